"""Saving, loading, resuming, copying: bit for bit, and to and from torch.optim."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    RULES,
    Gradients,
    Twin,
    assign,
    build,
    frozen,
    parameter,
    parameters_of,
    run_twin,
    same_bits,
    set_row,
)

import aim_kernels as ak

SHAPES = (((5, 7), (33,), ()), ((6, 2),))
PEERS = {
    "adamw": (torch.optim.AdamW, {"rule": "adamw", "lr": 0.01, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"rule": "adam", "lr": 0.01, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"rule": "sgd", "lr": 0.01, "weight_decay": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"rule": "sgd", "lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}),
    "adamw-amsgrad": (
        torch.optim.AdamW,
        {"rule": "adamw", "lr": 0.01, "betas": (0.9, 0.7), "weight_decay": 0.1, "amsgrad": True},
    ),
    "adam-amsgrad": (torch.optim.Adam, {"rule": "adam", "lr": 0.01, "betas": (0.9, 0.7), "amsgrad": True}),
    "adagrad": (
        torch.optim.Adagrad,
        {"rule": "adagrad", "lr": 0.01, "weight_decay": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
    "rmsprop": (torch.optim.RMSprop, {"rule": "rmsprop", "lr": 0.01, "weight_decay": 0.1, "alpha": 0.9}),
    "rmsprop-both": (
        torch.optim.RMSprop,
        {"rule": "rmsprop", "lr": 0.01, "weight_decay": 0.1, "alpha": 0.8, "centered": True, "momentum": 0.9},
    ),
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def drive(optimizer: torch.optim.Optimizer, batches: list[list[torch.Tensor]]) -> None:
    for grads in batches:
        assign(parameters_of(optimizer), [g.clone() for g in grads])
        optimizer.step()


def batches(optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> list[list[torch.Tensor]]:
    gradients = Gradients(parameters_of(optimizer), seed)
    return [gradients() for _ in range(steps)]


def transplant(source: ak.AIMFusedOptimizer, target: ak.AIMFusedOptimizer, state: dict[str, Any]) -> None:
    """A new process: parameters from the model's checkpoint (live weights), everything else from the optimizer's."""
    for old, new in zip(parameters_of(source), parameters_of(target), strict=True):
        new.data.copy_(old.detach())
    target.load_state_dict(state)


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


@pytest.mark.parametrize("peer", PEERS)
def test_checkpoints_of_torch_load_here_and_back(peer: str) -> None:
    """Three legs (torch, here, torch), and the same without a change of horses: equal to float64 rounding."""
    make, options = PEERS[peer]
    torch_options = {k: v for k, v in options.items() if k != "rule"}

    def params() -> list[torch.Tensor]:
        return [parameter(shape, "float64", seed=i) for i, shape in enumerate(((4, 3), (7,), ()))]

    straight = make(params(), foreach=False, **torch_options)
    grads = batches(straight, 12)
    drive(straight, grads)

    one = make(params(), foreach=False, **torch_options)
    drive(one, grads[:4])
    two = ak.AIMFusedOptimizer(
        [p.detach().clone().requires_grad_() for p in parameters_of(one)], backend="cpu", **options
    )
    two.load_state_dict(through_a_file(one.state_dict()))
    drive(two, grads[4:8])
    three = make([p.detach().clone().requires_grad_() for p in parameters_of(two)], foreach=False, **torch_options)
    three.load_state_dict(through_a_file(two.state_dict()))
    drive(three, grads[8:])
    for p, q in zip(parameters_of(straight), parameters_of(three), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd", "adagrad", "rmsprop", "lion"])
@pytest.mark.parametrize("source", [*PEERS, "lion"])
def test_checkpoints_of_another_rule_are_refused(source: str, rule: str) -> None:
    """torch.optim's, which do not say what they are of, and ours."""
    made: list[torch.optim.Optimizer] = []
    if source == "lion":
        made.append(ak.AIMFusedOptimizer([parameter((4,)), parameter((3, 2))], backend="cpu", rule="lion"))
    else:
        make, options = PEERS[source]
        made.append(ak.AIMFusedOptimizer([parameter((4,)), parameter((3, 2))], backend="cpu", **options))
        options = {k: v for k, v in options.items() if k != "rule"}
        made.append(make([parameter((4,)), parameter((3, 2))], foreach=False, **options))
    target = ak.AIMFusedOptimizer([parameter((4,)), parameter((3, 2))], backend="cpu", rule=rule)
    drive(target, batches(target, 2, seed=7))
    for optimizer in made:
        drive(optimizer, batches(optimizer, 2))
        before, groups = frozen(target), copy.deepcopy([{**g, "params": ()} for g in target.param_groups])
        saved = through_a_file(optimizer.state_dict())
        if source.split("-")[0] == rule:
            target.load_state_dict(saved)
            continue
        with pytest.raises(ValueError, match=r"group 0.*another rule|group 0.*checkpoint is of"):
            target.load_state_dict(saved)
        same_bits(before, frozen(target))
        assert groups == [{**g, "params": ()} for g in target.param_groups]


