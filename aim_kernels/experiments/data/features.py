"""Features that somebody computed before: ``.npy``, ``.npz``, ``.pt``, ``.pth`` and ``.pkl`` files to tensors.

No file can run code: ``.npy`` and ``.npz`` are read without pickles, ``.pt`` with ``weights_only=True``, ``.pkl`` by
:mod:`~aim_kernels.experiments.data.unpickle`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels.experiments.data import unpickle
from aim_kernels.experiments.data.media import BrokenFileError, Reader, naming

FEATURES = (".npy", ".npz", ".pt", ".pth", ".pkl", ".pickle")


def stored(path: Path) -> Tensor:
    """The one array or tensor of a file, of its own type.

    Raises FileNotFoundError, BrokenFileError for other endings, for files that hold several arrays, something else than
    numbers or more than tensors, and for what cannot be read.
    """
    if path.suffix.lower() not in FEATURES:
        raise BrokenFileError(f"{path} is no file of features ({', '.join(FEATURES)})")
    with naming(path):
        found = _content(path)
        if isinstance(found, Tensor):
            return found.detach()
        if found.dtype.kind not in "biuf":
            raise ValueError(f"expected numbers, got elements of the type {found.dtype}")
        # in this machine's order of bytes, and writable: torch takes nothing else
        return torch.from_numpy(np.array(found, dtype=found.dtype.newbyteorder("=")))


def _content(path: Path) -> Any:
    end = path.suffix.lower()
    if end == ".npy":
        return np.load(path, allow_pickle=False)
    if end == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files") or len(archive.files) != 1:
                raise ValueError(f"expected one array, got {list(getattr(archive, 'files', []))}")
            return archive[archive.files[0]]
    if end in (".pt", ".pth"):
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, Tensor):
            raise ValueError(f"expected a tensor, got {type(found).__name__}")
        return found
    with path.open("rb") as file:
        return unpickle.array(path, unpickle.load(file))


@dataclass(frozen=True)
class Features:
    """A file of features as float32, of the file's own shape.

    ``channel``: what is ``[a, b]``, such as a spectrogram, becomes ``[1, a, b]``: an image of one channel, as the
    published codes of OGM-GE (343dc1d), MLA (ab6c184) and BalanceBenchmark (4c1482f) use it.
    """

    channel: bool = True

    def __call__(self, path: Path) -> Tensor:
        x = stored(path).float()
        return x.unsqueeze(0) if self.channel and x.dim() == 2 else x


@dataclass(frozen=True)
class Either:
    """:class:`Features` of files that hold them, and ``other`` for all other files. A sound and its features have
    different shapes, so one data set should have either."""

    other: Reader
    features: Reader = Features()

    def __call__(self, path: Path) -> Tensor:
        return (self.features if path.suffix.lower() in FEATURES else self.other)(path)
