"""Saving, loading, resuming, copying: bit for bit."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from checkpoint_helpers import PEERS, SHAPES, batches, drive, through_a_file, transplant
from helpers import (
    DTYPES,
    RULES,
    Gradients,
    assign,
    build,
    frozen,
    parameter,
    parameters_of,
    same_bits,
    set_row,
)

import aim_kernels as ak


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rule", "row"),
    [
        *((rule, row) for rule in ("adamw", "sgd", "sgd-momentum") for row in ("ones", "alternate", "all")),
        *((rule, "all") for rule in ("amsgrad", "adagrad", "rmsprop", "rmsprop-momentum", "lion")),
    ],
)
def test_resume_is_bit_for_bit(rule: str, row: str, dtype: str) -> None:
    through, first, second = (build(rule, SHAPES, dtype, ("contiguous", "transposed")) for _ in range(3))
    for optimizer in (through, first):
        set_row(optimizer, 0, row)
    grads = batches(through, 14)
    drive(through, grads)
    drive(first, grads[:7])
    transplant(first, second, through_a_file(first.state_dict()))
    same_bits(frozen(first), frozen(second))
    drive(second, grads[7:])
    same_bits(frozen(through), frozen(second))


@pytest.mark.parametrize("saved_in", ["train", "eval", "true_parameters"])
def test_resume_from_a_checkpoint_taken_in_eval_mode(saved_in: str) -> None:
    """The usual loop: eval(), save model and optimizer, train()."""
    through, first, second = (build("adamw", SHAPES) for _ in range(3))
    for optimizer in (through, first):
        set_row(optimizer, 0, "alternate")
    grads = batches(through, 12)
    drive(through, grads)
    drive(first, grads[:6])
    if saved_in == "eval":
        first.eval()
        transplant(first, second, through_a_file(first.state_dict()))
        first.train()
    elif saved_in == "true_parameters":
        with first.true_parameters():
            transplant(first, second, through_a_file(first.state_dict()))
    else:
        transplant(first, second, through_a_file(first.state_dict()))
    second.train()
    same_bits(frozen(first), frozen(second))
    drive(second, grads[6:])
    same_bits(frozen(through), frozen(second))


def test_state_dict_holds_the_true_weights_however_it_is_called() -> None:
    optimizer = build("adamw", SHAPES)
    set_row(optimizer, 0, "all")
    drive(optimizer, batches(optimizer, 5))
    masters = [optimizer.state[p]["master"].clone() for p in optimizer.param_groups[0]["params"]]
    states = [optimizer.state_dict()]
    optimizer.eval()
    states.append(optimizer.state_dict())
    with optimizer.true_parameters():
        states.append(optimizer.state_dict())
    for state in states:
        same_bits([state["state"][i]["master"] for i in range(len(masters))], masters)


def test_loading_does_not_alias() -> None:
    """Neither a loaded dict nor a second optimizer shares memory with the first."""
    first, second, third = (build("adamw", SHAPES) for _ in range(3))
    set_row(first, 0, "all")
    grads = batches(first, 9)
    drive(first, grads[:3])
    state = first.state_dict()
    transplant(first, second, state)
    transplant(first, third, state)
    before = frozen(third)
    drive(first, grads[3:6])
    drive(second, grads[6:])
    same_bits(before, frozen(third))


def test_a_saved_dict_stays_as_it_was() -> None:
    """Step counts and tables in a state_dict kept in memory must not move with the run, moments may (as torch's do)."""
    optimizer = build("adamw", SHAPES)
    drive(optimizer, batches(optimizer, 3))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    assign(parameters_of(optimizer), [None] * 4)
    optimizer.step()
    same_bits(kept["state"], state["state"])
    fresh = build("adamw", SHAPES)
    transplant(optimizer, fresh, kept)
    drive(fresh, batches(fresh, 2))
    assert all(float(s["step"]) == 3 for s in kept["state"].values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_state_dtypes_are_kept_on_load(dtype: str) -> None:
    first, second = build("adamw", SHAPES, dtype), build("adamw", SHAPES, dtype)
    set_row(first, 0, "all")
    drive(first, batches(first, 3))
    transplant(first, second, through_a_file(first.state_dict()))
    wide = torch.float64 if dtype == "float64" else torch.float32
    for p in parameters_of(second):
        state = second.state[p]
        assert state["step"].dtype == torch.float32
        assert {state[name].dtype for name in state if name != "step"} == {wide}
    same_bits(frozen(first)["state"], frozen(second)["state"])  # nor were they rounded on the way


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
@pytest.mark.parametrize("row", ["ones", "alternate"])
def test_copies_go_on_as_the_original_and_alone(copier: str, row: str) -> None:
    optimizer = build("adamw", SHAPES)
    set_row(optimizer, 0, row)
    grads = batches(optimizer, 10)
    drive(optimizer, grads[:5])
    twin = copy.deepcopy(optimizer) if copier == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    before = frozen(twin)
    same_bits(frozen(optimizer), before)
    drive(optimizer, grads[5:])
    same_bits(before, frozen(twin))
    drive(twin, grads[5:])
    same_bits(frozen(optimizer), frozen(twin))
    assert not {id(p) for p in parameters_of(optimizer)} & {id(p) for p in parameters_of(twin)}


def test_copy_of_a_fresh_optimizer() -> None:
    optimizer = build("sgd-momentum", SHAPES)
    twin = copy.deepcopy(optimizer)
    grads = batches(optimizer, 3)
    drive(optimizer, grads)
    drive(twin, grads)
    same_bits(frozen(optimizer), frozen(twin))


def test_loading_into_a_running_optimizer() -> None:
    """Rolling back: the state of step 4 replaces that of step 8, tables and masters included."""
    optimizer = build("adamw", SHAPES)
    set_row(optimizer, 0, "chain")
    grads = batches(optimizer, 8)
    drive(optimizer, grads[:4])
    kept, state, params = (
        frozen(optimizer),
        copy.deepcopy(optimizer.state_dict()),
        [p.detach().clone() for p in parameters_of(optimizer)],
    )
    drive(optimizer, grads[4:])
    last = frozen(optimizer)
    for p, old in zip(parameters_of(optimizer), params, strict=True):
        p.data.copy_(old)
    optimizer.load_state_dict(state)
    same_bits(kept, frozen(optimizer))
    drive(optimizer, grads[4:])
    same_bits(last, frozen(optimizer))


def test_a_checkpoint_without_masters_drops_them() -> None:
    plain, modulated = build("adamw", SHAPES), build("adamw", SHAPES)
    set_row(modulated, 0, "chain")
    for optimizer in (plain, modulated):
        drive(optimizer, batches(optimizer, 3))
    transplant(plain, modulated, through_a_file(plain.state_dict()))
    same_bits(frozen(plain), frozen(modulated))
    grads = batches(plain, 2, seed=9)
    for optimizer in (plain, modulated):
        drive(optimizer, grads)
    same_bits(frozen(plain), frozen(modulated))


@pytest.mark.parametrize("steps", [0, 3])
def test_anchors_are_saved(steps: int) -> None:
    """Also before the first step, when a parameter has an anchor and no other state."""
    first = build("adamw", SHAPES, anchor="init")
    set_row(first, 0, "chain")
    grads = batches(first, steps + 4)
    drive(first, grads[:steps])
    second = build("adamw", SHAPES, anchor="init")
    for p in parameters_of(second):
        p.data.fill_(3.0)
    transplant(first, second, through_a_file(first.state_dict()))
    for optimizer in (first, second):
        drive(optimizer, grads[steps:])
    same_bits(frozen(first), frozen(second))


def test_distributed_checkpoint_functions() -> None:
    """get/set_optimizer_state_dict step an empty optimizer with zero gradients first: harmless, the resume bitwise."""
    from torch.distributed.checkpoint import state_dict as dcp

    def fresh() -> tuple[torch.nn.Module, ak.AIMFusedOptimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
        block = {"params": list(model[0].parameters()), "modality": "audio", "depth": 0, "modulated": True}
        return model, ak.AIMFusedOptimizer([block, {"params": list(model[1].parameters())}], backend="cpu", seed=3)

    model, first = fresh()
    before = [p.detach().clone() for p in model.parameters()]
    dcp.get_optimizer_state_dict(model, first)
    same_bits(before, [p.detach() for p in model.parameters()])

    (model, first), (other, second) = fresh(), fresh()
    set_row(first, 0, "alternate")
    grads = batches(first, 8)
    drive(first, grads[:4])
    dcp.set_model_state_dict(other, dcp.get_model_state_dict(model))
    dcp.set_optimizer_state_dict(other, second, dcp.get_optimizer_state_dict(model, first))
    same_bits(frozen(first), frozen(second))
    for optimizer in (first, second):
        drive(optimizer, grads[4:])
    same_bits(frozen(first), frozen(second))


def test_mismatched_groups_are_refused() -> None:
    optimizer, other = build("adamw", SHAPES), build("adamw", SHAPES[:1])
    drive(optimizer, batches(optimizer, 1))
    before = frozen(other)
    with pytest.raises(ValueError, match="group"):
        other.load_state_dict(optimizer.state_dict())
    same_bits(before, frozen(other))


@pytest.mark.parametrize("rule", RULES)
def test_no_state_beyond_the_base_rule_s(rule: str) -> None:
    optimizer = ak.AIMFusedOptimizer([parameter((4,)), parameter((3, 2))], backend="cpu", **RULES[rule])
    if rule == "lion":  # which torch.optim does not have
        drive(optimizer, batches(optimizer, 2))
        assert all(optimizer.state[p].keys() == {"step", "exp_avg"} for p in parameters_of(optimizer))
        return
    make = next(made for made, options in PEERS.values() if options["rule"] == RULES[rule]["rule"])
    known = inspect.signature(make.__init__).parameters
    peer = make(
        [parameter((4,)), parameter((3, 2))], foreach=False, **{k: v for k, v in RULES[rule].items() if k in known}
    )
    for made in (optimizer, peer):
        drive(made, batches(made, 2))
    for p, q in zip(parameters_of(optimizer), parameters_of(peer), strict=True):
        assert {k for k, v in optimizer.state[p].items() if v is not None} - {"step"} == {
            k for k, v in peer.state[q].items() if v is not None
        } - {"step"}


def test_checkpoint_that_lost_the_true_weights_is_refused() -> None:
    optimizer = build("adamw", SHAPES)
    set_row(optimizer, 0, "chain")
    for _ in range(2):
        assign(parameters_of(optimizer), Gradients(parameters_of(optimizer))())
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    lost = [state.pop("master", None) for state in saved["state"].values()]
    assert any(master is not None for master in lost)
    before = frozen(optimizer)
    with pytest.raises(ValueError, match="no master"):
        optimizer.load_state_dict(saved)
    same_bits(frozen(optimizer), before)
