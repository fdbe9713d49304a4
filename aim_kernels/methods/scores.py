"""Scores of each modality on a batch, which most methods compare. Nothing here waits for the device.

Scores are means over the ranks of an initialized process group, so that all of them set the same rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from aim_kernels.methods.losses import IGNORED
from aim_kernels.step.sharding import averaged


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def counted(labels: Tensor, ignored: int = IGNORED) -> tuple[Tensor, Tensor]:
    """Which samples count, bool ``[B]``, and labels with 0 for the others."""
    counts = labels != ignored
    return counts, torch.where(counts, labels, 0)


def mean_of_counted(values: Tensor, counts: Tensor) -> Tensor:
    """Means of ``values`` ``[..., B]`` over the samples that count, float64; 0 if none does."""
    values = torch.where(counts, values, 0.0).double()
    return values.sum(-1) / counts.sum().clamp_min(1)


def true_class_scores(logits: Sequence[Tensor], labels: Tensor, ignored: int = IGNORED) -> Tensor:
    """``s_m = sum_i softmax(logits_m[i])[y_i]``, float64 ``[M]``. ``logits``: ``[B, K]`` a modality; ``labels``:
    ``[B]``; samples with the label ``ignored`` are left out."""
    counts, labels = counted(labels, ignored)
    own = [wide(x).softmax(1).gather(1, labels[:, None])[:, 0] for x in logits]
    return averaged(torch.stack([torch.where(counts, p, 0.0).double().sum() for p in own]))


def accuracies(logits: Sequence[Tensor], labels: Tensor, ignored: int = IGNORED) -> Tensor:
    """Share of the samples whose class each modality names, float64 ``[M]``; those ``ignored`` are left out."""
    counts, labels = counted(labels, ignored)
    return averaged(torch.stack([mean_of_counted((x.argmax(1) == labels).double(), counts) for x in logits]))


def mean_of_others(scores: Tensor) -> Tensor:
    """``mean_{m' != m} s_m'`` for each m; ``[M]``."""
    return (scores.sum() - scores) / (len(scores) - 1)


def late_fusion_logits(head: nn.Linear, features: Sequence[Tensor]) -> list[Tensor]:
    """Each modality's share ``z_m W_m^T + b / M`` of ``head(concat(z_1, ..., z_M))``; they sum to the joint logits.

    ``features``: ``[B, C_m]`` a modality, in the order in which they are concatenated. Raises ValueError where the
    widths do not add up to the head's.
    """
    widths = [z.shape[1] for z in features]
    if sum(widths) != head.in_features:
        raise ValueError(f"features of widths {widths} do not fill a head of {head.in_features} inputs")
    slices = head.weight.split(widths, 1)
    bias = 0.0 if head.bias is None else head.bias / len(features)
    return [z @ w.T + bias for z, w in zip(features, slices, strict=True)]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own flag after. ``model.train()`` would undo blocks that are frozen."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
