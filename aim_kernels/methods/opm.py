"""OPM: features of the stronger modality are dropped, sample by sample."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from aim_kernels.methods.base import Blocks, Method, Outputs, check_window
from aim_kernels.methods.losses import Loss
from aim_kernels.methods.scores import mean_of_others, true_class_scores
from aim_kernels.methods.trees import by_sample, frames_of
from aim_kernels.step.arguments import check_at_least, check_within


class OPM(Method):
    """Each sample's features of modality m are zeroed with probability ``q_m = base * (1 + alpha * tanh(r_m - 1))``
    (at most 1) where ``r_m > 1``, else 0; what stays is divided by ``1 - theta``.

    ``r_m`` as in OGM, from this batch; ``theta = sum_m width_m q_m / sum_m width_m``. A batch is treated so with
    ``probability``. The weakest modality is never dropped, so no sample loses all. Source: GeWu-Lab/BML_TPAMI2024
    (TPAMI 2024); ``probability=0.7`` as in BalanceBenchmark, whose port takes the sum of the others for three
    modalities where we take their mean. The defaults of ``base`` and ``alpha`` are ours.

    The drop sits between encoders and fusion, so it is in :meth:`loss`: the joint logits of ``outputs`` go unused in a
    batch that is treated, and ``blocks.fuse`` runs once more.

    Raises ValueError for ``base`` or ``probability`` outside [0, 1], a negative ``alpha``.
    """

    writes_rows_only = False
    reads_rows = True
    class_scores = "the probability of the true class"

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        alpha: float = 1.0,
        base: float = 0.5,
        probability: float = 0.7,
        starts: int = 0,
        ends: int | None = None,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_at_least("alpha", alpha, 0.0)
        check_within("base", base, 0.0, 1.0)
        check_within("probability", probability, 0.0, 1.0)
        check_window(starts, ends)
        self.alpha, self.base, self.probability = alpha, base, probability
        self.starts, self.ends = starts, ends

    @torch.no_grad()
    def probabilities(self, outputs: Outputs) -> Tensor:
        """``q``, float64 ``[M]``."""
        scores = true_class_scores(outputs.unimodal(), outputs.labels, self.ignored)
        excess = scores / mean_of_others(scores) - 1.0
        q = self.base * (1.0 + self.alpha * torch.tanh(excess.relu()))
        return torch.where(excess > 0.0, q.clamp_max(1.0), torch.zeros_like(q))

    def _draw(self) -> Tensor:
        # Stays on the host: it decides what runs.
        return torch.rand((), generator=self.generator, dtype=torch.float32, device=self.generator.device)

    def loss(self, outputs: Outputs) -> Tensor:
        """The loss of what the fusion makes of the features that are left."""
        if not self.active or (self.probability < 1.0 and self._draw() >= self.probability):
            return super().loss(outputs)
        q = self.probabilities(outputs)
        keep = self.uniform(len(q), outputs.count) >= q[:, None]
        frames = [frames_of(self.blocks.named(m), z, outputs.count) for m, z in enumerate(outputs.features)]
        widths = [each * z[0].numel() for each, z in zip(frames, outputs.features, strict=True)]
        theta = sum(width * q[m] for m, width in enumerate(widths)) / sum(widths)

        def left_of(m: int, x: Tensor) -> Tensor:
            return x * by_sample(keep[m].to(x.dtype), x, frames[m]) / (1.0 - theta)

        left = [self.blocks.with_changed(m, z, functools.partial(left_of, m)) for m, z in enumerate(outputs.returned)]
        return self.loss_of(self.blocks.fuse(left), outputs.labels)
