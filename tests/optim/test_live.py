"""Live weights and masters: when they exist, and that train(), eval() and true_parameters() are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import RULES, Gradients, assign, build, frozen, parameters_of, same_bits, set_row
from lockstep import Twin, run_twin

import aim_kernels as ak

LIVE_ROWS = ("chain", "straight-through", "all", "alternate")


def running(
    row: str = "all", steps: int = 5, rule: str = "adamw", dtype: str = "float32", **options: Any
) -> tuple[Any, ...]:
    """An optimizer in the middle of a run, and its gradients."""
    optimizer = build(rule, (((5, 7), (70,), ()), ((6,),)), dtype, ("contiguous", "transposed"), **options)
    set_row(optimizer, 0, row)
    gradients = Gradients(parameters_of(optimizer))
    for _ in range(steps):
        assign(parameters_of(optimizer), gradients())
        optimizer.step()
    return optimizer, gradients


def advance(optimizer: ak.AIMFusedOptimizer, gradients: Gradients, steps: int = 1) -> None:
    for _ in range(steps):
        assign(parameters_of(optimizer), gradients())
        optimizer.step()


@pytest.mark.parametrize("row", ["ones", "step", "grad", "whole", "noise"])
def test_no_masters_without_live_rows(row: str) -> None:
    optimizer, _ = running(row)
    for p in parameters_of(optimizer):
        assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", LIVE_ROWS)
def test_masters_exist_only_in_groups_with_live_rows(row: str, dtype: str) -> None:
    optimizer, _ = running(row, dtype=dtype)
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            assert ("master" in optimizer.state[p]) == (index == 0)
            if index == 0:
                assert optimizer.state[p]["master"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masters_go_when_the_rows_are_one_again(dtype: str) -> None:
    optimizer, gradients = running("all", dtype=dtype)
    made = Twin(optimizer, "adamw")
    optimizer.set_modulation(0, live_under=1.0, live_well=1.0)
    made.step(gradients())
    for p in parameters_of(optimizer):
        assert "master" not in optimizer.state[p]
    run_twin(made, gradients, 3)
    set_row(optimizer, 0, "chain")
    run_twin(made, gradients, 3)
    assert "master" in optimizer.state[optimizer.param_groups[0]["params"][0]]


def test_masters_go_for_parameters_without_gradients_too() -> None:
    optimizer, gradients = running("all")
    made = Twin(optimizer, "adamw")
    optimizer.set_modulation(0, live_under=1.0, live_well=1.0)
    grads = gradients()
    true = optimizer.state[parameters_of(optimizer)[1]]["master"].clone()
    made.step([grads[0], None, *grads[2:]])
    p = parameters_of(optimizer)[1]
    assert "master" not in optimizer.state[p]
    same_bits(p.detach(), true)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("row", LIVE_ROWS)
@pytest.mark.parametrize("rule", ["adamw", "sgd", "sgd-momentum", "amsgrad", "adagrad", "rmsprop-momentum", "lion"])
def test_eval_and_train_are_exact_and_idempotent(rule: str, row: str, dtype: str) -> None:
    optimizer, _ = running(row, rule=rule, dtype=dtype)
    live = frozen(optimizer)
    params = parameters_of(optimizer)
    masters = [optimizer.state[p].get("master", p).detach().clone() for p in params]
    optimizer.train()
    same_bits(live, frozen(optimizer))
    for _ in range(2):
        optimizer.eval()
        for p, master in zip(params, masters, strict=True):
            same_bits(p.detach(), master.to(p.dtype))
    for _ in range(2):
        optimizer.train()
        same_bits(live, frozen(optimizer))
    with optimizer.true_parameters():
        for p, master in zip(params, masters, strict=True):
            same_bits(p.detach(), master.to(p.dtype))
    same_bits(live, frozen(optimizer))


def test_true_parameters_restores_what_it_found() -> None:
    optimizer, _ = running()
    live = frozen(optimizer)
    optimizer.eval()
    true = [p.detach().clone() for p in parameters_of(optimizer)]
    with optimizer.true_parameters():
        same_bits(true, [p.detach() for p in parameters_of(optimizer)])
    same_bits(true, [p.detach() for p in parameters_of(optimizer)])
    optimizer.train()
    same_bits(live, frozen(optimizer))
    with pytest.raises(ZeroDivisionError), optimizer.true_parameters():
        raise ZeroDivisionError
    same_bits(live, frozen(optimizer))
    with optimizer.true_parameters(), optimizer.true_parameters():
        same_bits(true, [p.detach() for p in parameters_of(optimizer)])
    same_bits(live, frozen(optimizer))


@pytest.mark.parametrize("change", ["grad", "rows", "both"])
def test_train_emits_what_was_there_although_rows_have_changed(change: str) -> None:
    """The module's live weights belong to the emitted coefficients, not to the row of the next step."""
    optimizer, _ = running("all")
    live = [p.detach().clone() for p in parameters_of(optimizer)]
    optimizer.eval()
    if change != "grad":
        optimizer.set_modulation(0, live_well=0.1, live_under=0.6, tau=0.9)
    if change != "rows":
        optimizer.set_strength("audio", 0, 0.9)
    optimizer.train()
    same_bits(live, [p.detach() for p in parameters_of(optimizer)])


