"""Trajectories against the float64 oracle: every rule, row and storage type, in lock step and free-running."""

from __future__ import annotations

from typing import Any

import pytest
import tolerances as tol
import torch
from helpers import DTYPES, ROWS, RULES, Gradients, assign, build, frozen, parameter, parameters_of, same_bits, set_row
from lockstep import Twin, run_twin

SHAPES = (((5, 7), (33,), (0,), ()), ((3, 4, 2), (16,)))
LAYOUTS = ("contiguous", "transposed", "offset")
STEPS = 20
#: Rows that `make test` has with every storage type; the others are float32's there.
EVERY_DAY = ("all", "alternate", "noise")
SPLITTING = ("chain", "straight-through", "step", "grad", "all", "alternate")


def twin(rule: str, row: str, dtype: str, free: bool, backend: str = "cpu") -> Twin:
    """Two groups: one with the row, one plain; steps and compares."""
    optimizer = build(rule, SHAPES, dtype, LAYOUTS, backend=backend)
    set_row(optimizer, 0, row)
    made = Twin(optimizer, RULES[rule]["rule"], free=free)
    run_twin(made, Gradients(parameters_of(optimizer), layouts=("contiguous", "sliced")), STEPS)
    assert min(made.masks.values()) > 50, "one class only: nothing was tested"
    return made


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, marks=[] if dtype == "float32" or row in EVERY_DAY else [pytest.mark.slow])
        for row in ROWS
        for dtype in DTYPES
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_lock_step(rule: str, row: str, dtype: str) -> None:
    twin(rule, row, dtype, free=False)


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[] if row in EVERY_DAY else [pytest.mark.slow]) for row in ROWS]
)
@pytest.mark.parametrize("rule", RULES)
def test_free_running(rule: str, row: str) -> None:
    twin(rule, row, "float32", free=True)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum", "adagrad", "rmsprop-momentum", "lion"])
def test_free_running_other_dtypes(rule: str, dtype: str) -> None:
    twin(rule, "all", dtype, free=True)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    "rule", ["adamw", "adam-maximize", "sgd", "sgd-nesterov", "adagrad", "rmsprop-momentum", "lion"]
)
def test_reference_backend(rule: str, row: str) -> None:
    twin(rule, row, "float32", free=False, backend="reference")


@pytest.mark.parametrize("rule", ["amsgrad", "rmsprop", "rmsprop-centered", "adamw-decoupled-lr"])
def test_reference_backend_other_rules(rule: str) -> None:
    twin(rule, "all", "float32", free=False, backend="reference")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", ["adamw", "rmsprop-momentum", "lion"])
def test_reference_backend_other_dtypes(rule: str, dtype: str) -> None:
    twin(rule, "all", dtype, free=False, backend="reference")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("row", ["all", "alternate"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("adam", {"amsgrad": True, "maximize": True}),
        ("adagrad", {"maximize": True, "lr_decay": 0.0, "initial_accumulator_value": 0.0}),
        # Three moments, none of them shared.
        ("rmsprop", {"momentum": 0.8}),
        ("rmsprop", {"alpha": 0.0}),
        ("lion", {"maximize": True, "decouple_lr": True, "weight_decay": 0.02}),
        ("lion", {"betas": (0.0, 0.9)}),
    ],
    ids=str,
)
def test_other_variants(rule: str, options: dict[str, Any], row: str, dtype: str) -> None:
    optimizer = build(rule, SHAPES, dtype, LAYOUTS, **options)
    set_row(optimizer, 0, row)
    run_twin(Twin(optimizer, RULES[rule]["rule"]), Gradients(parameters_of(optimizer)), 8)


