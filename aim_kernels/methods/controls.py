"""Controls: what is left of a method when its clever part is taken away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aim_kernels.aim.aim import AIM
from aim_kernels.aim.strengths import ModulationTable
from aim_kernels.methods.aim import AIMMethod
from aim_kernels.methods.base import Blocks, Method, Outputs, check_apply_to, check_at_least
from aim_kernels.methods.drop import FeatureDrop
from aim_kernels.methods.scores import unimodal_losses
from aim_kernels.step.layout import PHASE_COLUMNS, PHASES, ROW


class Drop(AIMMethod):
    """AIM's strengths, but the dominant modality's features are dropped: see :class:`FeatureDrop`."""

    make = FeatureDrop

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self.aim.remove()


class FeatureScaling(FeatureDrop):
    """Multiplies the last block's output of a dominant modality by ``1 - kappa`` (the mean over depths), in training
    mode. Otherwise :class:`FeatureDrop`; source: this library's control."""

    def _treat(self, output: Tensor, probability: float) -> Tensor:
        return output * (1.0 - probability)


class FeatureScale(Drop):
    """AIM's strengths, but the dominant modality's features are multiplied by ``1 - kappa``."""

    make = FeatureScaling


class AIMWithoutMask(AIM):
    """AIM whose rows do not tell classes apart: under-optimized weights get what well-optimized ones get."""

    def _write_rows(self, table: ModulationTable) -> None:
        super()._write_rows(table)
        for index, group in enumerate(self.optimizer.param_groups):
            if group.get("modulated") and group.get("modality") in table.dominant:
                row = self.optimizer.tables.rows[index].tolist()
                columns = {
                    phase: {c: row[ROW[f"{phase}_{c.replace('under', 'well')}"]] for c in PHASE_COLUMNS}
                    for phase in PHASES
                }
                self.optimizer.set_phase_rows(index, **columns)


class NoMask(AIMMethod):
    """AIM where every weight of a dominant block counts as well optimized: all of them are degraded, and learn as those
    do. In the auxiliary phase ``live_under = live_well = 1 - kappa``. Source: this library's control."""

    make = AIMWithoutMask


class SumOfLosses(Method):
    """Cross entropy of the joint logits plus ``unimodal_weight`` times that of each modality's own; encoders' gradients
    (or updates) times ``encoder_factor``. With ``unimodal_weight=0.3`` it is AIM by its defaults, without AIM.

    With ``encoder_factor=3`` it is what BalanceBenchmark's port of MMPareto (4c1482f) comes to: its gradients are
    cloned after all losses were summed, so no Pareto weight is ever found, and encoders get 3 times the sum's gradient.

    Raises ValueError for a negative ``encoder_factor`` or ``unimodal_weight``, an unknown ``apply_to``.
    """

    writes_rows_only = False

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        unimodal_weight: float = 1.0,
        encoder_factor: float = 1.0,
        apply_to: str = "grad",
        seed: int = 0,
    ) -> None:
        super().__init__(blocks, optimizer, seed=seed)
        check_at_least("encoder_factor", encoder_factor, 0.0)
        check_at_least("unimodal_weight", unimodal_weight, 0.0)
        self.unimodal_weight = unimodal_weight
        check_apply_to(apply_to)
        self.encoder_factor, self.apply_to = encoder_factor, apply_to
        if encoder_factor != 1.0:
            factors = torch.full((len(blocks.modalities),), encoder_factor, dtype=torch.float64, device=self.device)
            self.scale(factors, apply_to=apply_to, biases=True)

    def loss(self, outputs: Outputs) -> Tensor:
        return super().loss(outputs) + self.unimodal_weight * unimodal_losses(outputs).sum()
