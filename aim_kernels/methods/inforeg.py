"""InfoReg: while a network takes in much information, the modality that is ahead is drawn back to where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aim_kernels.aim.samples import Samples
from aim_kernels.methods.base import Blocks, Method, Outputs, gradients_of
from aim_kernels.methods.losses import Loss
from aim_kernels.methods.scores import counted, mean_of_others, true_class_scores
from aim_kernels.step.arguments import check_at_least, check_choice


class InfoReg(Method):
    """``g += beta_m (theta - theta_start)`` for the encoder of a modality that is ahead, inside its prime window.

    ``beta_m = strength * exp(tanh(s_m - mean_{m' != m} s_m'))`` where the difference is positive, else 0;
    ``theta_start``: the weights at the latest :meth:`update` (a copy of all encoders). ``s_m``: sum over the batch of
    the true class's probability ("sum", published: the tanh saturates) or their mean ("mean").

    The window: with an epoch's Fisher trace ``T = sum over weights of mean(sum_t g_t^2)``, gradients as they are
    stepped with, it is open while ``(A - A') / A > threshold``, ``A`` the sum of the latest ten traces and ``A'`` the
    same one epoch earlier; always in the first epoch. The loss is the joint cross entropy and each modality's own.

    Source: GeWu-Lab/InfoReg_CVPR2025, 939b2ed (CVPR 2025): two modalities, strengths 0.95 and 0.1, one window, the
    first modality's. Here every modality has a window of its own, ``strength`` is one number or one a modality, and all
    weights with two or more dimensions count.

    Raises ValueError for a negative ``strength``, another number of them than modalities, an unknown ``scores``.
    """

    writes_rows_only = False
    writes_gradients = True
    class_scores = "the probability of the true class"
    #: Epochs whose traces are added.
    HISTORY = 10

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        strength: float | Sequence[float] = 0.95,
        threshold: float = 0.05,
        scores: str = "sum",
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        modalities = len(blocks.modalities)
        strengths = [float(strength)] * modalities if isinstance(strength, (int, float)) else list(strength)
        if len(strengths) != modalities:
            raise ValueError(f"strength has {len(strengths)} numbers for {modalities} modalities")
        check_at_least("strength", min(strengths), 0.0)
        check_choice("scores", scores, ("sum", "mean"))
        self.threshold, self.scores = threshold, scores
        self.strength = torch.tensor(strengths, dtype=torch.float64, device=self.device)
        self.trace = torch.zeros(modalities, dtype=torch.float64, device=self.device)
        self.traces: list[Tensor] = []
        self.start: list[list[Tensor]] | None = None

    @torch.no_grad()
    def _update(self, samples: Samples, held_out: Samples | None) -> Tensor:
        """An epoch begins: keeps the weights, closes the trace. Returns ``[M]``, 1 where a window is open."""
        if self.start is not None:
            self.traces = [*self.traces, self.trace][-(self.HISTORY + 1) :]
            self.trace = torch.zeros_like(self.trace)
        self.start = [[p.detach().clone() for p in self.blocks.parameters(m)] for m in self.blocks.modalities]
        return self.window()

    def window(self) -> Tensor:
        """Float64 ``[M]``: 1 in the prime learning window, else 0."""
        if not self.traces:
            return torch.ones_like(self.trace)
        latest = torch.stack(self.traces[-self.HISTORY :]).sum(0)
        before = torch.stack(self.traces[-(self.HISTORY + 1) : -1]).sum(0) if len(self.traces) > 1 else 0.0
        return ((latest - before) / latest > self.threshold).double()

    def loss(self, outputs: Outputs) -> Tensor:
        return super().loss(outputs) + self.unimodal_losses(outputs).sum()

    @torch.no_grad()
    def after_backward(self, outputs: Outputs) -> Tensor:
        """Adds to the gradients in place; returns ``beta``, float64 ``[M]``."""
        scores = true_class_scores(outputs.unimodal(), outputs.labels, self.ignored)
        if self.scores == "mean":
            scores = scores / counted(outputs.labels, self.ignored)[0].sum().clamp_min(1)
        gap = scores - mean_of_others(scores)
        beta = torch.where(gap > 0.0, self.strength * torch.exp(torch.tanh(gap)), 0.0) * self.window()
        traces = torch.zeros_like(self.trace)
        for m, modality in enumerate(self.blocks.modalities):
            parameters = self.blocks.parameters(modality)
            starts = parameters if self.start is None else self.start[m]
            pairs = [(p, start) for p, start in zip(parameters, starts, strict=True) if p.grad is not None]
            if pairs and self.start is not None:
                away = torch._foreach_sub([p for p, _ in pairs], [start for _, start in pairs])
                torch._foreach_mul_(away, beta[m].to(away[0].dtype))
                torch._foreach_add_(gradients_of([p for p, _ in pairs]), away)
            weights = gradients_of([p for p, _ in pairs if p.dim() > 1])
            if weights:
                norms = torch.stack(torch._foreach_norm(weights)).double()
                sizes = torch.tensor([1.0 / g.numel() for g in weights], dtype=torch.float64, device="cpu")
                traces[m] = (norms.square() * sizes.to(norms.device, non_blocking=True)).sum()
        # A scaler takes no step of infinite gradients.
        self.trace = self.trace + torch.where(traces.isfinite(), traces, 0.0)
        return beta

    def state_dict(self) -> dict[str, Any]:
        start = None if self.start is None else [[p.clone() for p in row] for row in self.start]
        mine = {"trace": self.trace.clone(), "traces": [t.clone() for t in self.traces], "start": start}
        return {**super().state_dict(), **mine}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.trace = state["trace"].to(self.device, copy=True)
        self.traces = [t.to(self.device, copy=True) for t in state["traces"]]
        rows = state["start"]
        self.start = None if rows is None else [[p.to(self.device, copy=True) for p in row] for row in rows]
