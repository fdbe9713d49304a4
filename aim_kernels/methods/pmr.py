"""PMR: the features of the modality that is behind are drawn to prototypes of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aim_kernels.aim.samples import Samples
from aim_kernels.methods.base import Blocks, Method, Outputs, check_window
from aim_kernels.methods.losses import Loss
from aim_kernels.methods.scores import counted, evaluation_mode, mean_of_others, wide
from aim_kernels.step.arguments import check_at_least, check_choice, check_within
from aim_kernels.step.sharding import averaged


class PMR(Method):
    """``loss = loss(logits) + alpha * sum_m w_m CE(-|z_m - P_m|)``, with a prototype ``P_m[k]`` a class and modality.

    ``w_m``: 1 for a modality that is behind the mean of the others, else 0 ("one": fanyunfeng-bit/Modal-Imbalance-PMR,
    3615e48), or ``min(mean_{m' != m} s_m' / s_m - 1, 1)`` where that is positive ("ratio": Fan et al., CVPR 2023).
    ``s_m``: sum of the true class's probability under ``softmax(-|z_m - P_m|)``, Euclidean distances.

    Each :meth:`update` makes class means of the features of the samples that it is given (true weights, evaluation
    mode) and ``P <- momentum * P + (1 - momentum) * mean``; give it as much of the training set as can be afforded (the
    published code takes all of it). A class without a sample keeps its prototype; one that never had a sample has none,
    and its samples no prototype loss. Before the first update it is joint training. The paper's entropy term for the
    dominant modality is left out, as in the published code.

    Raises ValueError for a negative ``alpha``, ``momentum`` outside [0, 1], an unknown ``weighting``.
    """

    writes_rows_only = False
    reads_rows = True
    class_scores = "a prototype of each class"

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        alpha: float = 1.0,
        momentum: float = 0.5,
        weighting: str = "one",
        starts: int = 0,
        ends: int | None = None,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_at_least("alpha", alpha, 0.0)
        check_within("momentum", momentum, 0.0, 1.0)
        check_choice("weighting", weighting, ("one", "ratio"))
        check_window(starts, ends)
        self.alpha, self.momentum, self.weighting, self.starts, self.ends = alpha, momentum, weighting, starts, ends
        self.prototypes: list[Tensor] | None = None  # [K, features] a modality
        self.seen: Tensor | None = None  # [K]: which classes have one

    @torch.no_grad()
    def _update(self, samples: Samples, held_out: Samples | None) -> None:
        """Moves the prototypes. Raises ValueError without labels."""
        labels = samples.labels
        if labels is None:
            raise ValueError("PMR makes a prototype of each class; pass labels")
        with self.optimizer.true_parameters(), evaluation_mode(self.blocks.model):
            outputs = self.forward(samples)
        counts, labels = counted(labels, self.ignored)
        classes = torch.arange(outputs.logits.shape[1], device=labels.device)
        members = (counts & (classes[:, None] == labels)).to(wide(outputs.logits).dtype)
        count = averaged(members.sum(1))
        here = count > 0
        sums = [averaged(members @ self.features(outputs, m)) for m in range(len(self.blocks.modalities))]
        means = [torch.where(here[:, None], total / count[:, None], 0.0) for total in sums]
        if self.prototypes is None or self.seen is None:
            self.prototypes, self.seen = means, here
        else:
            old = self.seen[:, None]
            moved = [
                torch.where(old, self.momentum * p + (1.0 - self.momentum) * mean, mean)
                for p, mean in zip(self.prototypes, means, strict=True)
            ]
            self.prototypes = [
                torch.where(here[:, None], new, p) for new, p in zip(moved, self.prototypes, strict=True)
            ]
            self.seen = self.seen | here

    def features(self, outputs: Outputs, m: int) -> Tensor:
        """``[B, C]`` of modality m."""
        return wide(outputs.per_sample(m)).flatten(1)

    def loss(self, outputs: Outputs) -> Tensor:
        joint = super().loss(outputs)
        if self.prototypes is None or not self.active:
            return joint
        counts, labels = counted(outputs.labels, self.ignored)
        own = torch.stack(
            [self.log_probabilities(m, self.features(outputs, m), labels) for m in range(len(self.blocks.modalities))]
        )
        known = self.known(labels) & counts
        with torch.no_grad():
            scores = averaged(torch.where(known, own.exp(), 0.0).double().sum(1))
            behind = mean_of_others(scores) / scores - 1.0
            weight = (behind > 0.0).double() if self.weighting == "one" else behind.clamp(0.0, 1.0)
        losses = -torch.where(known, own, torch.zeros_like(own)).sum(1) / counts.sum().clamp_min(1)
        return joint + self.alpha * (weight.to(losses.dtype) * losses).sum()

    def known(self, labels: Tensor) -> Tensor:
        """Which samples are of a class that has a prototype; ``[B]``."""
        assert self.seen is not None
        return self.seen[labels]

    def log_probabilities(self, m: int, z: Tensor, labels: Tensor) -> Tensor:
        """``log softmax(-|z - P_m|)[y]``, ``[B]``, of features ``[B, C]``; differentiable."""
        assert self.prototypes is not None and self.seen is not None
        distance = torch.cdist(z, self.prototypes[m], compute_mode="donot_use_mm_for_euclid_dist")
        similarity = (-distance).masked_fill(~self.seen, -torch.inf)
        return similarity.log_softmax(1).gather(1, labels[:, None])[:, 0]

    def state_dict(self) -> dict[str, Any]:
        prototypes = None if self.prototypes is None else [p.clone() for p in self.prototypes]
        seen = None if self.seen is None else self.seen.clone()
        return {**super().state_dict(), "prototypes": prototypes, "seen": seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        prototypes, seen = state["prototypes"], state["seen"]
        self.prototypes = None if prototypes is None else [p.to(self.device, copy=True) for p in prototypes]
        self.seen = None if seen is None else seen.to(self.device, copy=True)
