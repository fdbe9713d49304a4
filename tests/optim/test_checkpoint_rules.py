"""Checkpoints of torch.optim, of other rules, variants and versions."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoint_helpers import PEERS, SHAPES, batches, drive, through_a_file, transplant
from helpers import Gradients, build, frozen, parameter, parameters_of, same_bits, set_row
from lockstep import Twin, run_twin

import aim_kernels as ak


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
