"""What others do to parameters, states, options and checkpoints between steps is noticed or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import frozen, same_bits

import aim_kernels as ak


def stepped(rule: str = "adamw", **options: Any) -> tuple[torch.nn.Parameter, ak.AIMFusedOptimizer]:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 8))
    groups = [{"params": [p], "modality": "a", "depth": 0, "modulated": options.pop("modulated", True)}]
    optimizer = ak.AIMFusedOptimizer(groups, lr=0.1, rule=rule, backend="cpu", **options)
    step(p, optimizer)
    return p, optimizer


def step(p: torch.nn.Parameter, optimizer: ak.AIMFusedOptimizer) -> None:
    p.grad = torch.linspace(1, 2, p.numel())
    optimizer.step()


def test_state_that_no_longer_fits_its_parameter_is_refused() -> None:
    p, optimizer = stepped()
    p.data = torch.zeros(64)
    p.grad = torch.ones(64)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*exp_avg.*\(8,\).*\(64,\)"):
        optimizer.step()
    assert not p.any()


@pytest.mark.parametrize("count", [torch.tensor(1, dtype=torch.int64), torch.tensor(1.0, dtype=torch.float64)])
def test_step_count_of_another_type_is_read_as_a_number(count: torch.Tensor) -> None:
    p, optimizer = stepped()
    q, other = stepped()
    optimizer.state[p]["step"] = count
    step(p, optimizer)
    step(q, other)
    same_bits(frozen(optimizer), frozen(other))


def test_state_given_other_memory_is_noticed() -> None:
    p, optimizer = stepped()
    q, other = stepped()
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][name].data = optimizer.state[p][name].clone()
    step(p, optimizer)
    step(q, other)
    same_bits(frozen(optimizer), frozen(other))


def test_live_weights_never_pass_for_true_ones() -> None:
    p, optimizer = stepped()
    optimizer.eval()
    step(p, optimizer)  # no live weights anywhere: the same thing
    optimizer.set_strength("a", 0, 0.5)
    with pytest.raises(RuntimeError, match=r"optimizer.train\(\)"):
        step(p, optimizer)
    optimizer.train()
    for _ in range(12):
        step(p, optimizer)
    live = p.detach().clone()
    with optimizer.true_parameters():
        assert torch.equal(p, optimizer.state[p]["master"])
        assert not torch.equal(p, live)


@pytest.mark.parametrize("write", ["in place", "through data", "by replacing data"])
def test_true_weights_that_were_edited_are_kept(write: str) -> None:
    p, optimizer = stepped()
    optimizer.set_strength("a", 0, 0.5)
    step(p, optimizer)
    optimizer.eval()
    with torch.no_grad():
        if write == "in place":
            p.fill_(3.0)
        elif write == "through data":
            p.data.fill_(3.0)
        else:
            p.data = torch.full((8,), 3.0)
    optimizer.train()
    assert (optimizer.state[p]["master"] == 3.0).all()


@pytest.mark.parametrize("how", ["replaced", "appended", "in other groups"])
def test_parameters_edited_in_a_group_are_stepped(how: str) -> None:
    _, optimizer = stepped()
    q = torch.nn.Parameter(torch.ones(5))
    q.grad = torch.ones(5)
    if how == "replaced":
        optimizer.param_groups[0]["params"][0] = q
    elif how == "in other groups":
        optimizer.param_groups = [{**optimizer.param_groups[0], "params": [q]}]
    else:
        optimizer.param_groups[0]["params"].append(q)
    optimizer.step()
    assert (q != 1.0).all()


def test_states_moved_to_another_mapping_are_used() -> None:
    p, optimizer = stepped()
    q, other = stepped()
    optimizer.state = copy.copy(optimizer.state)
    optimizer.state[p] = {name: value.clone() for name, value in optimizer.state[p].items()}
    step(p, optimizer)
    step(q, other)
    same_bits(frozen(optimizer), frozen(other))


@pytest.mark.parametrize(
    ("source", "rule"),
    [("RMSprop", "sgd"), ("Adagrad", "sgd"), ("Adamax", "adamw"), ("NAdam", "adamw"), ("SGD", "adam")],
)
def test_checkpoints_of_other_rules_are_refused(source: str, rule: str) -> None:
    p, optimizer = stepped(rule)
    q = torch.nn.Parameter(torch.zeros(8))
    q.grad = torch.ones(8)
    other = getattr(torch.optim, source)([q], lr=0.1)
    other.step()
    before = frozen(optimizer)
    with pytest.raises(ValueError, match="group 0"):
        optimizer.load_state_dict(other.state_dict())
    same_bits(frozen(optimizer), before)
    assert p in optimizer.state


@pytest.mark.parametrize(("key", "columns"), [("modulation_row", 18), ("statistics_row", 8), ("control", 2)])
def test_tables_of_another_version_are_refused_whole(key: str, columns: int) -> None:
    _, optimizer = stepped()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["modulation_row"][0] = 7.0
    saved["param_groups"][1][key] = [1] * columns
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=f"group 1.*{key}.*{columns} columns"):
        optimizer.load_state_dict(saved)
    same_bits(frozen(optimizer), before)


@pytest.mark.parametrize("modulated", [False, True])
def test_momentum_turned_on_makes_its_buffer(modulated: bool) -> None:
    p, optimizer = stepped("sgd", modulated=modulated)
    optimizer.param_groups[0]["momentum"] = 0.9
    step(p, optimizer)
    assert "momentum_buffer" in optimizer.state[p]


@pytest.mark.parametrize(
    ("option", "value"), [("under_optimized", ("typo", 0.1)), ("betas", (1.0, 1.0)), ("eps", -1.0)]
)
def test_options_spoiled_between_steps_are_refused(option: str, value: Any) -> None:
    p, optimizer = stepped()
    optimizer.param_groups[0][option] = value
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=rf"{option}.*group 0"):
        step(p, optimizer)
    same_bits(frozen(optimizer), before)


def test_parameters_without_an_order_or_a_tensor_are_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="order"):
        ak.AIMFusedOptimizer({p})
    with pytest.raises(TypeError, match="parameter 1 of group 0"):
        ak.AIMFusedOptimizer([("w", p), 5])


def test_norm_of_gradients_whose_squares_underflow() -> None:
    p = torch.nn.Parameter(torch.zeros(100))
    p.grad = torch.full((100,), 1e-24)
    optimizer = ak.AIMFusedOptimizer([p], backend="cpu")
    optimizer.step()
    assert optimizer.statistics()[0]["grad_norm"] == pytest.approx(1e-23, rel=1e-5)
