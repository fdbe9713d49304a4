"""The form of every data set of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Aligned samples: one tensor ``[N, ...]`` a modality, and class numbers ``[N]`` (int64)."""

    inputs: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Split:
        """The samples at ``index`` (int64 ``[n]``), in that order."""
        return Split(tuple(x[index] for x in self.inputs), self.labels[index])

    def to(self, device: str) -> Split:
        return Split(tuple(x.to(device) for x in self.inputs), self.labels.to(device))


@dataclass(frozen=True)
class MultimodalData:
    """Three splits of one data set. ``validation`` looks like the deployment: it can serve as AIM's held-out
    samples."""

    name: str
    modalities: tuple[str, ...]
    num_classes: int
    train: Split
    validation: Split
    test: Split

    def to(self, device: str) -> MultimodalData:
        splits = (split.to(device) for split in (self.train, self.validation, self.test))
        return MultimodalData(self.name, self.modalities, self.num_classes, *splits)
