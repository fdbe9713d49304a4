"""CGGM: gradients by how much each modality's accuracy gained, and a loss on their directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.methods.base import Blocks, Outputs
from aim_kernels.methods.coefficients import Coefficients
from aim_kernels.methods.scores import accuracies, counted, wide
from aim_kernels.methods.trees import detached
from aim_kernels.step.arguments import check_at_least


class CGGM(Coefficients):
    """``k_m = rou * (sum_{m'} d_m' - d_m) / sum_{m'} d_m'``, with the gain ``d_m`` of the accuracy of modality m's own
    logits from one batch to the next.

    Source: zrguo/CGGM, 21e428c. There the sum has 1e-8 added, so k reaches 1e8 where it is 0; here all k are ``rou``
    where the sum is smaller than ``guard`` (0: as published). All the same the sum may be negative, or a k large:
    ``bounds=(low, high)`` clamps ``k / rou``; None leaves it as published. The published code also clips the gradient
    norm after scaling; ``max_grad_norm`` of the optimizer clips before.

    ``direction`` is the weight of ``(sum_m |c_m| - sum_m c_m cos_m) / M``, with ``c = k / rou`` of the previous step.
    The published code takes cosines between head weights, although the paper speaks of gradients
    (zrguo/CGGM issue 6); ours are between the gradients of each modality's own and of the joint cross entropy with
    respect to the logits, which have one shape whatever the heads are (our reading).

    ``head_weight`` trains heads that only ``blocks.unimodal`` has: that many times their cross entropy, on features
    that pass nothing back (the published code trains them so, with an optimizer of their own).

    Raises ValueError for a negative number, or ``bounds`` that are not a pair in order.
    """

    class_scores = "the accuracy of each modality"

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        rou: float = 1.0,
        guard: float = 1e-6,
        bounds: tuple[float, float] | None = None,
        direction: float = 0.0,
        head_weight: float = 0.0,
        biases: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(blocks, optimizer, biases=biases, **options)
        for name, value in (("rou", rou), ("guard", guard), ("direction", direction), ("head_weight", head_weight)):
            check_at_least(name, value, 0.0)
        if bounds is not None and not bounds[0] <= bounds[1]:
            raise ValueError(f"bounds must be (low, high) with low <= high, got {bounds}")
        self.rou, self.guard, self.bounds = rou, guard, bounds
        self.direction, self.head_weight = direction, head_weight
        self.writes_rows_only = not (direction or head_weight)
        zeros = torch.zeros(len(blocks.modalities), dtype=torch.float64, device=self.device)
        self.accuracy, self.previous = zeros, zeros.clone()
        self.steps = 0

    def loss(self, outputs: Outputs) -> Tensor:
        loss = super().loss(outputs)
        if self.direction and self.steps:
            loss = loss + self.direction * self.direction_loss(outputs)
        if self.head_weight:
            own = self.blocks.unimodal([detached(z) for z in outputs.returned])
            loss = loss + self.head_weight * torch.stack([self.loss_of(x, outputs.labels) for x in own]).sum()
        return loss

    def direction_loss(self, outputs: Outputs) -> Tensor:
        """See the class; differentiable, 0-dim."""
        counts, labels = counted(outputs.labels, self.ignored)
        target = nn.functional.one_hot(labels, outputs.logits.shape[1])
        away = [wide(x).softmax(1) - target for x in (outputs.logits, *outputs.unimodal())]
        joint, *own = [torch.where(counts[:, None], g, 0.0).flatten() for g in away]
        cosines = torch.stack([nn.functional.cosine_similarity(g, joint, dim=0) for g in own])
        c = self.previous.to(cosines.dtype)
        return (c.abs().sum() - (c * cosines).sum()) / len(own)

    def coefficients(self, outputs: Outputs) -> Tensor:
        accuracy = accuracies(outputs.unimodal(), outputs.labels, self.ignored)
        gain = accuracy - self.accuracy
        total = gain.sum() + 1e-8
        c = (total - gain) / total
        c = torch.where(gain.sum().abs() < self.guard, torch.ones_like(c), c)
        if self.bounds is not None:
            c = c.clamp(*self.bounds)
        self.accuracy, self.previous, self.steps = accuracy, c, self.steps + 1
        return self.rou * c

    def state_dict(self) -> dict[str, Any]:
        mine = {"accuracy": self.accuracy.clone(), "previous": self.previous.clone(), "steps": self.steps}
        return {**super().state_dict(), **mine}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.accuracy, self.previous = (state[name].to(self.device, copy=True) for name in ("accuracy", "previous"))
        self.steps = int(state["steps"])
