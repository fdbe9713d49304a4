"""A row of ones is torch.optim: its for-loop implementation is the peer, one step at a time and over many."""

from __future__ import annotations

from typing import Any

import pytest
import tolerances as tol
import torch
from helpers import (
    CLASSES,
    DTYPES,
    GRADIENT_LAYOUTS,
    PARAMETER_LAYOUTS,
    TORCH_CLASSES,
    Gradients,
    assign,
    parameter,
    same_bits,
)

import aim_kernels as ak

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw-default": ("adamw", {}),
    "adamw": ("adamw", {"lr": 0.02, "betas": (0.8, 0.97), "eps": 1e-4, "weight_decay": 0.2}),
    "adamw-maximize": ("adamw", {"lr": 0.02, "weight_decay": 0.2, "maximize": True}),
    "adamw-zero-betas": ("adamw", {"lr": 0.02, "betas": (0.0, 0.0), "weight_decay": 0.2}),
    "adam-default": ("adam", {}),
    "adam": ("adam", {"lr": 0.02, "weight_decay": 0.2}),
    "adam-maximize": ("adam", {"lr": 0.02, "weight_decay": 0.2, "maximize": True}),
    "sgd-default": ("sgd", {}),
    "sgd": ("sgd", {"lr": 0.1, "weight_decay": 0.2}),
    "sgd-maximize": ("sgd", {"lr": 0.1, "weight_decay": 0.2, "maximize": True}),
    "sgd-momentum": ("sgd", {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9}),
    "sgd-dampening": ("sgd", {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "sgd-nesterov": ("sgd", {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9, "nesterov": True}),
    # A short memory, so that the maximum is often an earlier second moment.
    "adamw-amsgrad": ("adamw", {"lr": 0.02, "betas": (0.8, 0.7), "weight_decay": 0.2, "amsgrad": True}),
    "adam-amsgrad": ("adam", {"lr": 0.02, "betas": (0.8, 0.7), "weight_decay": 0.2, "amsgrad": True, "maximize": True}),
    "adagrad-default": ("adagrad", {}),
    "adagrad": ("adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.2, "initial_accumulator_value": 0.3}),
    "adagrad-maximize": ("adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.2, "maximize": True}),
    "rmsprop-default": ("rmsprop", {}),
    "rmsprop": ("rmsprop", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.2}),
    "rmsprop-maximize": ("rmsprop", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.2, "maximize": True}),
    "rmsprop-momentum": ("rmsprop", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.2, "momentum": 0.8}),
    "rmsprop-centered": ("rmsprop", {"lr": 0.01, "alpha": 0.8, "weight_decay": 0.2, "centered": True}),
    "rmsprop-both": ("rmsprop", {"lr": 0.01, "alpha": 0.8, "weight_decay": 0.2, "centered": True, "momentum": 0.8}),
}
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
SHAPES = [(5, 7), (2, 3, 4, 3), (70,), (), (1,), (0,)]


def pair(
    case: str,
    dtype: str = "float32",
    layouts: tuple[str, ...] = ("contiguous",),
    backend: str = "cpu",
    *,
    of_class: bool = False,
) -> tuple[Any, ...]:
    """The optimizer, its torch peer, and the parameters of both. ``of_class``: by the class of the rule, whose defaults
    are torch's own; else by ``AIMFusedOptimizer``, whose defaults the peer is given."""
    rule, options = CASES[case]
    ours, theirs = (
        [parameter(shape, dtype, layouts[i % len(layouts)], i) for i, shape in enumerate(SHAPES)] for _ in range(2)
    )
    peer_options: dict[str, Any] = {"foreach": False}
    peer_options |= {"fused": False} if rule in ("adamw", "adam") else {}
    if of_class:
        optimizer = CLASSES[rule](ours, backend=backend, **options)
    else:
        optimizer = ak.AIMFusedOptimizer(ours, rule=rule, backend=backend, **options)
        peer_options |= {"lr": 1e-3} | ({"eps": 1e-8} if rule == "adagrad" else {})
    return optimizer, TORCH_CLASSES[rule](theirs, **(peer_options | options)), ours, theirs


def condition(group: dict[str, Any], state: dict[str, Any]) -> torch.Tensor | float:
    """By how much a root magnifies the rounding of what it is taken of."""
    if not group.get("centered"):
        return 1.0
    variance = state["square_avg"] - state["grad_avg"] ** 2
    return state["square_avg"] / variance.clamp_min(1e-30)


def near(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, ulps: float, where: str) -> None:
    unit = 2 * tol.UNIT["float64" if found.dtype == torch.float64 else "float32"]
    worst = ((found.double() - expected.double()).abs() / (unit * scale.double().clamp_min(1e-30))).flatten()
    assert worst.numel() == 0 or worst.max() <= ulps, f"{where}: {worst.max():.1f} ulp"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of_class", [False, True], ids=["rule", "class"])
