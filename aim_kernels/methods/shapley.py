"""Shapley-guided alternation: the modality that contributes least learns alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aim_kernels.aim.samples import Samples
from aim_kernels.methods.base import Blocks, Outputs
from aim_kernels.methods.coalitions import shapley_values
from aim_kernels.methods.coefficients import Coefficients
from aim_kernels.methods.scores import evaluation_mode
from aim_kernels.step.arguments import check_at_least, check_choice


class ShapleyAlternation(Coefficients):
    """``k = 1`` for the encoder with the lowest Shapley value and 0 for the others, whose rows hold them; the head
    always learns.

    Values are of the mean probability of the true class, ``2^M - 1`` passes through the fusion. ``period="step"``: of
    each batch, for its own step; "epoch": of the samples given to :meth:`update`, until the next one; before the first,
    and where the values differ by no more than ``margin``, everybody learns. ``apply_to="grad"`` holds gradients, and
    momentum runs out; "step" holds updates. Decoupled decay goes on. Source: our reading of alternating schedules that
    are guided by Shapley values.

    Raises ValueError for an unknown ``period``, a negative ``margin``.
    """

    class_scores = "the probability of the true class"

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        period: str = "step",
        margin: float = 0.0,
        biases: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(blocks, optimizer, biases=biases, **options)
        check_choice("period", period, ("step", "epoch"))
        check_at_least("margin", margin, 0.0)
        self.period, self.margin = period, margin
        self.learns = torch.ones(len(blocks.modalities), dtype=torch.float64, device=self.device)

    def _update(self, samples: Samples, held_out: Samples | None) -> Tensor:
        """Returns ``[M]``, 1 where an encoder learns. Raises ValueError where ``period="epoch"`` has no labels."""
        if self.period == "epoch":
            if samples.labels is None:
                raise ValueError("Shapley values are of the probability of the true class; pass labels")
            with torch.no_grad(), self.optimizer.true_parameters(), evaluation_mode(self.blocks.model):
                self.learns = self.lowest(self.forward(samples))
        return self.learns

    def lowest(self, outputs: Outputs) -> Tensor:
        """1 for the modality with the lowest value and 0 for others; all 1 within the margin. Float64 ``[M]``."""
        phi = shapley_values(self.blocks.fuse, outputs.returned, outputs.labels, self.ignored)
        alone = (torch.arange(len(phi), device=phi.device) == phi.argmin()).double()
        return torch.where(phi.max() - phi.min() > self.margin, alone, torch.ones_like(alone))

    def coefficients(self, outputs: Outputs) -> Tensor:
        if self.period == "step":
            self.learns = self.lowest(outputs)
        return self.learns

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "learns": self.learns.clone()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.learns = state["learns"].to(self.device, copy=True)
