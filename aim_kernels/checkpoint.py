"""Checkpoints: torch.optim's format, complete, with the bits and dtypes that were saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels import checks, distributed
from aim_kernels.packing import blocks_of
from aim_kernels.rows import ROW
from aim_kernels.states import (
    arithmetic_dtype,
    conform,
    moments_of,
    read_moment,
    scale_of,
    state_layout,
    step_count,
    zeros_like_all,
)

if TYPE_CHECKING:
    from aim_kernels.optimizer import AIMFusedOptimizer

#: The states of every rule, and the moments of each in all its variants.
_STATES = {"step", "master", "anchor", "ema", "remainder", "compensation"}
_MOMENTS = {
    "adamw": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "adam": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "sgd": {"momentum_buffer", "exp_avg", "exp_avg_sq"},
    "adagrad": {"sum", "exp_avg"},
    "rmsprop": {"square_avg", "grad_avg", "momentum_buffer", "exp_avg"},
    "lion": {"exp_avg", "exp_avg_sq"},
}
_TABLE_KEYS = ("modulation_row", "statistics_row", "control")

#: Options that say how states are stored.
_STORAGE = ("state_dtype", "rounding", "master")

#: Options of torch.optim that change the rule and are not supported here, with the value that leaves it as it is.
_UNSUPPORTED = {"differentiable": False}


def complete(state_dict: dict[str, Any], optimizer: AIMFusedOptimizer) -> dict[str, Any]:
    """Adds each group's row, statistics and the control table to torch's state dict, as plain numbers, and anchors of
    parameters that have no state yet."""
    for number, group in enumerate(state_dict["param_groups"]):
        group.update(optimizer.tables.to_lists(number))
        for key, p in zip(group["params"], optimizer.param_groups[number]["params"], strict=True):
            if key in state_dict["state"] and distributed.is_dtensor(p):
                state_dict["state"][key] = _shardable(p, state_dict["state"][key])
            if p in optimizer._anchors:
                state_dict["state"][key] = {**state_dict["state"].get(key, {}), "anchor": optimizer._anchors[p]}
    return state_dict


def _shardable(p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A DTensor's states as they can be saved and cut in another way: moments in 8 bits as bfloat16, which has all
    their values, since exponents belong to the blocks of one process; the 16 bits of a remainder under the name of
    bfloat16 as well, since neither gloo nor NCCL gathers int16."""
    packed = [name for name in state if scale_of(name) in state]
    kept = {name: value for name, value in state.items() if name not in map(scale_of, packed)}
    for name in packed:
        kept[name] = distributed.like(p, read_moment(state, name).to(torch.bfloat16))
    if "remainder" in kept:
        kept["remainder"] = distributed.like(p, distributed.local_of(kept["remainder"]).view(torch.bfloat16))
    return kept


