"""Inputs of a model by modality: how they are passed, what is missing, and what belongs to which sample."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)
from torch.utils import _pytree as pytree

#: An argument of a model: the name of a keyword, or the number of a position.
Argument = str | int
#: Numbers of samples: a part, or a selection in any order.
Index = slice | Tensor


@dataclass(frozen=True)
class Inputs(Sequence[Any]):
    """The inputs of some samples, as a sequence with one entry per modality: a tree of tensors, or None, where the
    modality is missing.

    ``shared``: arguments that belong to no modality; ``layout``: where each entry goes when the model is called.
    """

    entries: tuple[Any, ...]
    shared: Mapping[Argument, Any] = field(default_factory=dict)
    layout: Layout | None = None

    def __getitem__(self, number: Any) -> Any:
        return self.entries[number]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.entries)

    @property
    def size(self) -> int:
        """The number of samples; 0 if no tensor tells."""
        return next((n for x in (*self.entries, *self.shared.values()) if (n := count_of(x)) is not None), 0)

    @property
    def device(self) -> torch.device:
        """That of the first tensor."""
        tensors = (x for x in pytree.tree_leaves(_plain([*self.entries, dict(self.shared)])) if _has_rows(x))
        return next(
            (x.data.device if isinstance(x, PackedSequence) else x.device for x in tensors), torch.device("cpu")
        )

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of a call of the model."""
        places: dict[Argument, Any] = dict(self.shared)
        for number, entry in enumerate(self.entries):
            names = None if self.layout is None else self.layout.names[number]
            if names is None:
                places[number] = entry
            elif entry is not None:
                places.update(entry)
            else:
                places.update(dict.fromkeys(names))
        numbers = sorted(name for name in places if isinstance(name, int))
        return [places[n] for n in numbers], {name: x for name, x in places.items() if isinstance(name, str)}

    def call(self, model: Callable[..., Any]) -> Any:
        """``model(*positional, **keywords)``."""
        positional, keywords = self.arguments()
        return model(*positional, **keywords)

    def given(self) -> Any:
        """In the form in which :meth:`AIM.update` takes them: a list of positional arguments, or a mapping."""
        positional, keywords = self.arguments()
        return keywords if keywords and not positional else positional

    def take(self, index: Index, count: int | None = None) -> Inputs:
        """These of the ``count`` samples."""
        count = self.size if count is None else count
        shared = {name: take(x, index, count, whole=True) for name, x in self.shared.items()}
        return Inputs(tuple(take(x, index, count) for x in self.entries), shared, self.layout)

    def without(self, missing: Sequence[int]) -> Inputs:
        """With None for the modalities of these numbers."""
        entries = tuple(None if number in missing else x for number, x in enumerate(self.entries))
        return Inputs(entries, self.shared, self.layout)

    def exchanged(self, numbers: Sequence[int], other: Inputs) -> Inputs:
        """With the entries of another order of the samples for these modalities, and with their columns of
        ``present``."""
        entries = tuple(y if number in numbers else x for number, (x, y) in enumerate(zip(self, other, strict=True)))
        shared = dict(self.shared)
        present, others = self.shared.get("present"), other.shared.get("present")
        if isinstance(present, Tensor) and isinstance(others, Tensor) and present.dim() == 2:
            columns = torch.zeros(present.shape[1], dtype=torch.bool, device=present.device)
            columns[list(numbers)] = True
            shared["present"] = torch.where(columns, others, present)
        return Inputs(entries, shared, self.layout)


