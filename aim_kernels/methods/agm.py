"""AGM: adaptive gradient modulation by Shapley-like responses of each modality."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aim_kernels.methods.base import Blocks, Outputs
from aim_kernels.methods.coalitions import shapley_logits
from aim_kernels.methods.coefficients import Coefficients
from aim_kernels.methods.scores import counted, evaluation_mode, mean_of_counted
from aim_kernels.step.arguments import check_at_least, check_choice
from aim_kernels.step.sharding import averaged


class AGM(Coefficients):
    """``k_m = exp(alpha * min(tau_m - rho_m, 7))``; rho is this batch's discrepancy, tau the running one's.

        rho_m = exp(M / (M - 1) * (s_m - mean_m' s_m')),    tau_m: the same of the mean of s over all earlier steps (0
        at the first)

    ``s_m``: mean over samples of the log probability (at least log 1e-8) of the true class under modality m's Shapley
    logits: ``2^M - 1`` passes through the fusion, in evaluation mode, with the features of absent modalities at zero
    (those of the training pass; the published code runs the encoders again, in evaluation mode).

    ``sign="paper"`` (Li et al., ICCV 2023): a modality that is ahead is damped. ``sign="published"``: s is the cross
    entropy, as in BalanceBenchmark's port (4c1482f): it is the one behind that is damped (lihongcs/AGM issue 11). The
    published code also clips gradients where the head's are beyond 5: see the optimizer's ``max_grad_norm``.

    Raises ValueError for a negative ``alpha``, an unknown ``sign``.
    """

    class_scores = "the probability of the true class"

    def __init__(
        self, blocks: Blocks, optimizer: Any, *, alpha: float = 1.0, sign: str = "paper", **options: Any
    ) -> None:
        super().__init__(blocks, optimizer, **options)
        check_at_least("alpha", alpha, 0.0)
        check_choice("sign", sign, ("paper", "published"))
        self.alpha, self.sign = alpha, sign
        self.running = torch.zeros(len(blocks.modalities), dtype=torch.float64, device=self.device)
        self.steps = 0

    def coefficients(self, outputs: Outputs) -> Tensor:
        with evaluation_mode(self.blocks.model):
            logits = shapley_logits(self.blocks.fuse, outputs.returned)
        counts, labels = counted(outputs.labels, self.ignored)
        index = labels[None, :, None].expand(len(logits), -1, 1)
        own = logits.softmax(2).gather(2, index)[..., 0].clamp_min(1e-8).log()
        scores = averaged(mean_of_counted(own, counts))
        if self.sign == "published":
            scores = -scores
        k = torch.exp(self.alpha * (self.discrepancy(self.running) - self.discrepancy(scores)).clamp_max(7.0))
        self.steps += 1
        self.running = self.running + (scores - self.running) / self.steps
        return k

    @staticmethod
    def discrepancy(scores: Tensor) -> Tensor:
        """rho of s."""
        return torch.exp(len(scores) / (len(scores) - 1) * (scores - scores.mean()))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "running": self.running.clone(), "steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.running, self.steps = state["running"].to(self.device, copy=True), int(state["steps"])
