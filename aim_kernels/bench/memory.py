"""``python -m aim_kernels bench --memory``: what a step of AdamW keeps and peaks at, for ViT-B/16 (86.6M parameters).

Every optimizer runs in a process of its own: weights, gradients and three steps; the peak is that of the process's
resident memory over what it had before the weights were made.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aim_kernels.bench.report import append_csv, check_columns, circumstances
from aim_kernels.bench.shapes import vit_b16
from aim_kernels.command_line import make_folder
from aim_kernels.optim.optimizer import AIMFusedOptimizer

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Line:
    """One optimizer; sizes in bytes a parameter, the peak also in MiB."""

    commit: str
    date: str
    torch: str
    optimizer: str
    weights: float
    gradients: float
    states: float
    together: float
    peak: float
    peak_mib: float
    source: str  # "measured", or where a figure is from that could not be


def _ours(**options: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda params: AIMFusedOptimizer([{"params": params, "modulated": True}], **options)


def _torch(**options: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda params: torch.optim.AdamW(params, **options)


def _live(params: list[Tensor]) -> torch.optim.Optimizer:
    optimizer = AIMFusedOptimizer([{"params": params, "modulated": True}])
    optimizer.set_modulation(0, live_well=0.5)
    return optimizer


OPTIMIZERS: dict[str, tuple[torch.dtype, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "torch AdamW fused": (F32, _torch(fused=True)),
    "torch AdamW foreach": (F32, _torch(foreach=True)),
    "torch AdamW fused, bfloat16": (BF16, _torch(fused=True)),
    "aim": (F32, _ours()),
    "aim, degraded weights": (F32, _live),
    "aim, state_dtype=bfloat16": (F32, _ours(state_dtype="bfloat16")),
    "aim, state_dtype=int8": (F32, _ours(state_dtype="int8")),
    "aim, bfloat16, master=float32": (BF16, _ours(master="float32")),
    "aim, bfloat16, master=split": (BF16, _ours(master="split")),
    "aim, bfloat16, split, int8": (BF16, _ours(master="split", state_dtype="int8")),
    "aim, bfloat16, stochastic, int8": (BF16, _ours(master="stochastic", state_dtype="int8")),
}

#: Weights, gradients and states of peers that have no CPU kernels of such speed, or do not run on a CPU at all, in
#: bytes a parameter: from the formats that their sources and papers give.
PUBLISHED = {
    "torchao AdamW8bit": (4.0, 4.0, 2 * (1 + 4 / 256), "its source: codes, a float32 scale for 256 of them"),
    "bitsandbytes AdamW8bit": (4.0, 4.0, 2 * (1 + 4 / 256), "its source: the same"),
    "flashoptim AdamW": (2.0, 2.0, 2.9, "its README: 57 % less than 16 bytes, bfloat16 weights of 24 bits"),
}


def work(name: str, shapes: Sequence[tuple[int, ...]] | None = None) -> dict[str, float]:
    """In a process of its own: bytes of weights, gradients and states, and the peak."""
    dtype, make = OPTIMIZERS[name]
    torch.set_num_threads(2)
    warm = [torch.zeros(64, dtype=dtype, requires_grad=True)]
    warm[0].grad = torch.zeros_like(warm[0])
    make(warm).step()  # what the first step of a process loads
    before = _resident()
    params = [torch.zeros(shape, dtype=dtype).fill_(0.01).requires_grad_() for shape in shapes or vit_b16()]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    optimizer = make(params)
    for _ in range(3):
        optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    states = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(optimizer.state.values())}
    return {
        "weights": float(sum(p.nbytes for p in params)),
        "gradients": float(sum(p.grad.nbytes for p in params if p.grad is not None)),
        "states": float(sum(states.values())),
        "peak": float(peak - before),
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _tensors(states: Iterable[dict[str, Any]]) -> Iterable[Tensor]:
    return (value for state in states for value in state.values() if isinstance(value, Tensor))


def measure() -> list[Line]:
    """All optimizers, one after the other."""
    numel = sum(map(prod, vit_b16()))
    kept = {key: value for key, value in circumstances().items() if key in ("commit", "date", "torch")}
    lines = []
    for name in OPTIMIZERS:
        code = f"import json; from aim_kernels.bench.memory import work; print(json.dumps(work({name!r})))"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found = json.loads(ran.stdout.splitlines()[-1])
        sizes = {key: found[key] / numel for key in ("weights", "gradients", "states")}
        lines.append(
            Line(
                **kept,
                optimizer=name,
                **sizes,
                together=sum(sizes.values()),
                peak=found["peak"] / numel,
                peak_mib=found["peak"] / 2**20,
                source="measured",
            )
        )
    for name, (weights, gradients, states, source) in PUBLISHED.items():
        together = weights + gradients + states
        lines.append(
            Line(
                **kept,
                optimizer=name,
                weights=weights,
                gradients=gradients,
                states=states,
                together=together,
                peak=float("nan"),
                peak_mib=float("nan"),
                source=source,
            )
        )
    return lines


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints, writes."""
    if arguments.out is not None:
        check_columns(arguments.out / "memory.csv", Line)
    lines = measure()
    print(f"{'optimizer':34} weights  gradients  states  together    peak  peak MiB")
    for x in lines:
        peak = f"{x.peak:6.2f}  {x.peak_mib:8.0f}" if x.peak == x.peak else f"        ({x.source})"
        print(f"{x.optimizer:34} {x.weights:7.2f}  {x.gradients:9.2f}  {x.states:6.2f}  {x.together:8.2f}  {peak}")
    if arguments.out is not None:
        append_csv(make_folder(arguments.out) / "memory.csv", lines, Line)
        print(f"written to {arguments.out / 'memory.csv'}")
    return 0
