"""Clipping by the norm of all gradients, in the step: ``max_grad_norm``.

The norm takes one read of the gradients. The factor joins the one that every gradient is multiplied by anyway, so the
gradients are not written, and ``grad`` stays as backward left it.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aim_kernels.step.inputs import StepInputs
    from aim_kernels.step.plan import StepPlan

#: ``torch.nn.utils.clip_grads_with_norm_`` adds it to the norm that it divides by.
_EPS = 1e-6


def clipped(inputs: StepInputs, plan: StepPlan, backend: ModuleType, max_norm: float) -> tuple[StepInputs, Tensor]:
    """Inputs of the same step with its gradients scaled by ``min(1, max_norm / (norm + 1e-6))``.

    Returns:
        Those, and the norm before clipping, of unscaled gradients, as a 0-dim tensor. On a device nothing waits for it.
    """
    if not backend.ON_DEVICE:
        grad_scale = 1.0 if inputs.grad_scale is None else float(inputs.grad_scale)
        squares = torch.tensor(backend.squares(plan), dtype=torch.float64, device=plan.tables.rows.device)
        total = _of_all_processes(plan, squares).item() ** 0.5 / grad_scale
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in plan.params) else torch.float32
        norm = torch.tensor(total, dtype=dtype, device=plan.tables.rows.device)
        return inputs._replace(clip_factor=clipped_to(max_norm, total)), norm
    norm = _of_all_processes(plan, _squares(plan)).sqrt()
    norm = norm.to(torch.float64 if any(p.dtype == torch.float64 for p in plan.params) else torch.float32)
    unscaled = norm if inputs.grad_scale is None else norm / inputs.grad_scale.to(norm.device)
    # What a device divides by. A factor of 0 (an infinite norm) is a grad_scale of infinity, NaN stays NaN.
    stretch = ((unscaled + _EPS) / max_norm).clamp(min=1.0)
    scale = stretch if inputs.grad_scale is None else stretch * inputs.grad_scale.to(norm.device)
    return inputs._replace(grad_scale=scale), unscaled


def _squares(plan: StepPlan) -> Tensor:
    """The sum of squares of all gradients but the uncounted ones', as a float64 tensor beside the tables."""
    primary = plan.tables.rows.device
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad, uncounted in zip(plan.grads, plan.records["uncounted"], strict=True):
        if grad is not None and not uncounted:
            alike.setdefault((grad.device, grad.dtype), []).append(grad)
    total = torch.zeros((), dtype=torch.float64, device=primary)
    for (_, dtype), grads in alike.items():
        # In the arithmetic type: the norm of float16 gradients may be beyond float16.
        norms = torch._foreach_norm(grads, 2, dtype=torch.promote_types(dtype, torch.float32))
        total += torch.stack(norms).to(primary, torch.float64).square().sum()
    return total


def _of_all_processes(plan: StepPlan, squares: Tensor) -> Tensor:
    if plan.exchange is not None:
        plan.exchange.add_up(squares)
    return squares


def clipped_to(max_norm: float, norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)); NaN where the norm is, as in torch."""
    factor = max_norm / (norm + _EPS)
    return 1.0 if factor > 1.0 else factor