def test_a_few_ulp_a_step(of_class: bool, case: str, dtype: str, backend: str) -> None:
    optimizer, peer, ours, theirs = pair(case, dtype, backend=backend, of_class=of_class)
    gradients = Gradients(ours)
    for _ in range(20):
        grads = gradients()
        before = [p.detach().clone() for p in ours]
        assign(ours, grads)
        assign(theirs, [g.clone() for g in grads])
        optimizer.step()
        peer.step()
        for p, q, old, grad in zip(ours, theirs, before, grads, strict=True):
            group, state = peer.param_groups[0], optimizer.state[p]
            magnified = condition(group, state)
            size = p.detach().abs() + magnified * (p.detach() - old).abs() + old.abs()
            if CASES[case][0] == "sgd":
                size = size + group["lr"] * grad.abs()
            near(p.detach(), q.detach(), size, tol.PEER_ULPS, "parameter")
            for name, value in peer.state[q].items():
                if name != "step" and value is not None:
                    mine = state[name]
                    reach = grad.abs() + 0.2 * old.abs()
                    if name == "momentum_buffer" and "square_avg" in state:  # of directions
                        reach = magnified * (
                            reach / (state["square_avg"] / magnified).sqrt().clamp_min(1e-8) + mine.abs()
                        )
                    scale = mine.abs() + (reach**2 if name in SQUARES else reach)
                    near(mine, value, scale, tol.PEER_ULPS, name)
                    value.copy_(mine)
            with torch.no_grad():
                q.copy_(p)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of_class", [False, True], ids=["rule", "class"])
def test_trajectories_stay_together(of_class: bool, case: str) -> None:
    optimizer, peer, ours, theirs = pair(case, "float64", of_class=of_class)
    gradients = Gradients(ours)
    for _ in range(50):
        grads = gradients()
        assign(ours, grads)
        assign(theirs, [g.clone() for g in grads])
        optimizer.step()
        peer.step()
    for p, q in zip(ours, theirs, strict=True):
        # Fifty steps of rounding in float64, relative to weights of order one.
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "case",
    ["adamw", "sgd-momentum", "sgd-nesterov", "adam-amsgrad", "adagrad", "rmsprop", "rmsprop-momentum", "rmsprop-both"],
)
def test_16_bit_parameters_are_float32_steps_rounded(case: str, dtype: str) -> None:
    """torch keeps 16-bit state, so the peer is a float32 run that is given the rounded weights after every step."""
    optimizer, _, ours, _ = pair(case, dtype)
    _, peer, _, theirs = pair(case)
    gradients = Gradients(ours)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    eps = torch.finfo(DTYPES[dtype]).eps
    for _ in range(20):
        grads = gradients()
        assign(ours, grads)
        assign(theirs, [g.float() for g in grads])
        optimizer.step()
        peer.step()
        for p, q in zip(ours, theirs, strict=True):
            # Half an ulp of the storage type, and a little for a neighbour chosen across a rounding boundary.
            torch.testing.assert_close(p.detach().float(), q.detach(), rtol=0.51 * eps, atol=2.0**-24)
            with torch.no_grad():
                q.copy_(p)


@pytest.mark.parametrize("memory", PARAMETER_LAYOUTS)
@pytest.mark.parametrize("grad_layout", GRADIENT_LAYOUTS)
def test_gradient_strides_differ_from_parameter_strides(memory: str, grad_layout: str) -> None:
    """Where torch's fused CPU kernels go silently wrong."""
    optimizer, peer, ours, theirs = pair("adamw", "float64", (memory,))
    gradients = Gradients(ours, layouts=(grad_layout,))
    for _ in range(4):
        grads = gradients()
        assign(ours, grads)
        assign(theirs, [g.clone() for g in grads])
        optimizer.step()
        peer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "case",
    [
        *("adamw", "adam", "adam-default", "sgd", "sgd-default", "sgd-momentum", "adamw-amsgrad", "adagrad"),
        *("adagrad-default", "rmsprop", "rmsprop-momentum", "rmsprop-centered", "rmsprop-both"),
    ],
)
def test_non_finite_gradients(case: str, backend: str) -> None:
    """Counted, and otherwise as torch does; the elements beside them and the steps after them are untouched."""
    optimizer, peer, ours, theirs = pair(case, backend=backend)
    gradients = Gradients(ours)
    for number in range(4):
        grads = gradients()
        if number == 1:
            grads[0][0, 1], grads[0][2, 3], grads[2][5] = float("nan"), float("inf"), float("-inf")
        assign(ours, grads)
        assign(theirs, [g.clone() for g in grads])
        optimizer.step()
        peer.step()
        assert optimizer.statistics()[0]["nonfinite"] == (3 if number == 1 else 0)
    for p, q in zip(ours, theirs, strict=True):
        same_bits(torch.isfinite(p.detach()), torch.isfinite(q.detach()))
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("adamw", {}),
        ("adamw", {"amsgrad": True}),
        ("adagrad", {}),
        ("adagrad", {"initial_accumulator_value": 1e-20}),
        ("rmsprop", {}),
        ("rmsprop", {"momentum": 0.9}),
        ("rmsprop", {"centered": True}),
    ],
    ids=str,
)
def test_extreme_gradients(rule: str, options: dict[str, Any], eps: float) -> None:
    """Squares that overflow or underflow, and an eps of zero, as torch has them."""
    values = torch.tensor([1e30, -1e30, 1e-30, -1e-25, 1e-38, 0.0, 3e38, 1.0])
    ours, theirs = (torch.ones(8, requires_grad=True) for _ in range(2))
    optimizer = ak.AIMFusedOptimizer([ours], rule=rule, eps=eps, backend="cpu", **options)
    peer = TORCH_CLASSES[rule]([theirs], lr=1e-3, eps=eps, foreach=False, **options)
    for _ in range(3):
        ours.grad, theirs.grad = values.clone(), values.clone()
        optimizer.step()
        peer.step()
    usual = values.abs() > 1e-18 if eps == 0.0 else torch.ones(8, dtype=torch.bool)
    if options.get("centered"):
        # Where the squares of both moments overflow their difference is a NaN, unless it is contracted to an FMA.
        usual &= values.abs() < 1e18
    torch.testing.assert_close(ours[usual], theirs[usual], rtol=1e-6, atol=1e-7, equal_nan=True)
