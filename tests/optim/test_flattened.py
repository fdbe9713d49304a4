"""What flattened state dicts need of an optimizer: keys that its groups have, and states that may be absent."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_helpers import batches, drive, through_a_file
from helpers import build, frozen, parameter, parameters_of, same_bits, set_row
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import aim_kernels as ak
from aim_kernels.step.tables import KEYS

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
SHAPES = (((5, 7), (33,)), ((6, 2),))


def nothing_in_groups(optimizer: ak.AIMFusedOptimizer) -> None:
    assert all(key in group and group[key] is None for group in optimizer.param_groups for key in KEYS)


def loaded(optimizer: ak.AIMFusedOptimizer) -> ak.AIMFusedOptimizer:
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    return optimizer


def extended(optimizer: ak.AIMFusedOptimizer) -> ak.AIMFusedOptimizer:
    saved = optimizer.state_dict()["param_groups"][0]  # what somebody may pass on as it is
    optimizer.add_param_group({**saved, "params": [parameter((3,))]})
    assert optimizer.tables.rows[2, 3] == 0.0
    return optimizer


WAYS: dict[str, Callable[[ak.AIMFusedOptimizer], ak.AIMFusedOptimizer]] = {
    "made": lambda o: o,
    "loaded": loaded,
    "extended": extended,
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
}


@pytest.mark.parametrize("way", WAYS)
def test_groups_have_the_keys_of_tables(way: str) -> None:
    optimizer = build("adamw", SHAPES)
    set_row(optimizer, 0, "alternate")
    drive(optimizer, batches(optimizer, 3))
    made = WAYS[way](optimizer)
    nothing_in_groups(made)
    assert not set(re.findall(r"\w+(?=: )", repr(made))) & set(KEYS), "nobody needs to read that they are None"
    tables = made.tables
    for number, group in enumerate(made.state_dict()["param_groups"]):
        assert group["modulation_row"] == tables.rows[number].tolist()
        assert group["statistics_row"] == tables.statistics[number].tolist()
        assert group["control"] == tables.control.tolist()
    nothing_in_groups(made)
    drive(made, batches(made, 1))
    nothing_in_groups(made)


def test_groups_that_say_none_leave_tables_as_they_are() -> None:
    """As those of torch's ZeroRedundancyOptimizer do."""
    first, second = (build("adamw", SHAPES) for _ in range(2))
    set_row(second, 0, "step")
    before = second.tables.rows.clone()
    saved = first.state_dict()
    for group in saved["param_groups"]:
        group.update(dict.fromkeys(KEYS))
    second.load_state_dict(saved)
    same_bits(before, second.tables.rows)
    nothing_in_groups(second)


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 64, dtype=dtype), nn.ReLU(), nn.Linear(64, 3, dtype=dtype))


def optimizer_of(model: nn.Sequential, **options: Any) -> ak.AIMFusedOptimizer:
    groups = [
        {"params": list(model[0].parameters()), "modality": "a", "depth": 0, "modulated": True},
        {"params": list(model[2].parameters())},
    ]
    return ak.AIMFusedOptimizer(groups, **({"lr": 0.01, "under_optimized": ("fraction", 0.3)} | options))


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("float32", {}, {}),
    ("float32", {"keep_masters": True, "anchor": "init"}, {}),
    ("float32", {"rule": "sgd", "momentum": 0.9}, {}),
    ("float32", {"rule": "lion"}, {}),
    ("float32", {"state_dtype": "int8", "ema_decay": 0.9}, {}),
    ("bfloat16", {"state_dtype": "int8", "master": "split"}, {}),
    ("bfloat16", {"master": "kahan"}, {}),
    ("bfloat16", {"master": None}, {"master": "split"}),
    ("float32", {"state_dtype": "bfloat16"}, {"state_dtype": "int8"}),
    ("float32", {"state_dtype": None}, {"state_dtype": "int8"}),
    ("float32", {}, {"keep_masters": True}),
    ("float32", {}, {"ema_decay": 0.9}),
]


@pytest.mark.parametrize(("dtype", "saved_by", "changes"), CASES, ids=str)
def test_flattened_is_as_good_as_not(dtype: str, saved_by: dict[str, Any], changes: dict[str, Any]) -> None:
    """Also where the fresh optimizer has states that the checkpoint has not, for which torch puts empty dicts."""
    stored = getattr(torch, dtype)
    model = model_of(stored)
    first = optimizer_of(model, **saved_by)
    if saved_by.get("keep_masters"):
        first.set_strength("a", 0, 0.5)
    grads = batches(first, 6)
    drive(first, grads[:3])
    made = []
    for options in (FLAT, StateDictOptions()):
        other = model_of(stored)
        second = optimizer_of(other, **(saved_by | changes))
        saved = copy.deepcopy(get_optimizer_state_dict(model, first, options=options))
        other.load_state_dict(model.state_dict())
        set_optimizer_state_dict(other, second, saved, options=options)
        made.append(second)
    same_bits(*map(frozen, made))
    for optimizer in (first, *made):
        drive(optimizer, grads[3:])
    same_bits(*map(frozen, made))
    if not changes:
        same_bits(frozen(first), frozen(made[0]))


