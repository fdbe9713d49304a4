"""``python -m aim_kernels precision``: what fewer bytes cost in training, against float32.

Real trainings, several seeds: coloured digits and smartwatch signals with AIM (the demo's networks), and a small
transformer that reads the descriptions which scikit-learn ships. All configurations of one seed begin with the same
weights and see the same batches. Results are appended to a CSV file as they come; a run that is started again goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence

import torch

from aim_kernels import command_line
from aim_kernels._extras import MissingPackageError, require
from aim_kernels.experiments.precision.configurations import CONFIGURATIONS, Configuration, Folder, Line
from aim_kernels.experiments.precision.drift import drift
from aim_kernels.experiments.precision.summary import masks, plot, table
from aim_kernels.experiments.precision.tasks import TASKS, WATCHED


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
    folder = Folder(arguments.out)
    kept = f"Finished trainings are in {folder.file}; the same command continues."
    return command_line.run(p.prog, lambda: _main(folder, arguments), kept)


def _main(folder: Folder, arguments: argparse.Namespace) -> int:
    from rich.progress import track

    torch.set_num_threads(arguments.threads)
    lines = folder.lines()
    folder.make()
    todo = list(jobs(arguments, lines))
    for task, configuration, seed, watched in track(todo, "trainings"):
        line = TASKS[task](configuration, seed, watched)
        folder.append(line)
        lines.append(line)
    print(table(lines, drift()), masks(lines), sep="\n\n")
    plot(folder.path / "precision.png", lines)
    print(f"\nwritten to {folder.path}")
    return 0
