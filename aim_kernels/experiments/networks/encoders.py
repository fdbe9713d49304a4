"""Encoders as lists of blocks, shallow to deep, for tables, signals and small images; all end in ``[B, width]``.

Group rather than batch normalization throughout: it has no running statistics that would depend on which weights were
live.
"""

from __future__ import annotations

from torch import nn


def mlp_blocks(inputs: int, width: int = 64, depth: int = 3) -> list[nn.Module]:
    """``depth`` blocks of a linear layer and a ReLU for ``[B, ...]`` of ``inputs`` values; the first one flattens."""
    check_depth(depth)
    first = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU())
    return [first, *(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth - 1))]


def conv1d_blocks(channels: int, width: int = 64) -> list[nn.Module]:
    """Three 1-D convolutions of stride 2 for ``[B, channels, T]``, group normalization and ReLU behind each; the last
    block averages over time. ``width`` is a multiple of 8."""
    check_multiple("width", width, 8)

    def block(inputs: int, outputs: int, kernel: int, *, last: bool = False) -> nn.Module:
        layers: list[nn.Module] = [
            nn.Conv1d(inputs, outputs, kernel, stride=2, padding=kernel // 2),
            nn.GroupNorm(4, outputs),
            nn.ReLU(),
        ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten()) if last else nn.Sequential(*layers)

    return [block(channels, width // 2, 7), block(width // 2, width, 5), block(width, width, 5, last=True)]


def conv2d_blocks(channels: int, width: int = 64) -> list[nn.Module]:
    """Three 3x3 convolutions of stride 2 for ``[B, channels, H, W]``, group normalization and ReLU behind each; the
    last block averages over places. ``width`` is a multiple of 8."""
    check_multiple("width", width, 8)

    def block(inputs: int, outputs: int, *, last: bool = False) -> nn.Module:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            nn.GroupNorm(4, outputs),
            nn.ReLU(),
        ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()) if last else nn.Sequential(*layers)

    return [block(channels, width // 2), block(width // 2, width), block(width, width, last=True)]


def check_multiple(name: str, value: int, of: int) -> None:
    if value < of or value % of:
        raise ValueError(f"{name} must be a multiple of {of}, got {value}")


def check_depth(depth: int) -> None:
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
