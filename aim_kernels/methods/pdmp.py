"""PDMP: the modality that does best alone is given the lead, not held back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aim_kernels.aim.samples import Samples
from aim_kernels.methods.base import Blocks, Outputs
from aim_kernels.methods.coefficients import Coefficients
from aim_kernels.methods.scores import accuracies, evaluation_mode
from aim_kernels.step.arguments import check_at_least


class PDMP(Coefficients):
    """``k = gamma_p`` for the performance-dominant modality, ``gamma_r`` for the others (arXiv 2604.05773).

    The paper takes the dominant modality from networks that were trained on one modality each: name it in ``dominant``.
    None: at each :meth:`update` the one whose own logits are right most often on the held-out samples (without any, on
    the training samples); all are 1 before the first, and where all are equally good (our reading). The defaults of the
    two coefficients are ours.

    Raises ValueError for an unknown modality, coefficients below 0, ``gamma_p`` below ``gamma_r``.
    """

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        dominant: str | None = None,
        gamma_p: float = 2.0,
        gamma_r: float = 1.0,
        **options: Any,
    ) -> None:
        # Where the modality is named, nothing is ranked.
        self.class_scores = "dominant=, or the accuracy of each modality" if dominant is None else ""
        super().__init__(blocks, optimizer, **options)
        if dominant is not None and dominant not in blocks.modalities:
            raise ValueError(f"dominant names {dominant!r}; the modalities are {', '.join(blocks.modalities)}")
        check_at_least("gamma_r", gamma_r, 0.0)
        check_at_least("gamma_p", gamma_p, gamma_r)
        self.gamma_p, self.gamma_r = gamma_p, gamma_r
        self.dominant = dominant
        # Where the modality is given it stays; zeros otherwise: nobody leads yet.
        leads = [float(m == dominant) for m in blocks.modalities]
        self.lead = torch.tensor(leads, dtype=torch.float64, device=self.device)

    def _update(self, samples: Samples, held_out: Samples | None) -> Tensor:
        """Finds the dominant modality, unless it was named; returns ``[M]``, 1 where a modality leads."""
        if self.dominant is None:
            ranked = samples if held_out is None else held_out
            if ranked.labels is None:
                raise ValueError("PDMP ranks modalities by their accuracy; pass labels, or name the dominant one")
            with torch.no_grad(), self.optimizer.true_parameters(), evaluation_mode(self.blocks.model):
                right = accuracies(self.forward(ranked).unimodal(), ranked.labels, self.ignored)
            best = (torch.arange(len(right), device=right.device) == right.argmax()).double()
            self.lead = torch.where(right.max() > right.min(), best, torch.zeros_like(best))
        return self.lead

    def coefficients(self, outputs: Outputs) -> Tensor:
        led = self.gamma_r + (self.gamma_p - self.gamma_r) * self.lead
        return torch.where(self.lead.any(), led, torch.ones_like(led))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lead": self.lead.clone()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.lead = state["lead"].to(self.device, copy=True)
