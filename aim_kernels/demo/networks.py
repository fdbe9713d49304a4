"""Late-fusion networks for the demo: one encoder a modality, built of blocks, and a linear head on their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from aim_kernels.data.common import MultimodalData

WIDTH = 64  # features of every encoder


class LateFusion(nn.Module):
    """``head(concat(encoder[m](x[m]) for m))``; encoders are lists of blocks that end in ``[B, WIDTH]``."""

    def __init__(self, encoders: Mapping[str, Sequence[nn.Module]], num_classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Sequential(*blocks) for name, blocks in encoders.items()})
        self.head = nn.Linear(WIDTH * len(self.encoders), num_classes)

    def features(self, *inputs: Tensor) -> list[Tensor]:
        """One ``[B, WIDTH]`` tensor a modality."""
        return [encoder(x) for encoder, x in zip(self.encoders.values(), inputs, strict=True)]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(torch.cat(self.features(*inputs), 1))

    def blocks(self) -> dict[str, list[nn.Module]]:
        """Modality to blocks, shallow to deep: what ``block_param_groups`` takes."""
        return {name: list(encoder.children()) for name, encoder in self.encoders.items()}


def mlp_blocks(inputs: int) -> list[nn.Module]:
    """Three blocks of a linear layer and a ReLU; the first flattens images."""
    first = nn.Sequential(nn.Flatten(), nn.Linear(inputs, WIDTH), nn.ReLU())
    return [first, *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(2))]


def conv_blocks(channels: int) -> list[nn.Module]:
    """Three strided 1-D convolutions with group normalization; the last block averages over time.

    Group rather than batch normalization: it has no running statistics that would depend on which weights were live.
    """

    def block(inputs: int, outputs: int, kernel: int, *, last: bool = False) -> nn.Module:
        layers: list[nn.Module] = [
            nn.Conv1d(inputs, outputs, kernel, stride=2, padding=kernel // 2),
            nn.GroupNorm(4, outputs),
            nn.ReLU(),
        ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten()) if last else nn.Sequential(*layers)

    return [block(channels, WIDTH // 2, 7), block(WIDTH // 2, WIDTH, 5), block(WIDTH, WIDTH, 5, last=True)]


def network_for(data: MultimodalData) -> LateFusion:
    """The demo's network for a data set: linear blocks for images, convolutions over time for ``[N, C, T]`` signals."""
    encoders: dict[str, list[nn.Module]] = {}
    for name, x in zip(data.modalities, data.train.inputs, strict=True):
        encoders[name] = conv_blocks(x.shape[1]) if x.dim() == 3 else mlp_blocks(x[0].numel())
    return LateFusion(encoders, data.num_classes)
