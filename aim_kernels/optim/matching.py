"""Match a checkpoint to an optimizer: whose it is, and which parameter is which, by name if both sides have names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aim_kernels.step.validation import name_of

Group = dict[str, Any]

#: Parts of a name that wrappers add: DDP, torch.compile, FSDP1, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

#: Whose a dict is that is no state dict of an optimizer, by keys that only theirs have.
_NO_STATE_DICTS = {
    "DeepSpeed's ZeRO": {
        "zero_stage",
        "base_optimizer_state",
        "single_partition_of_fp32_groups",
        "fp32_flat_groups",
        "ds_config",
        "ds_version",
    },
    "Megatron's mixed precision": {"fp32_from_fp16_params", "fp32_from_float16_params"},
    "apex's FP16_Optimizer": {"fp32_from_fp16", "fp32_groups_flat", "cur_scale"},
}

#: Whose states are, by names that only theirs have.
_STATES_OF = {
    "bitsandbytes (moments in state1 and state2, in 8 bits with absmax and qmap)": {
        "state1",
        "state2",
        "absmax1",
        "absmax2",
    },
    "an Adafactor (second moments as sums of rows and columns)": {
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "row_var",
        "col_var",
    },
    "torch.optim.Adamax": {"exp_inf"},
    "torch.optim.NAdam": {"mu_product"},
    "torch.optim.Adadelta": {"acc_delta"},
}

#: The same by options of a group that only theirs have.
_GROUPS_OF = {
    "momentum_decay": "torch.optim.NAdam",
    "lambd": "torch.optim.ASGD",
    "etas": "torch.optim.Rprop",
    "beta2_decay": "torch.optim.Adafactor",
    "scale_parameter": "an Adafactor",
    "ns_steps": "Muon",
    "grad_averaging": "LAMB or NovoGrad",
    "trust_coefficient": "LARS",
}


def parts_of_checkpoint(state_dict: Any) -> tuple[dict[Any, Any], list[Group]]:
    """States and param groups of what an optimizer has saved.

    Raises:
        ValueError: something else was passed; the message says what it looks like.
    """
    found = set(state_dict) if isinstance(state_dict, Mapping) else set()
    if {"state", "param_groups"} <= found:
        states, groups = state_dict["state"], list(state_dict["param_groups"])
        if isinstance(states, Mapping) and all(isinstance(g, Mapping) and "params" in g for g in groups):
            return dict(states), groups
        found = set()
    looks = ""
    if any(isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in found):
        looks = (
            "; it is a flattened one: load it with set_optimizer_state_dict of torch.distributed.checkpoint.state_dict "
            "and StateDictOptions(flatten_optimizer_state_dict=True)"
        )
    else:
        within = {key: state_dict[key] for key in found if isinstance(state_dict[key], Mapping)}
        everything = found.union(*within.values())
        for whose, keys in _NO_STATE_DICTS.items():
            if keys & everything:
                looks = f"; it looks like {whose}, which keeps parameters of its own: convert it with its tools first"
        for key, value in within.items() if not looks else ():
            if "param_groups" in value:
                looks = f"; it looks like a whole checkpoint: pass what it has under {key!r}"
    what = f"a dict of {sorted(map(str, found))[:8]}" if found else f"a {type(state_dict).__name__}"
    raise ValueError(f"the checkpoint must be a dict with 'state' and 'param_groups', got {what}{looks}")


# -- rules -----------------------------------------------------------------------------------------------------------


def rules_of(saved: Group) -> tuple[str, ...]:
    """The rules that a saved group may be of: its own word for it, or the options that torch.optim's class has."""
    if "rule" in saved:
        return (saved["rule"],)
    if saved.keys() & {"grad_averaging", "trust_coefficient"}:  # LAMB and LARS have those of Adam and SGD as well
        return ()
    if {"alpha", "centered"} <= saved.keys():
        return ("rmsprop",)
    if {"lr_decay", "initial_accumulator_value"} <= saved.keys():
        return ("adagrad",)
    if {"nesterov", "momentum", "dampening"} <= saved.keys() and "betas" not in saved:
        return ("sgd",)
    if "betas" not in saved:
        return ()
    if "amsgrad" in saved:  # before 2.7, Adam and AdamW had the same options
        decoupled = saved.get("decoupled_weight_decay")
        return ("adamw", "adam") if decoupled is None else ("adamw",) if decoupled else ("adam",)
    if "eps" not in saved:  # torch.optim has no Lion; others keep its states under the same names
        return ("lion",)
    # apex's, TransformerEngine's and DeepSpeed's FusedAdam do not save which of the two they were.
    return ("adamw", "adam") if saved.keys() & {"bias_correction", "step"} else ()