def test_a_user_s_state_that_the_flattened_dict_has_not() -> None:
    """The fresh optimizer has it, so torch asks for it, and finds nothing: an empty dict is no value of it."""
    model, other = model_of(), model_of()
    first, second = optimizer_of(model), optimizer_of(other)
    for optimizer in (first, second):
        drive(optimizer, batches(optimizer, 2))
    p, q = parameters_of(first)[0], parameters_of(second)[0]
    first.state[p]["norm"] = torch.tensor(3.0)
    second.state[q].update(norm=torch.tensor(1.0), z=torch.ones(2), mine={"a": 1})
    saved = get_optimizer_state_dict(model, first, options=FLAT)
    set_optimizer_state_dict(other, second, saved, options=FLAT)
    assert second.state[q]["norm"].item() == 3.0 and "z" not in second.state[q] and second.state[q]["mine"] == {}


def test_moments_in_8_bits_need_exponents_that_a_wider_optimizer_does_not_ask_for() -> None:
    model, other = model_of(), model_of()
    first, second = optimizer_of(model, state_dtype="int8"), optimizer_of(other)
    drive(first, batches(first, 2))
    saved = get_optimizer_state_dict(model, first, options=FLAT)
    with pytest.raises(ValueError, match="parameter 0 of group 0: the checkpoint has its exp_avg in 8 bits without"):
        set_optimizer_state_dict(other, second, saved, options=FLAT)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("to", [None, "stochastic", "split", "kahan", "float32"])
@pytest.mark.parametrize("since", ["split", "kahan", "float32"])
def test_weights_that_are_kept_in_another_way(since: str, to: str | None, live: bool) -> None:
    """torch drops what the fresh optimizer does not keep: half of every weight, and never in silence."""
    model, other = model_of(torch.bfloat16), model_of(torch.bfloat16)
    first, second = (optimizer_of(m, master=k, keep_masters=live) for m, k in ((model, since), (other, to)))
    grads = batches(first, 4)
    drive(first, grads[:2])
    saved = get_optimizer_state_dict(model, first, options=FLAT)
    other.load_state_dict(model.state_dict())
    if since == to:
        set_optimizer_state_dict(other, second, saved, options=FLAT)
        for optimizer in (first, second):
            drive(optimizer, grads[2:])
        same_bits(frozen(first), frozen(second))
        return
    number = 1 if live else 0  # a modulated parameter has a master in both
    rest = {"split": "remainder", "kahan": "compensation", "float32": "master"}[since]
    with pytest.raises(
        ValueError, match=rf"parameter 0 of group {number}: the checkpoint has no {rest} of it.*same options"
    ):
        set_optimizer_state_dict(other, second, saved, options=FLAT)
    whole = get_optimizer_state_dict(model, first)
    set_optimizer_state_dict(other, second, whole)
    drive(second, grads[2:])


@pytest.mark.parametrize(
    ("saved_by", "lost"),
    [
        ({"ema_decay": 0.9}, "ema"),
        ({"amsgrad": True}, "max_exp_avg_sq"),
        ({"rule": "sgd", "momentum": 0.9}, "momentum_buffer"),
        ({"rule": "rmsprop", "momentum": 0.9}, "momentum_buffer"),
    ],
    ids=str,
)
def test_states_that_go_with_other_options(saved_by: dict[str, Any], lost: str) -> None:
    """Options come with the checkpoint; so must the states that torch does not read if the optimizer has other ones."""
    model, other = model_of(), model_of()
    first = optimizer_of(model, **saved_by)
    second = optimizer_of(other, rule=saved_by.get("rule", "adamw"))
    grads = batches(first, 4)
    drive(first, grads[:2])
    before = frozen(second)
    with pytest.raises(ValueError, match=rf"parameter \d of group \d: the checkpoint has no {lost}.*same options"):
        set_optimizer_state_dict(other, second, get_optimizer_state_dict(model, first, options=FLAT), options=FLAT)
    assert before["rows"].equal(second.tables.rows) and all(g["lr"] == 0.01 for g in second.param_groups)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, second, copy.deepcopy(get_optimizer_state_dict(model, first)))
    for optimizer in (first, second):
        drive(optimizer, grads[2:])
    same_bits(frozen(first), frozen(second))


def test_blocks_that_the_fresh_optimizer_has_not() -> None:
    """Whether a group is a block comes with the checkpoint, too."""
    model, other = model_of(), model_of()
    first = optimizer_of(model, rule="lion")
    groups = [{"params": list(other[number].parameters())} for number in (0, 2)]
    second = ak.AIMFusedOptimizer(groups, rule="lion")
    drive(first, batches(first, 2))
    with pytest.raises(ValueError, match="parameter 0 of group 0: the checkpoint has no exp_avg_sq of it"):
        set_optimizer_state_dict(other, second, get_optimizer_state_dict(model, first, options=FLAT), options=FLAT)
