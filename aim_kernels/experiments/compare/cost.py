"""``compare --cost``: time and peak memory of a training step under each method, measured by themselves.

Every method gets a process of its own, one after the other: the peak of a process is never given back.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aim_kernels.aim.probes import CustomProbe
from aim_kernels.aim.rules import Ratio
from aim_kernels.bench.report import Circumstances, append_csv, check_columns, circumstances
from aim_kernels.command_line import make_folder
from aim_kernels.experiments.compare.contestants import contestant
from aim_kernels.experiments.data import DATA_SETS

#: Steps before and within the measurement.
WARM_UP, STEPS, ROUNDS = 20, 40, 5
#: Processes of each method.
PASSES = 3
#: Calls of Method.update: re-learning acts in the fourth.
UPDATES = 4


@dataclass(frozen=True)
class CostLine(Circumstances):
    """Times in milliseconds: median over rounds of the mean of 40 steps, with the quickest and slowest round;
    ``update_ms`` is the longest of four calls of :meth:`Method.update` (some methods act in few of them).
    ``peak_mib``: resident memory at its peak, beyond what it was before the network was made (Linux; elsewhere not a
    number). AIM and its controls hold the first modality back while steps are timed."""

    data: str
    contestant: str
    backbone: str
    width: int
    step_ms: float
    fastest: float
    slowest: float
    update_ms: float
    peak_mib: float


def measure(folder: Path, data: Sequence[str], names: Sequence[str], backbone: str = "auto", width: int = 64) -> None:
    """Appends to cost.csv."""
    check_columns(folder / "cost.csv", CostLine)
    from rich.progress import track

    # In turn, so that a machine that changes its pace does so for all.
    for name, contestant_name in track([(d, n) for d in data for _ in range(PASSES) for n in names], "cost"):
        command = [
            sys.executable,
            "-m",
            "aim_kernels.experiments.compare.cost",
            name,
            contestant_name,
            backbone,
            str(width),
        ]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        append_csv(make_folder(folder) / "cost.csv", [CostLine(**circumstances() | {"threads": 1} | found)], CostLine)


def _resident_mib(peak: bool) -> float:
    """Memory of this process now, or at its peak since :func:`_forget_peak`."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    name = "VmHWM:" if peak else "VmRSS:"
    return next(float(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(name))


def _forget_peak() -> None:
    """Loading the data takes more memory for a while than it leaves."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _hold_the_first(method: Any) -> None:
    """AIM and its controls, from the next update on: the first modality is held back by 0.5 at every depth, so that
    what holding costs shows on every data set, whatever is found there."""
    aim = getattr(method, "aim", None)
    if aim is None:
        return
    lead = 1.0 + math.atanh(0.5) / aim.alpha
    rows = [[lead if not number else 1.0] * depths for number, depths in enumerate(aim.depths.values())]
    aim.rule, aim.probe = Ratio(), CustomProbe(function=lambda *_: rows)


def cost_of(name: str, contestant_name: str, backbone: str = "auto", width: int = 64) -> dict[str, Any]:
    """One data set and contestant, in this process."""
    from aim_kernels.experiments.runs import PROBE_SAMPLES, build, draw, held_out_of, network_of

    torch.set_num_threads(1)
    task = DATA_SETS[name]
    data = task.make(0)
    batches = torch.randperm(len(data.train)).split(task.batch_size)
    parts = [data.train.take(index) for index in batches[: min(len(batches) - 1, 20)] or batches]
    _forget_peak()
    before = _resident_mib(peak=False)
    network = network_of(data, 0, backbone, width)
    entry = contestant(contestant_name)
    method = build(entry, 0, network, 0, data)
    draws = torch.Generator().manual_seed(0)
    seen, held_out = draw(data.train, PROBE_SAMPLES, draws), held_out_of(entry, data, draws)

    def steps(count: int) -> float:
        start = time.perf_counter()
        for number in range(count):
            batch = parts[number % len(parts)]
            method.step(batch.inputs, batch.labels)
        return 1e3 * (time.perf_counter() - start) / count

    steps(WARM_UP)
    updates = []
    for _ in range(UPDATES):
        start = time.perf_counter()
        method.update(seen.inputs, seen.labels, held_out=(held_out.inputs, held_out.labels))
        updates.append(1e3 * (time.perf_counter() - start))
    _hold_the_first(method)
    method.update(seen.inputs, seen.labels, held_out=(held_out.inputs, held_out.labels))
    steps(WARM_UP)
    rounds = [steps(STEPS) for _ in range(ROUNDS)]
    return {
        "data": name,
        "contestant": contestant_name,
        "backbone": backbone,
        "width": width,
        "step_ms": statistics.median(rounds),
        "fastest": min(rounds),
        "slowest": max(rounds),
        "update_ms": max(updates),
        "peak_mib": _resident_mib(peak=True) - before,
    }


if __name__ == "__main__":
    _, data_name, method_name, backbone_name, features = sys.argv
    print(json.dumps(cost_of(data_name, method_name, backbone_name, int(features))))
