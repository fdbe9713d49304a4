"""Small multimodal data sets, built from files that installed packages or downloaded wheels carry: nothing is
downloaded."""

from __future__ import annotations

from aim_kernels.data.common import MissingPackageError, MultimodalData, Split
from aim_kernels.data.digits import coloured_digits
from aim_kernels.data.registry import DATA_SETS, Task
from aim_kernels.data.views import htad, mnist_hog, mnist_weak, multiple_features
from aim_kernels.data.watch import smartwatch

__all__ = [
    "DATA_SETS",
    "MissingPackageError",
    "MultimodalData",
    "Split",
    "Task",
    "coloured_digits",
    "htad",
    "mnist_hog",
    "mnist_weak",
    "multiple_features",
    "smartwatch",
]