def described(saved: Group, states: Iterable[dict[Any, Any]]) -> str | None:
    """Whose a saved group is, if its states or options are known as another optimizer's."""
    names = {name for state in states for name in state}
    for whose, theirs in _STATES_OF.items():
        if theirs & names:
            return whose
    return next((whose for option, whose in _GROUPS_OF.items() if option in saved), None)


# -- names -----------------------------------------------------------------------------------------------------------


def in_order_of(groups: Sequence[Group], saved_groups: Sequence[Group]) -> list[Group]:
    """The saved groups, and the parameters in each, in the order of today's, matched by name; as they are where one
    side has no names.

    Names are those of ``named_parameters``; what DDP, torch.compile and the like add to them counts as nothing if the
    names are equal without it. Parameters that torch.distributed.checkpoint calls by their names are in the right order
    already, and only what contradicts that is looked for.

    Raises:
        ValueError: names that are missing on one side, that stand for two parameters, or that are together in a group
            on one side only.
    """
    here, saved = _names(groups), _names(saved_groups)
    by_key = all(isinstance(key, str) for group in saved_groups for key in group["params"])
    if by_key:
        saved = [list(group["params"]) for group in saved_groups]
    if here is None or saved is None or (by_key and not _contradict(here, saved)):
        return list(saved_groups)
    here, saved = _without_wrappers(here, saved)
    if here == saved:
        return list(saved_groups)
    for side, where in ((here, "here"), (saved, "in the checkpoint")):
        twice = [name for name, count in Counter(_joined(side)).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]!r}: {where} two parameters have this name; give every one a name of its own")
    left = [name for name in _joined(saved) if name not in set(_joined(here))]
    position = _positions(saved)
    for name, (number, index) in _positions(here).items():
        if name not in position:
            rest = f" (it has {', '.join(map(repr, left[:3]))}, which are not here)" if left else ""
            raise ValueError(
                f"{name_of(list(groups), number, index)}: the checkpoint has no parameter of this name{rest}; give the "
                "parameters the names that they had, or take 'param_names' out of its groups to load by place"
            )
    if left:
        raise ValueError(f"{left[0]!r}: the checkpoint has a parameter of this name, the optimizer has not")
    if len(here) != len(saved):
        raise ValueError(f"the checkpoint has {len(saved)} param groups, the optimizer {len(here)}")
    empty = iter([group for group, side in zip(saved_groups, saved, strict=True) if not side])
    matched: list[Group] = []
    for members in here:
        if not members:
            matched.append(next(empty, {}))  # fewer there than here: then a name of theirs is apart from others
            continue
        theirs = saved[position[members[0]][0]]
        # All of ours are among theirs, and all of theirs among ours.
        apart = next((name for name in (*members, *theirs) if name not in theirs or name not in members), None)
        if apart is not None:
            here_or_there = ("here", "in the checkpoint") if apart in members else ("in the checkpoint", "here")
            raise ValueError(
                f"{name_of(list(groups), *_positions(here)[apart])}: is in one group with {members[0]!r} "
                f"{here_or_there[0]}, and not {here_or_there[1]}; make the groups as they were"
            )
        found = saved_groups[position[members[0]][0]]
        matched.append({**found, "params": [found["params"][position[name][1]] for name in members]})
    return matched


def _names(groups: Sequence[Group]) -> list[list[str]] | None:
    """The names of all parameters, by group; None where one has none."""
    found = []
    for group in groups:
        names = group.get("param_names")
        if not group["params"]:
            names = []
        if names is None or len(names) != len(group["params"]) or not all(isinstance(name, str) for name in names):
            return None
        found.append(list(names))
    return found if any(found) else None


def _joined(names: list[list[str]]) -> list[str]:
    return [name for group in names for name in group]


def unwrapped_name(name: str) -> str:
    """A name without what wrappers add: DDP, torch.compile, FSDP1, activation checkpointing."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _positions(names: list[list[str]]) -> dict[str, tuple[int, int]]:
    """(group, index) by name."""
    return {name: (number, index) for number, group in enumerate(names) for index, name in enumerate(group)}


def _contradict(here: list[list[str]], saved: list[list[str]]) -> bool:
    """Whether a name stands at another position on the other side."""
    position = _positions(saved)
    return any(position.get(name, at) != at for name, at in _positions(here).items())


def _without_wrappers(here: list[list[str]], saved: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Both without what wrappers add, if that makes the names equal and leaves them different from each other."""
    if set(_joined(here)) == set(_joined(saved)):
        return here, saved
    bare_here, bare_saved = ([[unwrapped_name(name) for name in group] for group in side] for side in (here, saved))
    one, other = _joined(bare_here), _joined(bare_saved)
    same = set(one) == set(other) and len(set(one)) == len(one) and len(set(other)) == len(other)
    return (bare_here, bare_saved) if same else (here, saved)