@dataclass(frozen=True)
class Layout:
    """Which arguments of a model belong to which modality.

    ``names``: per modality its keywords (str) and positions (int); None: one argument, at the modality's position.
    """

    modalities: tuple[str, ...]
    names: tuple[tuple[Argument, ...] | None, ...]
    #: What is wrong with positional inputs: the model names its arguments like the modalities, in another order.
    refused: str = ""

    @classmethod
    def of(
        cls, modalities: Sequence[str], arguments: Mapping[str, Any] | None, model: nn.Module | None = None
    ) -> Layout:
        """That of ``arguments``: modality to a keyword or a position, or to several; None: one position each.

        Raises ValueError for other modalities than there are, none of a modality, and one that two modalities claim.
        """
        if arguments is None:
            return cls(tuple(modalities), (None,) * len(modalities), _swapped(modalities, model))
        if set(arguments) != set(modalities):
            raise ValueError(f"arguments is given for {sorted(arguments)}, the modalities are {sorted(modalities)}")
        names: list[tuple[Argument, ...]] = []
        for modality in modalities:
            given = arguments[modality]
            row = (given,) if isinstance(given, (str, int)) else tuple(given)
            if not row or any(isinstance(name, bool) or not isinstance(name, (str, int)) for name in row):
                raise ValueError(
                    f"arguments[{modality!r}] is {given!r}; give the names of the model's keywords, or positions"
                )
            names.append(row)
        every = [name for row in names for name in row]
        twice = sorted({str(name) for name in every if every.count(name) > 1})
        if twice:
            raise ValueError(f"arguments gives {', '.join(twice)} to more than one modality")
        return cls(tuple(modalities), tuple(names))

    def read(self, what: str, inputs: Any, present: Tensor | None = None) -> Inputs:
        """What was given for inputs, by modality. ``present``: the keyword of that name.

        Raises ValueError for inputs of another kind or number than the layout's.
        """
        if isinstance(inputs, Inputs):
            return inputs if present is None else Inputs(inputs.entries, {**inputs.shared, "present": present}, self)
        extra: dict[Argument, Any] = {} if present is None else {"present": _mask(what, present, self.modalities)}
        if isinstance(inputs, Mapping):
            return self._of_keywords(what, dict(inputs), extra)
        count = len(self.modalities)
        if not isinstance(inputs, Sequence) or (self.names[0] is None and len(inputs) != count):
            got = "one tensor" if isinstance(inputs, Tensor) else _words(inputs)
            raise ValueError(
                f"{what}inputs must be {count} tensors, one a modality in the order {', '.join(self.modalities)}; got "
                f"{got}. If a modality has several, or the model takes keywords, say which belong to it: "
                f"arguments={{{self.modalities[0]!r}: (...), ...}}"
            )
        values = [_tensors(x) for x in inputs]
        if self.names[0] is None and self.refused:
            raise ValueError(self.refused)
        if self.names[0] is None:
            return Inputs(tuple(values), extra, self)
        return self._by_name(what, dict(enumerate(values)), extra)

    def _of_keywords(self, what: str, inputs: dict[Any, Any], extra: Mapping[Argument, Any]) -> Inputs:
        values = {name: _tensors(x) for name, x in inputs.items()}
        if self.names[0] is not None:
            return self._by_name(what, values, extra)
        unknown = sorted(str(name) for name in values if name not in (*self.modalities, "present"))
        if unknown:
            raise ValueError(
                f"{what}inputs have {', '.join(unknown)}, the modalities are {', '.join(self.modalities)}; say which "
                f"keywords of the model belong to which: arguments={{{self.modalities[0]!r}: (...), ...}}"
            )
        lacking = [m for m in self.modalities if m not in values]
        if lacking:
            raise ValueError(f"{what}inputs have no {', '.join(lacking)}; give None for a modality that is missing")
        return Layout(self.modalities, tuple((m,) for m in self.modalities))._by_name(what, values, extra)

    def _by_name(self, what: str, values: Mapping[Argument, Any], extra: Mapping[Argument, Any]) -> Inputs:
        entries = []
        for row in self.names:
            assert row is not None
            own = {name: values[name] for name in row if name in values}
            entries.append(own if any(x is not None for x in own.values()) else None)
        claimed = {name for row in self.names for name in row or ()}
        shared = {name: x for name, x in values.items() if name not in claimed}
        if not any(name in values for name in claimed):
            raise ValueError(
                f"{what}inputs have none of the arguments that belong to a modality: {sorted(map(str, claimed))}; "
                f"they have {sorted(map(str, values))}"
            )
        return Inputs(tuple(entries), {**shared, **extra}, self)


def count_of(tree: Any) -> int | None:
    """The number of samples: the length of the first tensor that has one; None if there is none."""
    if isinstance(tree, Tensor):
        return tree.size(0) if tree.dim() else None
    if _is_per_sample(tree):
        return len(tree)
    for leaf in pytree.tree_leaves(_plain(tree), is_leaf=lambda x: isinstance(x, PackedSequence)):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.size(0)
    return None


