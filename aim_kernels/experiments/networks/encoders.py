"""Encoders as lists of blocks, shallow to deep, for tables, signals and small images; all end in ``[B, width]``.

Group normalization by default: it has no running statistics that would depend on which weights were live. With
``norm="batch"`` there are.
"""

from __future__ import annotations

from torch import nn

#: Normalizations by name.
NORMS = ("group", "batch")


def mlp_blocks(inputs: int, width: int = 64, depth: int = 3, norm: str | None = None) -> list[nn.Module]:
    """``depth`` blocks of a linear layer and a ReLU for ``[B, ...]`` of ``inputs`` values; the first one flattens.
    ``norm``: "group" (four groups) or "batch" normalization between the two; None: neither."""
    check_depth(depth)

    def block(size: int, *before: nn.Module) -> nn.Module:
        between = [] if norm is None else [_norm(norm, width, nn.BatchNorm1d)]
        return nn.Sequential(*before, nn.Linear(size, width), *between, nn.ReLU())

    return [block(inputs, nn.Flatten()), *(block(width) for _ in range(depth - 1))]


def conv1d_blocks(channels: int, width: int = 64, norm: str = "group") -> list[nn.Module]:
    """Three 1-D convolutions of stride 2 for ``[B, channels, T]``, normalization (``norm``: "group", of four groups,
    or "batch") and ReLU behind each; the last block averages over time. ``width`` is a multiple of 8."""
    check_multiple("width", width, 8)

    def block(inputs: int, outputs: int, kernel: int, *, last: bool = False) -> nn.Module:
        layers: list[nn.Module] = [
            nn.Conv1d(inputs, outputs, kernel, stride=2, padding=kernel // 2),
            _norm(norm, outputs, nn.BatchNorm1d),
            nn.ReLU(),
        ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten()) if last else nn.Sequential(*layers)

    return [block(channels, width // 2, 7), block(width // 2, width, 5), block(width, width, 5, last=True)]


def conv2d_blocks(channels: int, width: int = 64, norm: str = "group") -> list[nn.Module]:
    """Three 3x3 convolutions of stride 2 for ``[B, channels, H, W]``, normalization (``norm``: "group", of four
    groups, or "batch") and ReLU behind each; the last block averages over places. ``width`` is a multiple of 8."""
    check_multiple("width", width, 8)

    def block(inputs: int, outputs: int, *, last: bool = False) -> nn.Module:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
            _norm(norm, outputs, nn.BatchNorm2d),
            nn.ReLU(),
        ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()) if last else nn.Sequential(*layers)

    return [block(channels, width // 2), block(width // 2, width), block(width, width, last=True)]


def check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; it is one of {', '.join(NORMS)}")


def _norm(norm: str, channels: int, batch: type[nn.Module]) -> nn.Module:
    check_norm(norm)
    return nn.GroupNorm(4, channels) if norm == "group" else batch(channels)


def check_multiple(name: str, value: int, of: int) -> None:
    if value < of or value % of:
        raise ValueError(f"{name} must be a multiple of {of}, got {value}")


def check_depth(depth: int) -> None:
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
