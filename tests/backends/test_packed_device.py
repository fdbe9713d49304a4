"""Fewer bytes on a device: what the CPU kernels store, bit for bit (docs/design.md, "Fewer bytes")."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from backends_under_test import CHUNK, enter
from helpers import Gradients, assign, build, frozen, parameters_of, same_bits, same_numbers, set_row

import aim_kernels as ak
from aim_kernels.backends import device
from aim_kernels.step.layout import FAMILIES, FLAGS, GROUP_RECORD, RULES, STATISTIC, TENSOR_RECORD

pytestmark = pytest.mark.slow

#: 8 bits begin with 4096 elements; an odd block at the end, and a parameter whose address is not that of a vector.
SHAPES = (((37,), (4 * CHUNK + 4,), (5, 7)), ((70, 64), (0,)))
LAYOUTS = ("contiguous", "offset", "transposed")

#: (state_dtype, rounding); 8 bits are always rounded at random.
MOMENTS = ((None, "stochastic"), ("bfloat16", "stochastic"), ("bfloat16", "nearest"), ("int8", "stochastic"))
MASTERS = {
    "float32": (None,),
    "float64": (None,),
    "bfloat16": (None, "stochastic", "kahan", "split", "float32"),
    "float16": (None, "kahan", "float32"),
}


@pytest.fixture(params=["cuda", pytest.param("cuda@gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return enter(request.param, monkeypatch)


def pair(backend: str, rule: str, row: str, dtype: str, **options: Any) -> list[ak.AIMFusedOptimizer]:
    """The same optimizer on the CPU kernels and on the device."""
    made = [build(rule, SHAPES, dtype, LAYOUTS, backend=name, **options) for name in ("cpu", backend)]
    for optimizer in made:
        set_row(optimizer, 0, row)
    return made


def run(optimizer: ak.AIMFusedOptimizer, steps: int, missing: int | None = None) -> list[torch.Tensor]:
    """Steps; parameter ``missing`` gets no gradient in every second one. Returns the gradients of the last."""
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    for number in range(steps):
        given = gradients()
        assign(params, given)
        if missing is not None and number % 2:
            params[missing].grad = None
        optimizer.step()
    return given


def agree(cpu: ak.AIMFusedOptimizer, device: ak.AIMFusedOptimizer) -> None:
    """All that is stored, and what is counted; sums are added up in another order."""
    one, other = frozen(cpu), frozen(device)
    sums, others = one.pop("statistics").cpu(), other.pop("statistics").cpu()
    exact = [STATISTIC[name] for name in ("numel", "under", "nonfinite")]
    same_bits(one, other)
    same_numbers(sums[:, exact], others[:, exact])
    near = [STATISTIC[name] for name in ("grad_sq", "update_sq", "param_sq")]
    # At most a few hundred float32 terms in a partial sum.
    torch.testing.assert_close(sums[:, near], others[:, near], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("dtype", "master"), [(dtype, master) for dtype, masters in MASTERS.items() for master in masters]
)
@pytest.mark.parametrize(("state_dtype", "rounding"), MOMENTS)
def test_the_bits_of_the_cpu_kernels(
    backend: str, dtype: str, master: str | None, state_dtype: str | None, rounding: str
) -> None:
    if dtype == "float64":
        state_dtype = None
    for row in ("ones", "alternate"):
        options = {"state_dtype": state_dtype, "rounding": rounding, "master": master, "ema_decay": 0.9}
        made = pair(backend, "adamw", row, dtype, **options)
        for optimizer in made:
            run(optimizer, 3, missing=1)
        agree(*made)


@pytest.mark.parametrize("rule", ["amsgrad", "sgd", "sgd-nesterov", "adagrad", "rmsprop-momentum", "lion"])
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_other_rules(backend: str, rule: str, state_dtype: str) -> None:
    made = pair(backend, rule, "chain", "bfloat16", state_dtype=state_dtype, master="stochastic")
    for optimizer in made:
        run(optimizer, 3)
    agree(*made)


@pytest.mark.parametrize("modulated", [False, True])
def test_groups_that_keep_less(backend: str, modulated: bool) -> None:
    """Without classes some rules lack a moment."""
    for rule in ("sgd", "sgd-momentum", "adagrad", "rmsprop", "lion"):
        made = pair(backend, rule, "ones", "float32", state_dtype="int8", ema_decay=0.5, modulated=modulated)
        for optimizer in made:
            run(optimizer, 2)
        agree(*made)


@pytest.mark.parametrize("master", ["kahan", "split"])
def test_live_weights_come_and_go(backend: str, master: str) -> None:
    """What a parameter lacks goes into the master and comes back; eval() and train() read packed moments."""
    made = pair(backend, "adamw", "ones", "bfloat16", state_dtype="int8", master=master)
    for optimizer in made:
        run(optimizer, 2)
        optimizer.set_modulation(0, live_well=0.5)
        run(optimizer, 2, missing=1)
    agree(*made)
    live = [p.detach().clone() for p in parameters_of(made[1])]
    for optimizer in made:
        optimizer.eval()
    agree(*made)
    for optimizer in made:
        optimizer.train()
    same_bits(live, [p.detach() for p in parameters_of(made[1])])
    for optimizer in made:
        optimizer.set_modulation(0, live_well=1.0)
        run(optimizer, 2)
    assert not any("master" in state for state in made[1].state.values())
    agree(*made)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_gradients_are_left_as_zeros(backend: str, dtype: str) -> None:
    state_dtype = None if dtype == "float64" else "int8"
    made = pair(backend, "adamw", "chain", dtype, state_dtype=state_dtype, zero_grad_in_step=True)
    for optimizer in made:
        assert all(bool((grad == 0).all()) for grad in run(optimizer, 3))
    agree(*made)


def test_a_skipped_step_clears_gradients_only(backend: str) -> None:
    _, device = pair(backend, "adamw", "chain", "float32", state_dtype="int8", ema_decay=0.9, zero_grad_in_step=True)
    run(device, 2)
    before = frozen(device)
    where = parameters_of(device)[0].device
    device.found_inf = torch.ones((), device=where)
    assert all(bool((grad == 0).all()) for grad in run(device, 1))
    same_bits(before, frozen(device))


def test_what_is_not_finite_is_counted_before_it_is_cleared(backend: str) -> None:
    made = pair(backend, "adamw", "ones", "float32", state_dtype="int8", zero_grad_in_step=True)
    for optimizer in made:
        params = parameters_of(optimizer)
        grads = Gradients(params)()
        grads[1][7] = float("inf")
        grads[1][200] = float("nan")
        assign(params, grads)
        optimizer.step()
        assert optimizer.statistics()[0]["nonfinite"] == 2
    states = [optimizer.state[parameters_of(optimizer)[1]] for optimizer in made]
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"):
        assert torch.equal(states[0][name], states[1][name].cpu()), name
    assert states[1]["exp_avg_scale"].tolist()[:3].count(255) == 2


def test_packed_and_plain_tensors_in_one_step(backend: str) -> None:
    """Small parameters keep float32 moments, and other kernels."""
    made = pair(backend, "adamw", "alternate", "float32", state_dtype="int8")
    for optimizer in made:
        run(optimizer, 3)
    agree(*made)


def records(rules: list[str], tensors: list[tuple[int, dict[str, int]]]) -> tuple[np.ndarray, np.ndarray]:
    groups, made = np.zeros(len(rules), GROUP_RECORD), np.zeros(len(tensors), TENSOR_RECORD)
    groups["rule"] = [RULES.index(rule) for rule in rules]
    for record, (group, fields) in zip(made, tensors, strict=True):
        record["group"] = group
        for name, value in fields.items():
            record[name] = value
    return groups, made


def families(rules: list[str], tensors: list[tuple[int, dict[str, int]]]) -> list[str]:
    return [FAMILIES[number] for number in device.families_of(*records(rules, tensors))]


def test_families_are_those_of_the_tensors() -> None:
    rules = ["adamw", "sgd", "lion"]
    assert families(rules, []) == []
    assert families(rules, [(1, {}), (0, {}), (1, {})]) == ["adam", "sgd"]
    assert families(rules, [(2, {}), (0, {"moments": 2})]) == ["other", "general"]
    for field in ("moments", "weights", "zero_grad", "ema"):
        assert families(rules, [(0, {field: 1})]) == ["general"]
    for field in ("stochastic", "master", "rest", "exp_avg_scale", "offset"):
        assert families(rules, [(0, {field: 1})]) == ["adam"]
    groups, tensors = records(rules, [(0, {}), (1, {"ema": 8})])
    groups["flags"][0] = FLAGS["amsgrad"]
    assert device.families_of(groups, tensors) == (FAMILIES.index("other"), FAMILIES.index("general"))
