"""Report of a run on a device: table, CSV, Markdown, chart, and which targets were met."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from aim_kernels.aim.plots import save
from aim_kernels.bench import report
from aim_kernels.bench.timing import Samples
from aim_kernels.command_line import make_folder, write_text


@dataclass(frozen=True)
class GpuResult:
    """One line of the results file.

    ``mode``: "eager" and "graph" are times of the device, with the host ahead of it (a candidate that waits for the
    device itself is timed with its waiting); "wall" is the mean of steps that follow each other, the host's work
    included. ``chunk`` and ``threads`` are 0 for the defaults.
    """

    commit: str
    date: str
    device: str
    driver: str
    cuda: str
    python: str
    torch: str
    triton: str
    set: str
    dtype: str
    candidate: str
    mode: str
    chunk: int
    threads: int
    rounds: int
    median_us: float
    p20_us: float
    p80_us: float
    bytes_per_param: int
    gb_per_s: float
    ratio_to_copy: float
    ratio_to_torch_fused: float
    error: str


_NAN = float("nan")


def is_ours(candidate: str) -> bool:
    """Whether this library carries the candidate out: AIM written in PyTorch is a peer."""
    return candidate.startswith("aim") and candidate not in ("aim-eager", "aim-compiled")


def circumstances(device: str) -> dict[str, Any]:
    """The columns that all lines of one run share."""
    return {
        "commit": report.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "driver": _driver() if device != "cpu" else "",
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def device_name(device: str) -> str:
    return "CPU (dry run)" if device == "cpu" else torch.cuda.get_device_name(device)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def result(sample: Samples | str, moved: int, bandwidth: float, fused: Samples | None, **columns: Any) -> GpuResult:
    """A line, from samples in nanoseconds or the error in their place. ``moved``: bytes of a step; ``bandwidth``: of
    the copy, bytes a second."""
    shared = {"commit": "", "date": "", "device": "", "driver": "", "cuda": "", "python": "", "torch": "", "triton": ""}
    plain: dict[str, Any] = shared | {"chunk": 0, "threads": 0} | columns
    if isinstance(sample, str):
        measured = ("median_us", "p20_us", "p80_us", "gb_per_s", "ratio_to_copy", "ratio_to_torch_fused")
        unknown: dict[str, Any] = dict.fromkeys(measured, _NAN)
        return GpuResult(**plain, **unknown, error=sample)
    seconds = sample.median * 1e-9
    return GpuResult(
        **plain,
        median_us=sample.median / 1e3,
        p20_us=sample.quantile(0.2) / 1e3,
        p80_us=sample.quantile(0.8) / 1e3,
        gb_per_s=moved / seconds / 1e9,
        ratio_to_copy=seconds * bandwidth / moved,
        ratio_to_torch_fused=sample.median / fused.median if fused else _NAN,
        error="",
    )


def failure(candidate: str, dtype: str, error: str) -> GpuResult:
    """The line of a candidate that did not pass the gate."""
    return result(
        error, 0, 0.0, None, set="gate", dtype=dtype, candidate=candidate, mode="", rounds=0, bytes_per_param=0
    )


def configured(line: GpuResult, chunk: int, threads: int) -> GpuResult:
    return replace(line, chunk=chunk, threads=threads)


COLUMNS = ("candidate", "mode", "us", "p20", "p80", "GB/s", "x copy", "x torch fused")


def cells(line: GpuResult) -> tuple[str, ...]:
    """One line of the printed table."""
    name = line.candidate
    if line.chunk:
        name += f" {line.set} chunk {line.chunk}" + (f" threads {line.threads}" if line.threads else "")
    if line.error:
        return (name, line.mode, line.error, "", "", "", "", "")
    numbers = (line.median_us, line.p20_us, line.p80_us)
    compared = line.ratio_to_torch_fused
    return (
        name,
        line.mode,
        *(f"{number:.1f}" for number in numbers),
        f"{line.gb_per_s:.0f}",
        f"{line.ratio_to_copy:.2f}",
        f"{compared:.2f}" if compared == compared else "",
    )


def print_table(title: str, lines: Sequence[GpuResult]) -> None:
    """Print as aligned text."""
    table = [COLUMNS, *map(cells, lines)]
    widths = [max(len(row[column]) for row in table if len(row[column]) < 60) for column in range(len(COLUMNS))]
    print(f"\n{title}")
    for name, mode, *numbers in table:
        padded = (f"{text:>{width}}" for text, width in zip(numbers, widths[2:], strict=True))
        print("  ".join([f"  {name:<{widths[0]}}", f"{mode:<{widths[1]}}", *padded]), flush=True)


@dataclass(frozen=True)
class Target:
    """``candidate`` is to take at most ``limit`` times as long as ``against`` in the same mode ("copy": as a plain copy
    of its own bytes)."""

    set: str
    dtype: str
    candidate: str
    mode: str
    against: str
    limit: float


TARGETS = (
    *(Target(s, "float32", "aim", "eager", "copy", 1 / 0.9) for s in ("256m", "vit-l16")),
    *(Target(s, "float32", "aim", "eager", "torch-fused", 1.0) for s in ("256m", "vit-l16", "resnet50")),
    *(Target(s, "float32", "aim", "wall", "torch-fused", 1.0) for s in ("256m", "vit-l16")),
    *(Target(s, "float32", "aim", "graph", "torch-fused", 1.0) for s in ("256m", "vit-l16", "resnet50", "1000x1k")),
    Target("resnet50", "float32", "aim", "wall", "torch-fused", 0.6),
    *(Target("1000x1k", "float32", "aim", mode, "torch-fused", 0.25) for mode in ("eager", "wall")),
    *(Target(s, t, "aim-live", "eager", "copy", 1.05) for t in ("float32", "bfloat16") for s in ("256m", "vit-l16")),
    *(Target(s, "bfloat16", "aim-live", "eager", "torch-fused", 1.0) for s in ("256m", "vit-l16", "resnet50")),
    *(Target(s, "float32", "aim-triton", "eager", "aim", 1.1) for s in ("256m", "vit-l16", "resnet50")),
)


def reached(target: Target, lines: Iterable[GpuResult]) -> float:
    """The ratio that a run reached; NaN where it says nothing of it."""
    by_name = {(r.set, r.dtype, r.candidate, r.mode): r for r in lines if not r.chunk and not r.error}
    mine = by_name.get((target.set, target.dtype, target.candidate, target.mode))
    if mine is None:
        return _NAN
    if target.against == "copy":
        return mine.ratio_to_copy
    other = by_name.get((target.set, target.dtype, target.against, target.mode))
    return mine.median_us / other.median_us if other else _NAN


def verdicts(lines: Sequence[GpuResult]) -> list[str]:
    """One line a target."""
    told = []
    for target in TARGETS:
        ratio = reached(target, lines)
        verdict = "not measured" if ratio != ratio else "met" if ratio <= target.limit else "MISSED"
        what = f"{target.set} {target.dtype} {target.candidate} ({target.mode})"
        told.append(f"{what}: {ratio:.3f} x {target.against} (<= {target.limit:.3f}): {verdict}")
    return told


def print_targets(lines: Sequence[GpuResult]) -> None:
    for line in verdicts(lines):
        print(f"  {line}")


class Record:
    """What a run measured, in memory and, where there is a folder, in CSV (appended to, line by line), Markdown and,
    with matplotlib, a chart. Page and chart show the latest figures that the CSV has of the same commit, device and
    versions: a run may be cut into several, one after the other.

    Attributes:
        lines: of this run.
        table, page, chart: the files.
    """

    def __init__(self, folder: Path | None, title: str, bandwidth: float) -> None:
        self.title, self.bandwidth = title, bandwidth
        self.lines: list[GpuResult] = []
        self._before: list[GpuResult] = []
        self._shared = circumstances("cpu" if title.startswith("CPU") else "cuda")
        self.folder = folder
        if folder is not None:
            stem = stem_of(make_folder(folder), title)
            self.table, self.page, self.chart = (stem.with_suffix(suffix) for suffix in (".csv", ".md", ".png"))
            same = {name: value for name, value in self._shared.items() if name != "date"}
            for line in read(self.table):
                if not line.error and all(getattr(line, name) == value for name, value in same.items()):
                    self._before.append(line)

    def add(self, line: GpuResult) -> GpuResult:
        """Keeps a line, at once in the file, too."""
        line = replace(line, **self._shared)
        self.lines.append(line)
        if self.folder is not None:
            report.append_csv(self.table, [line], GpuResult)
        return line

    def everything(self) -> list[GpuResult]:
        """The latest line of every case."""
        latest = {}
        for r in [*self._before, *self.lines]:
            latest[r.set, r.dtype, r.candidate, r.mode, r.chunk, r.threads] = r
        return [*latest.values()]

    def show(self) -> None:
        """Writes page and chart anew."""
        if self.folder is not None:
            lines = self.everything()
            write_text(self.page, markdown(lines, self.title, self.bandwidth, self._shared))
            plot(self.chart, lines, self.title)


def read(table: Path) -> list[GpuResult]:
    """The lines of a results file; none where there is no such file, or one of other columns."""
    if not table.is_file():
        return []
    types = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(GpuResult)}
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if list(rows.fieldnames or ()) != list(types):
            return []
        # The last line of a run that was cut off may be a part of one.
        whole = [row for row in rows if None not in row.values()]
    return [GpuResult(**{name: read(row[name]) for name, read in types.items()}) for row in whole]


def stem_of(folder: Path, title: str) -> Path:
    """The files' common name, without suffix."""
    return folder / f"gpu-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}"


