"""Checkpoints: torch.optim's format, complete, with the bits and dtypes that were saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.optim import resets
from aim_kernels.optim.matching import described, in_order_of, parts_of_checkpoint, rules_of
from aim_kernels.step import options, sharding, validation
from aim_kernels.step.codecs import blocks_of
from aim_kernels.step.layout import ROW
from aim_kernels.step.ownership import STATES, copied, count_of, is_own, own_states
from aim_kernels.step.states import (
    arithmetic_dtype,
    conform,
    exponents_key,
    moments_of,
    read_moment,
    state_layout,
    step_count,
    zeros_like_all,
)
from aim_kernels.step.tables import KEYS

if TYPE_CHECKING:
    from aim_kernels.optim.interface import FusedOptimizer

#: Options that say how states are stored.
_STORAGE = ("state_dtype", "rounding", "master")

#: Options of torch.optim that change the rule and are not supported here, with the value that leaves it as it is.
_UNSUPPORTED = {"differentiable": False, "bias_correction": True}

#: Rules whose update goes without a step count, so that others save none.
_UNCOUNTED = ("sgd", "lion")

#: What has the bits that 16-bit weights lack, by the group's ``master``.
_WEIGHTS = {"split": "remainder", "kahan": "compensation", "float32": "master"}

#: Types in which moments and weights are saved; moments also in uint8, with exponents.
_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, torch.float64, *_HALVES)


def complete(state_dict: dict[str, Any], optimizer: FusedOptimizer) -> dict[str, Any]:
    """Adds each group's row, statistics and the control table to torch's state dict, as plain numbers, and anchors of
    parameters that have no state yet."""
    tables = optimizer.tables
    for number, group in enumerate(state_dict["param_groups"]):
        group.update(tables.to_lists(number))
        rule = group["rule"]
        for key, p in zip(group["params"], optimizer.param_groups[number]["params"], strict=True):
            if key in state_dict["state"] and sharding.is_dtensor(p):
                state_dict["state"][key] = _shardable(p, rule, state_dict["state"][key])
            if p in optimizer._anchors:
                state_dict["state"][key] = {**state_dict["state"].get(key, {}), "anchor": optimizer._anchors[p]}
    return state_dict


def _shardable(p: Tensor, rule: str, state: dict[str, Any]) -> dict[str, Any]:
    """A DTensor's states as they can be saved and cut in another way: moments in 8 bits as bfloat16, which has all
    their values, since exponents belong to the blocks of one process; the 16 bits of a remainder under the name of
    bfloat16 as well, since neither gloo nor NCCL gathers int16."""
    with_codes = [name for name in state if is_own(rule, state, exponents_key(name)) and exponents_key(name) in state]
    kept = {name: value for name, value in state.items() if name not in map(exponents_key, with_codes)}
    for name in with_codes:
        kept[name] = sharding.like(p, read_moment(state, name).to(torch.bfloat16))
    if "remainder" in kept:
        kept["remainder"] = sharding.like(p, sharding.local_of(kept["remainder"]).view(torch.bfloat16))
    return kept


def load(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Replaces groups, states and tables; checks everything first.

    The base class is not used for it: it would cast every state to the parameter's dtype, and so round the float32
    moments of 16-bit parameters.
    """
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, state_dict)
        if changed is not None:
            state_dict = changed

    saved_states, saved_groups = parts_of_checkpoint(state_dict)
    saved_groups = in_order_of(optimizer.param_groups, saved_groups)
    groups = _merged_groups(optimizer, saved_groups, saved_states)
    tables_saved = [{key: group[key] for key in KEYS if group.get(key) is not None} for group in saved_groups]
    tables = optimizer.tables
    for number, saved in enumerate(tables_saved):
        tables.check_lists(number, saved)
    state = {}
    for position, p, saved in _pairs(groups, saved_groups, saved_states):
        present = _present(groups[position[0]]["rule"], saved, optimizer.state.get(p, {}))
        today = optimizer.param_groups[position[0]]
        state[p] = _checked_state(groups, position, p, present, saved_groups[position[0]], today)
    for number, group in enumerate(groups):
        counts = [float(state[p].get("step", 0.0)) for p in group["params"]]
        if "modulation_row" in tables_saved[number]:
            _check_masters(groups, number, tables_saved[number]["modulation_row"], counts, state)
        elif "under_optimized" in saved_groups[number] and any(counts):
            raise ValueError(
                f"group {number}: the checkpoint has states but neither thresholds nor rows, which "
                "optimizer.state_dict() has in each group; save it whole"
            )
    known = {key for group in saved_groups for key in group["params"]}
    others = {key: copied(value) for key, value in saved_states.items() if key not in known}

    resets.restore_all(optimizer)
    for number, saved in enumerate(tables_saved):
        tables.from_lists(number, saved)
        groups[number] |= dict.fromkeys(KEYS)
    anchors = {p: s["anchor"] for p, s in optimizer.state.items() if isinstance(p, Tensor) and "anchor" in s}
    anchors |= optimizer._anchors
    anchors |= {p: values["anchor"] for p, values in state.items() if "anchor" in values}
    optimizer.state.clear()
    optimizer._anchors.clear()
    for p, values in state.items():
        if "step" in values:
            optimizer.state[p] = values | ({"anchor": anchors[p]} if p in anchors else {})
            continue
        if rest := {name: value for name, value in values.items() if name != "anchor"}:  # frozen, or of others
            optimizer.state[p] = rest
        if p in anchors:  # torch.distributed.checkpoint makes states only where there are none
            optimizer._anchors[p] = anchors[p]
    optimizer.state.update(others)
    optimizer.param_groups[:] = groups
    tables.groups = list(groups)
    for number, group in enumerate(groups):
        for p in group["params"]:
            if "step" in optimizer.state.get(p, ()):
                conform(group, p, optimizer.state[p], tables.has_live_weights(number))
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _merged_groups(
    optimizer: FusedOptimizer, saved_groups: list[dict[str, Any]], saved_states: dict[Any, Any]
) -> list[dict[str, Any]]:
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
        rules = rules_of(saved)
        if group["rule"] not in rules:
            states = (saved_states.get(key, {}) for key in saved["params"])
            other = " or ".join(map(repr, rules)) or described(saved, states) or "another rule"
            raise ValueError(f"group {number}: the checkpoint is of {other}, the optimizer of {group['rule']!r}")
        for option, neutral in _UNSUPPORTED.items():
            if saved.get(option, neutral) != neutral:
                raise ValueError(
                    f"group {number}: the checkpoint has {option}={saved[option]!r}, which is not supported"
                )
        given = {key: copied(value) for key, value in saved.items() if key != "params"}
        if saved["params"] and isinstance(saved["params"][0], str):
            given.pop("param_names", None)  # torch.distributed.checkpoint leaves them in the order that they had
        if "rule" not in saved:  # others keep in their groups whatever they are given, and ignore what they do not know
            given = {key: value for key, value in given.items() if key not in options.neutral(group["rule"])}
        result = {**group, **given, "params": group["params"]}
        # How states are stored is this optimizer's business: those of the checkpoint are converted.
        result |= {key: group[key] for key in _STORAGE}
        if result["ema_decay"] is None:
            result["ema_decay"] = group["ema_decay"]
        if "param_names" in group:
            result["param_names"] = group["param_names"]
        # JSON-like formats return lists; the options are tuples.
        result["betas"], result["under_optimized"] = tuple(result["betas"]), tuple(result["under_optimized"])
        options.check_hyperparameters(result, number)
        validation.check_measure(result, number, optimizer.backend)
        validation.check_anchor(result, number, optimizer.anchor)
        merged.append(result)
    return merged


