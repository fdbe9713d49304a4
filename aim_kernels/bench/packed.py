"""``python -m aim_kernels bench --bytes``: steps that keep fewer bytes, each beside the plain stream of its own bytes.

One tensor, one set of arrays: whatever a configuration stores lies in the same memory as what the others store, since
page placement alone moves a ratio by more than many of them differ. What one leaves there would be garbage to the next,
so the arrays are filled anew before every sample, outside of the clock.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels._native import load
from aim_kernels.bench import report, timing
from aim_kernels.command_line import make_folder
from aim_kernels.optim.optimizer import AIMFusedOptimizer
from aim_kernels.step.codecs import blocks_of
from aim_kernels.step.layout import STREAM_RECORD

F32, BF16, I16, U8 = torch.float32, torch.bfloat16, torch.int16, torch.uint8

#: Bytes a parameter of the widest array of each role.
_ROLES = {"param": 4, "grad": 4, "exp_avg": 4, "exp_avg_sq": 4, "master": 4, "rest": 2, "ema": 4}

#: Elements that are stepped by default, in units of 2^20.
MILLIONS = 32


def bytes_of(numel: int) -> float:
    """Of :class:`Arrays`, which also keep float32 and bfloat16 numbers to fill them with."""
    return float(numel * (sum(_ROLES.values()) + F32.itemsize + BF16.itemsize))


#: Elements that a thread of the floor takes at a time; 0: one share a thread.
_CHUNKS = (0, 1 << 16)

_SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


class Arrays:
    """The memory of all configurations: a buffer for each role, seen as any type."""

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.buffers = {role: torch.zeros(numel * size, dtype=U8) for role, size in _ROLES.items()}
        self.scales = {name: torch.zeros(blocks_of(numel), dtype=U8) for name in ("exp_avg", "exp_avg_sq")}
        generator = torch.Generator().manual_seed(0)
        self.source = {dtype: torch.randn(numel, generator=generator).mul_(0.01).to(dtype) for dtype in (F32, BF16)}

    def view(self, role: str, dtype: torch.dtype) -> Tensor:
        """One number an element."""
        return self.buffers[role][: self.numel * dtype.itemsize].view(dtype)

    def fill(self, role: str, dtype: torch.dtype) -> None:
        """Weights and gradients normal; moments, averages and rests as a step finds them at its start."""
        if role in ("param", "grad", "master", "ema"):
            self.view(role, dtype).copy_(self.source[dtype])
        else:
            self.view(role, dtype).zero_()


@dataclass(frozen=True)
class Configuration:
    """What is kept of every parameter, and in which type: role -> (type, "r" or "rw" or "w")."""

    name: str
    title: str
    dtype: torch.dtype
    options: dict[str, Any]
    arrays: dict[str, tuple[torch.dtype, str]]
    live: bool = False

    @property
    def bytes(self) -> float:
        """Read and written by a step, a parameter; without the exponents of 8-bit moments, 1/32 of a byte."""
        return sum(dtype.itemsize * len(how) for dtype, how in self.arrays.values())

    def build(self, arrays: Arrays) -> tuple[Callable[[], Any], Callable[[], None]]:
        """A step, and what prepares the arrays for it."""
        p = torch.nn.Parameter(arrays.view("param", self.dtype), requires_grad=True)
        p.grad = arrays.view("grad", self.dtype)
        group = {"params": [p], "modulated": True, "modality": "audio", "depth": 0}
        optimizer = AIMFusedOptimizer([group], **_SETTINGS, **self.options)
        state: dict[str, Any] = {"step": torch.ones(())}
        names = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "master": "master", "ema": "ema"}
        names["rest"] = "remainder" if self.options.get("master") == "split" else "compensation"
        for role, (dtype, _) in self.arrays.items():
            if role in names:
                state[names[role]] = arrays.view(role, dtype)
                if dtype == U8:
                    state[f"{role}_scale"] = arrays.scales[role]
        optimizer.state[p].update(state)
        optimizer.set_modulation(0, step_well=0.5, **({"live_well": 0.5} if self.live else {}))

        def prepare() -> None:
            with torch.no_grad():
                for role, (dtype, _) in self.arrays.items():
                    arrays.fill(role, dtype)

        prepare()
        optimizer.step()
        for role, (dtype, _) in self.arrays.items():
            if role in names and optimizer.state[p][names[role]].data_ptr() != arrays.view(role, dtype).data_ptr():
                raise AssertionError(f"{self.name}: the optimizer steps another {role} than the floor goes over")
        return optimizer.step, prepare

    def floors(self, arrays: Arrays) -> dict[str, Callable[[], Any]]:
        """Plain streams of the same bytes."""
        from aim_kernels.backends.cpu import _thread_pool

        runs = np.zeros(len(self.arrays), STREAM_RECORD)
        for run, (role, (dtype, how)) in zip(runs, self.arrays.items(), strict=True):
            run["address"], run["size"] = arrays.view(role, dtype).data_ptr(), dtype.itemsize
            run["reads"], run["writes"] = "r" in how, "w" in how
        threads = torch.get_num_threads()
        return {
            f"{self.name} floor {chunk or 'shares'}": partial(
                load("_C")[0].stream_runs, runs, arrays.numel, chunk, 0, threads, _thread_pool()
            )
            for chunk in _CHUNKS
        }


def _kept(param: torch.dtype, moments: torch.dtype, **more: tuple[torch.dtype, str]) -> dict[str, Any]:
    return {
        "param": (param, "rw"),
        "grad": (param, "r"),
        "exp_avg": (moments, "rw"),
        "exp_avg_sq": (moments, "rw"),
        **more,
    }


NEAREST = {"state_dtype": "bfloat16", "rounding": "nearest"}
_MASTER = {"master": (F32, "rw"), "param": (BF16, "w")}
CONFIGURATIONS = {
    c.name: c
    for c in (
        Configuration("fp32", "float32", F32, {}, _kept(F32, F32)),
        Configuration("fp32+bf16", "bfloat16 moments", F32, {"state_dtype": "bfloat16"}, _kept(F32, BF16)),
        Configuration("fp32+bf16n", "the same, to nearest", F32, NEAREST, _kept(F32, BF16)),
        Configuration("fp32+int8", "8-bit moments", F32, {"state_dtype": "int8"}, _kept(F32, U8)),
        Configuration("bf16", "bfloat16 weights, float32 moments", BF16, {}, _kept(BF16, F32)),
        Configuration("bf16+bf16n", "all bfloat16, to nearest", BF16, NEAREST, _kept(BF16, BF16)),
        Configuration("bf16+bf16", "all bfloat16", BF16, {"state_dtype": "bfloat16"}, _kept(BF16, BF16)),
        Configuration(
            "bf16s+bf16",
            "the same, weights rounded at random",
            BF16,
            {"state_dtype": "bfloat16", "master": "stochastic"},
            _kept(BF16, BF16),
        ),
        Configuration(
            "split+bf16",
            "bfloat16 + 16 bits",
            BF16,
            {"state_dtype": "bfloat16", "master": "split"},
            _kept(BF16, BF16, rest=(I16, "rw")),
        ),
        Configuration(
            "split+int8",
            "the same, 8-bit moments",
            BF16,
            {"state_dtype": "int8", "master": "split"},
            _kept(BF16, U8, rest=(I16, "rw")),
        ),
        Configuration(
            "kahan+bf16",
            "bfloat16 + compensation",
            BF16,
            {"state_dtype": "bfloat16", "master": "kahan"},
            _kept(BF16, BF16, rest=(BF16, "rw")),
        ),
        Configuration("master", "bfloat16 beside float32", BF16, {"master": "float32"}, _kept(BF16, F32) | _MASTER),
        Configuration("live", "the same, degraded", BF16, {"master": "float32"}, _kept(BF16, F32) | _MASTER, live=True),
    )
}


def torch_fused(dtype: torch.dtype, arrays: Arrays) -> tuple[Callable[[], Any], Callable[[], None]]:
    """torch.optim.AdamW(fused=True) on the same arrays."""
    p = torch.nn.Parameter(arrays.view("param", dtype))
    p.grad = arrays.view("grad", dtype)
    optimizer = torch.optim.AdamW([p], fused=True, **_SETTINGS)
    optimizer.state[p].update(
        step=torch.ones(()), exp_avg=arrays.view("exp_avg", dtype), exp_avg_sq=arrays.view("exp_avg_sq", dtype)
    )

    def prepare() -> None:
        with torch.no_grad():
            for role in ("param", "grad", "exp_avg", "exp_avg_sq"):
                arrays.fill(role, dtype)

    return optimizer.step, prepare


# -- what else costs a pass ------------------------------------------------------------------------------------------

MAX_NORM, EMA = 1.0, 0.999


def beside(arrays: Arrays) -> dict[str, tuple[Callable[[], Any], Callable[[], None]]]:
    """Clipping, clearing and averaging: inside of a step, and as torch has them, one after the other."""

    def prepare() -> None:
        with torch.no_grad():
            for role in ("param", "grad", "exp_avg", "exp_avg_sq", "ema"):
                arrays.fill(role, F32)

    p = torch.nn.Parameter(arrays.view("param", F32))
    p.grad = arrays.view("grad", F32)
    group = {"params": [p], "modulated": True, "modality": "audio", "depth": 0}
    ours = AIMFusedOptimizer([group], **_SETTINGS, max_grad_norm=MAX_NORM, zero_grad_in_step=True, ema_decay=EMA)
    moments = {name: arrays.view(name, F32) for name in ("exp_avg", "exp_avg_sq", "ema")}
    ours.state[p].update(step=torch.ones(()), **moments)
    ours.set_modulation(0, step_well=0.5)

    q = torch.nn.Parameter(arrays.view("param", F32))
    q.grad = arrays.view("grad", F32)
    fused = torch.optim.AdamW([q], fused=True, **_SETTINGS)
    fused.state[q].update(step=torch.ones(()), exp_avg=moments["exp_avg"], exp_avg_sq=moments["exp_avg_sq"])
    average = arrays.view("ema", F32)

    def separately() -> None:
        torch.nn.utils.clip_grad_norm_([q], MAX_NORM)
        fused.step()
        with torch.no_grad():
            torch._foreach_lerp_([average], [q.detach()], 1 - EMA)
        fused.zero_grad(set_to_none=False)

    return {"clip+zero+ema": (ours.step, prepare), "clip+zero+ema torch": (separately, prepare)}


# -- a run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line(report.Circumstances):
    """One line of the results file; times in nanoseconds a parameter."""

    numel: int
    rounds: int
    candidate: str
    bytes: float
    median_ns: float
    p20: float
    p80: float
    x_floor: float
    x_fp32: float
    x_torch_fp32: float
    x_torch_bf16: float


def measure(numel: int, rounds: int, names: Sequence[str]) -> list[Line]:
    """Every configuration, its floor and torch's fused step, interleaved in a new random order each round."""
    arrays = Arrays(numel)
    cases: dict[str, tuple[Callable[[], Any], Callable[[], None]]] = {}
    for name in names:
        cases[name] = CONFIGURATIONS[name].build(arrays)
        streams = CONFIGURATIONS[name].floors(arrays)
        cases |= {floor: (stream, lambda: None) for floor, stream in streams.items()}
    cases |= {"torch fp32": torch_fused(F32, arrays), "torch bf16": torch_fused(BF16, arrays)} | beside(arrays)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    shuffle = random.Random(0)
    with timing.collection_off():
        for number in range(rounds + 1):
            shuffle.shuffle(order)
            for name in order:
                run, prepare = cases[name]
                prepare()
                run()  # the pages and lines that it needs, and not those of the one before
                start = time.perf_counter_ns()
                run()
                if number:
                    taken[name].append(time.perf_counter_ns() - start)
    samples = {name: timing.Samples.of(values) for name, values in taken.items()}
    shared = report.circumstances() | {"numel": numel, "rounds": rounds}

    def ratio(name: str, other: str) -> float:
        return samples[name].median / samples[other].median if other in samples else float("nan")

    lines = []
    for name in [*names, "torch fp32", "torch bf16", *beside_names()]:
        floors = [samples[floor].median for floor in samples if floor.startswith(f"{name} floor")]
        size = CONFIGURATIONS[name].bytes if name in CONFIGURATIONS else float("nan")
        lines.append(
            Line(
                **shared,
                candidate=name,
                bytes=size,
                median_ns=samples[name].median / numel,
                p20=samples[name].quantile(0.2) / numel,
                p80=samples[name].quantile(0.8) / numel,
                x_floor=samples[name].median / min(floors) if floors else float("nan"),
                x_fp32=ratio(name, "fp32"),
                x_torch_fp32=ratio(name, "torch fp32"),
                x_torch_bf16=ratio(name, "torch bf16"),
            )
        )
    return lines


