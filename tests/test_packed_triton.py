"""The Triton kernels where less is kept or more is asked for: bit for bit the CPU kernels', interpreted.

docs/design.md ("Fewer bytes") says what is stored; test_triton.py compiles the same kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Gradients, assign, build, parameters_of, same_bits, set_row
from test_triton import compare, interpreted

import aim_kernels as ak

pytest.importorskip("triton")

from aim_kernels.backends import triton as backend

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]

#: Around a block that shares an exponent, and the smallest that have any; of two groups.
SIZES = ((129, 4100, 1), (4225, 127))
STEPS = 3


def pair(
    monkeypatch: pytest.MonkeyPatch, rule: str, chunk: int, sizes: Any = SIZES, **options: Any
) -> tuple[ak.AIMFusedOptimizer, ...]:
    monkeypatch.setattr(backend._Kernels, "CHUNK", chunk)
    shapes = [[(size,) for size in group] for group in sizes]
    return tuple(build(rule, shapes, kinds=("offset", "contiguous"), backend=b, **options) for b in ("cpu", "triton"))


def step_all(optimizers: tuple[ak.AIMFusedOptimizer, ...], grads: list[torch.Tensor | None]) -> None:
    """A step of each from the same gradients, and everything compared; gradients too."""
    for optimizer in optimizers:
        # Sums are added up in another order, and the deviation of the noise with them.
        optimizer.tables.statistics.copy_(optimizers[0].tables.statistics)
    for optimizer in optimizers:
        assign(parameters_of(optimizer), [None if grad is None else grad.clone() for grad in grads])
        optimizer.step()
    compare(optimizers[0], optimizers[1])
    left = [[p.grad for p in parameters_of(optimizer) if p.grad is not None] for optimizer in optimizers]
    same_bits(left[0], left[1], "gradients")
    assert all(bool(grad.any()) is not optimizers[0].zero_grad_in_step for grad in left[1] if grad.numel() > 1)


#: Every way of storing meets every rule's moments and the types that have it, with rows and chunks in turn.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("adamw", "float32", {"state_dtype": "int8"}),
    ("adamw", "bfloat16", {"state_dtype": "int8", "master": "split", "ema_decay": 0.9}),
    ("adam", "float16", {"state_dtype": "bfloat16", "master": "kahan", "zero_grad_in_step": True}),
    ("amsgrad", "bfloat16", {"state_dtype": "int8", "master": "stochastic", "zero_grad_in_step": True}),
    ("amsgrad", "float32", {"state_dtype": "bfloat16", "rounding": "nearest"}),
    ("rmsprop-momentum", "bfloat16", {"state_dtype": "int8", "rounding": "nearest", "master": "kahan"}),
    ("rmsprop-momentum", "float32", {"state_dtype": "int8", "ema_decay": 0.99, "zero_grad_in_step": True}),
    ("rmsprop", "float16", {"state_dtype": "int8", "master": "float32"}),
    ("lion", "bfloat16", {"state_dtype": "bfloat16", "master": "stochastic"}),
    ("lion", "float16", {"state_dtype": "int8", "rounding": "nearest"}),
    ("sgd-momentum", "bfloat16", {"state_dtype": "bfloat16", "rounding": "nearest", "master": "split"}),
    ("sgd-nesterov", "float32", {"state_dtype": "int8", "rounding": "nearest", "modulated": False}),
    ("sgd", "bfloat16", {"state_dtype": "int8", "master": "kahan", "modulated": False}),
    ("adagrad", "bfloat16", {"state_dtype": "int8", "master": "float32", "ema_decay": 0.5}),
    ("adamw", "float64", {"ema_decay": 0.9, "zero_grad_in_step": True}),
    ("adamw", "bfloat16", {"master": "stochastic", "ema_decay": 0.9}),
    ("adagrad", "float16", {"master": "kahan", "rounding": "nearest"}),
]
ROWS = ("chain", "all", "alternate", "ones", "noise", "step")


@interpreted
@pytest.mark.parametrize(
    ("rule", "dtype", "options"),
    CASES,
    ids=["-".join([rule, dtype, *map(str, o.values())]) for rule, dtype, o in CASES],
)
def test_the_bits_of_the_cpu_kernels(
    monkeypatch: pytest.MonkeyPatch, rule: str, dtype: str, options: dict[str, Any]
) -> None:
    """Two groups with rows of their own; a parameter without gradient, then with one again; live weights put back."""
    turn = CASES.index((rule, dtype, options))
    both = pair(monkeypatch, rule, (1536, 384)[turn % 5 == 0], dtype=dtype, **options)
    for optimizer in both:
        for group in range(2):
            row = "whole" if options.get("modulated") is False else ROWS[(turn + 2 * group) % len(ROWS)]
            set_row(optimizer, group, row)
    draw = Gradients(parameters_of(both[0]))
    for number in range(STEPS):
        grads: list[torch.Tensor | None] = list(draw())
        if number == 1:
            grads[0] = grads[-2] = None
        step_all(both, grads)
    for optimizer in both:
        optimizer.eval()
        optimizer.train()
    compare(*both)