def take(tree: Any, index: Index, count: int, *, whole: bool = False) -> Any:
    """The samples ``index`` of ``count`` in a tree: rows of tensors, packed sequences and nested tensors, and elements
    of lists of so many tensors, texts or other objects. What has no samples of its own (a number, a text, a tensor
    without or of one row) stays; with ``whole`` any tensor that has another number of rows, too."""

    def cut(leaf: Any) -> Any:
        if _is_ragged(leaf, count):
            return type(leaf)(leaf[number] for number in _numbers(index, count))
        if isinstance(leaf, PackedSequence):
            padded, lengths = pad_packed_sequence(leaf, batch_first=True)
            rows = torch.tensor(_numbers(index, count), dtype=torch.int64, device="cpu")
            return pack_padded_sequence(
                padded[rows.to(padded.device)], lengths[rows], batch_first=True, enforce_sorted=False
            )
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        if leaf.size(0) != count and (whole or leaf.size(0) == 1):
            return leaf
        if leaf.is_nested:
            rows_of = leaf.unbind()
            chosen = [rows_of[number] for number in _numbers(index, count)]
            return torch.nested.as_nested_tensor(chosen, layout=leaf.layout)
        if leaf.layout != torch.strided:
            numbers = torch.tensor(_numbers(index, count), dtype=torch.int64, device=leaf.device)
            return leaf.index_select(0, numbers)
        return leaf[index.to(leaf.device) if isinstance(index, Tensor) else index]

    return pytree.tree_map(cut, _plain(tree), is_leaf=lambda x: isinstance(x, PackedSequence) or _is_ragged(x, count))


def rows_with_nan(tree: Any, count: int) -> Tensor | None:
    """Which of the samples have NaN, bool ``[count]``; None if no tensor of floating point says anything of it."""
    found: Tensor | None = None
    for leaf in _leaves(tree, count):
        if isinstance(leaf, PackedSequence) and leaf.data.is_floating_point():
            leaf = pad_packed_sequence(leaf, batch_first=True)[0]
        parts = leaf.unbind() if isinstance(leaf, Tensor) and leaf.is_nested else leaf
        if isinstance(parts, (list, tuple)) and not isinstance(parts, PackedSequence):
            leaf = torch.tensor([isinstance(x, Tensor) and bool(x.isnan().any()) for x in parts]).to(torch.float32)
            leaf = leaf.masked_fill(leaf > 0, math.nan)
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        if leaf.layout != torch.strided or leaf.dim() == 0 or leaf.size(0) != count:
            continue
        bad = leaf.isnan().flatten(1).any(1) if leaf.dim() > 1 else leaf.isnan()
        found = bad if found is None else found | bad.to(found.device)
    return found


def shape_of(tree: Any, count: int) -> list[int]:
    """The lengths of everything in a tree that has one, if there are so many samples."""
    leaves = _leaves(tree, count)
    return [n for x in leaves if (n := len(x) if _is_ragged(x, count) else count_of(x)) is not None]


def _flattened(tree: Any, count: int) -> tuple[list[Any], Any]:
    return pytree.tree_flatten(_plain(tree), is_leaf=lambda x: isinstance(x, PackedSequence) or _is_ragged(x, count))


def _leaves(tree: Any, count: int) -> list[Any]:
    return pytree.tree_leaves(_plain(tree), is_leaf=lambda x: isinstance(x, PackedSequence) or _is_ragged(x, count))


def moved(tree: Any, device: torch.device) -> Any:
    """A tree with its tensors on the device."""
    return pytree.tree_map(lambda x: x.to(device) if _has_rows(x) else x, _plain(tree), is_leaf=_has_rows)


def joined(trees: Sequence[Any], counts: Sequence[int]) -> Any:
    """Trees of the same structure, one after the other.

    Raises ValueError where tensors of batches differ in more than their number of samples.
    """
    first = trees[0]
    if _is_ragged(first, counts[0]):
        return type(first)(x for tree in trees for x in tree)
    flat = [_flattened(tree, count) for tree, count in zip(trees, counts, strict=True)]
    if any(spec != flat[0][1] for _, spec in flat):
        raise ValueError("the batches of the loader differ in structure; pass one batch as (inputs, labels)")

    def join(parts: Sequence[Any]) -> Any:
        if isinstance(parts[0], PackedSequence):
            return pack_sequence([x for part in parts for x in unpack_sequence(part)], enforce_sorted=False)
        if _is_ragged(parts[0], counts[0]):
            return type(parts[0])(x for part in parts for x in part)
        if isinstance(parts[0], Tensor) and parts[0].is_nested:
            return torch.nested.as_nested_tensor([x for part in parts for x in part.unbind()], layout=parts[0].layout)
        if not isinstance(parts[0], Tensor) or parts[0].dim() == 0:
            return parts[0]
        shapes = {tuple(x.shape[1:]) for x in parts}
        if len(shapes) > 1:
            raise ValueError(
                f"batches of the loader have tensors of shapes {sorted(shapes)} per sample and cannot be joined; pad "
                "them to one length, or pass one batch as (inputs, labels)"
            )
        return torch.cat(list(parts))

    return pytree.tree_unflatten(
        [join(parts) for parts in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1]
    )


