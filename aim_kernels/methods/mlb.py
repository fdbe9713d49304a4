"""MLB / MLGM: several losses, and gradients that are boosted as well as damped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aim_kernels.methods.base import Blocks, Outputs
from aim_kernels.methods.coefficients import Coefficients
from aim_kernels.methods.scores import mean_of_others, true_class_scores
from aim_kernels.step.arguments import check_at_least


class MLB(Coefficients):
    """``k_m = 1 + (beta_m - 1) * tanh(alpha * (r_m - 1))``, ``r_m = mean_{m' != m} s_m' / s_m``, ``beta_m = beta_max``
    where ``r_m > 1``, else 2.

    ``s_m``: sum of the true class's probability by the modality's own logits. A modality that is behind is boosted, up
    to ``beta_max``; one that is ahead is damped, towards 0; k is continuous at r = 1. The loss is cross entropy of the
    joint logits and ``unimodal_weight`` times that of each modality's own. Source of the formula: kkontras/MLB, 357b5ce
    (which scales biases too, hence ``biases=True``); the defaults of ``alpha`` and ``beta_max`` are ours.

    Raises ValueError for a negative ``alpha`` or ``unimodal_weight``, ``beta_max`` below 1.
    """

    class_scores = "the probability of the true class"

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        alpha: float = 1.0,
        beta_max: float = 2.0,
        unimodal_weight: float = 1.0,
        biases: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(blocks, optimizer, biases=biases, **options)
        check_at_least("alpha", alpha, 0.0)
        check_at_least("beta_max", beta_max, 1.0)
        check_at_least("unimodal_weight", unimodal_weight, 0.0)
        self.alpha, self.beta_max, self.unimodal_weight = alpha, beta_max, unimodal_weight
        self.writes_rows_only = unimodal_weight == 0.0

    def loss(self, outputs: Outputs) -> Tensor:
        joint = super().loss(outputs)
        if self.unimodal_weight == 0.0:
            return joint
        return joint + self.unimodal_weight * self.unimodal_losses(outputs).sum()

    def coefficients(self, outputs: Outputs) -> Tensor:
        scores = true_class_scores(outputs.unimodal(), outputs.labels, self.ignored)
        excess = mean_of_others(scores) / scores - 1.0
        reach = torch.where(excess > 0.0, self.beta_max - 1.0, 1.0)
        return 1.0 + reach * torch.tanh(self.alpha * excess)
