"""A small pre-norm transformer over pieces of a signal or patches of an image, as a list of blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aim_kernels.experiments.networks.encoders import check_depth, check_multiple


def sinusoids(tokens: int, width: int, device: torch.device | None = None) -> Tensor:
    """``[tokens, width]``: ``sin(t / 10000^(2i / width))`` in the first half of the columns, ``cos`` in the second."""
    rate = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=device) * 2 / width)
    angle = torch.arange(tokens, device=device)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], 1)


class Tokens(nn.Module):
    """``[B, C, T]``, ``[B, C, H, W]`` or ``[B, C, T, H, W]`` to tokens ``[B, N, width]`` with their positions.

    ``patch`` has one size an axis behind the channels; what does not fill a patch at the end is padded with zeros.
    Every patch is flattened and goes through one linear layer; positions are sinusoids of the patch's number.
    """

    def __init__(self, channels: int, width: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(channels * math.prod(patch), width)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 + len(self.patch):
            raise ValueError(f"patches {self.patch} need an input of {2 + len(self.patch)} axes, got {tuple(x.shape)}")
        ends = [(0, -size % p) for size, p in zip(x.shape[2:], self.patch, strict=True)]
        x = nn.functional.pad(x, [n for pair in reversed(ends) for n in pair])
        for axis, p in enumerate(self.patch):
            x = x.unflatten(2 + 2 * axis, (-1, p))
        axes = len(self.patch)
        outer, within = [2 + 2 * a for a in range(axes)], [3 + 2 * a for a in range(axes)]
        z = self.linear(x.permute(0, *outer, 1, *within).flatten(1 + axes).flatten(1, axes))
        return z + sinusoids(z.shape[1], z.shape[2], z.device).to(z.dtype)


class Layer(nn.Module):
    """``z + attention(norm(z))``, then ``z + mlp(norm(z))``; ``[B, N, width]`` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, z: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(z)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        z = z + self.out(attended.transpose(1, 2).flatten(2))
        return z + self.mlp(self.norm2(z))


class MeanToken(nn.Module):
    """``[B, N, width]`` to ``[B, width]``: the mean of the tokens, normalized."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(z.mean(1))


def transformer_blocks(
    channels: int, patch: tuple[int, ...], width: int = 64, depth: int = 3, heads: int = 4
) -> list[nn.Module]:
    """``depth`` blocks of a layer each; the first makes the tokens, the last one averages them to ``[B, width]``.

    ``patch``: steps a token for signals ``[B, channels, T]``, height and width of a patch for images, and frames,
    height and width for videos. No dropout, no class token.

    Raises ValueError for a ``width`` that is no multiple of ``2 * heads``, a ``depth`` below 1, a patch below 1.
    Source: Vaswani et al., arXiv 1706.03762, and Dosovitskiy et al., arXiv 2010.11929; normalization before each part
    and the mean instead of a class token are our reading.
    """
    check_multiple("width", width, 2 * heads)
    check_depth(depth)
    if not 1 <= len(patch) <= 3 or min(patch) < 1:
        raise ValueError(f"patch must have one to three sizes of at least 1, got {patch}")
    layers = [[Layer(width, heads)] for _ in range(depth)]
    blocks: list[list[nn.Module]] = [list(layer) for layer in layers]
    blocks[0].insert(0, Tokens(channels, width, patch))
    blocks[-1].append(MeanToken(width))
    return [nn.Sequential(*block) for block in blocks]
