"""States as kernels read them: in the type that the options ask for, in the memory order of their parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aim_kernels.step import sharding
from aim_kernels.step.inputs import StepSources
from aim_kernels.step.ownership import count_of, is_counted
from aim_kernels.step.states import arithmetic_dtype, is_dense, keep_moment, read_moment, states_of, step_count
from aim_kernels.step.supported import is_idle

Group = dict[str, Any]


def arrange_all(sources: StepSources) -> None:
    """Arranges the states of all parameters that a step does not pass by."""
    primary = sources.tables.rows.device
    for group in sources.param_groups:
        for p in group["params"]:
            state = sources.state.get(p)
            if state and not is_idle(p, primary):
                arrange(group, p, state)


def arrange(group: Group, p: Tensor, state: dict[str, Any]) -> None:
    """Replaces those states of a parameter that are of another type or in another order than kernels read: somebody has
    set them, or has laid the parameter out anew."""
    here = sharding.local_of(p)
    for name, dtype in kept_of(group, p, state):
        if name in state and not is_arranged(here, sharding.local_of(state[name]), dtype):
            if dtype == torch.uint8:
                # Blocks go by memory order, so codes cannot be moved without their exponents.
                value = _arranged(here, read_moment(state, name), torch.float32)
                del state[name]
                keep_moment(p, state, name, value, dtype)
            else:
                state[name] = sharding.like(p, _arranged(here, sharding.local_of(state[name]), dtype))
    step = state.get("step")
    if step is not None and not is_counted(here, step):
        state["step"] = step_count(here, count_of(step))


def kept_of(group: Group, p: Tensor, state: dict[str, Any]) -> list[tuple[str, torch.dtype]]:
    """The states of one number an element that kernels read: key and type."""
    wide = arithmetic_dtype(p.dtype)
    moments = states_of(group, p, "master" in state).values()
    return [*((kept.name, kept.dtype) for kept in moments), ("master", wide), ("anchor", wide)]


def fills_block(p: Tensor) -> bool:
    """Whether the elements of a parameter fill one aligned block of memory; others are stepped in a contiguous copy."""
    return is_dense(p) and p.data_ptr() % p.element_size() == 0


def is_arranged(p: Tensor, state: Tensor, dtype: torch.dtype) -> bool:
    """Whether a state is of a type, and in the memory order in which its parameter is stepped. Both are local."""
    if state.dtype != dtype:
        return False
    return state.is_contiguous() if p.is_contiguous() or not fills_block(p) else state.stride() == p.stride()


def contiguous_strides(p: Tensor) -> tuple[int, ...]:
    """Those of a contiguous tensor of this shape."""
    return torch.empty(p.shape, device="meta").stride()


def _arranged(p: Tensor, state: Tensor, dtype: torch.dtype) -> Tensor:
    if is_arranged(p, state, dtype):
        return state
    strides = contiguous_strides(p) if p.is_contiguous() or not fills_block(p) else p.stride()
    return torch.empty_strided(p.shape, strides, dtype=dtype, device=p.device).copy_(state)
