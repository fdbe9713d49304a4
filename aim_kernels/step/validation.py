"""Validation of values, parameters, gradients and states: errors name the offender, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from aim_kernels.step import sharding
from aim_kernels.step.codecs import blocks_of
from aim_kernels.step.layout import PUBLIC_COLUMNS
from aim_kernels.step.ownership import count_of, is_counted, own_states
from aim_kernels.step.supported import has_memory, is_asleep, is_beside, is_estimated, is_idle, reason_against

Group = dict[str, Any]


def name_of(groups: list[Group], number: int, index: int) -> str:
    """How an error calls a parameter: its name where the user gave one."""
    return name_in(groups[number], number, index)


def name_in(group: Group, number: int, index: int) -> str:
    """:func:`name_of`, of a group that may stand in no list yet."""
    names = group.get("param_names") or ()
    position = f"parameter {index} of group {number}"
    return f"{names[index]!r} ({position})" if index < len(names) and names[index] is not None else position


def on_device(value: Any) -> bool:
    """Whether a value lies in the memory of a device, where looking at it would wait."""
    return type(value) is not float and isinstance(value, Tensor) and value.device.type != "cpu"


def may_differ(value: Any, number: float) -> bool:
    """Whether a value is another number; one in a device's memory is not looked at, and may be."""
    return on_device(value) or float(value) != number


def check_number(name: str, value: Any, low: float, high: float = float("inf"), *, high_open: bool = False) -> None:
    """Raises ValueError unless ``low <= value <= high`` (``< high`` if ``high_open``), on NaN, and on what is no real
    number of Python, numpy or torch."""
    if type(value) is not float:  # most are
        check_real(name, value)
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: expected a number, got an integer beyond the largest float") from error
    if not (low <= number < high if high_open else low <= number <= high):
        bounds = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}{')' if high_open else ']'}"
        raise ValueError(f"{name}: expected a number {bounds}, got {number:g}")


def check_real(name: str, value: Any) -> None:
    """Raises ValueError on what is no real number of Python, numpy or torch."""
    if not _is_number(value):
        hint = ""
        if isinstance(value, str):
            hint = ", a string (YAML reads 1e-3 as one, 1.0e-3 as a number); convert it with float()"
        elif isinstance(value, (bool, np.bool_)):
            hint = ", a truth value"
        raise ValueError(f"{name}: expected a number, got {value!r}{hint}")


def _is_number(value: Any) -> bool:
    # Not numbers.Real: fractions have no arithmetic with tensors.
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool and not value.is_complex() and not value.is_meta
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def check_whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """The integer that ``value`` is; raises ValueError unless ``low <= value < high``."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (high is not None and value >= high):
        bounds = "" if low is None else f" at least {low}" if high is None else f" in [{low}, {high})"
        raise ValueError(f"{name}: expected a whole number{bounds}, got {value!r}")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """The truth value that ``value`` is; raises ValueError on what is none, such as a string, all of which are true."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_anchor(group: Group, number: int, anchor: str) -> None:
    """Raises ValueError where weights are to be withdrawn to an average that the group does not keep."""
    if anchor == "ema" and group["modulated"] and group["ema_decay"] is None:
        raise ValueError(
            f"ema_decay (group {number}): anchor='ema' withdraws weights to their moving average, which this group "
            "does not keep; give it an ema_decay such as 0.999"
        )


def check_measure(group: Group, number: int, backend: str) -> None:
    """Raises ValueError on a measure that the backend has not."""
    if group["measure"] == "random" and backend != "reference":
        raise ValueError(
            f"measure (group {number}): 'random' is a control that only the reference backend computes, the optimizer "
            f"has backend={backend!r}; pass backend='reference'"
        )


def check_parameters(
    group: Group, number: int, params: list[Any], device: torch.device | None, earlier: dict[int, int]
) -> None:
    """Raises on what a step cannot update. ``group`` need not be complete; it is used for names. ``earlier``: numbers
    of the groups before it, by the id() of their parameters."""
    seen: set[int] = set()
    for index, p in enumerate(params):
        name = name_in(group, number, index)
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(p).__name__}")
        if id(p) in seen:
            raise ValueError(f"{name}: the same parameter stands in the group more than once; pass it once")
        if id(p) in earlier:
            raise ValueError(f"{name}: appears more than once, in group {earlier[id(p)]} as well; pass it once")
        seen.add(id(p))
        if is_asleep(p):  # torch ignores it, whatever it is, until it has a gradient
            continue
        if reason := reason_against(p):
            raise ValueError(f"{name}: {reason}")
        if p.dtype == torch.float64 and group.get("state_dtype") in ("bfloat16", "int8"):
            raise ValueError(
                f"{name}: state_dtype={group['state_dtype']!r} is for float32 and 16-bit parameters, this one "
                "is float64; give it a group of its own with state_dtype=None"
            )
        if p.dtype == torch.float16 and group.get("master") in ("split", "stochastic"):
            raise ValueError(
                f"{name}: master={group['master']!r} is for bfloat16 parameters, this one is float16; "
                "use 'kahan' or 'float32'"
            )
        if device is not None and not is_beside(p, device):
            raise ValueError(
                f"{name}: is on {p.device}, the others on {device}; use one optimizer for each kind of device"
            )


