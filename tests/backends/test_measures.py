"""Measures of optimization state other than the signal-to-noise ratio, and the moving average as an anchor: every
backend against the oracle, and at the edges of the number types."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from backends_under_test import EMULATED, enter
from helpers import (
    RULES,
    Gradients,
    assign,
    build,
    frozen,
    parameters_of,
    same_bits,
    set_row,
)
from lockstep import Twin, run_twin

import aim_kernels as ak
from aim_kernels.backends.reference import classes_of

MEASURES = ("fisher", "grad")
SHAPES = (((5, 7), (33,), (0,), ()), ((3, 4, 2), (150,)))


@pytest.fixture(params=("cpu", "reference", *EMULATED))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return enter(request.param, monkeypatch)


def advance(optimizer: ak.AIMFusedOptimizer, gradients: Gradients, steps: int) -> None:
    for _ in range(steps):
        assign(parameters_of(optimizer), gradients())
        optimizer.step()


@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum", "adagrad", "rmsprop-momentum", "lion"])
@pytest.mark.parametrize("measure", MEASURES)
def test_every_rule_in_lock_step(measure: str, rule: str) -> None:
    for name, dtype, row in (("cpu", "float32", "all"), ("reference", "float64", "alternate")):
        optimizer = build(rule, SHAPES, dtype, measure=measure, backend=name)
        set_row(optimizer, 0, row)
        made = run_twin(Twin(optimizer, RULES[rule]["rule"]), Gradients(parameters_of(optimizer)), 12)
        assert min(made.masks.values()) > 100, "one class only: nothing was tested"


@pytest.mark.parametrize("measure", MEASURES)
def test_every_backend_has_the_bits_of_the_cpu_kernels(backend: str, measure: str) -> None:
    made = []
    for name in ("cpu", backend):
        optimizer = build("adamw", SHAPES[1:], measure=measure, backend=name)
        set_row(optimizer, 0, "alternate")
        advance(optimizer, Gradients(parameters_of(optimizer)), 6)
        optimizer.eval()
        optimizer.train()
        made.append(frozen(optimizer))
    if backend == "reference":  # pow() of another library
        for p, q in zip(made[0]["params"], made[1]["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        return
    for tables in made:
        del tables["statistics"]  # whose sums are added up in another order
    same_bits(*made)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_moments_in_fewer_bits(state_dtype: str) -> None:
    shapes = (((65, 64), (33,)),)
    optimizer = build("adamw", shapes, measure="fisher", state_dtype=state_dtype)
    set_row(optimizer, 0, "all")
    made = run_twin(Twin(optimizer, "adamw"), Gradients(parameters_of(optimizer)), 8)
    assert min(made.masks.values()) > 1000


def classes(optimizer: ak.AIMFusedOptimizer) -> torch.Tensor:
    """Of the first parameter, as its live weights show them; weights are one."""
    p = parameters_of(optimizer)[0]
    return p.detach() == optimizer.state[p]["master"]


def decided(
    measure: str, m: torch.Tensor, v: torch.Tensor, tau: float, backend: str, dtype: torch.dtype
) -> torch.Tensor:
    """The classes of moments one step old, with betas of a half, so that m_hat and v_hat are what is given."""
    p = torch.ones(m.numel(), dtype=dtype)
    group = {"params": [p], "modality": "a", "depth": 0, "modulated": True}
    optimizer = ak.AIMFusedOptimizer(
        [group], lr=0.0, weight_decay=0.0, measure=measure, under_optimized=("absolute", tau), backend=backend
    )
    optimizer.set_strength("a", 0, 0.5)
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    optimizer.step()
    optimizer.state[p]["exp_avg"].copy_(m / 2)
    optimizer.state[p]["exp_avg_sq"].copy_(v / 2)
    optimizer.eval()
    optimizer.train()
    return classes(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fisher_goes_by_the_second_moment_alone(backend: str, dtype: torch.dtype) -> None:
    """m*m, however large beside v, does not move the boundary by one neighbouring number."""
    for tau in (0.05, 0.3, 0.5, 0.8):
        bound = torch.tensor((tau / (1 - tau)) ** 16, dtype=torch.float64)
        near = [bound.to(dtype)]
        for _ in range(40):
            near.append(torch.nextafter(near[-1], torch.tensor(torch.inf, dtype=dtype)))
            near.insert(0, torch.nextafter(near[0], torch.tensor(0.0, dtype=dtype)))
        v = torch.stack([*near, *(bound.to(dtype) * 10.0**k for k in range(-6, 7))])
        found = [decided("fisher", m, v, tau, backend, dtype) for m in (torch.zeros_like(v), 30 * v.sqrt())]
        assert torch.equal(*found)
        rounded = 16 * torch.finfo(dtype).eps  # the sixteenth power of a rounded quotient, in float64 or in two
        clear = (v.double() - bound).abs() > rounded * bound
        assert torch.equal(found[0][clear], (v.double() >= bound)[clear])
        assert 30 < int(found[0].sum()) < 70
        assert bool((found[0][1:81] >= found[0][:80]).all()), "it is monotone"


@pytest.mark.parametrize("measure", MEASURES)
def test_thresholds_at_their_ends(backend: str, measure: str) -> None:
    tiny, huge = torch.finfo(torch.float32).tiny, 1e13
    v = torch.tensor([0.0, tiny, 1e-30, 1.0, huge, torch.nan])
    m = v.sqrt()
    assert decided(measure, m, v, 0.0, backend, torch.float32).tolist() == [True] * 5 + [False]
    assert decided(measure, m, v, 1.0, backend, torch.float32).tolist() == [False] * 6
    # c is 2.3e-10 and 4.3e9; under "grad" that is the square of m.
    assert decided(measure, m, v, 0.2, backend, torch.float32).tolist() == [False, False, False, True, True, False]
    assert decided(measure, m, v, 0.8, backend, torch.float32).tolist() == [False] * 4 + [True, False]


# -- the control ----------------------------------------------------------------------------------------------------


def randomly(seed: int = 3, **options: Any) -> tuple[ak.AIMFusedOptimizer, Gradients]:
    torch.manual_seed(0)
    optimizer = build(
        "adamw", (((40, 50), (300,)),), measure="random", backend="reference", seed=seed,
        **({"under_optimized": ("fraction", 0.25)} | options),
    )  # fmt: skip
    return optimizer, Gradients(parameters_of(optimizer))


def test_random_classes_are_a_share_drawn_anew() -> None:
    optimizer, gradients = randomly()
    optimizer.set_strength("audio", 0, 0.5)
    masks = []
    for _ in range(4):
        advance(optimizer, gradients, 1)
        masks.append(classes(optimizer))
        share = masks[-1].double().mean().item()
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
        p = parameters_of(optimizer)[0]
        row, control = optimizer.tables.rows[0].tolist(), optimizer.tables.control.tolist()
        found = classes_of(optimizer.param_groups[0], optimizer.state[p], row, control, 0)
        assert found is not None and torch.equal(found, masks[-1])
    for one, other in zip(masks[1:], masks, strict=False):
        both = (one & other).double().mean().item()
        assert abs(both - 0.0625) < 4 * (0.0625 / 2000) ** 0.5, "draws of two steps are independent"
    other, gradients = randomly(seed=4)
    other.set_strength("audio", 0, 0.5)
    advance(other, gradients, 4)
    assert not torch.equal(classes(other), masks[-1])


def test_random_gradients_go_by_the_class_of_the_live_weights() -> None:
    """SGD: the step of the true weight is the learning rate times the gradient times what its live weight shows."""
    p = torch.ones(2000)
    group = {"params": [p], "modality": "audio", "depth": 0, "modulated": True}
    options = {"rule": "sgd", "lr": 0.1, "measure": "random", "backend": "reference"}
    optimizer = ak.AIMFusedOptimizer([group], under_optimized=("fraction", 0.3), **options)
    optimizer.set_strength("audio", 0, 0.5)
    for number in range(5):
        before = optimizer.state[p]["master"].clone() if number else p.clone()
        factor = torch.where(p == before, 1.0, 0.5)
        p.grad = torch.full_like(p, 0.125)
        optimizer.step()
        torch.testing.assert_close(before - optimizer.state[p]["master"], 0.0125 * factor)
        assert number == 0 or 0 < (factor == 1.0).sum() < 2000


def test_random_classes_survive_eval_and_a_checkpoint() -> None:
    optimizer, gradients = randomly()
    set_row(optimizer, 0, "alternate")
    advance(optimizer, gradients, 5)
    live = [p.detach().clone() for p in parameters_of(optimizer)]
    optimizer.eval()
    optimizer.train()
    same_bits([p.detach() for p in parameters_of(optimizer)], live)
    saved, drawn = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(gradients.random)
    advance(optimizer, gradients, 3)
    again, _ = randomly(seed=9)
    again.load_state_dict(saved)
    same_bits([p.detach() for p in parameters_of(again)], live)
    gradients.random = drawn
    advance(again, gradients, 3)
    same_bits(frozen(again), frozen(optimizer))


# -- the moving average as an anchor ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("adamw", {"dtype": "float32"}),
        ("adamw", {"dtype": "bfloat16", "state_dtype": "int8"}),
        ("adamw", {"dtype": "bfloat16", "master": "split", "state_dtype": "bfloat16"}),
        ("rmsprop-momentum", {"dtype": "float64"}),
        ("lion", {"dtype": "float32"}),
    ],
)
def test_weights_are_withdrawn_to_their_average(backend: str, rule: str, options: dict[str, Any]) -> None:
    shapes = (((37, 113) if "state_dtype" in options else (5, 7), (33,), ()), ((40,),))
    optimizer = build(rule, shapes, **options, anchor="ema", ema_decay=0.75, backend=backend)
    set_row(optimizer, 0, "all")
    made = Twin(optimizer, RULES[rule]["rule"])
    run_twin(made, Gradients(parameters_of(optimizer)), 2 if backend == "triton" else 6)
    live = [p.detach().clone() for p in parameters_of(optimizer)]
    optimizer.eval()
    true = [p.detach().clone() for p in parameters_of(optimizer)]
    optimizer.train()
    same_bits([p.detach() for p in parameters_of(optimizer)], live)
    assert not torch.equal(true[0], live[0])


def test_a_parameter_without_gradient_keeps_its_average(backend: str) -> None:
    optimizer = build("adamw", (((7,), (40,)),), anchor="ema", ema_decay=0.5, backend=backend)
    set_row(optimizer, 0, "alternate")
    made = Twin(optimizer, "adamw")
    gradients = Gradients(parameters_of(optimizer))
    for number in range(6):
        grads: list[torch.Tensor | None] = list(gradients())
        if number in (2, 4):
            grads[1] = None
        made.step(grads)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"measure \(group 0\): expected one of 'snr', 'fisher', 'grad', 'random'"):
        build(measure="sign")
    with pytest.raises(ValueError, match=r"measure \(group 0\): 'random' is a control .* pass backend='reference'"):
        build(measure="random")
    with pytest.raises(ValueError, match=r"under_optimized \(group 0\): measure='random' draws a share"):
        build(measure="random", backend="reference", under_optimized=("absolute", 0.5))
    with pytest.raises(ValueError, match=r"ema_decay \(group 0\): anchor='ema' .* give it an ema_decay"):
        build(anchor="ema")
    optimizer = build(anchor="ema", ema_decay=0.9)
    advance(optimizer, Gradients(parameters_of(optimizer)), 1)
    before = frozen(optimizer)
    for option, value, message in (("measure", "random", "is a control"), ("ema_decay", None, "anchor='ema'")):
        kept = optimizer.param_groups[0][option]
        optimizer.param_groups[0][option] = value
        with pytest.raises(ValueError, match=message):
            advance(optimizer, Gradients(parameters_of(optimizer)), 1)
        optimizer.param_groups[0][option] = kept
        same_bits(frozen(optimizer), before)


def test_a_checkpoint_of_the_control_needs_its_backend() -> None:
    saved = randomly()[0].state_dict()
    optimizer = build("adamw", (((40, 50), (300,)),))
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=r"measure \(group 0\): 'random' is a control"):
        optimizer.load_state_dict(saved)
    same_bits(frozen(optimizer), before)


def test_groups_may_differ_and_change_in_mid_run() -> None:
    optimizer = build("adamw", (((60,),), ((60,),)))
    optimizer.param_groups[1]["measure"] = "grad"
    for group in (0, 1):
        set_row(optimizer, group, "all")
    made = Twin(optimizer, "adamw")
    gradients = Gradients(parameters_of(optimizer))
    for number in range(8):
        if number == 5:
            optimizer.param_groups[0]["measure"] = "fisher"
        made.step(gradients())
    assert np.isfinite(optimizer.statistics()[0]["under_fraction"])