#: Rules that need one moment or none; the groups of others have classes though they are not modulated.
ONE_MOMENT = {
    "sgd": set(),
    "sgd-momentum": {"momentum_buffer"},
    "sgd-nesterov": {"momentum_buffer"},
    "adagrad": {"sum"},
    "rmsprop": {"square_avg"},
    "lion": {"exp_avg"},
}
BOTH_MOMENTS = {
    "adam": {"exp_avg", "exp_avg_sq"},
    "amsgrad": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "rmsprop-centered": {"square_avg", "grad_avg"},
    "rmsprop-momentum": {"square_avg", "grad_avg", "momentum_buffer"},
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("row", ["ones", "whole", "noise"])
@pytest.mark.parametrize("rule", [*ONE_MOMENT, *BOTH_MOMENTS])
def test_groups_that_are_not_modulated(rule: str, row: str, backend: str) -> None:
    optimizer = build(rule, SHAPES, modulated=False, backend=backend)
    set_row(optimizer, 0, row)
    run_twin(Twin(optimizer, RULES[rule]["rule"]), Gradients(parameters_of(optimizer)), 6)
    assert (torch.isnan(optimizer.tables.statistics[:, 1]) == (rule in ONE_MOMENT)).all()
    for p in parameters_of(optimizer):
        assert optimizer.state[p].keys() == {"step"} | (ONE_MOMENT | BOTH_MOMENTS)[rule]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rmsprop_s_momentum_without_modulation(backend: str) -> None:
    optimizer = build("rmsprop", SHAPES, modulated=False, backend=backend, momentum=0.8)
    set_row(optimizer, 0, "noise")
    run_twin(Twin(optimizer, "rmsprop"), Gradients(parameters_of(optimizer)), 6)
    for p in parameters_of(optimizer):
        assert optimizer.state[p].keys() == {"step", "square_avg", "momentum_buffer"}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_lion_and_gradients_that_are_not_finite(backend: str) -> None:
    """The sign of a NaN is a NaN, that of an infinity a sign; zeros stay where they are; others notice nothing."""
    optimizer = build("lion", (((40,),),), modulated=False, weight_decay=0.0, backend=backend)
    (p,) = parameters_of(optimizer)
    made, start = Twin(optimizer, "lion"), p.detach().clone()
    gradients = Gradients([p])
    for number in range(4):
        (grad,) = gradients()
        grad[5] = 0.0
        if number == 1:
            grad[0], grad[1], grad[2] = float("nan"), float("inf"), float("-inf")
        made.step([grad])
        assert optimizer.statistics()[0]["nonfinite"] == (3 if number == 1 else 0)
    assert p.isnan().tolist() == [True] + [False] * 39
    assert p[5] == start[5]
    assert (p[1] < start[1]) and (p[2] > start[2])
    made.finish()


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_decay_that_follows_the_schedule_alone(rule: str) -> None:
    """Twice the learning rate under the same schedule: the same decay (a gradient of zero leaves nothing else)."""
    kept = []
    for lr in (0.01, 0.02):
        optimizer = build(rule, (((5,),),), lr=lr, weight_decay=0.1, decouple_lr=True)
        (p,) = parameters_of(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.5**number)
        made = Twin(optimizer, rule)
        for _ in range(3):
            made.step([torch.zeros(5)])
            schedule.step()
        assert optimizer.param_groups[0]["reference_lr"] == lr
        kept.append(p.detach().clone())
        expected = parameter((5,)).detach() * (1 - 0.1) * (1 - 0.05) * (1 - 0.025)
        # Three products of rounded constants.
        torch.testing.assert_close(p.detach(), expected, rtol=12 * tol.UNIT["float32"], atol=0)
    torch.testing.assert_close(*kept, rtol=12 * tol.UNIT["float32"], atol=0)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "sgd-momentum", "adagrad", "rmsprop", "lion"])
