"""The demo's network: late fusion by concatenation and a linear head."""

from __future__ import annotations

from aim_kernels.experiments.data.common import MultimodalData
from aim_kernels.experiments.networks import MultimodalNetwork
from aim_kernels.experiments.networks import network_for as build

WIDTH = 64  # features of every encoder


def network_for(data: MultimodalData) -> MultimodalNetwork:
    """Linear blocks for the 8x8 images, convolutions over time for ``[N, C, T]`` signals; three blocks a modality."""
    return build(data, "auto", "concat", WIDTH)
