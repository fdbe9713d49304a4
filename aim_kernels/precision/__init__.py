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

from aim_kernels.bench.report import append_csv
from aim_kernels.data.common import MissingPackageError, require
from aim_kernels.precision.configurations import CONFIGURATIONS, Configuration, Line
from aim_kernels.precision.drift import drift
from aim_kernels.precision.summary import masks, plot, table
from aim_kernels.precision.tasks import TASKS, WATCHED


def read(path: Path) -> list[Line]:
    """What earlier runs left."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Line)}
        return [Line(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def jobs(arguments: argparse.Namespace, done: Sequence[Line]) -> Iterator[tuple[str, Configuration, int, bool]]:
    """Runs that are still to do: seed by seed, so that every comparison is complete as early as can be."""
    have = {(x.task, x.configuration, x.seed, not math.isnan(x.agreement)) for x in done}
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            for name in arguments.configurations:
                for watched in (False, True) if name in WATCHED and seed < 2 else (False,):
                    if (task, name, seed, watched) not in have:
                        yield task, CONFIGURATIONS[name], seed, watched


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = argparse.ArgumentParser(
        prog="python -m aim_kernels precision", description=(__doc__ or "").partition("\n\n")[0]
    )
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    p.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--threads", type=int, default=1, help="small networks are not faster with more (default: 1)")
    p.add_argument("--out", type=Path, default=Path("build/precision"), help="folder of precision.csv and .png")
    arguments = p.parse_args(argv)
    try:
        for package in ("rich", "matplotlib", "sklearn", "seglearn"):
            require(package, "the comparison")
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return 1
    from rich.progress import track

    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "precision.csv"
    lines = read(path)
    todo = list(jobs(arguments, lines))
    for task, configuration, seed, watched in track(todo, "trainings"):
        line = TASKS[task](configuration, seed, watched)
        append_csv(path, [line], Line)
        lines.append(line)
    print(table(lines, drift()), masks(lines), sep="\n\n")
    plot(arguments.out / "precision.png", lines)
    print(f"\nwritten to {arguments.out}")
    return 0
