"""Gradients of every size: what torch.optim keeps finite stays finite, on every backend, and moves weights as there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tolerances as tol
import torch
from backends_under_test import BACKENDS, DEVICE_BACKENDS, enter
from helpers import TORCH_CLASSES, frozen, parameters_of, same_bits

import aim_kernels as ak

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter

#: From below the smallest square that float32 has to beyond the greatest.
SIZES = tuple(float(f"{digit}e{power}") for power in range(-30, 38) for digit in (1, 2, 5))
#: No two in a row agree, so that centered variances are well above zero.
FACTORS = (1.0, -0.7, 0.4, -0.9, 0.2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "adam": ("adam", {"betas": (0.8, 0.95), "eps": 1e-30}),
    "amsgrad": ("adam", {"amsgrad": True, "weight_decay": 0.1}),
    "sgd": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "adagrad": ("adagrad", {}),
    "rmsprop": ("rmsprop", {"momentum": 0.5}),
    "rmsprop-centered": ("rmsprop", {"centered": True, "alpha": 0.9}),
}
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def in_reach(found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor, where: str) -> None:
    """Asserts that every element is the expected one within some ulp of ``size``, infinities included."""
    found, expected = found.double(), expected.double()
    unit = 2 * tol.PEER_ULPS * tol.UNIT["float32"]
    off = (found - expected).abs() > unit * size.double() + tol.PEER_ULPS * tol.TINY["float32"]
    off |= found.isfinite() != expected.isfinite()
    wrong = off & (found != expected)
    assert not wrong.any(), f"{where}: {found[wrong][:4].tolist()}, expected {expected[wrong][:4].tolist()}"


def gradients(factor: float) -> torch.Tensor:
    signs = np.where(np.arange(len(SIZES)) % 2, -1.0, 1.0)
    return torch.tensor(factor * signs * np.array(SIZES)).float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_torch(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lock step, so that each step is judged on its own."""
    chosen = enter(backend, monkeypatch)
    device = "cuda" if "@" in backend else "cpu"
    rule, options = CASES[case]
    options = {"lr": 1e-2, "eps": 1e-8} | options
    p, q = (torch.ones(len(SIZES), device=where).requires_grad_() for where in (device, "cpu"))
    optimizer = ak.AIMFusedOptimizer([p], rule=rule, backend=chosen, **options)
    peer_options = {name: value for name, value in options.items() if rule != "sgd" or name != "eps"}
    peer = TORCH_CLASSES[rule]([q], foreach=False, **({"weight_decay": 0.0} if rule == "adam" else {}) | peer_options)
    moving = torch.zeros(len(SIZES), dtype=torch.bool)
    for factor in FACTORS:
        grad, before = gradients(factor), q.detach().clone()
        p.grad, q.grad = grad.to(device), grad
        optimizer.step()
        peer.step()
        assert q.isfinite().all(), "torch has left the range; the case says nothing there"
        mine = {name: value.cpu() for name, value in optimizer.state[p].items()}
        found, moved = p.detach().cpu().double(), (q.detach() - before).abs().double()
        if "grad_avg" in mine:  # a difference of squares magnifies their rounding
            square, mean = mine["square_avg"].double(), mine["grad_avg"].double()
            moved = moved * torch.where(square.isfinite(), square / (square - mean**2).clamp_min(1e-300), 1.0)
        size = before.abs() + moved + (options["lr"] * 2 * grad.abs().double() if rule == "sgd" else 0.0)
        in_reach(found, q.detach(), size, "parameter")
        for name, value in peer.state[q].items():
            if name != "step" and value is not None:
                size = value if name in SQUARES else value.abs() + 10 * grad.abs().double()
                if name == "momentum_buffer" and rule == "rmsprop":
                    size = value.abs() + 10
                in_reach(mine[name], value, size, name)
                value.copy_(mine[name])
        moving |= q.detach() != before
        with torch.no_grad():
            q.copy_(p)
    assert moving[SIZES.index(2e19)] or rule == "adagrad"


