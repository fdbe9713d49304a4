"""The Triton kernels where less is kept or more is asked for: bit for bit the CPU kernels', interpreted.

docs/design.md ("Fewer bytes") says what is stored; test_triton.py compiles the same kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import Gradients, assign, build, frozen, parameters_of, same_bits, set_row
from test_triton import compare, interpreted

import aim_kernels as ak

pytest.importorskip("triton")

from aim_kernels.backends import triton as backend
from aim_kernels.backends.triton.driver import Variant, variants_of
from aim_kernels.step.layout import FLAGS, GROUP_RECORD, RULES, STATISTIC, TENSOR_RECORD

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

#: Around a block that shares an exponent, and the smallest that have any; of two groups.
SIZES = ((129, 4100, 1), (4225, 127))
STEPS = 3


def pair(
    monkeypatch: pytest.MonkeyPatch, rule: str, chunk: int, sizes: Any = SIZES, **options: Any
) -> tuple[ak.AIMFusedOptimizer, ...]:
    monkeypatch.setattr(backend._Kernels, "CHUNK", chunk)
    shapes = [[(size,) for size in group] for group in sizes]
    return tuple(build(rule, shapes, layouts=("offset", "contiguous"), backend=b, **options) for b in ("cpu", "triton"))


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
    ("rmsprop-momentum", "bfloat16", {"state_dtype": "int8", "master": "kahan"}),
    ("rmsprop-momentum", "float32", {"state_dtype": "int8", "ema_decay": 0.99, "zero_grad_in_step": True}),
    ("rmsprop", "float16", {"state_dtype": "int8", "master": "float32"}),
    ("lion", "bfloat16", {"state_dtype": "bfloat16", "master": "stochastic"}),
    ("lion", "float16", {"state_dtype": "int8"}),
    ("sgd-momentum", "bfloat16", {"state_dtype": "bfloat16", "rounding": "nearest", "master": "split"}),
    ("sgd-nesterov", "float32", {"state_dtype": "int8", "modulated": False}),
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
    # every other one at night: the interpreter takes ten seconds for each
    [pytest.param(*case, marks=[pytest.mark.nightly] * (turn % 2)) for turn, case in enumerate(CASES)],
    ids=["-".join([rule, dtype, *map(str, o.values())]) for rule, dtype, o in CASES],
)
def test_the_bits_of_the_cpu_kernels(
    monkeypatch: pytest.MonkeyPatch, rule: str, dtype: str, options: dict[str, Any]
) -> None:
    """Two groups with rows of their own; a parameter without gradient, then with one again; live weights put back."""
    turn = CASES.index((rule, dtype, options))
    both = pair(monkeypatch, rule, (1536, 768)[turn % 5 == 0], dtype=dtype, **options)
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


@interpreted
@pytest.mark.parametrize("offset", [1, 128, 2**35 + 77])
def test_rounding_by_the_place_in_the_whole(monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    """Parts of a parameter, which begin anywhere in it; a parameter that is far behind others."""
    both = pair(monkeypatch, "adamw", 1536, ((4100,),), dtype="bfloat16", state_dtype="int8", master="stochastic")
    draw = Gradients(parameters_of(both[0]))
    step_all(both, list(draw()))
    for optimizer in both:
        assert optimizer._plan is not None
        optimizer._plan.records["offset"] += offset
        optimizer._plan.records["first"] += offset + 2**33
    step_all(both, list(draw()))


@interpreted
@pytest.mark.parametrize(
    ("state_dtype", "rounding"), [("int8", "stochastic"), ("bfloat16", "stochastic"), ("bfloat16", "nearest")]
)
@pytest.mark.parametrize("rule", ["sgd-momentum", "adagrad"])
def test_moments_of_every_magnitude(
    monkeypatch: pytest.MonkeyPatch, rule: str, state_dtype: str, rounding: str
) -> None:
    """Both formats, from any bits: those of the gradient are the buffer's, and their square the sum's."""
    options: dict[str, Any] = {"state_dtype": state_dtype, "rounding": rounding, "modulated": False}
    options |= {"weight_decay": 0.0, "lr": 0.0} | ({"initial_accumulator_value": 0.0} if rule == "adagrad" else {})
    both = pair(monkeypatch, rule, 1536, ((6 * 1024,),), **options)
    random = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (48, 128), generator=random).to(torch.int32)
    exponent = torch.randint(0, 248, (48, 1), generator=random, dtype=torch.int32) + torch.arange(128) % 8
    bits[::2] = ((bits & ~0x7F800000) | (exponent.to(torch.int32) << 23))[::2]  # near each other, as moments are
    bits[0] &= ~0x7FFFFFFF
    bits[2] &= ~0x7F800000
    bits[4:12:2] = (bits[4:12:2] & ~0x7FFFF) | 0x40000  # halfway between two codes, and just below
    bits[12:20:2] = (bits[12:20:2] & ~0x7FFFF) | 0x3FFFF
    bits[20:24:2] = (bits[20:24:2] & ~0xFFFF) | 0x8000  # between two bfloat16
    grads = bits.view(torch.float32).view(-1)
    grads[~grads.isfinite()] = 1.0
    if state_dtype == "int8":
        grads[640], grads[900], grads[6143] = float("nan"), float("inf"), -float("inf")
    for optimizer in both:
        (p,) = parameters_of(optimizer)
        p.grad = grads.clone()
        optimizer.step()
    same_bits(*([optimizer.state[p] for p in parameters_of(optimizer)] for optimizer in both))


@interpreted
def test_a_skipped_step_leaves_nothing_but_zeros_in_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair(monkeypatch, "adamw", 1536, dtype="bfloat16", state_dtype="int8", zero_grad_in_step=True)
    draw = Gradients(parameters_of(both[0]))
    step_all(both, list(draw()))
    optimizer = both[1]
    before = frozen(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    params = parameters_of(optimizer)
    assign(params, draw())
    optimizer.step()
    same_bits(before, frozen(optimizer))
    assert not any(bool(p.grad.any()) for p in params if p.grad is not None)


@interpreted
@pytest.mark.parametrize("value", [float("nan"), 3e38, 1e-30])
def test_what_is_cleared_was_measured_before(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Gradients out of range are read a second time."""
    both = pair(monkeypatch, "sgd-momentum", 1536, lr=1e-3, state_dtype="int8", zero_grad_in_step=True)
    params = parameters_of(both[0])
    grads = [torch.full_like(p, value if value < 1 else 1.0).detach() for p in params]
    grads[1][4099] = grads[4][126] = value
    for optimizer in both:
        assign(parameters_of(optimizer), [grad.clone() for grad in grads])
        optimizer.step()
        assert not any(bool(p.grad.any()) for p in parameters_of(optimizer) if p.grad is not None)
    columns = [STATISTIC[name] for name in ("nonfinite", "grad_sq")]
    one, other = (optimizer.tables.statistics[:, columns] for optimizer in both)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0, equal_nan=True)
    assert bool((other[:, 1] > 0).all()) or value != value


def test_kinds_of_tensors_are_launches() -> None:
    groups = np.zeros(2, GROUP_RECORD)
    groups["rule"] = [RULES.index("adamw"), RULES.index("lion")]
    tensors = np.zeros(5, TENSOR_RECORD)
    tensors["group"], tensors["dtype"] = [0, 0, 0, 1, 1], [0, 2, 2, 0, 0]
    tensors["moments"], tensors["weights"] = [0, 2, 2, 0, 0], [0, 0, 2, 0, 0]
    tensors["ema"][4] = 64
    fields = [(0, False, False, 0), (0, True, False, 0), (0, True, True, 0), (2, False, True, 2)]
    assert variants_of(tensors, groups) == [Variant(*values) for values in fields]
    groups["flags"] = FLAGS["amsgrad"]
    assert variants_of(tensors, groups)[-1] == Variant(2, True, True, 2)
    assert variants_of(tensors[:0], groups) == []
