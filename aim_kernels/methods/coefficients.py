"""Methods that are one factor per modality: rows, epochs, which parameters."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from aim_kernels.methods.base import Blocks, Method, Outputs, check_apply_to, check_window
from aim_kernels.methods.losses import Loss


class Coefficients(Method, abc.ABC):
    """``g <- k_m g`` (or the update) of encoder m, with ``k`` of this batch; all on the device.

    Options: ``apply_to`` ("grad" as published; a factor that stays the same nearly cancels under Adam-like rules;
    "step" scales updates instead), ``starts`` and ``ends`` (first and last epoch in which k is not 1), ``biases``
    (whether biases and normalization parameters are scaled as well).

    Raises ValueError for an unknown ``apply_to`` and epochs out of order.
    """

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        apply_to: str = "grad",
        starts: int = 0,
        ends: int | None = None,
        biases: bool = False,
        noise: float = 0.0,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_apply_to(apply_to)
        check_window(starts, ends)
        self.apply_to, self.starts, self.ends, self.biases, self.noise = apply_to, starts, ends, biases, noise

    @abc.abstractmethod
    def coefficients(self, outputs: Outputs) -> Tensor:
        """``k``, float64 ``[M]``, of one batch; called without gradients."""

    @torch.no_grad()
    def after_backward(self, outputs: Outputs) -> Tensor:
        """Writes the coming step's rows; returns ``k``."""
        if self.active:
            k = self.coefficients(outputs)
        else:
            k = torch.ones(len(self.blocks.modalities), dtype=torch.float64, device=self.device)
        self.scale(k, apply_to=self.apply_to, noise=self.noise if self.active else 0.0, biases=self.biases)
        return k
