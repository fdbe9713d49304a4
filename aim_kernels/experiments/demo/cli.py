"""``python -m aim_kernels demo``: options, progress, and what lies in the output folder afterwards."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from aim_kernels import command_line
from aim_kernels._extras import MissingPackageError, require
from aim_kernels.experiments.data import DATA_SETS
from aim_kernels.experiments.demo.contestants import DATA, METHODS
from aim_kernels.experiments.demo.report import markdown, summary, table
from aim_kernels.experiments.demo.results import Folder, train
from aim_kernels.experiments.runs import HYPERPARAMETERS, Run

DESCRIPTION = """\
Trains a two-modality network on coloured digits (scikit-learn; colour gives the class away in training only) and on
smartwatch data (seglearn; split by person), each by joint training, OGM-GE, AIM, and a control that drops the dominant
modality's features. Prints and saves test accuracy, linear probes and times. Interrupted, it continues where it
stopped.
"""


def parser() -> command_line.Parser:
    """The command line's options."""
    options = command_line.Parser("python -m aim_kernels demo", DESCRIPTION)
    distinct = command_line.Distinct
    options.add_argument(
        "--data", nargs="+", action=distinct, choices=DATA, default=list(DATA), help="data sets (default: all)"
    )
    options.add_argument(
        "--method",
        nargs="+",
        action=distinct,
        choices=list(METHODS),
        default=list(METHODS),
        help="methods (default: all; ogm-ge is three runs)",
    )
    options.add_argument(
        "--seeds",
        nargs="+",
        action=distinct,
        type=command_line.seeds,
        default=[range(3)],
        metavar="SEED",
        help=f"seeds or ranges, at most {command_line.MOST_SEEDS}: 0 1 2, or 100-109 (default: 0 1 2)",
    )
    epochs = ", ".join(f"{name} {DATA_SETS[name].epochs}" for name in DATA)
    options.add_argument(
        "--epochs",
        type=command_line.whole(1, command_line.MOST_EPOCHS),
        help=f"passes over the training split (default: {epochs})",
    )
    options.add_argument(
        "--out", type=command_line.folder, default="demo-output", help="output folder (default: demo-output)"
    )
    options.add_argument("--device", type=command_line.device, default="cpu", help="where to train (default: cpu)")
    return options


def planned(options: argparse.Namespace) -> list[Run]:
    """All runs asked for, methods innermost, so that after an interruption the finished seeds have every method."""
    seeds = [seed for part in options.seeds for seed in part]
    methods = [name for option in METHODS if option in options.method for name in METHODS[option]]
    return [
        Run(data, method, 0, seed, options.epochs or DATA_SETS[data].epochs, device=options.device)
        for data in DATA
        if data in options.data
        for seed in seeds
        for method in methods
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0 done, 1 something is missing or cannot be written, 130 interrupted.
    SystemExit(2): a wrong argument."""
    p = parser()
    options = p.parse_args(argv)
    try:
        for package in ("rich", "matplotlib", "sklearn", *(["seglearn"] if "watch" in options.data else [])):
            require(package, "the demo")
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return 1
    folder = Folder(options.out)
    kept = f"Finished runs are in {folder.file}; the same command continues."
    return command_line.run(p.prog, lambda: _main(folder, options), kept)


def _main(folder: Folder, options: argparse.Namespace) -> int:
    folder.lines()  # before an hour of training, not after it
    runs = planned(options)
    _write_config(folder, options, runs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small are fastest with one, and give the same bits everywhere
    try:
        _run_all(folder, runs)
    finally:
        torch.set_num_threads(threads)
    _report(folder, runs)
    return 0


def _write_config(folder: Folder, options: argparse.Namespace, runs: Sequence[Run]) -> None:
    import aim_kernels

    config: dict[str, Any] = {
        "data": options.data,
        "method": options.method,
        "seeds": sorted({run.seed for run in runs}),
        "epochs": {run.data: run.epochs for run in runs},
        "batch_size": {run.data: DATA_SETS[run.data].batch_size for run in runs},
        "device": options.device,
        "optimizer": HYPERPARAMETERS,
        "versions": {
            "aim_kernels": aim_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    folder.make()
    command_line.write_text(folder.path / "config.json", json.dumps(config, indent=2) + "\n")


def _run_all(folder: Folder, runs: Sequence[Run]) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    done = {line.run for line in folder.lines()}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        every = progress.add_task("all epochs", total=sum(run.epochs for run in runs))
        for number, run in enumerate(runs, 1):
            progress.update(
                every, description=f"run {number}/{len(runs)}: {run.data}, {run.contestant}, seed {run.seed}"
            )
            if run in done:
                progress.advance(every, run.epochs)
                continue
            line, history = train(run, lambda _epoch: progress.advance(every))
            folder.add(line, history)
            progress.print(f"{run.data:7} {run.contestant:17} seed {run.seed:<4} test accuracy {line.test:5.1f} %")


def _report(folder: Folder, runs: Sequence[Run]) -> None:
    """Tables on the screen; table.md and the pictures in the folder."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from aim_kernels.experiments.demo.pictures import draw_accuracy, draw_modulation

    wanted = set(runs)
    lines = [line for line in folder.lines() if line.run in wanted]
    console = Console()
    for data in summary(lines):
        header, *rows = table(lines, data)
        seeds = len({line.seed for line in lines if line.data == data})
        shown = Table(
            title=f"{data}: percent, mean ± standard error over {seeds} seeds", box=box.SIMPLE, padding=(0, 1, 0, 0)
        )
        for name in header:
            # headers break, so that the numbers need not in 80 columns
            shown.add_column(
                name.replace(" ", "\n").replace("/", "/\n"),
                justify="left" if name == "method" else "right",
                no_wrap=True,
            )
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    command_line.write_text(folder.path / "table.md", markdown(lines))
    draw_accuracy(folder.path / "accuracy.png", lines)
    for run in runs:
        picture = folder.path / f"modulation-{run.data}.png"
        if run.contestant == "aim" and run.seed == min(r.seed for r in runs):
            history = folder.history(run)
            if history:
                draw_modulation(picture, run, history)
    console.print(f"Saved in {folder.path}: " + ", ".join(sorted(path.name for path in folder.path.iterdir())))
