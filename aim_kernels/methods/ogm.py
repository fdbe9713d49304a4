"""OGM and OGM-GE: the stronger modality's gradients are scaled down; "GE" adds noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aim_kernels.methods.base import Blocks, Outputs, check_at_least, check_choice
from aim_kernels.methods.coefficients import Coefficients
from aim_kernels.methods.ogm_ge import OGMGE


class OGM(Coefficients):
    """``k_m = 1 - tanh(alpha * r_m)`` where ``r_m = s_m / mean_{m' != m} s_m' > 1``, else 1: see :class:`OGMGE`.

    ``argument="r"`` is the paper (Peng et al., CVPR 2022) and the published code (GeWu-Lab/OGM-GE_CVPR2022, 343dc1d); k
    jumps at r = 1. ``"r-1"`` is smooth there (our variant). ``boost`` is "OGM+" of GeWu-Lab/BML_TPAMI2024: the weaker
    modalities are scaled by this constant (4 there), and the stronger one not at all. ``noise`` (1 in "ogm-ge"): in
    units of a block's gradient standard deviation in the previous step; the published code takes each tensor's, in this
    step. Published code scales convolutions only, ours all weights.

    Raises ValueError for a negative ``alpha`` or ``noise``, an unknown ``argument``, ``boost`` below 1.
    """

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
        check_choice("argument", argument, ("r", "r-1"))
        if boost is not None:
            check_at_least("boost", boost, 1.0)
        self.rule = OGMGE(self.optimizer, alpha=alpha, apply_to=self.apply_to, noise=noise)
        self.argument, self.boost = argument, boost

    def coefficients(self, outputs: Outputs) -> Tensor:
        ratio = self.rule.ratios(outputs.unimodal(), outputs.labels)
        ahead = ratio > 1.0
        if self.boost is not None:
            k = torch.ones_like(ratio)
            return torch.where(ahead.any() & ~ahead, k * self.boost, k)
        if self.argument == "r":
            return self.rule.damping(ratio)
        return torch.where(ahead, 1.0 - torch.tanh(self.rule.alpha * (ratio - 1.0).relu()), torch.ones_like(ratio))
