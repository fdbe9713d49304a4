"""Gradient scaling: by GradScaler before the step, and handed over to the kernel."""

from __future__ import annotations

import helpers
import pytest
import torch
from backends_under_test import BACKENDS, enter
from helpers import RULES, Gradients, assign, build, frozen, parameters_of, same_bits, set_row

import aim_kernels as ak

SHAPES = (((5, 7), (1031,), ()), ((70,),))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return enter(request.param, monkeypatch)


def run(optimizer: ak.AIMFusedOptimizer, scale: float = 1.0, steps: int = 3) -> None:
    """Steps on gradients that were multiplied by ``scale``."""
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    for _ in range(steps):
        assign(params, [grad * scale for grad in gradients()])
        optimizer.step()


@pytest.mark.parametrize("row", ["ones", "alternate"])
@pytest.mark.parametrize("rule", ["adamw", "adam-maximize", "sgd-momentum"])
def test_scale_is_divided_away(backend: str, rule: str, row: str) -> None:
    """A power of two, so that not a bit is lost."""
    plain, scaled = (build(rule, SHAPES, backend=backend) for _ in range(2))
    for optimizer in (plain, scaled):
        set_row(optimizer, 0, row)
    run(plain)
    scaled.grad_scale = torch.tensor(1024.0)
    run(scaled, 1024.0)
    same_bits(frozen(plain), frozen(scaled))


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_step_moves_nothing(backend: str, scaled: bool, found: bool) -> None:
    """All four combinations: infinities are heeded with and without a scale."""
    optimizer = build("adamw", SHAPES, backend=backend)
    set_row(optimizer, 0, "alternate")
    run(optimizer)
    before = frozen(optimizer)
    if scaled:
        optimizer.grad_scale = torch.tensor(2.0)
    optimizer.found_inf = torch.tensor(1.0 if found else 0.0)
    params = parameters_of(optimizer)
    assign(params, Gradients(params, seed=5)())
    optimizer.step()
    if found:
        same_bits(before, frozen(optimizer))
    else:
        assert optimizer.tables.control[1] == before["control"][1] + 1
        assert all(not torch.equal(p, q) for p, q in zip(params, before["params"], strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    expected = int(before["state"][0]["step"]) + (1 if found else 2)
    assert int(optimizer.state[params[0]]["step"]) == expected


def test_masters_outlive_a_skipped_step(backend: str) -> None:
    """The step that would write the true weights back was skipped: the module still holds degraded ones."""
    optimizer, other = (build("adamw", SHAPES, backend=backend) for _ in range(2))
    for each in (optimizer, other):
        set_row(each, 0, "chain")
        run(each)
        each.set_modulation(0, grad_well=1.0, live_well=1.0)
    params = parameters_of(optimizer)
    assign(params, Gradients(params, seed=5)())
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert "master" in optimizer.state[params[0]]
    optimizer.found_inf = torch.tensor(0.0)
    for each in (optimizer, other):
        assign(parameters_of(each), Gradients(parameters_of(each), seed=6)())
        each.step()
    assert "master" not in optimizer.state[params[0]]
    same_bits(frozen(other), frozen(optimizer))


@pytest.mark.parametrize("rule", RULES)
def test_grad_scaler_hands_over(backend: str, rule: str) -> None:
    """``scaler.step`` with ``fused_scaling`` equals unscaling first; an overflow is skipped and the scale backs off."""
    one, other = (build(rule, SHAPES, backend=backend, fused_scaling=fused) for fused in (False, True))
    scalers = [torch.amp.GradScaler(helpers.DEVICE, init_scale=4.0, growth_interval=100) for _ in range(2)]
    for optimizer, scaler in zip((one, other), scalers, strict=True):
        params = parameters_of(optimizer)
        gradients = Gradients(params)
        for number in range(3):
            scaler.scale(torch.ones((), device=helpers.DEVICE)).item()  # starts the scaler
            assign(params, [grad * scaler.get_scale() for grad in gradients()])
            if number == 1:
                params[1].grad[3] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0
        assert int(optimizer.tables.control[1]) == 2
        assert not hasattr(optimizer, "grad_scale")
    same_bits(frozen(one), frozen(other))


def test_the_choice_survives_a_copy() -> None:
    import copy
    import pickle

    for made in (copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))):
        for fused in (False, True):
            assert made(build(fused_scaling=fused))._step_supports_amp_scaling is fused
