"""The training state of an optimizer that can be gone back to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels.step import sharding
from aim_kernels.step.ownership import parts_of

#: Goes back to what was kept.
Restore = Callable[[], None]


def values_of(tensors: list[Tensor]) -> Restore:
    """Keeps the values of tensors, of DTensors those of their local parts, and puts them back in place."""
    kept = [(tensor, sharding.local_of(tensor).detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, values in kept:
            sharding.local_of(tensor).copy_(values)

    return restore


def options_of(groups: list[dict[str, Any]]) -> Restore:
    """Keeps the options of param groups, the values of those that are tensors included; the lists of parameters stay as
    they are."""
    kept = [(group, {name: value for name, value in group.items() if name != "params"}) for group in groups]
    values = values_of([v for _, options in kept for v in options.values() if isinstance(v, Tensor)])

    def restore() -> None:
        for group, options in kept:
            for name in group.keys() - options.keys() - {"params"}:
                del group[name]
            group.update(options)
        values()

    return restore


def states_of(states: dict[Any, Any]) -> Restore:
    """Keeps the states of all parameters, what others keep there included: what is written in it, at any depth, and who
    holds what."""
    kept = dict(states)
    within = {id(part): part for state in kept.values() for part in parts_of(state)}.values()
    containers = [(part, copy.copy(part)) for part in within if not isinstance(part, Tensor)]
    values = values_of([part for part in within if isinstance(part, Tensor) and not part.is_meta])

    def restore() -> None:
        values()
        states.clear()
        states.update(kept)
        for container, contents in containers:
            if isinstance(container, dict):
                container.clear()
                container.update(contents)
            else:
                container[... if isinstance(container, np.ndarray) else slice(None)] = contents

    return restore


def tables_of(optimizer: Any) -> Restore:
    """Keeps the list of groups, and rows, statistics, control and the count of steps."""
    groups, tables = list(optimizer.param_groups), optimizer.tables
    values = [(name, getattr(tables, name).clone()) for name in ("rows", "statistics", "control")]
    live, steps = tables.live_columns(), tables.steps

    @torch.no_grad()
    def restore() -> None:
        optimizer.param_groups[:] = groups
        tables = optimizer.tables  # whose rows have followed their groups
        for name, kept in values:
            getattr(tables, name).copy_(kept)
        tables.set_live_columns(live)
        tables.steps = steps

    return restore


def snapshot_of(optimizer: Any) -> Restore:
    """``AIMFusedOptimizer.snapshot``."""
    optimizer._refuse_open_step("trying steps")
    optimizer._weights.refuse_averages("trying steps")
    anchors = dict(optimizer._anchors)
    held, grad_norm = optimizer._weights, optimizer.grad_norm
    flags = held.holds_true, held.in_true_pass
    parts = [
        tables_of(optimizer),
        values_of(list(anchors.values())),
        states_of(optimizer.state),
        options_of(optimizer.param_groups),
    ]

    def restore() -> None:
        if optimizer._release is not None:
            optimizer._release.forget()
        for part in parts:
            part()
        optimizer._anchors.clear()
        optimizer._anchors.update(anchors)
        held.holds_true, held.in_true_pass = flags
        optimizer.grad_norm = grad_norm
        optimizer._reset()

    return restore