def _check_masters(
    groups: list[dict[str, Any]],
    number: int,
    row: list[float],
    counts: list[float],
    state: dict[Tensor, dict[str, Any]],
) -> None:
    """Raises where live weights were saved without the true ones: going on would take the degraded weights for true.

    Args:
        counts: steps of the group's parameters. What was never stepped is under-optimized.
    """
    under, well = (row[ROW[f"emitted_{side}"]] for side in ("under", "well"))
    for index, (p, count) in enumerate(zip(groups[number]["params"], counts, strict=True)):
        if "master" not in state[p] and (under != 1.0 or (count and well != 1.0)):
            raise ValueError(
                f"{validation.name_of(groups, number, index)}: the checkpoint was taken while live weights were in the "
                "module, but has no master of them; save optimizer.state_dict() whole, or make both optimizers with "
                "keep_masters=True (torch.distributed.checkpoint reads only the states that the fresh optimizer has)"
            )


def _pairs(
    groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]], saved_states: dict[Any, Any]
) -> Iterator[tuple[tuple[int, int], Tensor, dict[str, Any]]]:
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            state = saved_states.get(key)
            if state is not None and not isinstance(state, dict):
                name, found = validation.name_of(groups, number, index), type(state).__name__
                raise ValueError(f"{name}: its state is a {found} in the checkpoint, expected a dict")
            yield (number, index), p, state or {}