def load(optimizer: AIMFusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Replaces groups, states and tables; checks everything first.

    The base class is not used for it: it would cast every state to the parameter's dtype, and so round the float32
    moments of 16-bit parameters.
    """
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, state_dict)
        if changed is not None:
            state_dict = changed

    saved_groups = state_dict["param_groups"]
    groups = _merged_groups(optimizer, saved_groups)
    _check_masters(groups, saved_groups, state_dict)
    _check_tables(saved_groups, state_dict)
    state = {p: _checked_state(groups, place, p, saved) for place, p, saved in _pairs(groups, saved_groups, state_dict)}
    tables_saved = [{key: group.pop(key) for key in _TABLE_KEYS if key in group} for group in groups]
    for number, saved in enumerate(tables_saved):
        optimizer.tables.check_lists(number, saved)

    for number, saved in enumerate(tables_saved):
        optimizer.tables.from_lists(number, saved)
    anchors = {p: s["anchor"] for p, s in optimizer.state.items() if "anchor" in s} | optimizer._anchors
    anchors |= {p: values["anchor"] for p, values in state.items() if "anchor" in values}
    optimizer.state.clear()
    optimizer._anchors.clear()
    for p, values in state.items():
        if "step" in values:
            optimizer.state[p] = values | ({"anchor": anchors[p]} if p in anchors else {})
            continue
        if "master" in values:  # frozen
            optimizer.state[p] = {"master": values["master"]}
        if p in anchors:  # torch.distributed.checkpoint makes states only where there are none
            optimizer._anchors[p] = anchors[p]
    optimizer.param_groups[:] = groups
    optimizer._tables.groups = list(groups)
    for number, group in enumerate(groups):
        for p in group["params"]:
            if "step" in optimizer.state.get(p, ()):
                conform(group, p, optimizer.state[p], optimizer.tables.has_live_weights(number))
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _merged_groups(optimizer: AIMFusedOptimizer, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Saved options over today's, with today's parameters."""
    today = optimizer.param_groups
    if len(saved_groups) != len(today):
        raise ValueError(f"the checkpoint has {len(saved_groups)} param groups, the optimizer {len(today)}")
    merged = []
    for number, (group, saved) in enumerate(zip(today, saved_groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"group {number} has {len(saved['params'])} parameters in the checkpoint "
                f"and {len(group['params'])} here"
            )
        rules = _rules_of(saved)
        if group["rule"] not in rules:
            other = " or ".join(map(repr, rules)) or "another rule of torch.optim"
            raise ValueError(f"group {number}: the checkpoint is of {other}, the optimizer of {group['rule']!r}")
        for option, neutral in _UNSUPPORTED.items():
            if saved.get(option, neutral) != neutral:
                raise ValueError(
                    f"group {number}: the checkpoint has {option}={saved[option]!r}, which is not supported"
                )
        options = {key: value for key, value in saved.items() if key != "params"}
        if isinstance(options.get("lr"), Tensor):
            options["lr"] = options["lr"].clone()
        result = {**group, **options, "params": group["params"]}
        # How states are stored is this optimizer's business: those of the checkpoint are converted.
        result |= {key: group[key] for key in _STORAGE}
        if result["ema_decay"] is None:
            result["ema_decay"] = group["ema_decay"]
        if "param_names" in group:
            result["param_names"] = group["param_names"]
        # JSON-like formats return lists; the options are tuples.
        result["betas"], result["under_optimized"] = tuple(result["betas"]), tuple(result["under_optimized"])
        checks.check_hyperparameters(result, number)
        checks.check_measure(result, number, optimizer.backend)
        checks.check_anchor(result, number, optimizer.anchor)
        merged.append(result)
    return merged


def _rules_of(saved: dict[str, Any]) -> tuple[str, ...]:
    """The rules that a saved group may be of: its own word for it, or the options that torch.optim's class has."""
    if "rule" in saved:
        return (saved["rule"],)
    if "alpha" in saved:
        return ("rmsprop",)
    if "lr_decay" in saved:
        return ("adagrad",)
    if "nesterov" in saved and "momentum" in saved and "betas" not in saved:
        return ("sgd",)
    if "betas" in saved and "amsgrad" in saved:  # before 2.7, Adam and AdamW had the same options
        decoupled = saved.get("decoupled_weight_decay")
        return ("adamw", "adam") if decoupled is None else ("adamw",) if decoupled else ("adam",)
    if "betas" in saved:  # torch.optim has no Lion; others keep its states under the same names
        return ("lion",)
    return ()


def _check_masters(
    groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> None:
    """Raises where live weights were saved without the true ones: going on would take the degraded weights for true."""
    for (number, index), _, saved in _pairs(groups, saved_groups, state_dict):
        row = saved_groups[number].get("modulation_row")
        if row is None or "master" in saved or not saved.get("step"):
            continue
        if any(row[ROW[f"emitted_{kind}"]] != 1.0 for kind in ("under", "well")):
            raise ValueError(
                f"{checks.name_of(groups, number, index)}: the checkpoint was taken while live weights were in the "
                "module, but has no master of them; save optimizer.state_dict() whole (torch.distributed.checkpoint "
                "with flatten_optimizer_state_dict=True drops what not every parameter has)"
            )


def _check_tables(saved_groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raises where states of ours come without thresholds and rows."""
    for number, group in enumerate(saved_groups):
        if "under_optimized" not in group or "modulation_row" in group:
            continue
        if any(float(state_dict["state"].get(key, {}).get("step", 0)) for key in group["params"]):
            raise ValueError(
                f"group {number}: the checkpoint has states but neither thresholds nor rows "
                "(torch.distributed.checkpoint drops them with flatten_optimizer_state_dict=True); save it without"
            )


def _pairs(
    groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> Iterator[tuple[tuple[int, int], Tensor, dict[str, Any]]]:
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            yield (number, index), p, state_dict["state"].get(key, {})


def _empty_state(p: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    """For a saved state of that type. Moments in fewer bits stay so until :func:`states.conform` makes of them what the
    group's options ask for."""
    local = distributed.local_of(p)
    kind = arithmetic_dtype(p.dtype)
    if key in ("compensation", "remainder"):
        kind = p.dtype if key == "compensation" else torch.int16
    elif key not in _STATES and dtype in (torch.bfloat16, torch.uint8):
        kind = dtype
    made = torch.empty_like(local, dtype=kind, memory_format=state_layout(p), requires_grad=False)
    return distributed.like(p, made)


def _of_other_blocks(p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
    """Saved states with moments in 8 bits as bfloat16, which has all their values, where their blocks are not those of
    the parameter: it is in parts here, or laid out in another order."""
    kept = dict(saved)
    strides = torch.empty_like(distributed.local_of(p), device="meta", memory_format=state_layout(p)).stride()
    for name, value in saved.items():
        scale = saved.get(scale_of(name))
        if scale is None or distributed.is_dtensor(value) or value.dtype != torch.uint8:
            continue
        fits = value.shape == p.shape and scale.shape == (blocks_of(value.numel()),)  # if not, that is said later
        if fits and (distributed.is_dtensor(p) or value.stride() != strides):
            kept[name] = read_moment(saved, name).to(torch.bfloat16)
            del kept[scale_of(name)]
    return kept


def _checked_state(
    groups: list[dict[str, Any]], place: tuple[int, int], p: Tensor, saved: dict[str, Any]
) -> dict[str, Any]:
    """The state of one parameter: own copies, in the arithmetic dtype and the parameter's memory order."""
    group = groups[place[0]]
    state: dict[str, Any] = {}
    moments = _MOMENTS[group["rule"]]
    if foreign := saved.keys() - _STATES - moments - set(map(scale_of, moments)):
        raise ValueError(
            f"{checks.name_of(groups, *place)}: the checkpoint has the states {sorted(map(str, foreign))}, which rule "
            f"{group['rule']!r} does not know; it is of another rule"
        )
    saved = _of_other_blocks(p, saved) if saved else {}
    for key, value in saved.items():
        if value is None:  # torch.optim.SGD without momentum
            continue
        if key == "step":
            count = value.item() if isinstance(value, Tensor) else value
            state[key] = step_count(p, float(count))
        elif isinstance(value, Tensor) and key.endswith("_scale"):
            blocks = blocks_of(distributed.local_of(p).numel())
            if value.shape != (blocks,):
                raise ValueError(
                    f"{checks.name_of(groups, *place)}: its {key} has shape {tuple(value.shape)} in the checkpoint, "
                    f"{(blocks,)} here"
                )
            state[key] = value.to(p.device, torch.uint8, copy=True)
        elif isinstance(value, Tensor):
            name = checks.name_of(groups, *place)
            value = distributed.in_place_of(p, value, f"{name}: its {key}")
            if value.shape != p.shape:
                raise ValueError(
                    f"{name}: its {key} has shape {tuple(value.shape)} in the checkpoint, {tuple(p.shape)} here"
                )
            if value.dtype == torch.uint8 and scale_of(key) not in saved:
                raise ValueError(f"{name}: the checkpoint has its {key} in 8 bits without {scale_of(key)}")
            state[key] = _empty_state(p, key, value.dtype)
            local = distributed.local_of(value)
            if key == "remainder" and local.dtype == torch.bfloat16:
                local = local.view(torch.int16)
            distributed.local_of(state[key]).copy_(local)
        else:
            state[key] = value
    if not state.keys() - {"anchor", "master"}:  # not stepped yet
        return state
    # torch.optim.SGD counts no steps, and no rule but Adam keeps both moments that a modulated group needs.
    state.setdefault("step", step_count(p, 1.0))
    needed = moments_of({**group, "modulated": False}).values() if group["rule"] != "sgd" else ()
    for key in moments_of(group).values():
        if key not in state and key in needed:
            raise ValueError(f"{checks.name_of(groups, *place)}: the checkpoint has no {key}; it is of another rule")
        if key not in state:
            state[key] = zeros_like_all([p])[0]
    return state