@pytest.mark.parametrize("backend", BACKENDS)
def test_means_that_are_not_finite_stay_so(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Centered: a square that overflowed is a step of zero beside a finite mean, and NaN beside an infinite one, also
    for weights that are finite again."""
    name = enter(backend, monkeypatch)
    device = "cuda" if "@" in backend else "cpu"
    p, q = (torch.ones(5, device=where).requires_grad_() for where in (device, "cpu"))
    optimizer = ak.AIMFusedOptimizer([p], rule="rmsprop", lr=1e-2, centered=True, backend=name)
    peer = torch.optim.RMSprop([q], lr=1e-2, centered=True, foreach=False)
    for grad in ([float("inf"), float("nan"), 3e22, -float("inf"), 1.0], [1.0, 1.0, 1e20, 1.0, 1.0]):
        q.grad = torch.tensor(grad)
        p.grad = q.grad.to(device)
        with torch.no_grad():
            p.fill_(1.0)
            q.fill_(1.0)
        optimizer.step()
        peer.step()
    assert q.isnan().tolist() == [True, True, False, True, False]
    torch.testing.assert_close(p.detach().cpu(), q.detach(), equal_nan=True, rtol=1e-6, atol=0.0)


#: What keeps a second moment that torch.optim has not, or has in other types.
SECOND: dict[str, dict[str, Any]] = {
    "adamw": {"rule": "adamw"},
    "sgd": {"rule": "sgd", "modulated": True},
    "sgd-momentum": {"rule": "sgd", "momentum": 0.9, "modulated": True},
    "lion": {"rule": "lion", "modulated": True},
    "bfloat16 parameters": {"rule": "adamw", "dtype": torch.bfloat16},
    "bfloat16 moments": {"rule": "adamw", "state_dtype": "bfloat16", "rounding": "nearest"},
    "8 bits": {"rule": "adamw", "state_dtype": "int8"},
    "amsgrad in 8 bits": {"rule": "adamw", "state_dtype": "int8", "amsgrad": True},
    "rmsprop in bfloat16": {"rule": "rmsprop", "state_dtype": "bfloat16", "centered": True},
    "average": {"rule": "adam", "ema_decay": 0.5},
    "float64": {"rule": "adamw", "dtype": torch.float64},
}
#: What a step may lose of a moment, relative to it: roundings to nearest, or at random.
LOSS = {"bfloat16": 2 * tol.BFLOAT16_NEAREST, "int8": 2 * tol.INT8_NEAREST}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SECOND)
def test_second_moments_stay_finite(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant gradient of 1e20 (1e155 in float64): ``v = (1 - beta2^t) g^2``, and the weights go on moving."""
    chosen = enter(backend, monkeypatch)
    options = dict(SECOND[case])
    dtype, modulated = options.pop("dtype", torch.float32), options.pop("modulated", False)
    p = torch.ones(4096, dtype=dtype, device="cuda" if "@" in backend else "cpu").requires_grad_()
    group = {"params": [p], "modality": "audio", "depth": 0, "modulated": modulated}
    optimizer = ak.AIMFusedOptimizer([group], lr=1e-2, betas=(0.9, 0.999), backend=chosen, **options)
    size = 1e155 if dtype == torch.float64 else 1e20
    decay = 0.99 if options["rule"] == "rmsprop" else 0.999
    for t in range(1, 4):
        before = p.detach().clone()
        p.grad = torch.full_like(p, size)
        optimizer.step()
        assert p.isfinite().all() and (p.detach() != before).all()
        states = optimizer.state_dict()["state"][0]
        name = "square_avg" if options["rule"] == "rmsprop" else "exp_avg_sq"
        second = ak.step.states.read_moment(states, name).double()
        expected = (1 - decay**t) * float(p.grad[0]) * float(p.grad[0])
        loss = t * LOSS.get(options.get("state_dtype", ""), 4 * tol.UNIT["float32"])
        assert ((second - expected).abs() <= loss * expected).all(), f"{second[0]}, expected {expected}"


@pytest.mark.parametrize("backend", DEVICE_BACKENDS)
def test_devices_have_the_bits_of_the_cpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for where in ("cpu", backend):
        chosen = enter(where, monkeypatch)
        device = "cuda" if "@" in where else "cpu"
        for rule, options in CASES.values():
            p = torch.ones(len(SIZES), device=device).requires_grad_()
            group = {"params": [p], "modality": "audio", "depth": 0, "modulated": True}
            optimizer = ak.AIMFusedOptimizer([group], rule=rule, backend=chosen, **options)
            optimizer.set_modulation(0, step_well=0.5, live_well=0.5)
            for factor in FACTORS:
                p.grad = gradients(factor).to(device)
                optimizer.step()
            found = frozen(optimizer)
            del found["statistics"]
            results.append([parameters_of(optimizer), found])
    same_bits(results[: len(CASES)], results[len(CASES) :])