@pytest.mark.parametrize("saver", ["torch", "here"])
@pytest.mark.parametrize(
    ("rule", "switch"), [("adamw", "amsgrad"), ("adam", "amsgrad"), ("rmsprop", "centered"), ("rmsprop", "momentum")]
)
@pytest.mark.parametrize("saved_on", [True, False])
def test_variants_come_with_the_checkpoint(rule: str, switch: str, saved_on: bool, saver: str) -> None:
    """As in torch.optim: the options of the saved groups replace today's, those that choose a variant included."""
    on = {"amsgrad": True, "centered": True, "momentum": 0.8}[switch]
    options = {"lr": 0.01, "weight_decay": 0.1} | ({"betas": (0.9, 0.7)} if rule != "rmsprop" else {"alpha": 0.8})
    make = PEERS[rule][0]

    def params() -> list[torch.Tensor]:
        return [parameter(shape, "float64", seed=i) for i, shape in enumerate(((4, 3), (7,), ()))]

    theirs = options | ({switch: on} if saved_on else {})
    peer, source = (make(params(), foreach=False, **theirs) for _ in range(2))
    if saver == "here":
        source = ak.AIMFusedOptimizer(params(), backend="cpu", rule=rule, **theirs)
    grads = batches(peer, 8)
    drive(peer, grads)
    drive(source, grads[:4])
    target = ak.AIMFusedOptimizer(
        [p.detach().clone().requires_grad_() for p in parameters_of(source)],
        backend="cpu",
        rule=rule,
        **(options if saved_on else options | {switch: on}),
    )
    target.load_state_dict(through_a_file(source.state_dict()))
    assert bool(target.param_groups[0][switch]) is saved_on
    drive(target, grads[4:])
    for p, q in zip(parameters_of(peer), parameters_of(target), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
        assert peer.state[p].keys() == target.state[q].keys()


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        *(("amsgrad", "max_exp_avg_sq"), ("adagrad", "sum"), ("rmsprop", "square_avg"), ("lion", "exp_avg")),
        *(("rmsprop-momentum", name) for name in ("square_avg", "grad_avg", "momentum_buffer")),
    ],
)
def test_checkpoint_that_lost_a_moment_is_refused(rule: str, name: str) -> None:
    optimizer, target = build(rule, SHAPES), build(rule, SHAPES)
    drive(optimizer, batches(optimizer, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1][name]
    before = frozen(target)
    with pytest.raises(ValueError, match=f"parameter 1 of group 0.*{name}"):
        target.load_state_dict(saved)
    same_bits(before, frozen(target))


def test_torch_s_adagrad_before_its_first_step() -> None:
    """It has its sums from the beginning, and a step count of zero."""
    make, options = PEERS["adagrad"]
    options = {k: v for k, v in options.items() if k != "rule"}
    source = make([parameter((4, 3), "float64")], foreach=False, **options)
    target = ak.AIMFusedOptimizer([parameter((4, 3), "float64")], backend="cpu", rule="adagrad")
    target.load_state_dict(through_a_file(source.state_dict()))
    (p,) = parameters_of(target)
    same_bits(target.state[p]["sum"], torch.full((4, 3), 0.2, dtype=torch.float64))
    grads = batches(source, 3)
    for optimizer in (source, target):
        drive(optimizer, grads)
    torch.testing.assert_close(p, parameters_of(source)[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_reference_learning_rate_is_saved(rule: str) -> None:
    """In the middle of a schedule the learning rate is another than the one that the decay is relative to."""
    options = {"decouple_lr": True, "weight_decay": 0.05}
    through, first, second = (build(rule, SHAPES, **options, lr=lr) for lr in (0.04, 0.04, 0.5))
    grads = batches(through, 6)
    for optimizer, count in ((through, 6), (first, 3)):
        for number in range(count):
            for group in optimizer.param_groups:
                group["lr"] = 0.04 * 0.5**number
            drive(optimizer, grads[number : number + 1])
    transplant(first, second, through_a_file(first.state_dict()))
    assert [group["reference_lr"] for group in second.param_groups] == [0.04, 0.04]
    for number in range(3, 6):
        for group in second.param_groups:
            group["lr"] = 0.04 * 0.5**number
        drive(second, grads[number : number + 1])
    same_bits(frozen(through), frozen(second))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_amsgrad_switched_on_in_a_run(backend: str) -> None:
    """The maximum starts with the next second moment; torch.optim misses its state and raises KeyError."""
    optimizer = build("adamw", SHAPES, backend=backend)
    set_row(optimizer, 0, "all")
    drive(optimizer, batches(optimizer, 3))
    for group in optimizer.param_groups:
        group["amsgrad"] = True
    run_twin(Twin(optimizer, "adamw"), Gradients(parameters_of(optimizer), seed=8), 4)
    assert all("max_exp_avg_sq" in optimizer.state[p] for p in parameters_of(optimizer))


def test_hyperparameters_of_a_torch_checkpoint_are_taken() -> None:
    source = torch.optim.AdamW([parameter((3,))], lr=0.5, betas=(0.1, 0.2), eps=0.3, weight_decay=0.4)
    drive(source, batches(source, 1))
    target = ak.AIMFusedOptimizer([parameter((3,))], backend="cpu")
    target.load_state_dict(source.state_dict())
    group = target.param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"]) == (0.5, (0.1, 0.2), 0.3, 0.4)
    run_twin(
        Twin(target, "adamw", under_optimized=("fraction", 0.1), threshold_rate=0.1),
        Gradients(parameters_of(target)),
        3,
    )


@pytest.mark.parametrize("legacy", ["integer", "float", "float64 tensor"])
def test_step_counts_of_other_versions(legacy: str) -> None:
    optimizer, fresh = build("adamw", SHAPES), build("adamw", SHAPES)
    drive(optimizer, batches(optimizer, 3))
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = {"integer": 3, "float": 3.0, "float64 tensor": torch.tensor(3.0, dtype=torch.float64)}[legacy]
    transplant(optimizer, fresh, state)
    grads = batches(optimizer, 2, seed=5)
    drive(optimizer, grads)
    drive(fresh, grads)
    same_bits(frozen(optimizer)["params"], frozen(fresh)["params"])


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
