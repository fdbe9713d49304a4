"""Samples that :meth:`AIM.update` takes: checks, parts, and the classes of real labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Inputs, one per modality (None: missing), and labels.
Samples = tuple[list[Tensor | None], Tensor | None]


def check_inputs(
    what: str, inputs: Sequence[Tensor | None] | Tensor, labels: Tensor | None, modalities: Sequence[str]
) -> Samples:
    """One batch, its labels on the device of its inputs. ``what``: "" or "held-out ", for messages.

    Raises ValueError for another number of inputs, none at all, and lengths that differ from that of the labels.
    """
    if isinstance(inputs, Tensor) or len(inputs) != len(modalities):
        got = "one tensor" if isinstance(inputs, Tensor) else f"{len(inputs)}"
        raise ValueError(
            f"{what}inputs must be {len(modalities)} tensors, one a modality in the order "
            f"{', '.join(modalities)}; got {got}"
        )
    if all(x is None for x in inputs):
        raise ValueError(f"{what}inputs are all None; give at least one modality")
    if labels is None:
        return list(inputs), None
    for modality, x in zip(modalities, inputs, strict=True):
        if x is not None and (len(x) != len(labels) or len(x) == 0):
            raise ValueError(f"{what}input of {modality!r} has {len(x)} samples, {what}labels have {len(labels)}")
    return list(inputs), labels.to(next(x.device for x in inputs if x is not None))


def check_class_labels(what: str, labels: Tensor, num_classes: int) -> Tensor:
    """Class numbers ``[B]`` as int64. Raises ValueError for another shape or type, and for numbers out of range."""
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"{what}labels must be class numbers of shape [B], got {labels.dtype} of shape {tuple(labels.shape)}; "
            "for real numbers use targets='quantiles' with a loss, or a callable probe"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{what}labels range from {low} to {high}; with num_classes={num_classes} they lie in 0..{num_classes - 1}"
        )
    return labels.long()


def check_real_labels(what: str, labels: Tensor) -> Tensor:
    """Finite real numbers ``[B]`` or ``[B, 1]``. Raises ValueError for anything else."""
    if not labels.is_floating_point() or labels.dim() > 2 or labels[0].numel() != 1:
        raise ValueError(
            f"{what}labels must be real numbers of shape [B] or [B, 1] under targets='quantiles', got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    if not bool(torch.isfinite(labels).all()):
        raise ValueError(f"{what}labels are not all finite; leave such samples out")
    return labels


def part_of(inputs: Sequence[Tensor | None], part: slice) -> list[Tensor | None]:
    """The same samples of every input."""
    return [None if x is None else x[part] for x in inputs]


def pieces_of(count: int, most: int) -> list[slice]:
    """``count`` samples in at most so many parts, as equal as can be."""
    parts = torch.arange(count, device="cpu").tensor_split(min(most, count))
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


def without(samples: Samples, modalities: Sequence[str], missing: Sequence[str]) -> Samples:
    """The samples with None for the inputs of ``missing``."""
    inputs, labels = samples
    return [None if m in missing else x for m, x in zip(modalities, inputs, strict=True)], labels


def bins(labels: Tensor, edges: Tensor) -> Tensor:
    """Numbers ``[B]`` of the bins between ``edges``."""
    return torch.bucketize(labels.flatten(), edges, right=True)


def binned(labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real labels as classes: bin numbers ``[B]`` of ``count`` bins that hold equally many samples, the mean of each
    bin (the middle quantile of an empty one) shaped like labels, and the edges between them."""
    values = labels.flatten()
    fractions = torch.arange(2 * count + 1, device=values.device, dtype=values.dtype) / (2 * count)
    quantiles = torch.quantile(values.float(), fractions.float()).to(values.dtype)
    edges, middles = quantiles[2:-1:2].contiguous(), quantiles[1::2]
    classes = bins(labels, edges)
    counts = torch.bincount(classes, minlength=count)
    sums = torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(0, classes, values)
    means = torch.where(counts > 0, sums / counts.clamp_min(1), middles)
    return classes, means.view(count, *labels.shape[1:]), edges
