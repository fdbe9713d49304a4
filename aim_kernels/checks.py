"""What is refused, and how it is said: every error names the parameter and what to do, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aim_kernels.rows import DTYPES, PUBLIC_COLUMNS, RULES

Group = dict[str, Any]

DTYPE_NUMBER = {getattr(torch, name): number for number, name in enumerate(DTYPES)}


def name_of(groups: list[Group], number: int, index: int) -> str:
    """How an error calls a parameter: its name where the user gave one."""
    names = groups[number].get("param_names")
    place = f"parameter {index} of group {number}"
    return f"{names[index]!r} ({place})" if names and names[index] is not None else place


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def check_number(name: str, value: Any, low: float, high: float = float("inf"), *, high_open: bool = False) -> None:
    """Raises ValueError unless ``low <= value <= high`` (``< high`` if ``high_open``); NaN is refused."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected a number, got {value!r}") from error
    if not (low <= number < high if high_open else low <= number <= high):
        bounds = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}{')' if high_open else ']'}"
        raise ValueError(f"{name}: expected a number {bounds}, got {number:g}")


def check_hyperparameters(group: Group, number: int) -> None:
    """Raises ValueError that names the option and the group."""
    where = f" (group {number})"
    if group["rule"] not in RULES:
        raise ValueError(f"rule{where}: unknown rule {group['rule']!r}; choose one of {', '.join(RULES)}")
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(
            f"lr{where}: a tensor learning rate must have one element, got shape {tuple(group['lr'].shape)}"
        )
    for option in ("lr", "eps", "weight_decay", "momentum"):
        if _on_device(group[option]):  # looking at it would wait for the device
            if option != "lr" or group[option].dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{option}{where}: only lr may be a tensor on a device, of float32 or float64; got "
                    f"{group[option].dtype} on {group[option].device}"
                )
            continue
        check_number(option + where, group[option], 0.0)
    try:
        first, second = group["betas"]
    except (TypeError, ValueError) as error:
        raise ValueError(f"betas{where}: expected two numbers, got {group['betas']!r}") from error
    check_number(f"betas[0]{where}", first, 0.0, 1.0, high_open=True)
    check_number(f"betas[1]{where}", second, 0.0, 1.0, high_open=True)
    check_number(f"dampening{where}", group["dampening"], -float("inf"))
    check_number(f"threshold_rate{where}", group["threshold_rate"], 0.0, 1.0)
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(f"nesterov{where}: Nesterov momentum needs a momentum and zero dampening")
    try:
        kind, value = group["under_optimized"]
    except (TypeError, ValueError) as error:
        kind, value = None, error
    if kind not in ("fraction", "absolute"):
        raise ValueError(
            f"under_optimized{where}: expected ('fraction', q) or ('absolute', tau), got {group['under_optimized']!r}"
        )
    check_number(f"under_optimized{where}: {kind}", value, 0.0, 1.0)


def check_ordered(params: Any) -> None:
    """Raises on a set of parameters."""
    if isinstance(params, (set, frozenset)):
        raise TypeError("params: a set has no order, on which checkpoints and noise depend; pass a list")


def check_parameters(groups: list[Group], number: int, params: list[Any], device: torch.device | None) -> None:
    """Raises on what a step cannot update. ``groups[number]`` need not be complete; it is used for names."""
    seen: set[int] = set()
    earlier = {id(p): other for other in range(number) for p in groups[other]["params"]}
    for index, p in enumerate(params):
        name = name_of(groups, number, index)
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(p).__name__}")
        if id(p) in seen:
            raise ValueError(f"{name}: the same parameter stands in the group more than once; pass it once")
        if id(p) in earlier:
            raise ValueError(f"{name}: appears more than once, in group {earlier[id(p)]} as well; pass it once")
        seen.add(id(p))
        if p.layout != torch.strided:
            raise ValueError(f"{name}: sparse parameters are not supported; use a dense one")
        if p.is_complex():
            raise ValueError(f"{name}: complex parameters are not supported; pass torch.view_as_real(parameter)")
        if p.dtype not in DTYPE_NUMBER:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NUMBER)
            raise ValueError(f"{name}: {p.dtype} is not supported; use one of {kinds}")
        if p.device.type == "meta":
            raise ValueError(f"{name}: is on the meta device; give it memory first (module.to_empty)")
        if device is not None and (p.device.type != device.type or (p.device != device and device.type == "cpu")):
            raise ValueError(
                f"{name}: is on {p.device}, the others on {device}; use one optimizer for each kind of device"
            )
        if any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(f"{name}: is expanded (several elements share memory); pass a contiguous parameter")


def check_states(groups: list[Group], state: dict[Tensor, dict[str, Any]]) -> None:
    """Raises on the first state that does not fit its parameter."""
    for number, group in enumerate(groups):
        for index, p in enumerate(group["params"]):
            for key, value in state.get(p, {}).items():
                if key == "step" or not isinstance(value, Tensor):
                    continue
                if value.shape != p.shape or value.device != p.device:
                    raise RuntimeError(
                        f"{name_of(groups, number, index)}: its state {key} has shape {tuple(value.shape)} on "
                        f"{value.device}, the parameter {tuple(p.shape)} on {p.device}; delete "
                        "optimizer.state[parameter] to start it anew"
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
            if g.layout != torch.strided:
                raise RuntimeError(
                    f"{name}: its gradient is sparse, which AIMFusedOptimizer does not support; "
                    "use sparse=False in the embedding, or torch.optim.SparseAdam for this parameter"
                )
            if g.is_complex():
                raise RuntimeError(f"{name}: its gradient is complex; optimize torch.view_as_real(parameter) instead")
            if g.shape != p.shape:
                raise RuntimeError(
                    f"{name}: its gradient has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}; "
                    "run backward() again"
                )
            if g.device != p.device:
                raise RuntimeError(
                    f"{name}: its gradient is on {g.device}, the parameter on {p.device}; move both to one device"
                )
            if g.dtype != p.dtype:
                raise RuntimeError(f"{name}: its gradient is {g.dtype}, the parameter {p.dtype}; cast one of them")


def check_columns(columns: dict[str, Any]) -> None:
    """Raises on column names and values that a row cannot hold."""
    for column, value in columns.items():
        if column not in PUBLIC_COLUMNS:
            raise ValueError(f"unknown column {column!r}; the columns are {', '.join(PUBLIC_COLUMNS)}")
        if _on_device(value):
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
    if not _on_device(kappa):
        check_number("kappa", kappa, 0.0, 1.0, high_open=True)
