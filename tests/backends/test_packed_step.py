"""Steps with fewer bytes, in lock step with the oracle: what is stored must be what the documented rounding, with the
documented bits, makes of moments and weights; everything else within its bound."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from helpers import GRADIENT_LAYOUTS, PARAMETER_LAYOUTS, ROWS, RULES, Gradients, build, parameters_of, set_row
from lockstep import Twin, run_twin

from aim_kernels import _C

ISAS = [name for name, _, supported in _C.isas() if supported]

#: More than 4096 elements, with an end that fills no block, or no vector; and small ones, which keep float32 beside
#: 8 bits. Two tiles of 1024 and a chunk's edge are in test_sizes.
SHAPES = (((4103,), (37,), ()), ((67, 65), (0,)))

STATES: dict[str, dict[str, Any]] = {
    "bfloat16": {"state_dtype": "bfloat16"},
    "nearest": {"state_dtype": "bfloat16", "rounding": "nearest"},
    "int8": {"state_dtype": "int8"},
}
EXTRAS = ({}, {"ema_decay": 0.9}, {"zero_grad_in_step": True}, {"ema_decay": 0.75, "zero_grad_in_step": True})
MASTERS = (None, "stochastic", "kahan", "split", "float32")


def twin(rule: str, row: str, dtype: str = "float32", steps: int = 3, shapes: Any = SHAPES, **options: Any) -> Twin:
    optimizer = build(rule, shapes, dtype, ("contiguous", "transposed"), **options)
    set_row(optimizer, 0, row)
    made = Twin(optimizer, RULES[rule]["rule"])
    run_twin(made, Gradients(parameters_of(optimizer), layouts=("contiguous", "sliced")), steps)
    assert min(made.masks.values()) > 50, "one class only: nothing was tested"
    return made


def spread(cases: Any) -> list[tuple[Any, ...]]:
    """Each case with one of the instruction sets and one of the extras, in turn, so that all meet all."""
    return [(*case, ISAS[i % len(ISAS)], EXTRAS[i // 2 % 4]) for i, case in enumerate(cases)]


@pytest.mark.parametrize(
    ("rule", "row", "states", "isa", "extras"),
    spread(
        [
            *((rule, "all", states) for states in STATES for rule in RULES),
            *(("adamw", row, states) for states in ("bfloat16", "int8") for row in ROWS if row != "all"),
            *(("rmsprop-momentum", row, "int8") for row in ("ones", "alternate", "noise")),
        ]
    ),
)
def test_moments(
    rule: str, row: str, states: str, isa: str, extras: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIM_KERNELS_ISA", isa)
    twin(rule, row, **STATES[states], **extras)


@pytest.mark.parametrize(
    ("master", "states", "rule_row", "isa", "extras"),
    spread(
        itertools.product(
            MASTERS,
            (None, "bfloat16", "int8"),
            (("adamw", "ones"), ("adamw", "all"), ("sgd-nesterov", "step"), ("rmsprop-momentum", "grad")),
        )
    ),
)
def test_weights_of_bfloat16_parameters(
    master: str | None,
    states: str | None,
    rule_row: tuple[str, str],
    isa: str,
    extras: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIM_KERNELS_ISA", isa)
    twin(*rule_row, "bfloat16", master=master, state_dtype=states, **extras)


@pytest.mark.parametrize("states", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("master", [None, "kahan", "float32"])
def test_weights_of_float16_parameters(master: str | None, states: str | None) -> None:
    twin("adamw", "grad", "float16", master=master, state_dtype=states, ema_decay=0.9)
    twin("lion", "chain", "float16", master=master, state_dtype=states)


@pytest.mark.parametrize("extras", EXTRAS[1:], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_averages_and_cleared_gradients_with_wide_moments(dtype: str, extras: dict[str, Any]) -> None:
    twin("adamw", "all", dtype, **extras)
    twin("adam-maximize", "ones", dtype, **extras)


@pytest.mark.parametrize(
    "options",
    [{"state_dtype": "bfloat16"}, {"state_dtype": "int8", "ema_decay": 0.9}],
    ids=str,
)
@pytest.mark.parametrize(
    ("rule", "row"),
    [
        ("adamw", "noise"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("amsgrad", "all"), ("rmsprop-momentum", "ones"))),
    ],
)
def test_reference_backend(rule: str, row: str, options: dict[str, Any]) -> None:
    twin(rule, row, backend="reference", **options)
    for master in ("stochastic", "split", "kahan", "float32"):
        twin(rule, row, "bfloat16", backend="reference", master=master, steps=2, zero_grad_in_step=True, **options)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"state_dtype": "bfloat16", "zero_grad_in_step": True}),
        ("bfloat16", {"state_dtype": "bfloat16", "master": "split", "ema_decay": 0.5}),
        ("bfloat16", {"state_dtype": "bfloat16", "master": "stochastic"}),
        ("float16", {"state_dtype": "bfloat16", "rounding": "nearest", "master": "kahan"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", ["adamw", "rmsprop-momentum"])
def test_sizes_1_to_300(rule: str, dtype: str, options: dict[str, Any]) -> None:
    sizes = [*range(1, 36), 63, 65, *range(120, 137), 255, 256, 257, 271, 299, 300]
    twin(rule, "all", dtype, 2, ([(size,) for size in sizes],), **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_beyond_4096(dtype: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits begin at 4096; ends of every size; two chunks."""
    monkeypatch.setenv("AIM_KERNELS_ISA", isa)
    sizes = [4095, 4096, 4097, 4111, 4112, 4223, 4225, 5120, 5121, _C.CHUNK + 129]
    optimizer = twin("adamw", "all", dtype, 2, ([(size,) for size in sizes],), state_dtype="int8").optimizer
    dtypes = [str(optimizer.state[p]["exp_avg"].dtype) for p in parameters_of(optimizer)]
    assert dtypes == ["torch.float32"] + ["torch.uint8"] * 9


@pytest.mark.parametrize("memory", PARAMETER_LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"state_dtype": "int8"}),
        ("bfloat16", {"state_dtype": "int8", "master": "split", "ema_decay": 0.9}),
        ("bfloat16", {"state_dtype": "bfloat16", "master": "kahan"}),
        ("bfloat16", {"master": "stochastic"}),
    ],
    ids=str,
)
def test_layouts(memory: str, dtype: str, options: dict[str, Any]) -> None:
    """Each layout of parameters under each of gradients, which are zeros afterwards."""
    shapes = ((67, 65), (9, 8, 8, 8), (4101,), (2, 1, 3))
    optimizer = build("adamw", (shapes,), dtype, (memory,), zero_grad_in_step=True, **options)
    set_row(optimizer, 0, "grad")
    made, params = Twin(optimizer, "adamw"), parameters_of(optimizer)
    for number, grad_layout in enumerate(GRADIENT_LAYOUTS):
        if number == 5:
            set_row(optimizer, 0, "all")
        made.step(Gradients(params, seed=number, layouts=(grad_layout,))())
    made.finish()