def markdown(lines: Sequence[GpuResult], title: str, bandwidth: float, shared: dict[str, Any]) -> str:
    """The run as a page."""
    told = [f"# {title}", ""]
    told.append(
        f"Commit {shared['commit']}, {shared['date']}, driver {shared['driver']}, CUDA {shared['cuda']}, torch "
        f"{shared['torch']}, triton {shared['triton']}. A plain copy moves {bandwidth / 1e9:.0f} GB/s, read and "
        "written."
    )
    for key in dict.fromkeys((line.set, line.dtype) for line in lines if not line.chunk):
        told += ["", f"## {key[0]}, {key[1]}", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        told += [f"| {' | '.join(cells(r))} |" for r in lines if (r.set, r.dtype) == key and not r.chunk]
    swept = [line for line in lines if line.chunk]
    if swept:
        told += ["", "## Chunk and block size", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        told += [f"| {' | '.join(cells(line))} |" for line in swept]
    told += ["", "## Targets", "", *(f"- {line}" for line in verdicts(lines)), ""]
    return "\n".join(told)


def plot(path: Path, lines: Sequence[GpuResult], title: str) -> bool:
    """Bars, one panel a set and storage type: time as a multiple of a copy of the same bytes. False without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [line for line in lines if line.mode == "eager" and not line.error and not line.chunk]
    keys = list(dict.fromkeys((line.set, line.dtype) for line in shown))
    if not keys:
        return False
    size = (3.6 * len(keys), 3.6)
    figure, axes = pyplot.subplots(1, len(keys), figsize=size, squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], keys, strict=True):
        mine = [line for line in shown if (line.set, line.dtype) == key][::-1]
        colors = ["#c44e52" if is_ours(line.candidate) else "#8c8c8c" for line in mine]
        bars = axis.barh([line.candidate for line in mine], [line.ratio_to_copy for line in mine], color=colors)
        axis.bar_label(bars, [f"{line.ratio_to_copy:.2f}" for line in mine], padding=2, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axis.set_xscale("log")
        axis.set_xlim(0.7, 2.5 * max(line.ratio_to_copy for line in mine))
        axis.set_title(f"{key[0]}, {key[1]}", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("time of a step, as a multiple of a copy of the same bytes (log scale)", fontsize=9)
    figure.suptitle(title, fontsize=9)
    numbers = {" ".join(k): {x.candidate: x.ratio_to_copy for x in shown if (x.set, x.dtype) == k} for k in keys}
    save(figure, path, numbers, dpi=130)
    pyplot.close(figure)
    return True
