"""``python -m aim_kernels compare``: options, progress, and what lies in the output folder afterwards."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from aim_kernels import command_line
from aim_kernels._extras import MissingPackageError, require
from aim_kernels.experiments.compare import cost, report
from aim_kernels.experiments.compare.contestants import BUDGET, CONTESTANTS, TUNING_SEEDS
from aim_kernels.experiments.compare.lines import Line, train
from aim_kernels.experiments.compare.results import Folder, seed_runs, tuned, tuning_runs
from aim_kernels.experiments.data import DATA_SETS
from aim_kernels.experiments.networks import BACKBONES
from aim_kernels.experiments.runs import Run, network_of

DESCRIPTION = f"""\
Trains every method on every data set: identical splits, batches and initial weights for each seed. Methods with
options first choose one of at most {BUDGET} configurations by the validation split of two seeds that are not reported
({", ".join(map(str, TUNING_SEEDS))}). Results are appended as they come; interrupted, the same command goes on. Writes
results.csv, report.md, report.html and pictures.
"""


PROG = "python -m aim_kernels compare"
#: What each mode uses of the options; the others are refused, since nobody would see that they did nothing.
USED = {
    "--report": ("report", "out"),
    "--cost": ("cost", "data", "methods", "backbone", "width", "out"),
}
_BYTES = 16  # of a weight: itself, its gradient and two moments


def parser() -> command_line.Parser:
    """The command line's options. None stands for the default, so that :func:`main` can tell."""
    p = command_line.Parser(PROG, DESCRIPTION)
    whole, one_of, distinct = command_line.whole, command_line.one_of, command_line.Distinct
    p.add_argument("--data", nargs="+", action=distinct, type=one_of(["all", *DATA_SETS]), metavar="NAME",
                   help=f"all, or some of: {', '.join(DATA_SETS)}")  # fmt: skip
    p.add_argument("--methods", nargs="+", action=distinct, type=one_of(["all", *CONTESTANTS]), metavar="NAME",
                   help=f"all, or some of: {', '.join(CONTESTANTS)}; joint training is always among them")  # fmt: skip
    # Beyond lie the seeds that configurations are chosen by.
    p.add_argument("--seeds", type=whole(1, min(TUNING_SEEDS)), help="reported seeds 0, 1, ... (default: 10)")
    p.add_argument("--epochs", type=whole(1, command_line.MOST_EPOCHS),
                   help="passes over the training split (default: the data set's own number)")  # fmt: skip
    p.add_argument("--backbone", choices=list(BACKBONES), help="of every encoder (default: auto, by samples)")
    p.add_argument("--width", type=whole(1, 8192), help="features of every encoder (default: 64)")
    p.add_argument("--no-tuning", action="store_true", help="every method with its default configuration")
    p.add_argument("--jobs", type=whole(1, 256), help="trainings at a time, one thread each (default: 1)")
    p.add_argument("--cost", action="store_true", help="measure time and memory of a step instead of training")
    p.add_argument("--report", action="store_true", help="only draw the report of what is there")
    p.add_argument("--out", type=command_line.folder, default="compare-output",
                   help="output folder (default: compare-output)")  # fmt: skip
    return p


def _chosen(given: Sequence[str], all_of: Sequence[str]) -> list[str]:
    return [name for name in all_of if "all" in given or name in given]


def _judged(p: command_line.Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with defaults, or SystemExit(2)."""
    options = p.parse_args(argv)
    if options.cost and options.report:
        p.refuse("--cost", "measures, --report only draws; give one of them")
    for mode, used in USED.items():
        if getattr(options, mode[2:]):
            p.refuse_unused(options, f"with {mode}", used)
    for option, names in (("--data", options.data), ("--methods", options.methods)):
        if "all" in (names or ()) and len(names) > 1:
            p.refuse(option, "'all' stands alone")
    return command_line.filled(
        options, data=["all"], methods=["all"], seeds=10, width=64, jobs=1, backbone="auto",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status: 0 done, 1 something is missing or cannot be written, 130
    interrupted. SystemExit(2): a wrong argument."""
    p = parser()
    options = _judged(p, argv)
    folder = Folder(options.out)
    if options.cost:
        kept = f"What was measured is in {folder.path / 'cost.csv'}."
    else:
        kept = "" if options.report else f"Finished runs are in {folder.file}; the same command continues."
    return command_line.run(PROG, lambda: _main(p, folder, options), kept)


def _main(p: command_line.Parser, folder: Folder, options: argparse.Namespace) -> int:
    data = _chosen(options.data, list(DATA_SETS))
    names = _chosen([*options.methods, "joint"], list(CONTESTANTS))
    try:
        for package in ("rich", "matplotlib", "sklearn", "scipy"):
            require(package, "the comparison")
        if not options.report:
            _look_at(p, data, options)
    except (MissingPackageError, FileNotFoundError, ValueError) as error:
        print(f"{error}\n(--data chooses other data sets)", file=sys.stderr)
        return 1
    wanted = None
    if report.is_empty(folder) and options.report:
        p.refuse("--report", f"{folder.path} has no results: neither runs in results.csv nor steps in cost.csv")
    if options.cost:
        cost.measure(folder.path, data, names, options.backbone, options.width)
    elif not options.report:
        network = options.backbone, options.width
        tuning = [] if options.no_tuning else tuning_runs(data, names, options.epochs, *network)
        _train_all(folder, tuning, options.jobs, "tuning")
        wanted = seed_runs(data, names, options.seeds, options.epochs, tuned(folder.lines(), tuning), *network)
        _train_all(folder, wanted, options.jobs, "seeds")
    written = report.write(folder, wanted)
    print(f"Saved in {folder.path}: {', '.join(path.name for path in written)}")
    return 0


def _look_at(p: command_line.Parser, data: Sequence[str], options: argparse.Namespace) -> None:
    """Every data set, and whether there is such a network for it: before an hour of training, not after it."""
    for name in data:
        made = DATA_SETS[name].make(0)
        try:
            with torch.device("meta"):
                network = network_of(made, 0, options.backbone, options.width)
        except ValueError as error:
            p.error(f"--data {name}, --backbone {options.backbone}, --width {options.width}: {error}")
        p.refuse_beyond_memory("--width", _BYTES * sum(weight.numel() for weight in network.parameters()))


def _one_thread() -> None:
    torch.set_num_threads(1)  # networks this small are fastest with one, and give the same bits everywhere


@contextlib.contextmanager
def _not_interrupted() -> Iterator[None]:
    """Processes that begin within never see an interruption, which a terminal sends to all; this one sees it later.
    Windows has no such mask."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    others = set(multiprocessing.active_children())
    try:
        left = list(reversed(runs))
        running: set[Future[tuple[Line, list[dict[str, Any]]]]] = set()
        while left or running:
            while left and len(running) < 2 * jobs:  # few at a time, so that an interruption does not wait for many
                with _not_interrupted():
                    running.add(pool.submit(train, left.pop()))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # what they are at would end in minutes, and nobody waits for it
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
