"""Diagnosing and re-learning: encoders that tell more classes apart in training than outside go back to their start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aim_kernels.aim.samples import Samples
from aim_kernels.methods.base import Blocks, Method
from aim_kernels.methods.losses import Loss
from aim_kernels.methods.scores import counted, evaluation_mode, wide
from aim_kernels.step.arguments import check_at_least
from aim_kernels.step.sharding import averaged


def kmeans(x: Tensor, clusters: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """Cluster numbers ``[N]`` of the rows of ``x`` ``[N, D]``: Lloyd's algorithm from k-means++ seeds."""
    first = int(torch.randint(len(x), (), generator=generator, device=generator.device))
    centres = x[first : first + 1]
    for _ in range(min(clusters, len(x)) - 1):
        nearest = torch.cdist(x, centres).square().amin(1)
        share = torch.rand((), generator=generator, dtype=torch.float32, device=generator.device).item()
        draw = share * nearest.sum()
        index = torch.searchsorted(nearest.cumsum(0), draw).clamp_max(len(x) - 1)
        centres = torch.cat([centres, x[index][None]])
    numbers = torch.arange(len(centres), device=x.device)
    for _ in range(iterations):
        members = (numbers[:, None] == torch.cdist(x, centres).argmin(1)).to(x.dtype)
        count = members.sum(1, keepdim=True)
        centres = torch.where(count > 0, members @ x / count.clamp_min(1.0), centres)
    return torch.cdist(x, centres).argmin(1)


def purity(assigned: Tensor, labels: Tensor) -> float:
    """Share of the samples that are of the most frequent class of their cluster."""
    clusters, classes = int(assigned.max()) + 1, int(labels.max()) + 1
    counts = torch.bincount(assigned * classes + labels, minlength=clusters * classes).view(clusters, classes)
    return float(counts.amax(1).sum()) / len(labels)


class Relearning(Method):
    """``theta <- w theta_0 + (1 - w) theta`` for each encoder, ``w = tanh(strength * |purity - purity_held_out|)``.

    Every ``every`` updates (but not the first), at most ``times`` of them. A purity is that of a k-means clustering,
    with as many clusters as logits, of an encoder's features, scaled to [-1, 1]; ``theta_0``: the weights when the
    method was made (a copy of all encoders, also in the state). Moments of the optimizer stay.

    Source: "Diagnosing and Re-learning" (Wei et al., ECCV 2024) as ported by BalanceBenchmark, 4c1482f, which measures
    on all training and validation samples and seeds k-means anew. :meth:`update` waits for the device.

    Raises ValueError for numbers out of range.
    """

    class_scores = "the classes of the samples of each cluster"
    reads_rows = True

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        strength: float = 1.0,
        every: int = 10,
        times: int | None = None,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_at_least("strength", strength, 0.0)
        check_at_least("every", every, 1)
        if times is not None:
            check_at_least("times", times, 0)
        self.strength, self.every, self.times = strength, every, times
        self.done = 0
        self.start = [[p.detach().clone() for p in blocks.parameters(m)] for m in blocks.modalities]

    @torch.no_grad()
    def _update(self, samples: Samples, held_out: Samples | None) -> list[float] | None:
        """Diagnoses, and moves the encoders back, where it is time to; returns ``w``, else None.

        Raises ValueError where it is time to and labels or held-out samples are missing.
        """
        due = self.updates > 0 and self.updates % self.every == 0 and (self.times is None or self.done < self.times)
        weights = None
        if due:
            if samples.labels is None or held_out is None or held_out.labels is None:
                raise ValueError("re-learning compares training with held-out samples; pass labels and held_out")
            with self.optimizer.true_parameters():
                gaps = self.purities(samples.inputs, samples.labels) - self.purities(held_out.inputs, held_out.labels)
                weights = torch.tanh(self.strength * gaps.abs()).tolist()
                for modality, start, w in zip(self.blocks.modalities, self.start, weights, strict=True):
                    torch._foreach_lerp_(list[Tensor](self.blocks.parameters(modality)), start, w)
            self.done += 1
        return weights

    def purities(self, inputs: Any, labels: Tensor) -> Tensor:
        """Of each modality's features; float64 ``[M]``."""
        with evaluation_mode(self.blocks.model):
            outputs = self.forward(Samples(self.blocks.layout.read("", inputs), labels))
        counts, labels = counted(labels, self.ignored)
        labels = labels[counts]
        if not len(labels):
            raise ValueError("re-learning needs samples with a class; all labels are to be ignored")
        found = []
        for m in range(len(self.blocks.modalities)):
            z = wide(outputs.per_sample(m)).flatten(1)[counts]
            low, high = z.amin(0), z.amax(0)
            z = 2.0 * (z - low) / (high - low).clamp_min(1e-12) - 1.0
            found.append(purity(kmeans(z, outputs.logits.shape[1], self.generator), labels))
        return averaged(torch.tensor(found, dtype=torch.float64, device=self.device))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "done": self.done, "start": [[p.clone() for p in row] for row in self.start]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.done = int(state["done"])
        self.start = [[p.to(self.device, copy=True) for p in row] for row in state["start"]]
