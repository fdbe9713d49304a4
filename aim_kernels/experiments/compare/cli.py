"""``python -m aim_kernels compare``: options, progress, and what lies in the output folder afterwards."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from aim_kernels import command_line
from aim_kernels._extras import MissingPackageError, require
from aim_kernels.experiments.compare import cost, report
from aim_kernels.experiments.compare.contestants import BUDGET, CONTESTANTS, TUNING_SEEDS
from aim_kernels.experiments.compare.lines import train
from aim_kernels.experiments.compare.results import Folder, seed_runs, tuned, tuning_runs
from aim_kernels.experiments.compare.workers import Trained, trained
from aim_kernels.experiments.data import DATA_SETS
from aim_kernels.experiments.networks import BACKBONES
from aim_kernels.experiments.runs import Run, network_of
from aim_kernels.experiments.sharing import Share, alone_in

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DESCRIPTION = f"""\
Trains every method on every data set: identical splits, batches and initial weights for each seed. Methods with
options first choose one of at most {BUDGET} configurations by the validation split of two seeds that are not reported
({", ".join(map(str, TUNING_SEEDS))}). Results are appended as they come; interrupted, the same command goes on. Run
more than once at a time, it shares the work. Writes results.csv, report.md, report.html and pictures.
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
    if options.report and not folder.path.is_dir():
        p.refuse("--report", f"there is no folder {folder.path}; --out names one that a comparison wrote")
    if report.is_empty(folder) and options.report:
        p.refuse("--report", f"{folder.path} has no results: neither runs in results.csv nor steps in cost.csv; "
                 "--out names a folder that a comparison wrote")  # fmt: skip
    if options.cost:
        cost.measure(folder.path, data, names, options.backbone, options.width)
    elif not options.report:
        network = options.backbone, options.width
        tuning = [] if options.no_tuning else tuning_runs(data, names, options.epochs, *network)
        _train_all(folder, tuning, options.jobs, "tuning")
        wanted = seed_runs(data, names, options.seeds, options.epochs, tuned(folder.lines(), tuning), *network)
        _train_all(folder, wanted, options.jobs, "seeds")
    with alone_in(folder.claims, "report"):
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


def _train_all(folder: Folder, runs: Sequence[Run], jobs: int, what: str) -> None:
    """Every run has its line afterwards, of this process or of another one with the same folder."""
    from rich.progress import Progress

    done = {line.run for line in folder.lines()}
    if all(run in done for run in runs):
        return
    share = Share(folder.claims, runs, folder.file_stem, lambda: {line.run for line in folder.lines()})
    with contextlib.closing(share), Progress() as progress:
        task = progress.add_task(what, total=len(runs), completed=share.done)
        for line, history in _trained(_told(share, progress, task), jobs):
            folder.add(line, history)
            share.release(line.run)
            progress.update(task, completed=share.done)
            progress.print(f"{line.data:14} {line.contestant:22} seed {line.seed:<5} test {line.test:5.1f} %")
        progress.update(task, completed=len(runs))


def _told(share: Share, progress: Progress, task: TaskID) -> Iterator[Run | None]:
    """The runs of a share; once, that others are waited for."""
    told = False
    for run in share:
        progress.update(task, completed=share.done)
        if run is None and not told:
            told = True
            progress.print("What is left is being trained by other processes with this folder; waiting for them.")
        yield run


def _trained(runs: Iterable[Run | None], jobs: int) -> Iterator[Trained]:
    return trained(runs, jobs, train)
