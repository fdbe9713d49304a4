"""A network for a data set by names: of the backbone and of the fusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from aim_kernels.experiments.data.common import MultimodalData
from aim_kernels.experiments.networks.encoders import conv1d_blocks, conv2d_blocks, mlp_blocks
from aim_kernels.experiments.networks.fusion import FUSIONS
from aim_kernels.experiments.networks.multimodal import MultimodalNetwork
from aim_kernels.experiments.networks.resnet import resnet18_blocks
from aim_kernels.experiments.networks.transformer import transformer_blocks

Shape = tuple[int, ...]

SMALL = 12  # pixels: images with a side below are read as a table, by an MLP


def _auto(shape: Shape, width: int, norm: str = "group") -> list[nn.Module]:
    if len(shape) == 2:
        return conv1d_blocks(shape[0], width, norm)
    if len(shape) == 3 and min(shape[1:]) >= SMALL:
        return conv2d_blocks(shape[0], width, norm)
    return _resnet18(shape, width, norm) if len(shape) == 4 else _mlp(shape, width, None if norm == "group" else norm)


def _mlp(shape: Shape, width: int, norm: str | None = None) -> list[nn.Module]:
    return mlp_blocks(math.prod(shape), width, norm=norm)


def _conv(shape: Shape, width: int) -> list[nn.Module]:
    if len(shape) == 2:
        return conv1d_blocks(shape[0], width)
    return conv2d_blocks(shape[0], width) if len(shape) == 3 else []


def _resnet18(shape: Shape, width: int, norm: str = "group") -> list[nn.Module]:
    if len(shape) not in (3, 4):
        return []
    return resnet18_blocks(shape[0], width, norm=norm, small=min(shape[-2:]) < 64)


def _transformer(shape: Shape, width: int) -> list[nn.Module]:
    if len(shape) not in (2, 3, 4):
        return []
    # tokens: about 16 of a signal, at most 8 x 8 of an image, one frame each of a video
    sides = [max(1, -(-size // (16 if len(shape) == 2 else 8))) for size in shape[1:]]
    return transformer_blocks(shape[0], (1, *sides[1:]) if len(shape) == 4 else tuple(sides), width)


#: Backbone to ``blocks(shape of a sample, width)``; an empty list where the backbone does not take such samples.
BACKBONES: dict[str, Callable[[Shape, int], list[nn.Module]]] = {
    "auto": _auto,
    "mlp": _mlp,
    "conv": _conv,
    "resnet18": _resnet18,
    "transformer": _transformer,
    "auto-batchnorm": partial(_auto, norm="batch"),
    "resnet18-batchnorm": partial(_resnet18, norm="batch"),
}


def network_of(
    shapes: Mapping[str, Shape],
    num_classes: int,
    backbone: str | Mapping[str, str] = "auto",
    fusion: str = "concat",
    width: int = 64,
    missing: str = "zeros",
) -> MultimodalNetwork:
    """A network for samples of ``shapes`` (modality to the shape of one sample, without the batch).

    ``backbone``: "mlp" (three blocks, everything); "conv" (three, signals ``[C, T]`` and images ``[C, H, W]``);
    "resnet18" (five, images and videos ``[C, T, H, W]``); "transformer" (three; signals, images, videos); "auto": "mlp"
    for tables and images with a side below 12, "conv" for signals and other images, "resnet18" for videos;
    "auto-batchnorm" and "resnet18-batchnorm" with batch instead of group normalization (an MLP has none otherwise). A
    mapping gives one a modality. ``fusion``: a key of :data:`FUSIONS`. ``width``: features of every encoder.
    ``missing``: see :class:`MultimodalNetwork`.

    Weights are drawn from torch's default generator, encoder by encoder, then the fusion.

    Raises ValueError for unknown names, and for a backbone that does not take a modality's samples.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}; it is one of {', '.join(FUSIONS)}")
    named = dict.fromkeys(shapes, backbone) if isinstance(backbone, str) else dict(backbone)
    if set(named) != set(shapes):
        raise ValueError(f"backbone must name the modalities {list(shapes)}, got {list(named)}")
    for modality, name in named.items():
        if name not in BACKBONES:
            raise ValueError(f"unknown backbone {name!r} of {modality!r}; it is one of {', '.join(BACKBONES)}")
    encoders = {}
    for modality, shape in shapes.items():
        encoders[modality] = BACKBONES[named[modality]](tuple(shape), width)
        if not encoders[modality]:
            raise ValueError(
                f"backbone {named[modality]!r} does not take samples of the shape {tuple(shape)} of {modality!r}; "
                "give backbone='auto', or a mapping with another one for it"
            )
    return MultimodalNetwork(encoders, FUSIONS[fusion]([width] * len(shapes), num_classes), missing=missing)


def network_for(
    data: MultimodalData,
    backbone: str | Mapping[str, str] = "auto",
    fusion: str = "concat",
    width: int = 64,
    missing: str = "zeros",
) -> MultimodalNetwork:
    """A network for a data set; see :func:`network_of`."""
    shapes = {name: tuple(x.shape[1:]) for name, x in zip(data.modalities, data.train.inputs, strict=True)}
    return network_of(shapes, data.num_classes, backbone, fusion, width, missing)
