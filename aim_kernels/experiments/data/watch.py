"""Smartwatch data: accelerometer and gyroscope of people doing shoulder exercises, split by person."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aim_kernels._extras import require
from aim_kernels.experiments.data.common import MultimodalData, Split

WINDOW, STRIDE = 100, 50  # samples at 50 Hz: two seconds, half overlapping
TRAIN, VALIDATION = 5, 2  # of 10 people; the other three are the test split


def _file() -> Path:
    """seglearn's data file, found without importing seglearn (which would import scikit-learn and pandas)."""
    require("seglearn", "the smartwatch data set")
    spec = importlib.util.find_spec("seglearn")
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(folder) / "data" / "watch_dataset.npy"
        if path.exists():
            return path
    raise FileNotFoundError("seglearn is installed but has no data/watch_dataset.npy; install seglearn==1.2.5")


def smartwatch(seed: int = 0) -> MultimodalData:
    """seglearn's watch data: ``accelerometer`` and ``gyroscope`` ``[N, 3, 100]`` each, 7 exercises, 10 people.

    Each of the 140 recordings (50 Hz) is cut into windows of 100 samples with stride 50, 4,677 in all. People, not
    windows, are split: 5 train, 2 validate, 3 test, drawn by ``seed``. The deployment is people never seen before, and
    so is the validation split. Channels are standardized with the mean and standard deviation of the training windows.

    Raises MissingPackageError where seglearn is not installed.
    Source: Burns et al., arXiv 1802.01489, as packaged in seglearn 1.2.5 (BSD).
    """
    # the file is a pickled dictionary from the installed package, as trusted as the package's code
    raw = np.load(_file(), allow_pickle=True).item()
    windows, labels, people = [], [], []
    for series, label, person in zip(raw["X"], raw["y"], raw["subject"], strict=True):
        cut = np.lib.stride_tricks.sliding_window_view(series, WINDOW, axis=0)[::STRIDE]  # [n, 6, WINDOW]
        windows.append(cut)
        labels += [label] * len(cut)
        people += [person] * len(cut)
    x = torch.as_tensor(np.concatenate(windows), dtype=torch.float32)
    y = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    person_of = torch.as_tensor(np.asarray(people), dtype=torch.int64)

    everyone = torch.unique(person_of)
    shuffled = everyone[torch.randperm(len(everyone), generator=torch.Generator().manual_seed(seed))]
    masks = [torch.isin(person_of, part) for part in shuffled.tensor_split([TRAIN, TRAIN + VALIDATION])]
    mean = x[masks[0]].mean((0, 2), keepdim=True)
    std = x[masks[0]].std((0, 2), keepdim=True)
    x = (x - mean) / std

    def split(mask: Tensor) -> Split:
        return Split((x[mask, :3], x[mask, 3:]), y[mask])

    return MultimodalData("watch", ("accelerometer", "gyroscope"), 7, *(split(mask) for mask in masks))