def _present(rule: str, saved: dict[str, Any], today: dict[str, Any]) -> dict[str, Any]:
    """Saved states without the empty dicts that torch.distributed.checkpoint makes of what the optimizer has today and
    a flattened state dict has not."""

    def is_absent(name: str, value: Any) -> bool:
        known = is_own(rule, saved, name) or not isinstance(today.get(name, {}), dict)
        return isinstance(value, dict) and not value and known

    return {name: value for name, value in saved.items() if not is_absent(name, value)}


def _empty_state(p: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    """For a saved state of that type. Moments in fewer bits stay so until :func:`states.conform` makes of them what the
    group's options ask for."""
    local = sharding.local_of(p)
    stored_dtype = arithmetic_dtype(p.dtype)
    if key in ("compensation", "remainder"):
        stored_dtype = p.dtype if key == "compensation" else torch.int16
    elif key not in STATES and dtype in (torch.bfloat16, torch.uint8):
        stored_dtype = dtype
    made = torch.empty_like(local, dtype=stored_dtype, memory_format=state_layout(p), requires_grad=False)
    return sharding.like(p, made)


def _of_other_blocks(p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
    """Saved states with moments in 8 bits as bfloat16, which has all their values, where their blocks are not those of
    the parameter: it is in parts here, or laid out in another order."""
    kept = dict(saved)
    strides = torch.empty_like(sharding.local_of(p), device="meta", memory_format=state_layout(p)).stride()
    for name, value in saved.items():
        exponents = saved.get(exponents_key(name))
        if not isinstance(exponents, Tensor) or sharding.is_dtensor(value) or value.dtype != torch.uint8:
            continue
        fits = value.shape == p.shape and exponents.shape == (blocks_of(value.numel()),)  # if not, that is said later
        if fits and (sharding.is_dtensor(p) or value.stride() != strides):
            kept[name] = read_moment(saved, name).to(torch.bfloat16)
            del kept[exponents_key(name)]
    return kept


def _checked_state(
    groups: list[dict[str, Any]],
    position: tuple[int, int],
    p: Tensor,
    saved: dict[str, Any],
    saved_group: dict[str, Any],
    today: dict[str, Any],
) -> dict[str, Any]:
    """The state of one parameter: own copies, in the arithmetic dtype and the parameter's memory order; and what others
    keep there, as it is, on the parameter's device."""
    group, name = groups[position[0]], validation.name_of(groups, *position)
    rule, state = group["rule"], dict[str, Any]()
    own = {key: value for key, value in own_states(rule, saved).items() if value is not None}
    foreign = {key: value for key, value in saved.items() if not is_own(rule, saved, key)}
    if "bias_correction" in saved_group and p.dtype in _HALVES:
        _take_master(name, own, foreign)
    own = _of_other_blocks(p, own) if own else own
    for key, value in own.items():
        if key == "step":
            state[key] = step_count(p, _count(f"{name}: its step", value))
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            found = f"{value.layout} tensor on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: its {key} is a {found} in the checkpoint, a dense tensor here")
        if key.endswith("_scale"):
            blocks = blocks_of(sharding.local_of(p).numel())
            if value.shape != (blocks,):
                raise ValueError(
                    f"{name}: its {key} has shape {tuple(value.shape)} in the checkpoint, {(blocks,)} here"
                )
            state[key] = value.to(p.device, torch.uint8, copy=True)
            continue
        value = sharding.in_place_of(p, value, f"{name}: its {key}")
        if value.shape != p.shape:
            raise ValueError(
                f"{name}: its {key} has shape {tuple(value.shape)} in the checkpoint, {tuple(p.shape)} here"
            )
        if value.dtype == torch.uint8 and exponents_key(key) not in own:
            raise ValueError(f"{name}: the checkpoint has its {key} in 8 bits without {exponents_key(key)}")
        if value.dtype not in (*_FLOATS, torch.int16 if key == "remainder" else torch.uint8):
            raise ValueError(f"{name}: its {key} is {value.dtype} in the checkpoint, which is not how it is kept here")
        state[key] = _empty_state(p, key, value.dtype)
        local = sharding.local_of(value)
        if key == "remainder" and local.dtype == torch.bfloat16:
            local = local.view(torch.int16)
        sharding.local_of(state[key]).copy_(local)
    _check_dropped(name, p, state, group, saved_group, today)
    whose = described({}, [foreign])
    if state.keys() - {"anchor", "master"} or whose:  # stepped, not frozen
        _complete_state(group, name, p, state, saved_group, whose)
    return state | {key: copied(value, p.device) for key, value in foreign.items()}


def _check_dropped(
    name: str,
    p: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    saved_group: dict[str, Any],
    today: dict[str, Any],
) -> None:
    """Raises where a checkpoint of ours has not the states that go with its options: of a flattened state dict torch
    reads only what the fresh optimizer keeps, by options of its own."""
    if "rule" not in saved_group or not float(state.get("step", 0.0)) > 0:
        return
    asked = moments_of(today).values()
    lost = [key for key in moments_of(group).values() if key not in state and key not in asked]
    if saved_group.get("ema_decay") is not None and today["ema_decay"] is None and "ema" not in state:
        lost.append("ema")
    how = saved_group.get("master") if p.dtype in _HALVES else None
    if how in _WEIGHTS and how != today["master"] and not state.keys() & set(_WEIGHTS.values()):
        lost.append(_WEIGHTS[how])
    if lost:
        raise ValueError(
            f"{name}: the checkpoint has no {lost[0]} of it, which goes with the options of its group there; of a "
            "flattened state dict torch reads only what the fresh optimizer keeps: make it with the same options"
        )


def _complete_state(
    group: dict[str, Any],
    name: str,
    p: Tensor,
    state: dict[str, Any],
    saved_group: dict[str, Any],
    whose: str | None,
) -> None:
    """Adds what others do not save of a parameter that was stepped, and raises where that cannot be known. ``whose``:
    the optimizer that its other states are of, if they are known."""
    rule = group["rule"]
    # No rule but Adam keeps both moments that a modulated group needs.
    needed = moments_of({**group, "modulated": False}).values()
    for key in moments_of(group).values():
        if key in needed and key not in state and (rule != "sgd" or whose):
            raise ValueError(f"{name}: the checkpoint has no {key}; it is of {whose or 'another rule'}")
        if key not in state:
            state[key] = zeros_like_all([p])[0]
    if "step" not in state and saved_group.get("step") is not None:  # of fused optimizers, one for all parameters
        state["step"] = step_count(p, _count(f"{name}: the step of its group", saved_group["step"]))
        group.pop("step", None)
    if "step" not in state:
        if rule not in _UNCOUNTED or ("rule" in saved_group and group["modulated"]):
            raise ValueError(
                f"{name}: the checkpoint has states of it but no step, on which the next update depends; give its "
                "state, or its group, the number of steps that it has taken"
            )
        state["step"] = step_count(p, 1.0)


def _take_master(name: str, own: dict[str, Any], foreign: dict[str, Any]) -> None:
    """The true weights of a 16-bit parameter as TransformerEngine's FusedAdam saves them."""
    value = foreign.get("master_param")
    if value is None or "master" in own:
        return
    if isinstance(value, Tensor) and value.dtype == torch.int16:
        raise ValueError(
            f"{name}: the checkpoint has the lower 16 bits of its weights (store_param_remainders of "
            "TransformerEngine's FusedAdam); save it with whole master weights"
        )
    own["master"] = foreign.pop("master_param")


def _count(what: str, value: Any) -> float:
    try:
        return count_of(value)
    except ValueError as error:
        raise ValueError(f"{what} {error} (in the checkpoint)") from error
