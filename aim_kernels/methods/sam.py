"""SAM, and M-SAM: the gradient is taken a small step uphill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aim_kernels.aim.samples import Samples
from aim_kernels.methods.base import Blocks, Method, Outputs, gradients_of
from aim_kernels.methods.coalitions import shapley_losses, shapley_values
from aim_kernels.methods.losses import Loss, of_classes
from aim_kernels.step.arguments import check_at_least, check_choice


class SAM(Method):
    """``g = grad L(theta + e)``, ``e = rho * grad L(theta) / |grad L(theta)|`` over all parameters (Foret et al.,
    2021).

    Two forward and backward passes a step; weights are perturbed and put back, to the bit. Dropout draws anew in the
    second, and running statistics see both. Raises ValueError for a negative ``rho``.
    """

    writes_rows_only = False
    one_pass = False

    def __init__(
        self, blocks: Blocks, optimizer: Any, *, rho: float = 0.05, loss: Loss | None = None, seed: int = 0
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_at_least("rho", rho, 0.0)
        self.rho = rho

    def _step_on(self, batch: Samples) -> Tensor:
        """Returns the loss of the unperturbed weights."""
        self.optimizer.zero_grad()
        outputs = self.forward(batch)
        loss = self.loss(outputs)
        loss.backward()
        stepped: list[Tensor] = [p for p in self.blocks.model.parameters() if p.grad is not None]
        first = gradients_of(stepped)
        kept = [p.detach().clone() for p in stepped]
        with torch.no_grad():
            for p, g, factor in zip(stepped, first, self.reach(outputs, stepped, first), strict=True):
                p.add_(g * (self.rho * factor))
        try:
            for p in stepped:
                p.grad = None  # not zero_grad(), which may keep the tensors
            self.loss(self.forward(batch)).backward()
        finally:
            with torch.no_grad():
                torch._foreach_copy_(stepped, kept)
        self.combine(outputs, stepped, first)
        self.optimizer.step()
        return loss.detach()

    def reach(self, outputs: Outputs, parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """``1 / |grad L|`` for each parameter that is perturbed, 0 for others."""
        norm = torch.stack(torch._foreach_norm(gradients)).double().square().sum().sqrt()
        return [1.0 / norm.clamp_min(1e-12)] * len(gradients)

    def combine(self, outputs: Outputs, parameters: Sequence[Tensor], first: list[Tensor]) -> None:
        """Makes the step's gradient of those at ``theta + e`` (in ``grad``) and at ``theta``."""


class MSAM(SAM):
    """``g = v grad L(theta + e) + (1 - v) grad L(theta)``, ``v`` the dominant modality's share of the Shapley values.

    M-SAM (arXiv 2510.24919; no code was found): ``L_d = v L`` is the dominant modality's part of the loss, the rest the
    others', and only L_d is flattened: ``e = rho * grad L_d / |grad L_d|``, in which v cancels. ``v``: Shapley values
    of the mean probability of the true class, from this batch, negative ones as 0; without class numbers ``[B]``, of
    what features take from the loss (our reading). ``perturb="all"``:
    every parameter, as the formula; "dominant": the dominant modality's encoder only (our variant).

    Raises ValueError for a negative ``rho``, an unknown ``perturb``.
    """

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        rho: float = 0.05,
        perturb: str = "all",
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(blocks, optimizer, rho=rho, loss=loss, seed=seed)
        check_choice("perturb", perturb, ("all", "dominant"))
        self.perturb = perturb

    def shares(self, outputs: Outputs) -> Tensor:
        """Float64 ``[M]``, adding up to 1."""
        labels, fuse = outputs.labels, self.blocks.fuse
        flat = isinstance(labels, Tensor) and labels.dim() == 1 and labels.dtype == torch.int64
        if of_classes(self.loss_function) and flat and outputs.logits.dim() == 2:
            phi = shapley_values(fuse, outputs.returned, labels, self.ignored).clamp_min(0.0)
        else:
            phi = shapley_losses(fuse, outputs.returned, lambda x: self.loss_of(x, labels)).clamp_min(0.0)
        total = phi.sum()
        return torch.where(total > 0.0, phi / total.clamp_min(1e-12), torch.full_like(phi, 1.0 / len(phi)))

    def reach(self, outputs: Outputs, parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        self.share = self.shares(outputs)
        if self.perturb == "all":
            return super().reach(outputs, parameters, gradients)
        owner = {id(p): m for m, name in enumerate(self.blocks.modalities) for p in self.blocks.parameters(name)}
        leads = (torch.arange(len(self.share), device=self.share.device) == self.share.argmax()).double()
        off = leads.new_zeros(())
        chosen = [leads[owner[id(p)]] if id(p) in owner else off for p in parameters]
        squares = torch.stack(torch._foreach_norm(gradients)).double().square()
        norm = (squares * torch.stack(chosen)).sum().sqrt()
        return [c / norm.clamp_min(1e-12) for c in chosen]

    @torch.no_grad()
    def combine(self, outputs: Outputs, parameters: Sequence[Tensor], first: list[Tensor]) -> None:
        v = self.share.max()
        for p, g in zip(parameters, first, strict=True):
            p.grad = (1.0 - v) * g if p.grad is None else v * p.grad + (1.0 - v) * g
