"""What blocks return: a tensor, or a tree with one; and which of its rows belong to which sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


def zeroed(tree: Any) -> Any:
    """The same with zeros in all tensors of floating point."""
    return _mapped(lambda x: torch.zeros_like(x) if x.is_floating_point() else x, tree)


def detached(tree: Any) -> Any:
    """The same without a graph."""
    return _mapped(torch.Tensor.detach, tree)


def changed(where: str, tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with ``change(z)`` in the place of its one tensor of floating point.

    Raises TypeError, naming ``where``, if there are several: which of them counts samples, and how, nobody says.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    found = [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]
    if len(found) != 1 or isinstance(tree, PackedSequence):
        raise TypeError(
            f"{where} returns a {type(tree).__name__} with {len(found)} tensors of floating point; end the encoder "
            "with a module that returns one tensor [B, ...]"
        )
    return _mapped(lambda x: change(x) if x is found[0] else x, tree)


def frames_of(where: str, z: Tensor, count: int) -> int:
    """How many rows of ``z`` belong to each of ``count`` samples: T of ``[B * T, ...]``, the rows of a sample one after
    the other.

    Raises ValueError, naming ``where`` and the shape, for another number of rows, and if they may be ``[T, B, ...]``.
    """
    each, rest = divmod(len(z), count) if z.dim() and count else (0, 1)
    if rest or not each or (each > 1 and z.dim() > 2 and z.shape[1] == count):
        raise ValueError(
            f"{where} has features of shape {list(z.shape)} for a batch of {count}; it must return [B, ...], "
            "or [B * T, ...], the rows of a sample one after the other"
        )
    return each


def per_sample(where: str, z: Tensor, count: int) -> Tensor:
    """``[B, ...]``: the mean over the frames of each sample. Raises what :func:`frames_of` raises."""
    each = frames_of(where, z, count)
    return z if each == 1 else z.unflatten(0, (count, each)).mean(1)


def by_sample(values: Tensor, z: Tensor, each: int) -> Tensor:
    """``values`` ``[B]`` in a shape that multiplies ``z`` ``[B * each, ...]`` by sample."""
    values = values if each == 1 else values.repeat_interleave(each)
    return values.view(-1, *[1] * (z.dim() - 1))


def _mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    def leaf(x: Any) -> Any:
        if isinstance(x, PackedSequence):
            return x._replace(data=change(x.data))
        if isinstance(x, Tensor):
            return change(x)
        if x is None or isinstance(x, (str, int, float)):
            return x
        raise TypeError(
            f"the last block of an encoder returns a {type(x).__name__}, which cannot be put together again; end the "
            "encoder with a module that returns a tensor, a tuple, a list or a dict"
        )

    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping) and type(tree) not in pytree.SUPPORTED_NODES:
        return leaf(tree)
    return pytree.tree_map(leaf, tree, is_leaf=lambda x: isinstance(x, PackedSequence))