def test_class_masks_show_in_the_weights(rule: str) -> None:
    """A class taken wrongly moves the weights by much more than any tolerance: the masks read back from them agree."""
    optimizer = build(rule, (((300,),),), weight_decay=0.0)
    optimizer.set_modulation(0, live_under=1.0, live_well=0.5)
    made = Twin(optimizer, RULES[rule]["rule"])
    gradients = Gradients(parameters_of(optimizer))
    p = parameters_of(optimizer)[0]
    for _ in range(STEPS):
        made.step(gradients())
        leaf = made.oracle.blocks[0].leaves[0]
        kept = p.detach() == optimizer.state[p]["master"]
        distinct = (optimizer.state[p]["master"] != 0).numpy()
        assert ((kept.numpy() == leaf.under) | ~distinct).all()
        assert optimizer.tables.statistics[0, 1] == int(leaf.under.sum())
    made.finish()


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("row", ["chain", "step", "grad", "all"])
def test_near_ties_follow_the_implementation(row: str, free: bool) -> None:
    """Equal gradients at a threshold of one: every decision is a tie, settled by roundings that no contract fixes."""
    options = {"under_optimized": ("absolute", 1.0), "threshold_rate": 0.3}
    optimizer = build("adam", (((400,),),), weight_decay=0.0, **options)
    set_row(optimizer, 0, row)
    made = Twin(optimizer, "adam", free=free, under_optimized=options["under_optimized"])
    (grad,) = Gradients(parameters_of(optimizer))()
    for _ in range(2 if row == "all" else 4):
        made.step([grad.clone()])
    assert made.oracle.ties > 300
    with pytest.raises(AssertionError, match="near ties"):
        made.finish()


@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_anchor(anchor: str, dtype: str) -> None:
    optimizer = build("adamw", SHAPES, dtype, anchor=anchor)
    anchors = {p: p.detach().clone() for p in parameters_of(optimizer)} if anchor == "init" else None
    set_row(optimizer, 0, "all")
    made = Twin(optimizer, "adamw", anchors=anchors)
    run_twin(made, Gradients(parameters_of(optimizer)), STEPS)


@pytest.mark.parametrize("target", [("fraction", 0.0), ("fraction", 1.0), ("absolute", 0.0), ("absolute", 0.3)])
def test_threshold_controller_at_its_limits(target: tuple[str, float]) -> None:
    """Clipped at 0 and 1 by the controller; held where it is absolute."""
    optimizer = build("adam", (((40,), (9,)),), under_optimized=target, threshold_rate=0.45)
    set_row(optimizer, 0, "straight-through")
    made = Twin(optimizer, "adam", under_optimized=target, threshold_rate=0.45)
    gradients, seen = Gradients(parameters_of(optimizer)), []
    for _ in range(12):
        made.step(gradients())
        seen.append(optimizer.modulation()[0]["tau"])
    if target[0] == "absolute":
        assert set(seen) == {target[1]}
    else:
        assert (max(seen) > 0.5) if target[1] == 0.0 else (set(seen) == {0.0})


def test_rows_changed_between_steps() -> None:
    """A row takes effect in the next step; the free-running oracle is told of the change only."""
    optimizer = build("adamw", SHAPES)
    made = Twin(optimizer, "adamw")
    gradients = Gradients(parameters_of(optimizer))
    for name in ("ones", "chain", "all", "step", "noise", "straight-through"):
        set_row(optimizer, 1, name)
        for _ in range(4):
            made.step(gradients())
    made.finish()


def test_learning_rate_zero_and_zero_gradients_are_harmless() -> None:
    """What frameworks do to create the state of an empty optimizer."""
    optimizer = build("adamw", SHAPES, lr=0.0)
    params = parameters_of(optimizer)
    before = frozen(optimizer)
    assign(params, [torch.zeros_like(p) for p in params])
    optimizer.step()
    after = frozen(optimizer)
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in after["state"])
    assert not any(value.any() for state in after.pop("state") for value in state.values())
    before.pop("state")
    same_bits(before, after)
    made = Twin(optimizer, "adamw")
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    run_twin(made, Gradients(params), 5)