def beside_names() -> tuple[str, str]:
    """The candidates of :func:`beside`."""
    return "clip+zero+ema", "clip+zero+ema torch"


#: candidate, column, limit: what is to be reached on a quiet machine.
TARGETS = (
    ("bf16+bf16n", "x_torch_bf16", 0.5),
    ("bf16+bf16n", "x_floor", 1.15),
    ("fp32+bf16", "x_fp32", 0.78),
    ("fp32+int8", "x_fp32", 0.65),
    ("fp32+int8", "x_floor", 1.3),
    ("master", "x_floor", 1.05),
)


def main(arguments: argparse.Namespace) -> int:
    """Measures, prints, writes."""
    if arguments.out is not None:
        report.check_columns(arguments.out / "bytes.csv", Line)
    lines = measure(arguments.numel << 20, arguments.rounds or 11, list(CONFIGURATIONS))
    head = ("candidate", "bytes", "ns/param", "p20", "p80", "x floor", "x fp32", "x torch fp32", "x torch bf16")
    rows: list[tuple[str, ...]] = [head]
    for line in lines:
        numbers = (line.median_ns, line.p20, line.p80)
        ratios = (line.x_floor, line.x_fp32, line.x_torch_fp32, line.x_torch_bf16)
        rows.append(
            (
                line.candidate,
                f"{line.bytes:g}" if line.bytes == line.bytes else "",
                *(f"{value:.3f}" for value in numbers),
                *(f"{value:.2f}" if value == value else "" for value in ratios),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        padded = (f"{text:>{width}}" for text, width in zip(cells, widths[1:], strict=True))
        print("  ".join([f"{name:<{widths[0]}}", *padded]))
    by_name = {line.candidate: line for line in lines}
    print("\ntargets:")
    for name, column, limit in TARGETS:
        reached = getattr(by_name[name], column)
        print(f"  {name:12} {column:13} {reached:.2f} (<= {limit:.2f})  {'met' if reached <= limit else 'MISSED'}")
    both = [by_name[name].median_ns for name in beside_names()]
    verdict = "met" if both[1] >= 1.8 * both[0] else "MISSED"
    print(f"  {'clip+zero+ema':12} torch takes {both[1] / both[0]:.2f} times as long (>= 1.80)  {verdict}")
    if arguments.out is not None:
        path = make_folder(arguments.out) / "bytes.csv"
        report.append_csv(path, lines, Line)
        print(f"written to {path}")
    return 0
