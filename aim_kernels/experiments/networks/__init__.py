"""Networks for comparisons: encoders as lists of blocks, fusions, and a network of both that bears missing inputs."""

from __future__ import annotations

from aim_kernels.experiments.networks.build import BACKBONES, network_for, network_of
from aim_kernels.experiments.networks.encoders import conv1d_blocks, conv2d_blocks, mlp_blocks
from aim_kernels.experiments.networks.fusion import FUSIONS, Concatenation, CrossAttention, FiLM, Fusion, Gated, Sum
from aim_kernels.experiments.networks.multimodal import MultimodalNetwork
from aim_kernels.experiments.networks.resnet import resnet18_blocks
from aim_kernels.experiments.networks.transformer import transformer_blocks

__all__ = [
    "BACKBONES",
    "FUSIONS",
    "Concatenation",
    "CrossAttention",
    "FiLM",
    "Fusion",
    "Gated",
    "MultimodalNetwork",
    "Sum",
    "conv1d_blocks",
    "conv2d_blocks",
    "mlp_blocks",
    "network_for",
    "network_of",
    "resnet18_blocks",
    "transformer_blocks",
]