def check_degradable(groups: list[Group], number: int, primary: torch.device) -> None:
    """Raises RuntimeError on a frozen parameter of a group with live weights that there can be none of."""
    for index, p in enumerate(groups[number]["params"]):
        if not is_lazy(p) and is_idle(p, primary):
            reason = reason_against(p) or f"is on {p.device}, the others on {primary}"
            raise RuntimeError(
                f"{name_of(groups, number, index)}: cannot be degraded with its block ({reason}); take it out of the "
                "group"
            )


def check_meshes(groups: list[Group], process_group: Any, first: int = 0, widest: Any = None) -> Any:
    """Raises ValueError on DTensors that a step cannot work with, by name. Returns the mesh of which all others are
    slices; None where there are no DTensors.

    ``first``: number of the first of the groups; ``widest``: such a mesh of those before it.
    """
    sharded = [
        (name_in(group, number, index), p)
        for number, group in enumerate(groups, first)
        for index, p in enumerate(group["params"])
        if sharding.is_dtensor(p)
    ]
    if not sharded:
        return widest
    for name, p in sharded:
        if process_group is not None:
            raise ValueError(
                f"{name}: is a DTensor, whose processes are those of its mesh; process_group is for plain parameters"
            )
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"{name}: is placed {p.placements}; a partial sum cannot be stepped, redistribute it")
        if p.device_mesh.get_coordinate() is None:
            raise ValueError(f"{name}: this process is not in its mesh {p.device_mesh}")
    before = [] if widest is None else [widest]
    widest = sharding.widest_of([*before, *(p.device_mesh for _, p in sharded)])
    for name, p in sharded:
        if not sharding.is_within(p.device_mesh, widest):
            raise ValueError(
                f"{name}: its mesh {p.device_mesh} is no part of {widest}, on which other parameters are; use slices "
                "of one mesh, or one optimizer for each mesh"
            )
    return widest


def check_states(
    groups: list[Group],
    state: dict[Tensor, dict[str, Any]],
    advice: str = "delete optimizer.state[parameter] to start it anew",
) -> None:
    """Raises on the first state that does not fit its parameter; ``advice``: what to do."""
    for number, group in enumerate(groups):
        for index, p in enumerate(group["params"]):
            for key, value in own_states(group["rule"], state.get(p, {})).items():
                if value is None or (key == "step" and is_estimated(value)):  # None stands for none
                    continue
                if key == "step":
                    if not is_counted(p, value) or value.device.type == "cpu":  # looking at a device waits for it
                        _check_count(name_of(groups, number, index), value)
                    continue
                if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex():
                    raise RuntimeError(
                        f"{name_of(groups, number, index)}: its state {key} is {_said_of(value)}, where a step of rule "
                        f"{group['rule']!r} needs a dense real tensor; delete optimizer.state[parameter] to start it "
                        "anew, or keep what is yours under another name"
                    )
                if key.endswith("_scale"):
                    fits = value.dtype == torch.uint8 and value.device == p.device
                    if fits and value.shape == (blocks_of(sharding.local_of(p).numel()),):
                        continue
                    raise RuntimeError(
                        f"{name_of(groups, number, index)}: its state {key} has {value.numel()} exponents on "
                        f"{value.device}, which do not fit its elements; {advice}"
                    )
                if value.dtype == torch.uint8 and f"{key}_scale" not in state.get(p, {}):
                    raise RuntimeError(
                        f"{name_of(groups, number, index)}: its state {key} is in 8 bits, and {key}_scale is gone; "
                        f"{advice}"
                    )
                local = sharding.local_of(value)
                if not is_estimated(value) and (local._is_zerotensor() or not has_memory(local)):
                    raise RuntimeError(f"{name_of(groups, number, index)}: its state {key} has no memory; {advice}")
                if not sharding.placed_alike(value, p):
                    raise RuntimeError(
                        f"{name_of(groups, number, index)}: its state {key} is {_placement(value)}, the parameter "
                        f"{_placement(p)}; {advice}"
                    )
                if value.shape != p.shape or value.device != p.device:
                    raise RuntimeError(
                        f"{name_of(groups, number, index)}: its state {key} has shape {tuple(value.shape)} on "
                        f"{value.device}, the parameter {tuple(p.shape)} on {p.device}; {advice}"
                    )


