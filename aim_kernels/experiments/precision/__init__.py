"""``python -m aim_kernels precision``: what fewer bytes cost in training, against float32.

Real trainings, several seeds: coloured digits and smartwatch signals with AIM (the demo's networks), and a small
transformer that reads the descriptions which scikit-learn ships. All configurations of one seed begin with the same
weights and see the same batches. Results are appended to a CSV file as they come; a run that is started again goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from aim_kernels import command_line
from aim_kernels._extras import MissingPackageError, require
from aim_kernels.bench.report import append_csv, check_columns
from aim_kernels.experiments.precision.configurations import CONFIGURATIONS, Configuration, Line
from aim_kernels.experiments.precision.drift import drift
from aim_kernels.experiments.precision.summary import masks, plot, table
from aim_kernels.experiments.precision.tasks import TASKS, WATCHED


def read(path: Path) -> list[Line]:
    """What earlier runs left. A line that was cut short is left out, and its run done again.

    Raises :class:`OtherVersionError` where the file has other columns.
    """
    check_columns(path, Line)
    if not path.exists() or not path.stat().st_size:
        return []
    types = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Line)}
    found = []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            try:
                found.append(Line(**{name: types[name](value) for name, value in row.items()}))
            except (KeyError, TypeError, ValueError):
                continue
    return found


def jobs(arguments: argparse.Namespace, done: Sequence[Line]) -> Iterator[tuple[str, Configuration, int, bool]]:
    """Runs that are still to do: seed by seed, so that every comparison is complete as early as can be."""
    have = {(x.task, x.configuration, x.seed, not math.isnan(x.agreement)) for x in done}
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            for name in arguments.configurations:
                for watched in (False, True) if name in WATCHED and seed < 2 else (False,):
                    if (task, name, seed, watched) not in have:
                        yield task, CONFIGURATIONS[name], seed, watched


def parser() -> command_line.Parser:
    """The command line's options."""
    p = command_line.Parser("python -m aim_kernels precision", (__doc__ or "").partition("\n\n")[0])
    whole, distinct = command_line.whole, command_line.Distinct
    p.add_argument(
        "--tasks", nargs="+", action=distinct, choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS)
    )
    p.add_argument(
        "--configurations",
        nargs="+",
        action=distinct,
        choices=CONFIGURATIONS,
        default=list(CONFIGURATIONS),
        metavar="NAME",
        help=", ".join(CONFIGURATIONS),
    )
    p.add_argument("--seeds", type=whole(1, command_line.MOST_SEEDS), default=5, help="seeds 0, 1, ... (default: 5)")
    p.add_argument(
        "--threads",
        type=whole(1, command_line.MOST_THREADS),
        default=1,
        help="small networks are not faster with more (default: 1)",
    )
    p.add_argument(
        "--out",
        type=command_line.folder,
        default="build/precision",
        help="folder of precision.csv and .png (default: build/precision)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 1 where something is missing or cannot be written, 2 for a wrong argument, 130
    where it was interrupted."""
    p = parser()
    arguments = p.parse_args(argv)
    try:
        for package in ("rich", "matplotlib", "sklearn", "seglearn"):
            require(package, "the comparison")
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return 1
    path = arguments.out / "precision.csv"
    kept = f"Finished trainings are in {path}; the same command continues."
    return command_line.run(p.prog, lambda: _main(path, arguments), kept)


def _main(path: Path, arguments: argparse.Namespace) -> int:
    from rich.progress import track

    torch.set_num_threads(arguments.threads)
    lines = read(path)
    command_line.make_folder(arguments.out)
    todo = list(jobs(arguments, lines))
    for task, configuration, seed, watched in track(todo, "trainings"):
        line = TASKS[task](configuration, seed, watched)
        append_csv(path, [line], Line)
        lines.append(line)
    print(table(lines, drift()), masks(lines), sep="\n\n")
    plot(arguments.out / "precision.png", lines)
    print(f"\nwritten to {arguments.out}")
    return 0
