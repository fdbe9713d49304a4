"""``python -m aim_kernels compare``: options, progress, and what lies in the output folder afterwards."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from aim_kernels.compare import cost, report
from aim_kernels.compare.contestants import BUDGET, CONTESTANTS, TUNING_SEEDS
from aim_kernels.compare.results import Folder, OtherVersionError, seed_runs, tuned, tuning_runs
from aim_kernels.compare.training import Line, Run, network_of, train
from aim_kernels.data import DATA_SETS
from aim_kernels.data.common import MissingPackageError, require
from aim_kernels.networks import BACKBONES

DESCRIPTION = f"""\
Trains every method on every data set: identical splits, batches and initial weights for each seed. Methods with
options first choose one of at most {BUDGET} configurations by the validation split of two seeds that are not reported
({", ".join(map(str, TUNING_SEEDS))}). Results are appended as they come; interrupted, the same command goes on. Writes
results.csv, report.md, report.html and pictures.
"""


def _named(options: Sequence[str]) -> Any:
    def one(text: str) -> str:
        if text != "all" and text not in options:
            raise argparse.ArgumentTypeError(f"{text!r} is none of: all, {', '.join(options)}")
        return text

    return one


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser("python -m aim_kernels compare", description=DESCRIPTION)
    p.add_argument("--data", nargs="+", type=_named(list(DATA_SETS)), default=["all"], metavar="NAME",
                   help=f"all, or some of: {', '.join(DATA_SETS)}")  # fmt: skip
    p.add_argument("--methods", nargs="+", type=_named(list(CONTESTANTS)), default=["all"], metavar="NAME",
                   help=f"all, or some of: {', '.join(CONTESTANTS)}; joint training is always among them")  # fmt: skip
    p.add_argument("--seeds", type=_count, default=10, help="reported seeds 0, 1, ... (default: 10)")
    p.add_argument("--epochs", type=_count, help="passes over the training split (default: the data set's own number)")
    p.add_argument("--backbone", choices=list(BACKBONES), default="auto", help="of every encoder (default: by samples)")
    p.add_argument("--width", type=_count, default=64, help="features of every encoder (default: 64)")
    p.add_argument("--no-tuning", action="store_true", help="every method with its default configuration")
    p.add_argument("--jobs", type=_count, default=1, help="trainings at a time, one thread each (default: 1)")
    p.add_argument("--cost", action="store_true", help="measure time and memory of a step instead of training")
    p.add_argument("--report", action="store_true", help="only draw the report of what is there")
    p.add_argument("--out", type=Path, default=Path("compare-output"), help="output folder (default: compare-output)")
    return p


def _chosen(given: Sequence[str], all_of: Sequence[str]) -> list[str]:
    return [name for name in all_of if "all" in given or name in given]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status: 0 done, 1 something is missing, 130 interrupted."""
    options = parser().parse_args(argv)
    data = _chosen(options.data, list(DATA_SETS))
    names = _chosen([*options.methods, "joint"], list(CONTESTANTS))
    try:
        for package in ("rich", "matplotlib", "sklearn", "scipy"):
            require(package, "the comparison")
        if not options.report:
            for name in data:  # before an hour of training, not after it
                network_of(DATA_SETS[name].make(0), 0, options.backbone, options.width)
    except (MissingPackageError, ValueError) as error:
        print(f"{error}\n(--data chooses other data sets)", file=sys.stderr)
        return 1
    folder, wanted = Folder(options.out), None
    try:
        folder.lines()
        if options.cost:
            cost.measure(folder.path, data, names, options.backbone, options.width)
        elif not options.report:
            network = options.backbone, options.width
            tuning = [] if options.no_tuning else tuning_runs(data, names, options.epochs, *network)
            _train_all(folder, tuning, options.jobs, "tuning")
            wanted = seed_runs(data, names, options.seeds, options.epochs, tuned(folder.lines(), tuning), *network)
            _train_all(folder, wanted, options.jobs, "seeds")
    except KeyboardInterrupt:
        print(f"\nInterrupted. Finished runs are in {folder.file}; the same command continues.", file=sys.stderr)
        return 130
    except OtherVersionError as error:
        print(error, file=sys.stderr)
        return 1
    written = report.write(folder, wanted)
    print(f"Saved in {folder.path}: {', '.join(path.name for path in written)}")
    return 0


def _one_thread() -> None:
    torch.set_num_threads(1)  # networks this small are fastest with one, and give the same bits everywhere


def _train_all(folder: Folder, runs: Sequence[Run], jobs: int, what: str) -> None:
    from rich.progress import Progress

    done = {line.run for line in folder.lines()}
    todo = [run for run in runs if run not in done]
    with Progress() as progress:
        task = progress.add_task(what, total=len(runs), completed=len(runs) - len(todo))
        for line, history in _trained(todo, jobs):
            folder.add(line, history)
            progress.advance(task)
            progress.print(f"{line.data:14} {line.contestant:22} seed {line.seed:<5} test {line.test:5.1f} %")


def _trained(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Line, list[dict[str, Any]]]]:
    """Results as they come."""
    if jobs == 1:
        threads = torch.get_num_threads()
        try:
            _one_thread()
            yield from map(train, runs)
        finally:
            torch.set_num_threads(threads)
        return
    # spawned: a forked process would inherit threads that hold locks
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _one_thread)
    try:
        left = list(reversed(runs))
        running: set[Future[tuple[Line, list[dict[str, Any]]]]] = set()
        while left or running:
            while left and len(running) < 2 * jobs:  # few at a time, so that an interruption does not wait for many
                running.add(pool.submit(train, left.pop()))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
