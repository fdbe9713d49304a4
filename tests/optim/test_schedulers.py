"""Every scheduler of torch.optim.lr_scheduler, with learning rates that are numbers and tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Gradients, assign, build, parameter, parameters_of, same_bits, set_row
from lockstep import Twin
from torch.optim import lr_scheduler as s

import aim_kernels as ak

STEPS = 9

MAKERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: s.LambdaLR(o, lambda n: 1 / (n + 1)),
    "MultiplicativeLR": lambda o: s.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: s.StepLR(o, 2),
    "MultiStepLR": lambda o: s.MultiStepLR(o, [1, 4, 5]),
    "ConstantLR": lambda o: s.ConstantLR(o, 0.3, total_iters=4),
    "LinearLR": lambda o: s.LinearLR(o, 0.2, total_iters=6),
    "ExponentialLR": lambda o: s.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: s.PolynomialLR(o, 20, power=2.0),
    "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: s.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: s.CyclicLR(o, 1e-3, 1e-2, step_size_up=2, base_momentum=0.7, max_momentum=0.95),
    "OneCycleLR": lambda o: s.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: s.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: s.SequentialLR(o, [s.ConstantLR(o, 0.1, 3), s.ExponentialLR(o, 0.9)], [3]),
    "ChainedScheduler": lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 3), s.ExponentialLR(o, 0.9)]),
}


def advance(scheduler: Any) -> None:
    """A loss that does not get better, for the scheduler that asks for one."""
    scheduler.step(1.0) if isinstance(scheduler, s.ReduceLROnPlateau) else scheduler.step()


def test_none_is_left_out() -> None:
    assert set(MAKERS) == set(s.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum"])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", MAKERS)
def test_scheduled_steps(name: str, tensor_lr: bool, rule: str) -> None:
    """The rates are those that torch.optim gets, every step is the oracle's at that rate, and the plan stays."""
    optimizer = build(rule, (((4, 4),), ((3,),)), lr=torch.tensor(0.02) if tensor_lr else 0.02)
    peer_class = torch.optim.AdamW if rule == "adamw" else torch.optim.SGD
    options = {"betas": (0.85, 0.98)} if rule == "adamw" else {"momentum": 0.8}
    others = [parameter((2,)) for _ in range(2)]
    assign(others, [torch.zeros(2)] * 2)
    # As many groups, since a tensor is theirs in common: what is multiplied in place is multiplied once a group.
    peer = peer_class([{"params": [q]} for q in others], lr=torch.tensor(0.02) if tensor_lr else 0.02, **options)
    schedulers = MAKERS[name](optimizer), MAKERS[name](peer)
    made = Twin(optimizer, optimizer.param_groups[0]["rule"])
    gradients, rates, plans = Gradients(parameters_of(optimizer)), [], set()
    for number in range(STEPS):
        made.step(gradients())
        peer.step()
        for key in ("lr", "betas", "momentum"):
            for group in optimizer.param_groups:
                if key in peer.param_groups[0]:
                    assert group[key] == peer.param_groups[0][key]
        rates.append(float(optimizer.param_groups[0]["lr"]))
        if number:
            plans.add(id(optimizer._plan))
        for scheduler in schedulers:
            advance(scheduler)
    assert len(set(rates)) > 1, "a schedule that changed nothing tested nothing"
    assert len(plans) == 1, "the plan was built anew for a change of hyperparameters"
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == tensor_lr
    made.finish()


@pytest.mark.parametrize("rule", ["sgd", "rmsprop", "adagrad"])
def test_what_schedulers_look_for_survives_copies_and_new_groups(rule: str) -> None:
    """They take an optimizer whose defaults have betas for one of Adam's kind; groups have them all the same."""
    optimizer = ak.AIMFusedOptimizer([parameter((3,))], rule=rule, betas=(0.5, 0.75))
    names = {"sgd": {"momentum"}, "rmsprop": {"momentum"}, "adagrad": set()}[rule]
    for each in (optimizer, copy.deepcopy(optimizer)):
        each.add_param_group({"params": [parameter((2,))]})
        assert {"betas", "momentum"} & each.defaults.keys() == names
        assert [group["betas"] for group in each.param_groups] == [(0.5, 0.75)] * 2
    if not names:
        with pytest.raises(ValueError, match="momentum"):  # as torch.optim.Adagrad
            s.CyclicLR(optimizer, 1e-3, 1e-2)


def same_weights(one: ak.AIMFusedOptimizer, two: ak.AIMFusedOptimizer) -> None:
    same_bits([p.detach() for p in parameters_of(one)], [p.detach() for p in parameters_of(two)])


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rates_that_are_tensors_are_read_every_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """0-dim or of one element, changed in place; 0.5 and its like are the same number in both types."""
    lr = torch.full(shape, 0.5, dtype=dtype)
    one, two = build(lr=lr), build(lr=0.5)
    for each in (one, two):
        set_row(each, 0, "chain")
    for number in range(4):
        for each in (one, two):
            assign(parameters_of(each), Gradients(parameters_of(each), seed=number)())
            each.step()
        same_weights(one, two)
        lr.mul_(0.5)
        two.param_groups[0]["lr"] *= 0.5


@pytest.mark.parametrize("rate", [torch.zeros(2), torch.tensor(float("nan")), torch.tensor(-1.0)], ids=str)
def test_learning_rate_tensors_that_are_refused(rate: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"lr \(group 0\)"):
        ak.AIMFusedOptimizer([parameter((3,))], lr=rate)
    optimizer = build()
    params = parameters_of(optimizer)
    assign(params, Gradients(params)())
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = rate.clone()
    with pytest.raises(ValueError, match=r"lr \(group 0\)"):
        optimizer.step()
    same_bits(before, [p.detach() for p in params])
