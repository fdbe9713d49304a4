"""Ownership of states: those of a step, and those that others keep beside them: wrappers, hooks and users, who may put
anything of any type into ``optimizer.state[p]`` and under keys of their own into ``optimizer.state``."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels.step.sharding import is_dtensor, local_of
from aim_kernels.step.states import exponents_key

#: The states of every rule.
STATES = frozenset({"step", "master", "anchor", "ema", "remainder", "compensation"})

#: The moments of each rule, in all its variants.
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "sgd": ("momentum_buffer", "exp_avg", "exp_avg_sq"),
    "adagrad": ("sum", "exp_avg"),
    "rmsprop": ("square_avg", "grad_avg", "momentum_buffer", "exp_avg"),
    "lion": ("exp_avg", "exp_avg_sq"),
}

_NAMES = {rule: STATES.union(moments) for rule, moments in MOMENTS.items()}

#: Moments by the key of their exponents.
_EXPONENTS = {rule: {exponents_key(name): name for name in moments} for rule, moments in MOMENTS.items()}

#: What a step may write.
WRITTEN = {rule: names.union(_EXPONENTS[rule]) - {"anchor"} for rule, names in _NAMES.items()}


def is_own(rule: str, state: dict[str, Any], name: Any) -> bool:
    """Whether a state is one that a step of this rule reads or writes, or did before an option changed. Exponents are
    where their moment is in 8 bits; under any other name there is nothing that a step knows of."""
    if name in _NAMES[rule]:
        return True
    moment = state.get(_EXPONENTS[rule].get(name, ""))
    return isinstance(moment, Tensor) and moment.dtype == torch.uint8


def own_states(rule: str, state: dict[str, Any]) -> dict[str, Any]:
    """Those of a parameter's states that are a step's own."""
    return {name: value for name, value in state.items() if is_own(rule, state, name)}


def own_tensors(rule: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """The same without what is no tensor."""
    return {name: value for name, value in own_states(rule, state).items() if isinstance(value, Tensor)}


def drop_absent(groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]]) -> None:
    """Deletes states of a step's own that are None, as torch.optim.SGD keeps a buffer that it has not."""
    for group in groups:
        for p in group["params"]:
            state = states.get(p, {})
            for name in [name for name, value in own_states(group["rule"], state).items() if value is None]:
                del state[name]


def count_of(value: Any) -> float:
    """A step count: a number, or a tensor or an array of one element, of any type and on any device.

    Raises:
        ValueError: anything else, and what no count can be; the message goes on after "its step".
    """
    found = value
    if isinstance(found, Tensor):
        found = local_of(found)
        if found.numel() != 1 or found.is_meta:
            raise ValueError(f"is a tensor of shape {tuple(found.shape)} on {found.device}; expected one number")
        found = found.item()
    elif isinstance(found, np.ndarray):
        if found.size != 1:
            raise ValueError(f"is an array of shape {found.shape}; expected one number")
        found = found.item()
    if not isinstance(found, (numbers.Real, np.bool_)):
        raise ValueError(f"is {value!r}; expected a number")
    number = float(found)
    if not (math.isfinite(number) and number >= 0 and number == int(number)):
        raise ValueError(f"is {number!r}; expected a whole number of steps, at least 0")
    return number


def is_counted(p: Tensor, value: Any) -> bool:
    """Whether a step count is as a kernel counts it: a 0-dim float32 tensor beside its parameter."""
    return isinstance(value, Tensor) and value.dtype == torch.float32 and not value.dim() and value.device == p.device


def copied(value: Any, device: torch.device | None = None) -> Any:
    """What somebody keeps, with the same bits and types: tensors, also those in dicts, lists and tuples, are copies, on
    ``device`` if one is given."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return value
        source = value.detach()
        made = source.clone() if device is None or is_dtensor(value) else source.to(device, copy=True)
        return made.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        kept = copy.copy(value)
        for name, entry in value.items():
            kept[name] = copied(entry, device)
        return kept
    if isinstance(value, list):
        members = copy.copy(value)
        members[:] = [copied(entry, device) for entry in value]
        return members
    if isinstance(value, tuple):
        entries = [copied(entry, device) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return copy.copy(value) if isinstance(value, (set, np.ndarray)) else value


def parts_of(value: Any) -> Iterator[Any]:
    """What can be written in what somebody keeps: tensors, arrays, dicts and lists, at any depth."""
    if isinstance(value, (Tensor, np.ndarray, dict, list)):
        yield value
    if isinstance(value, (dict, list, tuple)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from parts_of(entry)
