"""OGM and OGM-GE: the stronger modality's gradients are scaled down; "GE" adds noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aim_kernels.methods.base import Blocks, Outputs
from aim_kernels.methods.coefficients import Coefficients
from aim_kernels.methods.losses import IGNORED
from aim_kernels.methods.scores import counted, mean_of_others
from aim_kernels.step.arguments import check_at_least, check_choice
from aim_kernels.step.sharding import averaged


class OGM(Coefficients):
    """Scales the stronger modality's gradients (or updates), and adds gradient noise. With ``s_m = sum_i
    softmax(logits_m[i])[y_i]``,

        r_m = s_m / mean_{m' != m} s_m';    k_m = 1 - tanh(alpha * r_m) where r_m > 1, else 1

    ``argument="r"`` is the paper (Peng et al., CVPR 2022) and the published code (GeWu-Lab/OGM-GE_CVPR2022, 343dc1d); k
    jumps at r = 1. ``"r-1"`` is smooth there (our variant). More modalities by the mean of the others are our
    generalization. ``boost`` is "OGM+" of GeWu-Lab/BML_TPAMI2024: the weaker modalities are scaled by this constant (4
    there), and the stronger one not at all.

    ``noise`` (1 in "ogm-ge"): in units of a block's gradient standard deviation in the previous step, so the first step
    is without; the published code takes each tensor's, in this step (two passes instead of one). Published code scales
    convolutions only, ours all weights, whatever their rank and name.

    Raises ValueError for a negative ``alpha`` or ``noise``, an unknown ``argument``, ``boost`` below 1.
    """

    class_scores = "the probability of the true class"

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        alpha: float = 1.0,
        noise: float = 0.0,
        argument: str = "r",
        boost: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(blocks, optimizer, noise=noise, **options)
        check_at_least("alpha", alpha, 0.0)
        check_at_least("noise", noise, 0.0)
        check_choice("argument", argument, ("r", "r-1"))
        if boost is not None:
            check_at_least("boost", boost, 1.0)
        self.alpha, self.argument, self.boost = alpha, argument, boost

    @staticmethod
    def ratios(logits: Sequence[Tensor], labels: Tensor, ignored: int = IGNORED) -> Tensor:
        """``r`` as a float64 tensor ``[M]`` on the device of the logits. ``logits``: ``[B, K]`` per modality;
        ``labels``: ``[B]``, those ``ignored`` left out."""
        counts, labels = counted(labels, ignored)
        own = [x.float().softmax(1).gather(1, labels[:, None])[:, 0] for x in logits]
        scores = torch.stack([torch.where(counts, p, 0.0).sum() for p in own]).double()
        scores = averaged(scores)
        return scores / mean_of_others(scores)

    def coefficients(self, outputs: Outputs) -> Tensor:
        ratio = self.ratios(outputs.unimodal(), outputs.labels, self.ignored)
        ahead, one = ratio > 1.0, torch.ones_like(ratio)
        if self.boost is not None:
            return torch.where(ahead.any() & ~ahead, one * self.boost, one)
        argument = ratio if self.argument == "r" else ratio - 1.0
        return torch.where(ahead, 1.0 - torch.tanh(self.alpha * argument.relu()), one)