def _numbers(index: Index, count: int) -> list[int]:
    return list(range(count)[index]) if isinstance(index, slice) else [int(i) for i in index.tolist()]


def _is_ragged(x: Any, count: int) -> bool:
    """Whether a list has one element per sample: texts (in a tuple, too), other objects, mappings, or tensors that are
    not all batches of so many."""
    if type(x) not in (list, tuple) or len(x) != count or not x:
        return False
    if all(isinstance(each, str) for each in x):
        return True
    if type(x) is tuple:
        return False
    if all(isinstance(each, Tensor) for each in x):
        return not all(e.dim() and e.size(0) == count for e in x)
    inner = (Tensor, np.ndarray, PackedSequence, list, tuple, type(None))
    return not any(isinstance(each, inner) for each in x)


def _is_per_sample(x: Any) -> bool:
    """The same of a list whose number of samples nothing else tells: texts, or tensors of different lengths."""
    if type(x) not in (list, tuple) or not x:
        return False
    if all(isinstance(each, str) for each in x):
        return True
    if type(x) is tuple or not all(isinstance(each, Tensor) for each in x):
        return False
    return len({each.shape[:1] for each in x}) > 1 or not x[0].dim()


def _has_rows(x: Any) -> bool:
    return isinstance(x, (Tensor, PackedSequence))


def _plain(tree: Any) -> Any:
    """A tree in which mappings that torch does not know as such (a tokenizer's output) are dicts."""
    if isinstance(tree, Mapping) and type(tree) not in pytree.SUPPORTED_NODES:
        return {name: _plain(x) for name, x in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_plain(x) for x in tree)
    if type(tree) is dict:
        return {name: _plain(x) for name, x in tree.items()}
    return tree


def _tensors(tree: Any) -> Any:
    """A tree with tensors for numpy's arrays."""
    if isinstance(tree, Tensor):  # by far the most often
        return tree
    return pytree.tree_map(lambda x: torch.as_tensor(x) if isinstance(x, np.ndarray) else x, _plain(tree))


def _mask(what: str, present: Any, modalities: Sequence[str]) -> Tensor:
    """``present`` as a tensor. Raises ValueError for one that is not bool ``[B, M]``."""
    mask = present if isinstance(present, Tensor) else torch.as_tensor(present)
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] != len(modalities):
        raise ValueError(
            f"{what}present must be bool of shape [B, {len(modalities)}], which samples have which of "
            f"{', '.join(modalities)}; got {mask.dtype} of shape {list(mask.shape)}"
        )
    return mask


def _swapped(modalities: Sequence[str], model: nn.Module | None) -> str:
    """The message about a model whose positional arguments are the modalities in another order; else empty."""
    if model is None:
        return ""
    try:
        names = list(inspect.signature(model.forward).parameters)[: len(modalities)]
    except (TypeError, ValueError):
        return ""
    if set(names) != set(modalities) or names == list(modalities):
        return ""
    return (
        f"the model takes {', '.join(names)}, and the blocks are given in the order {', '.join(modalities)}; give the "
        "blocks in the model's order, or inputs as a mapping"
    )


def labels_of(labels: Any) -> Any:
    """Labels as a tree of tensors: numpy's arrays and lists of numbers become tensors."""
    if isinstance(labels, list) and labels and all(isinstance(x, (bool, int, float)) for x in labels):
        return torch.as_tensor(labels)
    return _tensors(labels)


def _words(inputs: Any) -> str:
    return f"{len(inputs)}" if isinstance(inputs, Sequence) else f"a {type(inputs).__name__}"
