"""Batches that a training step takes: looked at from outside only, so that no step waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aim_kernels.aim.inputs import Inputs, Layout, joined, labels_of
from aim_kernels.aim.samples import LABELS, Samples


def read_batch(layout: Layout, inputs: Any, labels: Any = None, present: Tensor | None = None) -> Samples:
    """Inputs by modality and labels of a batch: of ``(inputs, labels)`` given one by one, or of a loader's batch,
    ``[*inputs, labels]``, ``(inputs, labels)``, or a mapping with "labels". Without labels they are None.

    Raises ValueError for inputs of another kind or number than the model's.
    """
    if labels is None and not isinstance(inputs, Inputs):
        inputs, labels = _split(layout, inputs)
    return Samples(layout.read("", inputs, present), None if labels is None else labels_of(labels))


def _split(layout: Layout, batch: Any) -> tuple[Any, Any]:
    claimed = {name for row in layout.names for name in row or ()}
    if isinstance(batch, Mapping):
        name = next((each for each in LABELS if each in batch and each not in claimed), None)
        return (batch, None) if name is None else ({k: x for k, x in batch.items() if k != name}, batch[name])
    if not isinstance(batch, (tuple, list)):
        return batch, None
    count = len(layout.modalities)
    if len(batch) == 2 and _whole(layout, batch[0], claimed):
        return batch[0], batch[1]
    if layout.names[0] is None and len(batch) == count + 1:
        return batch[:-1], batch[-1]
    return batch, None


def _whole(layout: Layout, x: Any, claimed: set[str | int]) -> bool:
    """Whether something holds the inputs of all modalities, rather than that of one."""
    if isinstance(x, Inputs):
        return True
    if isinstance(x, Mapping):
        return bool((claimed or set(layout.modalities)) & set(x))
    return isinstance(x, (tuple, list)) and (bool(claimed) or len(x) == len(layout.modalities))


def union(what: str, one: Samples, other: Samples) -> Samples:
    """The samples of both, in this order. ``what``: who asks, for messages.

    Arguments that belong to no sample (another number of rows) stay those of ``one``. Raises ValueError for inputs or
    labels of another structure or shape.
    """
    counts = [one.size, other.size]
    shared: dict[str | int, Any] = {}
    names = dict.fromkeys((*one.inputs.shared, *other.inputs.shared))
    for name in names:
        parts = [each.inputs.shared.get(name) for each in (one, other)]
        if name == "present":
            parts = [_all_present(each) if x is None else x for each, x in zip((one, other), parts, strict=True)]
        of_samples = all(isinstance(x, Tensor) and x.dim() and len(x) == n for x, n in zip(parts, counts, strict=True))
        shared[name] = joined(parts, counts) if of_samples else parts[0]
    try:
        for a, b in zip(pytree.tree_leaves(one.labels), pytree.tree_leaves(other.labels), strict=False):
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype != b.dtype:
                raise ValueError(f"labels are {a.dtype} and {b.dtype}")
        entries = tuple(joined(parts, counts) for parts in zip(one.inputs, other.inputs, strict=True))
        labels = joined([one.labels, other.labels], counts)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{what} joins training and held-out samples, which differ: {error}") from error
    return Samples(Inputs(entries, shared, one.inputs.layout), labels)


def _all_present(samples: Samples) -> Tensor:
    return torch.ones(samples.size, len(samples.inputs), dtype=torch.bool, device=samples.inputs.device)


def state_of(samples: Samples | None) -> dict[str, Any] | None:
    """Samples as plain data."""
    if samples is None:
        return None
    inputs = samples.inputs
    names = None if inputs.layout is None else inputs.layout.names
    return {
        "entries": list(inputs.entries),
        "shared": dict(inputs.shared),
        "names": names,
        "labels": samples.labels,
    }


def samples_of(layout: Layout, state: Mapping[str, Any] | None, device: torch.device) -> Samples | None:
    """What :func:`state_of` made plain, on the device."""
    if state is None:
        return None

    def there(tree: Any) -> Any:
        return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)

    own = layout if state["names"] is None else Layout(layout.modalities, tuple(state["names"]))
    inputs = Inputs(tuple(map(there, state["entries"])), there(state["shared"]), own)
    return Samples(inputs, there(state["labels"]))
