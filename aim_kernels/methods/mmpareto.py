"""MMPareto: each encoder steps along a gradient that serves the joint loss and its modality's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim.samples import Samples
from aim_kernels.methods.base import Blocks, Method
from aim_kernels.methods.losses import Loss
from aim_kernels.step.arguments import check_at_least


class MMPareto(Method):
    """``g = gamma * max(1, |g_mm + g_u| / |g*|) * g*``, ``g* = 2 k g_mm + 2 (1 - k) g_u`` for each tensor of an
    encoder.

    ``g_mm``: gradient of the joint loss; ``g_u``: of the modality's own. Over a whole encoder, k = 1/2 where
    ``g_mm . g_u > 0``; else the weights of the shortest convex combination, ``k = (|g_u|^2 - g_mm . g_u) /
    |g_mm - g_u|^2``, clamped to [0.001, 0.999]. The factor by norms is each tensor's. All other parameters (heads) get
    the sum. Source: GeWu-Lab/MMPareto_ICML2024, a339db3 (ICML 2024), gamma = 1.5.

    The published code takes four backward passes; two are enough, because the sum of all modalities' own losses gives
    each encoder its own one's gradient (the other logits do not depend on it), and the summed gradient is the sum.

    Raises ValueError for a negative ``gamma``.
    """

    writes_rows_only = False
    one_pass = False

    def __init__(
        self, blocks: Blocks, optimizer: Any, *, gamma: float = 1.5, loss: Loss | None = None, seed: int = 0
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_at_least("gamma", gamma, 0.0)
        self.gamma = gamma

    def _step_on(self, batch: Samples) -> Tensor:
        """Two backward passes and one step; returns the sum of all losses."""
        self.optimizer.zero_grad()
        outputs = self.forward(batch)
        joint, own = self.loss(outputs), self.unimodal_losses(outputs).sum()
        joint.backward(retain_graph=True)
        encoders = [self.blocks.parameters(m) for m in self.blocks.modalities]
        of_joint = [[p.grad for p in parameters] for parameters in encoders]
        for p in (p for parameters in encoders for p in parameters):
            p.grad = None
        own.backward()
        with torch.no_grad():
            for parameters, gradients in zip(encoders, of_joint, strict=True):
                self.combine(parameters, gradients)
        self.optimizer.step()
        return (joint + own).detach()

    def combine(self, parameters: Sequence[nn.Parameter], of_joint: Sequence[Tensor | None]) -> None:
        """Replaces the gradients of one encoder, which are those of its own loss."""
        stepped, mm, own = [], [], []
        for p, g in zip(parameters, of_joint, strict=True):
            if p.grad is not None or g is not None:
                stepped.append(p)
                mm.append(torch.zeros_like(p) if g is None else g)
                own.append(torch.zeros_like(p) if p.grad is None else p.grad)
        if not stepped:
            return
        mm_mm, own_own = (torch.stack(torch._foreach_norm(gs)).double().square().sum() for gs in (mm, own))
        mm_own = torch.stack([(a * b).sum() for a, b in zip(mm, own, strict=True)]).double().sum()
        apart = mm_mm + own_own - 2.0 * mm_own
        shortest = ((own_own - mm_own) / apart.clamp_min(torch.finfo(torch.float64).tiny)).clamp(0.001, 0.999)
        k = torch.where(mm_own > 0.0, torch.full_like(shortest, 0.5), shortest)
        summed = torch._foreach_norm(torch._foreach_add(mm, own))
        for p, a, b, norm in zip(stepped, mm, own, summed, strict=True):
            g = 2.0 * k * a + 2.0 * (1.0 - k) * b
            longer = norm / torch.linalg.vector_norm(g)
            # where g* vanishes the quotient is not a number or infinite, and there is nothing to lengthen
            p.grad = self.gamma * torch.where(longer.isfinite() & (longer > 1.0), longer, torch.ones_like(longer)) * g
