"""What the tests of compiled steps share: the same optimizer twice, and what is asked of graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import (
    Gradients,
    assign,
    frozen,
    parameters_of,
    same_bits,
)
from torch._dynamo.utils import counters

import aim_kernels as ak
from aim_kernels.optim import torch_compile

# Two groups; numbers, an empty tensor, and a tensor too large to share a buffer with others.
SHAPES = (((5, 7), (33,), (), (0,)), ((2, 3, 4, 5), (6,), (70000,)))
MUTATED = ("params", "states", "masters", "rows", "statistics", "control")


def no_recompilation() -> Any:
    return torch._dynamo.config.patch(error_on_recompile=True)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compile_step(optimizer: ak.AIMFusedOptimizer, backend: str) -> Callable[[], None]:
    return torch.compile(lambda: optimizer.step(), fullgraph=True, backend=backend)


class Pair:
    """The same optimizer twice, stepped with the same gradients: one eagerly, one in a graph."""

    def __init__(
        self, make: Callable[[], ak.AIMFusedOptimizer], backend: str, around: Callable[..., Any] | None = None
    ) -> None:
        self.optimizers = (make(), make())
        steps = [around(o) if around else (lambda o=o: o.step()) for o in self.optimizers]
        self.steps = (steps[0], torch.compile(steps[1], fullgraph=True, backend=backend))
        self.params = [parameters_of(optimizer) for optimizer in self.optimizers]
        self.gradients = Gradients(self.params[0])

    def each(self, change: Callable[[ak.AIMFusedOptimizer], Any]) -> None:
        for optimizer in self.optimizers:
            change(optimizer)

    def step(self, without: tuple[int, ...] = ()) -> None:
        grads = [None if i in without else g for i, g in enumerate(self.gradients())]
        results = []
        for params, step in zip(self.params, self.steps, strict=True):
            assign(params, grads)
            results.append(step())
        same_bits(*results)
        same_bits(*map(frozen, self.optimizers))


def forbid_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the graph handed over copies")

    monkeypatch.setattr(torch_compile, "_substituted", fail)


def count_copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls, original = [], torch_compile._substituted

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(torch_compile, "_substituted", counted)
    return calls