def _check_count(name: str, value: Any) -> None:
    try:
        count_of(value)
    except ValueError as error:
        raise RuntimeError(
            f'{name}: its state step {error}; set optimizer.state[parameter]["step"] to the steps that it has taken'
        ) from error


def _said_of(value: Any) -> str:
    """What an error calls a value that is no dense real tensor."""
    return f"a {value.layout} tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_estimated(groups: list[Group]) -> None:
    """Raises RuntimeError on a parameter with numbers, and with a gradient, inside of a FakeTensorMode: torch's
    operations would compute nothing there, and a kernel would."""
    if not any(type(mode).__name__ == "FakeTensorMode" for mode in _get_current_dispatch_mode_stack()):
        return
    for number, group in enumerate(groups):
        for index, p in enumerate(group["params"]):
            if p.grad is not None and not is_estimated(p):
                raise RuntimeError(
                    f"{name_of(groups, number, index)}: has numbers, and step() is called inside of a FakeTensorMode, "
                    "which has only shapes; make the module inside of it, or step outside"
                )


def check_gradients(groups: list[Group], grads: Sequence[Tensor | None] | None = None) -> None:
    """Raises on the first gradient that a step cannot read: of ``grads``, in the order of the groups, or ``p.grad``."""
    given = None if grads is None else iter(grads)
    for number, group in enumerate(groups):
        for index, p in enumerate(group["params"]):
            g = p.grad if given is None else next(given)
            if g is None:
                continue
            name = name_of(groups, number, index)
            if not sharding.placed_alike(g, p):
                raise RuntimeError(
                    f"{name}: its gradient is {_placement(g)}, the parameter {_placement(p)}; redistribute one of them"
                )
            if g.layout != torch.strided:
                raise RuntimeError(
                    f"{name}: its gradient is sparse, which AIMFusedOptimizer does not support; "
                    "use sparse=False in the embedding, or torch.optim.SparseAdam for this parameter"
                )
            if g.is_complex():
                raise RuntimeError(f"{name}: its gradient is complex, the parameter real; take its real part")
            if g.shape != p.shape:
                raise RuntimeError(
                    f"{name}: its gradient has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}; "
                    "call zero_grad() and run backward() again"
                )
            if g.device != p.device:
                raise RuntimeError(
                    f"{name}: its gradient is on {g.device}, the parameter on {p.device}; move both to one device"
                )
            if g.dtype != p.dtype:
                raise RuntimeError(f"{name}: its gradient is {g.dtype}, the parameter {p.dtype}; cast one of them")
            if not is_estimated(g) and not has_memory(g):
                raise RuntimeError(
                    f"{name}: its gradient has no memory (its storage was freed, or it is a wrapper of other tensors: "
                    f"{type(g).__name__}); run backward() again, or give the parameter a plain gradient"
                )


def _placement(tensor: Tensor) -> str:
    if not sharding.is_dtensor(tensor):
        return "a plain tensor"
    return f"a DTensor placed {tensor.placements} on {tensor.device_mesh}"  # type: ignore[attr-defined]


def check_noise(groups: list[Group], process_group: Any, noisy: set[int]) -> None:
    """Raises ValueError where noise cannot go by global element index, for groups that are to have noise."""
    if not noisy:
        return
    positions = [(number, index) for number, group in enumerate(groups) for index in range(len(group["params"]))]
    for (number, index), first in zip(positions, sharding.first_indices(groups, process_group), strict=True):
        if first is None and number in noisy:
            why = (
                "its place among all parameters is not known; use aim_kernels.AIMZeroRedundancyOptimizer"
                if process_group is not None
                else f"its elements here are not consecutive in the whole ({groups[number]['params'][index].placements}"
                "); shard its first dimension"
            )
            raise ValueError(f"{name_of(groups, number, index)}: noise goes by global element index, but {why}")


def check_columns(columns: dict[str, Any], known: tuple[str, ...] = PUBLIC_COLUMNS) -> None:
    """Raises on column names and values that a row cannot hold."""
    for column, value in columns.items():
        if column not in known:
            raise ValueError(f"unknown column {column!r}; the columns are {', '.join(known)}")
        if on_device(value):
            continue  # looking at it would wait for the device
        if column in ("tau", "tau_prev"):
            check_number(column, value, 0.0, 1.0)
        elif column == "noise":
            check_number(column, value, 0.0)
        else:
            check_number(column, value, -float("inf"))


def check_kappa(kappa: Any) -> None:
    """Raises unless kappa lies in [0, 1)."""
    if isinstance(kappa, Tensor) and kappa.numel() != 1:
        raise ValueError(f"kappa: expected a number or a 0-dim tensor, got shape {tuple(kappa.shape)}")
    if not on_device(kappa):
        check_number("kappa", kappa, 0.0, 1.0, high_open=True)
