"""Small multimodal data sets, built from files that installed packages or downloaded wheels carry: nothing is
downloaded. And loaders for data sets of the field, in the layouts in which they are published."""

from __future__ import annotations

from aim_kernels._extras import MissingPackageError
from aim_kernels.experiments.data.captioned import food101, iemocap, mvsa_single
from aim_kernels.experiments.data.clips import ave, crema_d, kinetics_sounds, ucf101, vggsound
from aim_kernels.experiments.data.common import MultimodalData, Split
from aim_kernels.experiments.data.digits import coloured_digits, coloured_mnist
from aim_kernels.experiments.data.features import Features
from aim_kernels.experiments.data.index import Clips
from aim_kernels.experiments.data.media import BrokenFileError
from aim_kernels.experiments.data.registry import DATA_SETS, Task
from aim_kernels.experiments.data.sentiment import cmu_mosei, cmu_mosi
from aim_kernels.experiments.data.text import BagOfWords, StoredTokens, Tokens, vocabulary
from aim_kernels.experiments.data.views import htad, mnist_hog, mnist_weak, multiple_features
from aim_kernels.experiments.data.watch import smartwatch

__all__ = [
    "DATA_SETS",
    "BagOfWords",
    "BrokenFileError",
    "Clips",
    "Features",
    "MissingPackageError",
    "MultimodalData",
    "Split",
    "StoredTokens",
    "Task",
    "Tokens",
    "ave",
    "cmu_mosei",
    "cmu_mosi",
    "coloured_digits",
    "coloured_mnist",
    "crema_d",
    "food101",
    "htad",
    "iemocap",
    "kinetics_sounds",
    "mnist_hog",
    "mnist_weak",
    "multiple_features",
    "mvsa_single",
    "smartwatch",
    "ucf101",
    "vggsound",
    "vocabulary",
]
