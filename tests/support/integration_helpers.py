"""A small network of two modalities, its data and its optimizer, for the tests of training frameworks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import aim_kernels as ak

CLASSES = 3


class Network(nn.Module):
    """Two encoders of two blocks each, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = nn.ModuleList([nn.Sequential(nn.Linear(n, 6), nn.Tanh()) for n in (4, 6)])
        self.video = nn.ModuleList([nn.Sequential(nn.Linear(n, 6), nn.Tanh()) for n in (5, 6)])
        self.head = nn.Linear(12, CLASSES)

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        for one, other in zip(self.audio, self.video, strict=True):
            audio, video = one(audio), other(video)
        return self.head(torch.cat([audio, video], 1))

    def make_optimizer(self, strength: float = 0.0, **options: Any) -> ak.AIMFusedOptimizer:
        """With a strength, all of the deep video block is held back from the first step on."""
        groups = ak.block_param_groups(self, {"audio": list(self.audio), "video": list(self.video)})
        optimizer = ak.AIMFusedOptimizer(groups, lr=1e-2, **options)
        if strength:
            optimizer.set_modulation(("video", 1), live_well=1.0 - strength, live_under=1.0 - strength)
        return optimizer


def held_back(network: Network) -> nn.Parameter:
    """The weight whose live values are degraded."""
    return network.video[1][0].weight


def columns(count: int = 24, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(audio, video, labels); the video tells the class nearly for free."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    audio = torch.randn(count, 4, generator=generator)
    video = torch.randn(count, 5, generator=generator) * 0.1 + labels[:, None]
    return audio, video, labels


def samples() -> tuple[list[Tensor], Tensor, None]:
    """What the callbacks hand to ``aim.update``: no held-out samples, so the ratio decides and video dominates."""
    *inputs, labels = columns()
    return inputs, labels, None


def with_held_out() -> tuple[list[Tensor], Tensor, tuple[list[Tensor], Tensor]]:
    """The same, with held-out samples."""
    *inputs, labels = columns()
    *outside, answers = columns(seed=1)
    return inputs, labels, (outside, answers)


class Recorder:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.seen.append((tag, scalar_value, global_step))
