"""Reentrant activation checkpoints, whose weights get their gradients in parts.

``torch.utils.checkpoint`` with ``use_reentrant=True`` runs each piece of the network again in a backward of its own. A
weight of two pieces, or of one and of what lies around them, is then completed twice, which autograd tells nobody.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of what a module was given or has returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def given_in_parts(outputs: Iterable[Tensor], among: Mapping[Tensor, str]) -> Tensor | None:
    """A parameter of ``among`` that backward from ``outputs`` may complete more than once; None where there is none.

    What a checkpoint runs is known as far as Python tells: modules, methods of them, what a function has closed over.
    """
    left: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = {None}
    pieces = []
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            # torch's own, and those made after it.
            if isinstance(node, FunctionCtx) and hasattr(node, "run_function"):
                pieces.append(node.run_function)
    if not pieces:
        return None
    around = {node.variable for node in seen if hasattr(node, "variable")}
    reached = [{p for p in _parameters_in(piece) if p in among} for piece in pieces]
    times = {p: sum(p in members for members in reached) for p in among}
    several = [p for p in among if times[p] + (p in around) > 1]
    # What is in the graph around them has rather been reached by way of its module.
    return min(several, key=lambda p: p in around and times[p] > 1, default=None)


def _parameters_in(run: Any) -> set[Tensor]:
    """The tensors that a function can reach without being given them, but for global ones."""
    found: set[Tensor] = set()
    seen: set[int] = set()
    left = [run]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.add(value)
        elif isinstance(value, nn.Module):
            found.update(value.parameters())
        elif isinstance(value, MethodType):
            left += [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            left += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, FunctionType):
            left += _contents(value.__closure__ or ())
            left += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            left += value
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            left += vars(value).values()
    return found


def _contents(cells: Iterable[Any]) -> Iterator[Any]:
    for cell in cells:
        with contextlib.suppress(ValueError):  # of a variable that is not bound yet
            yield cell.cell_contents
