"""Measures of a trained network, all on a whole split with the weights that the method wants judged; and over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aim_kernels.experiments.data.common import MultimodalData, Split
from aim_kernels.methods.base import Blocks

#: Samples of one forward pass.
PIECE = 512
#: Bins of the calibration error.
BINS = 15


@torch.no_grad()
def logits_of(model: Any, split: Split) -> Tensor:
    """``[N, K]``, in pieces."""
    return torch.cat([model(*(x[i : i + PIECE] for x in split.inputs)) for i in range(0, len(split), PIECE)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share, in percent, of samples whose class has the greatest logit."""
    return 100.0 * int((logits.argmax(1) == labels).sum()) / len(labels)


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """Unweighted mean over classes of F1, in percent; a class that is neither there nor predicted does not count."""
    from sklearn.metrics import f1_score

    return 100.0 * float(f1_score(labels.cpu().numpy(), logits.argmax(1).cpu().numpy(), average="macro"))


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error, in percent: ``sum_b n_b / N |accuracy_b - confidence_b|`` over 15 bins of equal width
    of the greatest probability (Guo et al. 2017, arXiv 1706.04599)."""
    confidence, predicted = torch.softmax(logits.double(), 1).max(1)
    right = (predicted == labels).double()
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.float64, device=logits.device).index_add_(0, bins, right - confidence)
    return 100.0 * gap.abs().sum().item() / len(labels)


@torch.no_grad()
def linear_probes(blocks: Blocks, data: MultimodalData) -> list[float]:
    """Test accuracy, in percent, of a ridge classifier on each encoder's frozen features, fitted on training."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def features(split: Split) -> list[Any]:
        pieces = [blocks.encode([x[i : i + PIECE] for x in split.inputs]) for i in range(0, len(split), PIECE)]
        return [torch.cat(parts).flatten(1).cpu().double().numpy() for parts in zip(*pieces, strict=True)]

    train, test = data.train.labels.cpu().numpy(), data.test.labels.cpu().numpy()
    found = []
    for fitted, held in zip(features(data.train), features(data.test), strict=True):
        probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=1.0)).fit(fitted, train)
        found.append(100.0 * probe.score(held, test))
    return found


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; that of one value is not a number."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.fmean(values), standard_error(values)


def paired(ours: Sequence[float], theirs: Sequence[float], test_share: float = 0.0) -> tuple[float, float]:
    """Mean of the paired differences and the half width of its 95 % interval (Student's t; not a number for one
    pair).

    Seeds that split the same samples anew have training samples in common, so they tell less than as many independent
    ones: with ``test_share``, the number of test samples over that of training samples, the variance of the mean is
    ``(1 / n + test_share) * s^2`` (the corrected resampled t-test of Nadeau and Bengio, Machine Learning 52, 2003).
    """
    import numpy as np
    from scipy import stats

    difference = np.asarray(ours) - np.asarray(theirs)
    n = len(difference)
    if n < 2:
        return float(difference.mean()), float("nan")
    error = difference.std(ddof=1) * (1 / n + test_share) ** 0.5
    return float(difference.mean()), float(stats.t.ppf(0.975, n - 1) * error)
