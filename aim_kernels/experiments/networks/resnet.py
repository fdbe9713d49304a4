"""ResNet-18 in five blocks: the stem and four stages of two residual units."""

from __future__ import annotations

from torch import Tensor, nn

from aim_kernels.experiments.networks.encoders import check_multiple, check_norm


def normalization(norm: str, channels: int) -> nn.Module:
    """The layer for ``norm``, "group" (eight channels each) or "batch"."""
    check_norm(norm)
    return nn.GroupNorm(max(1, channels // 8), channels) if norm == "group" else nn.BatchNorm2d(channels)


class ResidualUnit(nn.Module):
    """``relu(norm(conv(relu(norm(conv(x))))) + skip(x))``; ``skip`` is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            normalization(norm, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            normalization(norm, outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), normalization(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.skip(x))


class PerFrame(nn.Module):
    """Layers for images that take videos as well: ``[B, C, T, H, W]`` goes through them frame by frame."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5:
            return self.layers(x)
        frames = self.layers(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Average(nn.Module):
    """The mean over everything behind the channels: ``[B, C, ...]`` to ``[B, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def resnet18_blocks(channels: int, width: int = 512, *, norm: str = "group", small: bool = False) -> list[nn.Module]:
    """Five blocks for images ``[B, channels, H, W]`` (spectrograms too) or videos ``[B, channels, T, H, W]``.

    The stages have ``width / 8``, ``/ 4``, ``/ 2`` and ``width`` channels; 512 is the published network without its
    classifier. The last block averages over places and, of a video, frames. ``small`` takes a 3x3 stem of stride 1
    without pooling, as is usual for images below 64 pixels. ``norm`` is "group" (eight channels a group) or "batch",
    whose running statistics follow the live weights, auxiliary blocks among them.

    Convolutions start from He's normal initialization (fan out).

    Raises ValueError for a ``width`` that is no multiple of 64, an unknown ``norm``.
    Source: He et al., arXiv 1512.03385; group normalization: Wu and He, arXiv 1803.08494.
    """
    check_multiple("width", width, 64)
    base = width // 8
    kernel, stride = (3, 1) if small else (7, 2)
    stem = [
        nn.Conv2d(channels, base, kernel, stride, kernel // 2, bias=False),
        normalization(norm, base),
        nn.ReLU(),
        *([] if small else [nn.MaxPool2d(3, 2, 1)]),
    ]
    blocks: list[nn.Module] = [PerFrame(*stem)]
    inputs = base
    for stage in range(4):
        outputs = base * 2**stage
        units = [ResidualUnit(inputs, outputs, 1 if stage == 0 else 2, norm), ResidualUnit(outputs, outputs, 1, norm)]
        blocks.append(PerFrame(*units))
        inputs = outputs
    blocks[-1] = nn.Sequential(blocks[-1], Average())
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return blocks
