"""Every data set by its name, with how long and in what batches networks are trained on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from aim_kernels.experiments.data.common import MultimodalData
from aim_kernels.experiments.data.digits import coloured_digits, coloured_mnist
from aim_kernels.experiments.data.views import htad, mnist_hog, mnist_weak, multiple_features
from aim_kernels.experiments.data.watch import smartwatch


class Task(NamedTuple):
    """A data set and how it is trained on.

    Attributes:
        make: ``make(seed)``.
        modalities: their names.
        epochs, batch_size: of training.
        backbone: that of "auto", by default.
        frozen: the modality whose encoder is trained alone first, for a quarter of the epochs, and then frozen.
    """

    make: Callable[[int], MultimodalData]
    modalities: tuple[str, ...]
    epochs: int
    batch_size: int
    backbone: str = "auto"
    frozen: str | None = None


DATA_SETS: dict[str, Task] = {
    "digits": Task(coloured_digits, ("grey", "colour"), 40, 32),
    "digits-batchnorm": Task(coloured_digits, ("grey", "colour"), 40, 32, backbone="auto-batchnorm"),
    "digits-frozen": Task(coloured_digits, ("grey", "colour"), 40, 32, frozen="colour"),
    "mnist-colour": Task(coloured_mnist, ("grey", "colour"), 6, 64),
    "watch": Task(smartwatch, ("accelerometer", "gyroscope"), 8, 64),
    "htad": Task(htad, ("audio", "accelerometer"), 40, 32),
    "mfeat-pix-mor": Task(partial(multiple_features, views=("pix", "mor")), ("pix", "mor"), 30, 32),
    "mfeat-fou-zer": Task(partial(multiple_features, views=("fou", "zer")), ("fou", "zer"), 30, 32),
    "mfeat-six": Task(multiple_features, ("fou", "fac", "kar", "pix", "zer", "mor"), 20, 32),
    "mnist-hog": Task(mnist_hog, ("hog0", "hog1", "hog2", "hog3"), 20, 64),
    "mnist-weak": Task(mnist_weak, ("image", "coarse"), 20, 64),
}
