"""max_grad_norm: what clip_grad_norm_ before the step gives, with the gradients left alone."""

from __future__ import annotations

import copy
from typing import Any

import helpers
import pytest
import torch
from backends_under_test import DEVICE_BACKENDS, enter
from helpers import Gradients, assign, build, parameters_of, set_row

import aim_kernels as ak

SHAPES = (((5, 7), (33,), (), (0,)), ((5000,), (1,)))


def pair(backend: str, dtype: str = "float32", **options: Any) -> tuple[ak.AIMFusedOptimizer, ak.AIMFusedOptimizer]:
    """One that clips in its step, one whose gradients are clipped beforehand."""
    ours, usual = (build("adam", SHAPES, dtype, backend=backend, **options) for _ in range(2))
    for optimizer in (ours, usual):
        set_row(optimizer, 0, "chain")
    return ours, usual


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["cpu", "reference", *DEVICE_BACKENDS])
@pytest.mark.parametrize("largest", [0.5, 1e6], ids=["clipped", "within"])
def test_equals_clip_grad_norm(backend: str, dtype: str, largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    name = enter(backend, monkeypatch)
    ours, usual = pair(name, dtype)
    ours.max_grad_norm = largest
    gradients = Gradients(parameters_of(ours))
    # The usual way rounds clipped gradients, and the norm, to the gradients' type. A device gets the factor in float32.
    rtol = {"float32": 2e-6, "float64": 1e-12, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    if dtype == "float64" and backend not in ("cpu", "reference"):
        rtol = 2e-7
    for _ in range(3):
        grads = gradients()
        assign(parameters_of(ours), [g.clone() for g in grads])
        assign(parameters_of(usual), [g.clone() for g in grads])
        ours.step()
        exact = torch.cat([g.double().flatten() for g in grads]).norm()
        assert isinstance(ours.grad_norm, torch.Tensor) and ours.grad_norm.dim() == 0
        torch.testing.assert_close(ours.grad_norm.double(), exact, rtol=1e-6 if dtype != "float64" else 1e-12, atol=0)
        torch.nn.utils.clip_grad_norm_(parameters_of(usual), largest)
        usual.step()
        for p, g in zip(parameters_of(ours), grads, strict=True):
            assert torch.equal(p.grad, g), "the gradients themselves stay as they are"
        norms = [torch.tensor([row["grad_norm"] for row in o.statistics()], dtype=torch.float64) for o in (ours, usual)]
        torch.testing.assert_close(*norms, rtol=rtol, atol=0)
    if dtype in ("float32", "float64"):
        for p, q in zip(parameters_of(ours), parameters_of(usual), strict=True):
            torch.testing.assert_close(p, q, rtol=20 * rtol, atol=20 * rtol)


@pytest.mark.parametrize("backend", ["cpu", "reference", *DEVICE_BACKENDS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norms_that_are_not_finite(backend: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch: NaN everywhere, or zero gradients beside the infinite one's NaN."""
    name = enter(backend, monkeypatch)
    mine = torch.ones(40, device=helpers.DEVICE).requires_grad_()
    ours = ak.AIMFusedOptimizer([mine], rule="sgd", backend=name, max_grad_norm=1.0)
    theirs = torch.ones(40, requires_grad=True)
    grad = torch.linspace(-1, 1, 40)
    grad[3] = value
    mine.grad, theirs.grad = grad.to(helpers.DEVICE), grad.clone()
    ours.step()
    norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
    torch.optim.SGD([theirs], lr=1e-3).step()
    torch.testing.assert_close(mine.cpu(), theirs, equal_nan=True)
    assert ours.grad_norm is not None
    torch.testing.assert_close(ours.grad_norm.cpu(), norm, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference", *DEVICE_BACKENDS])
def test_a_norm_beyond_float16(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled gradients are large; torch's own norm of them is infinite, and the step would vanish."""
    name = enter(backend, monkeypatch)
    p = torch.zeros(20, dtype=torch.float16, device=helpers.DEVICE).requires_grad_()
    optimizer = ak.AIMFusedOptimizer([p], lr=1.0, rule="sgd", backend=name, max_grad_norm=1.0)
    p.grad = torch.full_like(p, 30000.0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    torch.testing.assert_close(optimizer.grad_norm.cpu(), torch.tensor(30000.0 * 20**0.5))
    torch.testing.assert_close(p.detach().cpu(), torch.full((20,), -(20**-0.5), dtype=torch.float16))


def test_squares_that_leave_float32() -> None:
    """In one tile of the norm's kernel or over several; torch's own norm is infinite there."""
    for size in (1, 17, 5000, 20000):
        for scale in (1e30, 1e-30):
            p = torch.zeros(size, requires_grad=True)
            optimizer = ak.AIMFusedOptimizer([p], rule="sgd", backend="cpu", max_grad_norm=1.0)
            p.grad = torch.full((size,), scale)
            optimizer.step()
            assert optimizer.grad_norm is not None
            assert float(optimizer.grad_norm) == pytest.approx(scale * size**0.5, rel=1e-6)


@pytest.mark.parametrize("backend", ["cpu", *DEVICE_BACKENDS])
def test_with_a_fused_gradient_scaler(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm is of unscaled gradients."""
    name = enter(backend, monkeypatch)
    ours, usual = pair(name, max_grad_norm=0.5)
    grads = Gradients(parameters_of(ours))()
    assign(parameters_of(ours), [g * 1024 for g in grads])
    assign(parameters_of(usual), [g.clone() for g in grads])
    device = parameters_of(ours)[0].device
    ours.grad_scale, ours.found_inf = torch.tensor(1024.0, device=device), torch.tensor(0.0, device=device)
    ours.step()
    usual.step()
    torch.testing.assert_close(ours.grad_norm, usual.grad_norm, rtol=1e-6, atol=0)
    for p, q in zip(parameters_of(ours), parameters_of(usual), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_same_bits_on_any_number_of_threads() -> None:
    norms = set()
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ours, _ = pair("cpu", max_grad_norm=0.5)
        assign(parameters_of(ours), Gradients(parameters_of(ours))())
        ours.step()
        assert ours.grad_norm is not None
        norms.add(float(ours.grad_norm))
    torch.set_num_threads(before)
    assert len(norms) == 1


def test_may_be_set_between_steps_and_is_copied() -> None:
    ours, usual = pair("cpu")
    ours.max_grad_norm = 0.5
    assert copy.deepcopy(ours).max_grad_norm == 0.5
    gradients = Gradients(parameters_of(ours))
    for step in range(3):
        ours.max_grad_norm = None if step == 1 else 0.5
        grads = gradients()
        for optimizer in (ours, usual):
            assign(parameters_of(optimizer), [g.clone() for g in grads])
        if step != 1:
            torch.nn.utils.clip_grad_norm_(parameters_of(usual), 0.5)
        ours.step()
        usual.step()
    for p, q in zip(parameters_of(ours), parameters_of(usual), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [-1.0, float("nan"), "x"])
def test_bad_norms_are_refused(value: Any) -> None:
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="max_grad_norm"):
        ak.AIMFusedOptimizer([p], max_grad_norm=value)
    optimizer = ak.AIMFusedOptimizer([p])
    optimizer.max_grad_norm = value
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_without_it_there_is_no_norm() -> None:
    ours, _ = pair("cpu")
    for largest in (0.5, None):
        ours.max_grad_norm = largest
        assign(parameters_of(ours), Gradients(parameters_of(ours))())
        ours.step()
        assert (ours.grad_norm is None) == (largest is None)