def test_evaluating_in_between_does_not_change_the_run() -> None:
    plain, gradients = running("alternate", steps=2)
    visited, _ = running("alternate", steps=2)
    for _ in range(8):
        grads = gradients()
        for optimizer in (plain, visited):
            assign(parameters_of(optimizer), [g.clone() for g in grads])
        visited.eval()
        visited.train()
        with visited.true_parameters():
            pass
        plain.step()
        visited.step()
    same_bits(frozen(plain), frozen(visited))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_changed_under_eval_become_the_masters(dtype: str) -> None:
    optimizer, gradients = running("all", dtype=dtype)
    first, second = parameters_of(optimizer)[:2]
    kept = optimizer.state[second]["master"].clone()
    optimizer.eval()
    with torch.no_grad():
        first.fill_(0.25)
    optimizer.train()
    same_bits(optimizer.state[first]["master"], torch.full_like(optimizer.state[first]["master"], 0.25))
    same_bits(optimizer.state[second]["master"], kept)
    live = {0.25 * c for c in (optimizer.modulation()[0]["live_under"], optimizer.modulation()[0]["live_well"])}
    found = set(first.detach().double().flatten().tolist())
    assert all(min(abs(value - x) for x in live) < 1e-3 for value in found)
    run_twin(Twin(optimizer, "adamw"), gradients, 2)


@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum", "adagrad", "rmsprop-momentum", "lion"])
@pytest.mark.parametrize("row", LIVE_ROWS)
def test_late_gradients(rule: str, row: str) -> None:
    """Parameters that miss gradients, from the first step or later: not stepped, but emitted with the row."""
    optimizer = build(rule, (((5, 7), (70,), (9,)), ((6,), (3,))), layouts=("contiguous", "transposed"))
    set_row(optimizer, 0, row)
    made = Twin(optimizer, RULES[rule]["rule"])
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    for number in range(20):
        grads: list[torch.Tensor | None] = list(gradients())
        if number < 3 or number % 4 == 1:
            grads[1] = None
        if number % 3:
            grads[2] = None
        if number % 2:
            grads[3] = grads[4] = None
        made.step(grads)
    made.finish()
    assert [int(optimizer.state[p]["step"]) for p in params] == [20, 13, 7, 10, 10]


def test_group_without_any_gradient() -> None:
    """Its threshold and statistics stay; its row and its live weights follow the phase."""
    optimizer = build("adamw", (((5, 7),), ((40,),)))
    for group in (0, 1):
        set_row(optimizer, group, "alternate")
    made = Twin(optimizer, "adamw")
    gradients = Gradients(parameters_of(optimizer))
    run_twin(made, gradients, 6)
    kept = optimizer.tables.statistics[1].clone(), optimizer.modulation()[1]["tau"]
    phases = set()
    for _ in range(8):
        made.step([gradients()[0], None])
        phases.add(int(optimizer.tables.control[3]))
        same_bits(optimizer.tables.statistics[1], kept[0])
        assert optimizer.modulation()[1]["tau"] == kept[1]
    assert phases == {0, 1}


def test_no_gradients_at_all_is_no_step() -> None:
    optimizer, _ = running("alternate")
    before = frozen(optimizer)
    assign(parameters_of(optimizer), [None] * len(parameters_of(optimizer)))
    optimizer.step()
    same_bits(before, frozen(optimizer))


def test_step_under_true_parameters_is_refused() -> None:
    optimizer, gradients = running()
    assign(parameters_of(optimizer), gradients())
    with pytest.raises(RuntimeError), optimizer.true_parameters():
        optimizer.step()
    optimizer.step()


def test_eval_without_masters_allows_steps() -> None:
    optimizer, gradients = running("ones")
    before = [p.detach().clone() for p in parameters_of(optimizer)]
    optimizer.eval()
    same_bits(before, [p.detach() for p in parameters_of(optimizer)])
    advance(optimizer, gradients)
    optimizer.train()


def test_version_counters_of_what_eval_and_train_write() -> None:
    optimizer, _ = running()
    p = parameters_of(optimizer)[0]
    for act in (optimizer.eval, optimizer.train):
        version = p._version
        act()
        assert p._version > version


def test_train_is_free_where_live_weights_are_in_place() -> None:
    """Training loops call it before every batch: nothing may be written then."""
    optimizer, gradients = running()
    p = parameters_of(optimizer)[0]
    version = p._version
    optimizer.train()
    assert p._version == version
    advance(optimizer, gradients)
    optimizer.eval()
    assert optimizer.holds_true_weights
    optimizer.train()
    assert not optimizer.holds_true_weights
    version = p._version
    optimizer.train()
    assert p._version == version


def test_strength_set_while_the_module_was_evaluated_without_masters() -> None:
    """Nothing degraded at eval(), then a strength: the next step must not leave eval() believing in true weights."""
    optimizer, gradients = running("ones")
    optimizer.eval()
    optimizer.set_strength("audio", 0, 0.75)
    try:
        advance(optimizer, gradients)
        advance(optimizer, gradients)
    except RuntimeError:
        optimizer.train()
        advance(optimizer, gradients, 2)
    optimizer.eval()
    for p in optimizer.param_groups[0]["params"]:
        same_bits(p.detach(), optimizer.state[p]["master"])
