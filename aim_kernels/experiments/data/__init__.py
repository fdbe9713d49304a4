"""Small multimodal data sets, built from files that installed packages or downloaded wheels carry: nothing is
downloaded. And loaders for data sets of the field, in the layouts in which they are published."""

from __future__ import annotations

from aim_kernels._extras import MissingPackageError
from aim_kernels.experiments.data.clips import Clips, ave, crema_d, kinetics_sounds, ucf101
from aim_kernels.experiments.data.common import MultimodalData, Split
from aim_kernels.experiments.data.digits import coloured_digits, coloured_mnist
from aim_kernels.experiments.data.registry import DATA_SETS, Task
from aim_kernels.experiments.data.views import htad, mnist_hog, mnist_weak, multiple_features
from aim_kernels.experiments.data.watch import smartwatch

__all__ = [
    "DATA_SETS",
    "Clips",
    "MissingPackageError",
    "MultimodalData",
    "Split",
    "Task",
    "ave",
    "coloured_digits",
    "coloured_mnist",
    "crema_d",
    "htad",
    "kinetics_sounds",
    "mnist_hog",
    "mnist_weak",
    "multiple_features",
    "smartwatch",
    "ucf101",
]
