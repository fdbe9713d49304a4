"""Samples that :meth:`AIM.update` takes: checks, parts, and the classes of real labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aim_kernels.aim.inputs import (
    Inputs,
    Layout,
    count_of,
    joined,
    labels_of,
    moved,
    rows_with_nan,
    shape_of,
    take,
)

#: So many samples are taken from a loader, at most.
FROM_LOADER = 1024
#: Names of the labels in a batch that is a mapping.
LABELS = ("labels", "label")


@dataclass(frozen=True)
class Samples:
    """Inputs and labels (a tree of tensors; None: not given)."""

    inputs: Inputs
    labels: Any

    @property
    def size(self) -> int:
        """The number of samples."""
        told = None if self.labels is None else count_of(self.labels)
        return self.inputs.size if told is None else told

    def part(self, index: slice | Tensor) -> Samples:
        """These of the samples."""
        count = self.size
        return Samples(self.inputs.take(index, count), take(self.labels, index, count))


def read_samples(what: str, layout: Layout, inputs: Any, labels: Any = None, present: Tensor | None = None) -> Samples:
    """One batch in any of the forms that :meth:`AIM.update` takes, its labels on the device of its inputs. ``what``: ""
    or "held-out ", for messages.

    Samples with NaN in inputs or labels are left out, with a warning. Raises ValueError for another number of inputs,
    none at all, lengths that differ from that of the labels, and only samples with NaN.
    """
    if labels is None:
        inputs, labels = _split(layout, inputs)
    found = layout.read(what, inputs, present)
    if all(x is None for x in found):
        raise ValueError(f"{what}inputs are all None; give at least one modality")
    samples = Samples(found, None if labels is None else moved(labels_of(labels), found.device))
    _check_lengths(what, layout, samples)
    return _without_nan(what, layout, samples)


def read_held_out(layout: Layout, held_out: Any) -> Samples:
    """The held-out samples: ``(inputs, labels)``, ``(inputs, labels, present)``, a loader or its batch."""
    what = "held-out "
    if isinstance(held_out, (tuple, list)) and 2 <= len(held_out) <= 3 and not isinstance(held_out[0], Tensor):
        return read_samples(what, layout, *held_out)
    return read_samples(what, layout, held_out)


def _split(layout: Layout, given: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch or a loader; labels None where there are none."""
    if isinstance(given, Mapping):
        name = next((each for each in LABELS if each in given and not _claimed(layout, each)), None)
        return (given, None) if name is None else ({k: x for k, x in given.items() if k != name}, given[name])
    count = len(layout.modalities)
    if isinstance(given, (tuple, list)) and not isinstance(given, Inputs):
        if layout.names[0] is None and len(given) == count + 1:
            return given[:-1], given[-1]
        return given, None
    if isinstance(given, Iterable) and not isinstance(given, (Tensor, Inputs, str)):
        return _of_loader(layout, given)
    return given, None


def _claimed(layout: Layout, name: str) -> bool:
    return any(name in (row or ()) for row in layout.names)


def _of_loader(layout: Layout, loader: Iterable[Any]) -> tuple[Any, Any]:
    """The first batches of a loader, up to ``FROM_LOADER`` samples or its end; the random state is as before."""
    parts: list[Samples] = []
    total = 0
    with torch.random.fork_rng(devices=[]):
        for batch in loader:
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and not isinstance(batch[0], Tensor)
            if not isinstance(batch, (tuple, list, Mapping)):
                raise ValueError(
                    f"the loader yields a {type(batch).__name__}; it must yield [*inputs, labels], (inputs, labels), "
                    "or a mapping with 'labels'"
                )
            inputs, labels = (batch[0], batch[1]) if pair else _split(layout, batch)
            samples = Samples(layout.read("", inputs), labels_of(labels))
            parts.append(samples)
            total += samples.size
            if total >= FROM_LOADER:
                _warn_of_order(parts)
                break
    if not parts:
        raise ValueError("the loader is empty; give one that yields samples")
    counts = [each.size for each in parts]
    inputs = [each.inputs.given() for each in parts]
    labels = None if parts[0].labels is None else joined([each.labels for each in parts], counts)
    return joined(inputs, counts), labels


def _warn_of_order(parts: Sequence[Samples]) -> None:
    """Warns where the first samples of a loader that goes on are sorted by class."""
    labels = [each.labels for each in parts]
    if not all(isinstance(x, Tensor) and x.dim() == 1 and not x.is_floating_point() for x in labels):
        return
    found = torch.cat(labels)
    if bool((found[1:] >= found[:-1]).all()):
        warnings.warn(
            f"the first {len(found)} samples of the loader are sorted by class and have {len(found.unique())} of them; "
            "a decision needs samples of all: shuffle, or pass samples",
            stacklevel=6,  # whoever calls AIM.update
        )


def _check_lengths(what: str, layout: Layout, samples: Samples) -> None:
    """Raises ValueError where inputs and labels are not all of as many samples."""
    count = samples.size
    source = "" if samples.labels is None else f", {what}labels have {count}"
    for modality, x in zip(layout.modalities, samples.inputs, strict=True):
        found = shape_of(x, count) if count else [0]
        if x is not None and count not in found and count:
            got = type(next(iter(x.values())) if isinstance(x, Mapping) and x else x).__name__
            raise ValueError(
                f"{what}input of {modality!r} ({got}) has nothing that counts {count} samples; give tensors whose "
                "first dimension does, or a list of one element per sample"
                if not found or set(found) == {1}
                else f"{what}input of {modality!r} has {found[0]} samples{source}; the first dimension of all its "
                "tensors must count samples"
            )
        wrong = [n for n in found if n not in (count, 1)] if count else [0]
        if x is not None and wrong:
            raise ValueError(
                f"{what}input of {modality!r} has {wrong[0]} samples{source}; the first dimension of all its tensors "
                "must count samples"
            )
    present = samples.inputs.shared.get("present")
    if isinstance(present, Tensor) and present.dim() == 2 and len(present) != count:
        raise ValueError(f"{what}present has {len(present)} samples, the inputs have {count}")
    wrong = [n for n in shape_of(samples.labels, count) if n != count]
    if wrong:
        raise ValueError(f"{what}labels have tensors of {count} and of {wrong[0]} samples; all must count samples")


def _without_nan(what: str, layout: Layout, samples: Samples) -> Samples:
    count, bad = samples.size, None
    names = [f"the input of {m!r}" for m in layout.modalities]
    present = samples.inputs.shared.get("present")
    for number, (name, tree) in enumerate(zip([*names, "the labels"], [*samples.inputs, samples.labels], strict=True)):
        rows = rows_with_nan(tree, count)
        if rows is not None and number < len(names) and isinstance(present, Tensor) and present.dim() == 2:
            rows = rows & present[:, number].to(rows)  # what stands for an absent input is not looked at
        if rows is None or not bool(rows.any()):
            continue
        warnings.warn(
            f"{int(rows.sum())} of {count} {what}samples have NaN in {name} (the first is number "
            f"{int(rows.nonzero()[0])}); they are left out of this update",
            stacklevel=5,  # whoever calls AIM.update
        )
        bad = rows.cpu() if bad is None else bad | rows.cpu()
    if bad is None:
        return samples
    kept = (~bad).nonzero().flatten()
    if not len(kept):
        raise ValueError(f"all {what}samples have NaN; give others")
    return samples.part(kept)


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


def pieces_of(count: int, most: int) -> list[slice]:
    """``count`` samples in at most so many parts, as equal as can be."""
    parts = torch.arange(count, device="cpu").tensor_split(min(most, count))
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


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
