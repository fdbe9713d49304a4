"""Report of a run: the table, rows of a CSV file, a bar chart, and which targets were met."""

from __future__ import annotations

import csv
import datetime
import io
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from aim_kernels._native import load
from aim_kernels.aim.plots import save
from aim_kernels.command_line import OtherVersionError, append_lines
from aim_kernels.diagnostics import cpu_model

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

L = TypeVar("L", bound="DataclassInstance")


@dataclass(frozen=True)
class Circumstances:
    """The columns that all lines of one run share."""

    commit: str
    date: str
    cpu: str
    os: str
    python: str
    torch: str
    threads: int
    isa: str


@dataclass(frozen=True)
class Result(Circumstances):
    """One line of the results file; times in nanoseconds a parameter, sizes in bytes a parameter."""

    set: str
    candidate: str
    rounds: int
    median_ns_per_param: float
    p20: float
    p80: float
    step_ms: float
    bytes_per_param: int
    state_bytes_per_param: float
    ratio_to_floor: float
    ratio_to_torch_fused: float


def circumstances() -> dict[str, Any]:
    """As keywords of what derives from :class:`Circumstances`."""
    _C, _ = load("_C")
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": _C.active_isa(),
    }


def commit() -> str:
    """Short hash of the checkout that this package runs from, with a mark if it was changed; empty outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


COLUMNS = ("candidate", "ns/param", "p20", "p80", "step ms", "state B/param", "x floor", "x torch fused")


def cells(result: Result) -> tuple[str, ...]:
    """One line of the printed table."""
    return (
        result.candidate,
        f"{result.median_ns_per_param:.3f}",
        f"{result.p20:.3f}",
        f"{result.p80:.3f}",
        f"{result.step_ms:.3f}",
        f"{result.state_bytes_per_param:.2f}" if result.state_bytes_per_param else "",
        f"{result.ratio_to_floor:.2f}",
        f"{result.ratio_to_torch_fused:.2f}" if result.ratio_to_torch_fused == result.ratio_to_torch_fused else "",
    )


def print_table(title: str, results: Sequence[Result]) -> None:
    """Print as aligned text."""
    lines = [COLUMNS, *map(cells, results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for name, *numbers in lines:
        padded = (f"{text:>{width}}" for text, width in zip(numbers, widths[1:], strict=True))
        print("  ".join([f"  {name:<{widths[0]}}", *padded]))


def append_csv(
    path: Path,
    results: Iterable[DataclassInstance],
    columns_of: type[DataclassInstance] = Result,
    spec: str = ".6g",
) -> None:
    """Append results of one type, floats written by ``spec``; a file of other columns is not touched, and a
    line that was cut short is removed (:func:`~aim_kernels.command_line.append_lines`)."""
    check_columns(path, columns_of)
    names = [f.name for f in fields(columns_of)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    for result in results:
        row = asdict(result)
        writer.writerow({k: format(v, spec) if isinstance(v, float) else v for k, v in row.items()})
    append_lines(path, ",".join(names) + "\n", text.getvalue())


def check_columns(path: Path, columns_of: type[DataclassInstance] = Result) -> None:
    """Raises :class:`OtherVersionError` where :func:`append_csv` would not append."""
    if path.exists() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            if next(csv.reader(file), []) != [f.name for f in fields(columns_of)]:
                raise OtherVersionError(
                    f"{path} has other columns than this version writes; give another folder, or move it away"
                )


def read(path: Path, line_type: type[L]) -> list[L]:
    """The lines of a file that :func:`append_csv` wrote, but those that were cut short; none where it is not there.

    Raises :class:`OtherVersionError` where it has other columns.
    """
    check_columns(path, line_type)
    if not path.exists() or not path.stat().st_size:  # a device such as /dev/full could be read without end
        return []
    types = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(line_type)}
    found = []
    # What follows the last end of a line was cut short, even if it can be read: the last digits may be missing.
    whole = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
    # One by one: a quote that was cut off would swallow the next line.
    for text in whole.splitlines()[1:]:
        try:
            (row,) = csv.reader([text], strict=True)
            found.append(line_type(**{n: of(value) for (n, of), value in zip(types.items(), row, strict=True)}))
        except (csv.Error, ValueError):
            continue
    return found


def title_of(shared: Mapping[str, Any]) -> str:
    """The machine in a line, from columns of :class:`Circumstances`."""
    return f"{shared['cpu']}, {shared['threads']} threads, {shared['isa']}, torch {shared['torch']}"


def plot(path: Path, results: Sequence[Result], title: str) -> bool:
    """Bar chart, one panel a set: ratio to the floor of the candidate's own bytes. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    sets = list(dict.fromkeys(r.set for r in results))
    figure, axes = pyplot.subplots(1, len(sets), figsize=(3.4 * len(sets), 3.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], sets, strict=True):
        shown = [r for r in results if r.set == name and r.state_bytes_per_param][::-1]
        bars = axis.barh(
            [r.candidate for r in shown],
            [r.ratio_to_floor for r in shown],
            color=["#c44e52" if r.candidate in OURS else "#8c8c8c" for r in shown],
        )
        axis.bar_label(bars, [f"{r.ratio_to_floor:.2f}" for r in shown], padding=2, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axis.set_xscale("log")
        axis.set_xlim(0.7, 2.2 * max(r.ratio_to_floor for r in shown))
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("time of a step, as a multiple of the memory floor (log scale)", fontsize=9)
    figure.suptitle(title, fontsize=9)
    shown = [r for r in results if r.state_bytes_per_param]
    save(
        figure, path, {name: {r.candidate: r.ratio_to_floor for r in shown if r.set == name} for name in sets}, dpi=130
    )
    pyplot.close(figure)
    return True


OURS = ("aim", "aim-live", "aim-chain", "aim-plain")


@dataclass(frozen=True)
class Target:
    """``candidate`` is to take at most ``limit`` times as long as ``against`` ("floor": that of its own bytes)."""

    set: str
    candidate: str
    against: str
    limit: float


TARGETS = (
    *(Target(s, "aim", "floor", 1.05) for s in ("64m", "vit-b16")),
    *(Target(s, "aim", "torch-fused", 1.00) for s in ("64m", "vit-b16")),
    *(Target(s, "aim-live", "floor", 1.05) for s in ("64m", "vit-b16")),
    Target("resnet18", "aim", "torch-fused", 0.92),
    Target("1000x1k", "aim", "torch-fused", 1 / 5),
    Target("l3-256k", "aim", "floor", 1.6),
    *(Target(s, "aim", "aim-eager", 1 / 7) for s in ("64m", "vit-b16", "resnet18")),
    *(Target(s, "aim", "aim-compiled", 1 / 1.6) for s in ("64m", "vit-b16", "resnet18")),
)


def check_targets(results: Iterable[Result]) -> list[tuple[Target, float]]:
    """The targets that this run says something of, with the ratio reached."""
    by_name = {(r.set, r.candidate): r for r in results}
    reached = []
    for target in TARGETS:
        mine = by_name.get((target.set, target.candidate))
        if mine is None:
            continue
        if target.against == "floor":
            reached.append((target, mine.ratio_to_floor))
        elif (target.set, target.against) in by_name:
            other = by_name[target.set, target.against]
            reached.append((target, mine.median_ns_per_param / other.median_ns_per_param))
    return reached


def print_targets(results: Sequence[Result]) -> None:
    """One line a target."""
    for target, ratio in check_targets(results):
        verdict = "met" if ratio <= target.limit else "MISSED"
        compared = f"{ratio:6.3f} x {target.against:12} (<= {target.limit:.3f})"
        print(f"  {target.set:9} {target.candidate:9} {compared}  {verdict}")
