"""What probes and trials measure with: the blocks of a model, samples in pieces, means over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim.inputs import Inputs
from aim_kernels.aim.prototypes import Pool, block_features
from aim_kernels.aim.samples import Samples, binned, check_class_labels, check_real_labels
from aim_kernels.aim.strengths import Measured, Scores

#: Score of every sample, ``[B]``, of features ``[B, C]`` and labels ``[B]``.
Judge = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A model, its optimizer and blocks, and how they are measured.

    ``depths``: modality to number of blocks; ``modules`` and ``pools``: its blocks and what makes ``[B, C]`` of their
    outputs, empty where no probe reads features. ``generator``: draws of the probe. The other fields are options of
    :class:`AIM`.
    """

    model: nn.Module
    optimizer: Any
    num_classes: int
    depths: Mapping[str, int]
    modules: Mapping[str, list[nn.Module]]
    pools: Mapping[str, Pool | None]
    loss: Callable[[Any, Tensor], Tensor]
    targets: str
    batch_size: int
    generator: torch.Generator

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of the model's inputs."""
        return tuple(self.depths)

    def check_labels(self, what: str, labels: Tensor) -> Tensor:
        """Labels as ``targets`` has them."""
        if self.targets == "quantiles":
            return check_real_labels(what, labels)
        return check_class_labels(what, labels, self.num_classes)

    def classes(self, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Class numbers ``[B]``; of real labels also the means of their bins and the edges between them."""
        return (labels, None, None) if self.targets == "classes" else binned(labels, self.num_classes)

    def features(self, inputs: Inputs) -> dict[str, list[Tensor]]:
        """Pooled outputs ``[B, C]`` of the blocks of all modalities with an input."""
        modules = {m: self.modules[m] for m, x in zip(self.modalities, inputs, strict=True) if x is not None}
        return block_features(self.model, modules, inputs, self.pools)

    def features_of_all(self, inputs: Inputs, count: int) -> dict[str, list[Tensor]]:
        """:meth:`features` of ``count`` samples, in pieces of ``batch_size``."""
        pieces = [
            self.features(inputs.take(slice(start, start + self.batch_size), count))
            for start in range(0, count, self.batch_size)
        ]
        return {m: [torch.cat(parts) for parts in zip(*(piece[m] for piece in pieces), strict=True)] for m in pieces[0]}

    @torch.no_grad()
    def mean_scores(self, judges: Mapping[str, Sequence[Judge]], inputs: Inputs, labels: Tensor) -> Measured:
        """Means over the samples, with their standard errors."""
        found: dict[str, list[list[Tensor]]] = {m: [[] for _ in row] for m, row in judges.items()}
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            for modality, row in self.features(inputs.take(part, len(labels))).items():
                for depth, z in enumerate(row):
                    found[modality][depth].append(judges[modality][depth](z, labels[part]).double())
        samples = torch.stack([torch.cat(pieces) for row in found.values() for pieces in row])  # [blocks, B]
        mean = samples.mean(1)
        error = samples.std(1) / len(labels) ** 0.5 if len(labels) > 1 else torch.zeros_like(mean)
        tables = []
        for column in torch.stack([mean, error]).tolist():
            numbers = iter(column)
            tables.append({m: [next(numbers) for _ in row] for m, row in found.items()})
        return Measured(*tables)

    @torch.no_grad()
    def joint_loss(self, samples: Samples) -> float:
        """Mean of ``loss(model(*inputs), labels)`` over all samples and ranks."""
        if samples.labels is None:
            raise ValueError("guard=True watches the held-out loss and needs held-out labels; pass them")
        total = 0.0
        count = samples.size
        for start in range(0, count, self.batch_size):
            stop = min(start + self.batch_size, count)
            here = samples.part(slice(start, stop))
            total += float(self.loss(here.inputs.call(self.model), here.labels)) * (stop - start)
        return self.averaged(Measured.exactly({"joint": [total / count]})).scores["joint"][0]

    def averaged(self, measured: Measured) -> Measured:
        """The mean over ranks, so that every rank sets the same rows."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return measured
        world = distributed.get_world_size()
        scores, errors = measured
        own = [[value for row in scores.values() for value in row], [e**2 for row in errors.values() for e in row]]
        flat = torch.tensor(own, dtype=torch.float64, device=next(self.model.parameters()).device)
        distributed.all_reduce(flat)
        means, squares = (flat / world).tolist()
        numbers, variances = iter(means), iter(squares)
        return Measured(
            {m: [next(numbers) for _ in row] for m, row in scores.items()},
            {m: [(next(variances) / world) ** 0.5 for _ in row] for m, row in scores.items()},
        )

    def averaged_numbers(self, numbers: Sequence[float]) -> list[float]:
        """Their means over ranks."""
        return self.averaged(Measured.exactly({"": list(numbers)})).scores[""]

    def gradient_scores(self) -> Scores:
        """Root mean square gradient of each block in the latest step; all ones before the first."""
        squares = {m: [0.0] * n for m, n in self.depths.items()}
        numel = {m: [0] * n for m, n in self.depths.items()}
        for row in self.optimizer.statistics():
            if row["modality"] is not None:
                squares[row["modality"]][row["depth"]] += row["grad_norm"] ** 2
                numel[row["modality"]][row["depth"]] += row["numel"]
        if not any(any(row) for row in squares.values()):
            return {m: [1.0] * n for m, n in self.depths.items()}
        return {
            m: [math.sqrt(s / max(n, 1)) for s, n in zip(squares[m], numel[m], strict=True)] for m in self.modalities
        }

    def under_fraction(self) -> Scores:
        """The share of under-optimized elements of each block; NaN where a block has no modulated group."""
        table = {m: [math.nan] * n for m, n in self.depths.items()}
        for group, row in zip(self.optimizer.param_groups, self.optimizer.statistics(), strict=True):
            if group.get("modality") is not None and group.get("modulated"):
                table[group["modality"]][group["depth"]] = float(row["under_fraction"])
        return table
