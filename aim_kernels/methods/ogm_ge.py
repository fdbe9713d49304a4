"""OGM-GE: on-the-fly gradient modulation with generalization enhancement, as one modulation row a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.step.arguments import numbers_checked
from aim_kernels.step.sharding import averaged


def late_fusion_logits(head: nn.Linear, features: Sequence[Tensor]) -> list[Tensor]:
    """Each modality's share ``z_m W_m^T + b / M`` of ``head(concat(z_1, ..., z_M))``; they sum to the joint logits.

    ``features``: ``[B, C_m]`` a modality, in the order in which they are concatenated. Raises ValueError where the
    widths do not add up to the head's.
    """
    widths = [z.shape[1] for z in features]
    if sum(widths) != head.in_features:
        raise ValueError(f"features of widths {widths} do not fill a head of {head.in_features} inputs")
    slices = head.weight.split(widths, 1)
    bias = 0.0 if head.bias is None else head.bias / len(features)
    return [z @ w.T + bias for z, w in zip(features, slices, strict=True)]


class OGMGE:
    """Scales the stronger modality's gradients (or updates) by ``1 - tanh(alpha * r)`` and adds gradient noise.

    Call :meth:`update` after the forward and before ``optimizer.step()``. With ``s_m = sum_i
    softmax(logits_m[i])[y_i]``,

        r_m = s_m / mean_{m' != m} s_m';    k_m = 1 - tanh(alpha * r_m) where r_m > 1, else 1

    For two modalities this is the published code (GeWu-Lab/OGM-GE_CVPR2022, 343dc1d, MIT), with its quirk: the argument
    is r, not r - 1, so k jumps at r = 1. More modalities by the mean of the others are our generalization. Ours differs
    further: all weights of a block count, whatever their rank and name; noise has the standard deviation of the
    block's, not the tensor's, gradient, of the previous rather than this step (one pass instead of two), so the first
    step is without.

    ``apply_to="grad"`` scales gradients as published (a constant factor nearly cancels under Adam-like rules),
    ``"step"`` the updates. ``noise=1.0`` is "GE"; 0.0 is plain OGM. Biases and normalization parameters are left alone.

    Raises ValueError for fewer than two modalities in the optimizer's groups, a negative alpha or noise, an unknown
    ``apply_to``.
    """

    @numbers_checked
    def __init__(self, optimizer: Any, *, alpha: float = 1.0, apply_to: str = "grad", noise: float = 1.0) -> None:
        if apply_to not in ("grad", "step"):
            raise ValueError(f"unknown apply_to {apply_to!r}; it is 'grad' or 'step'")
        if not alpha >= 0.0:
            raise ValueError(f"alpha must be >= 0, got {alpha}")
        if not noise >= 0.0:
            raise ValueError(f"noise must be >= 0, got {noise}")
        names = [group.get("modality") for group in optimizer.param_groups]
        self.modalities = tuple(dict.fromkeys(name for name in names if name is not None))
        if len(self.modalities) < 2:
            raise ValueError(
                f"OGM-GE needs at least two modalities, the optimizer's groups name {list(self.modalities)}"
            )
        self.optimizer, self.alpha, self.apply_to, self.noise = optimizer, alpha, apply_to, noise

    @torch.no_grad()
    def ratios(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """``r`` as a float64 tensor ``[M]`` on the device of the logits. ``logits``: ``[B, K]`` a modality; ``labels``:
        ``[B]``."""
        if len(logits) != len(self.modalities):
            raise ValueError(
                f"logits of {len(logits)} modalities, expected {len(self.modalities)}: {', '.join(self.modalities)}"
            )
        scores = torch.stack([x.float().softmax(1).gather(1, labels[:, None]).sum() for x in logits]).double()
        scores = averaged(scores)
        return scores / ((scores.sum() - scores) / (len(logits) - 1))

    def damping(self, ratio: Tensor) -> Tensor:
        """``k`` of ``r``."""
        return torch.where(ratio > 1.0, 1.0 - torch.tanh(self.alpha * ratio.relu()), torch.ones_like(ratio))

    def coefficients(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """``k``, for what :meth:`ratios` takes."""
        return self.damping(self.ratios(logits, labels))

    def update(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Write the coming step's rows from this batch's unimodal logits, without synchronizing; returns ``k``."""
        k = self.coefficients(logits, labels)
        for index, group in enumerate(self.optimizer.param_groups):
            if group.get("modality") is not None and group.get("modulated"):
                value = k[self.modalities.index(group["modality"])]
                columns = {f"{self.apply_to}_under": value, f"{self.apply_to}_well": value}
                self.optimizer.set_modulation(index, noise=self.noise, **columns)
        return k
