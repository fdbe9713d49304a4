"""A step inside of ``torch.compile``: the bits of the eager step, one graph, and no new one when numbers change."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from compile_helpers import (
    MUTATED,
    SHAPES,
    Pair,
    compile_step,
    forbid_copies,
    graphs,
    no_recompilation,
)
from helpers import (
    GRADIENT_LAYOUTS,
    PARAMETER_LAYOUTS,
    ROWS,
    RULES,
    Gradients,
    assign,
    build,
    frozen,
    parameters_of,
    same_bits,
    set_row,
)

import aim_kernels as ak
from aim_kernels.optim import torch_compile

pytestmark = pytest.mark.usefixtures("own_graphs")

# -- the same bits, the same graph -------------------------------------------------------------------------------------

CASES = [
    *((rule, "all", "aot_eager") for rule in RULES),
    *(("adamw", row, "eager") for row in ROWS if row != "all"),
    ("adamw", "all", "inductor"),
    ("sgd-nesterov", "alternate", "inductor"),
]


@pytest.mark.parametrize(("rule", "row", "backend"), CASES)
def test_equals_the_eager_step_and_compiles_once(rule: str, row: str, backend: str) -> None:
    pair = Pair(lambda: build(rule, SHAPES), backend)
    pair.step()
    with no_recompilation():
        for number in range(5):
            if number == 1:  # masters appear
                pair.each(lambda o: set_row(o, 0, row))
            if number == 3:
                pair.each(lambda o: o.set_strength("audio", 1, 0.25))
            for group in (g for o in pair.optimizers for g in o.param_groups):
                group["lr"] *= 0.9
                group["weight_decay"] *= 1.1
                group["betas"] = (0.8 + 0.01 * number, 0.97)
                group["eps"] = 1e-3 * number
                group["under_optimized"] = ("fraction", 0.3 + 0.1 * number)
            pair.step()
    assert graphs() == 1


@pytest.mark.parametrize(
    ("dtype", "backend"), [("bfloat16", "inductor"), ("float16", "aot_eager"), ("float64", "eager")]
)
def test_layouts_types_and_anchors(dtype: str, backend: str) -> None:
    shapes = (((5, 7), (4, 6), (2, 3, 4, 4), (5, 3), (6, 2)), ((9, 2), (2, 2, 3, 3)))
    pair = Pair(lambda: build("adamw", shapes, dtype, PARAMETER_LAYOUTS, anchor="init"), backend)
    pair.gradients.layouts = GRADIENT_LAYOUTS
    pair.each(lambda o: set_row(o, 1, "chain"))
    pair.step()
    pair.each(lambda o: set_row(o, 0, "all"))
    with no_recompilation():
        for _ in range(3):
            pair.step()


@pytest.mark.slow
def test_inductor_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_copies(monkeypatch)
    pair = Pair(lambda: build("adamw", SHAPES), "inductor")
    for number in range(3):
        pair.each(lambda o, n=number: o.set_strength("audio", 0, 0.2 * n))
        pair.step()


def test_masters_come_and_go_in_one_graph() -> None:
    # bfloat16: a parameter whose master stayed too long would have other bits.
    pair = Pair(lambda: build("adamw", SHAPES, "bfloat16"), "aot_eager")
    pair.step()
    with no_recompilation():
        for strengths in ((0.3, 0), (0.3, 0.5), (0, 0.5), (0, 0), (0, 0), (0.9, 0.1), (0, 0)):
            pair.each(lambda o, s=strengths: [o.set_strength("audio", depth, k) for depth, k in enumerate(s)])
            pair.step()
    assert not any("master" in state for state in pair.optimizers[1].state.values())


@pytest.mark.slow
def test_gradients_come_and_go() -> None:
    pair = Pair(lambda: build("adamw", SHAPES), "aot_eager")
    pair.step(without=(0, 4))
    pair.step(without=(1,))
    pair.step()
    pair.each(lambda o: set_row(o, 0, "all"))
    for _ in range(2):
        pair.step(without=(0,))
        pair.step(without=(1,))
    seen = graphs()
    with no_recompilation():
        for number in range(4):
            pair.each(lambda o, n=number: o.set_strength("audio", 0, (0.5, 0.0, 0.25, 0.75)[n]))
            pair.step(without=(number % 2,))
    assert graphs() == seen


def test_a_parameter_that_is_only_emitted_is_written() -> None:
    pair = Pair(lambda: build("adamw", SHAPES), "inductor")
    pair.step()
    pair.each(lambda o: set_row(o, 0, "straight-through"))
    pair.step()
    p = pair.params[1][1]
    before, version = p.detach().clone(), p._version
    pair.each(lambda o: o.set_strength("audio", 0, 0.9))
    pair.step(without=(1,))
    assert not torch.equal(before, p) and p._version > version


def test_a_graph_sees_what_was_only_emitted() -> None:
    def around(optimizer: ak.AIMFusedOptimizer) -> Callable[[], Any]:
        p = parameters_of(optimizer)[1]

        def step() -> Any:
            with torch.no_grad():
                before = p * 2
                p.mul_(1.0)
            optimizer.step()
            return before, p.detach() * 2

        return step

    pair = Pair(lambda: build("adamw", SHAPES), "aot_eager", around)
    pair.step()
    for strength in (0.5, 0.9):
        pair.each(lambda o, k=strength: o.set_strength("audio", 0, k))
        pair.step(without=(1,))


def test_no_gradient_no_step() -> None:
    optimizer = build("adamw", SHAPES)
    before = frozen(optimizer)
    compile_step(optimizer, "aot_eager")()
    same_bits(before, frozen(optimizer))


# -- learning rates ----------------------------------------------------------------------------------------------------

S = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: S.LambdaLR(o, lambda n: 0.9**n),
    "cosine": lambda o: S.CosineAnnealingLR(o, 5),
    "one-cycle": lambda o: S.OneCycleLR(o, 0.1, total_steps=20),  # moves the betas as well
    "cyclic": lambda o: S.CyclicLR(o, 1e-3, 1e-1, 3, cycle_momentum=False),
    "sequential": lambda o: S.SequentialLR(o, [S.LinearLR(o), S.ExponentialLR(o, 0.9)], [3]),
    "plateau": lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=0),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tensor: bool) -> None:
    pair = Pair(lambda: build("adamw", SHAPES, lr=torch.tensor(1e-2) if tensor else 1e-2), "eager")
    pair.step()  # a scheduler that comes later must not cost a graph either
    schedulers = [SCHEDULERS[name](o) for o in pair.optimizers]
    rates = set()
    with no_recompilation(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            pair.step()
            for scheduler in schedulers:
                scheduler.step(*(1.0,) * (name == "plateau"))
            rates.add(float(pair.optimizers[1].param_groups[0]["lr"]))
    assert len(rates) > 2


def test_a_scheduler_still_warns_of_the_wrong_order() -> None:
    optimizer = build("adamw", SHAPES)
    scheduler = S.ExponentialLR(optimizer, 0.9)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_learning_rate_that_the_graph_changes_counts_at_once(backend: str) -> None:
    def around(optimizer: ak.AIMFusedOptimizer) -> Callable[[], None]:
        def step() -> None:
            optimizer.rate.mul_(0.5)
            optimizer.step()

        return step

    def make() -> ak.AIMFusedOptimizer:
        rate = torch.tensor(1e-1)
        optimizer = build("adamw", SHAPES, lr=rate)
        optimizer.rate = rate
        return optimizer

    pair = Pair(make, backend, around)
    for _ in range(3):
        pair.step()


def test_a_learning_rate_replaced_by_another_tensor() -> None:
    pair = Pair(lambda: build("adamw", SHAPES, lr=torch.tensor(1e-2)), "aot_eager")
    pair.step()
    with no_recompilation():
        for lr in (torch.tensor(3e-2), torch.tensor(5e-2), 7e-2):
            pair.each(lambda o, value=lr: [g.update(lr=value) for g in o.param_groups])
            pair.step()


# -- the operator ------------------------------------------------------------------------------------------------------


def stepped(row: str = "all") -> tuple[ak.AIMFusedOptimizer, tuple[Any, ...]]:
    """An optimizer after two compiled steps, and arguments of the operator for a third."""
    optimizer = build("adamw", (((5, 7), (33,)), ((4, 3),)))
    set_row(optimizer, 0, row)
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    step = compile_step(optimizer, "eager")
    for _ in range(2):
        assign(params, gradients())
        step()
    assign(params, gradients())
    i = optimizer._inputs
    grads, plain = [p.grad for p in params], [p.detach() for p in params]
    tables = (i.rows, i.statistics, i.control)
    return optimizer, (i.number, "sss", plain, grads, i.states, i.masters, *tables, i.anchors, i.lrs, None, None)


@pytest.mark.parametrize("row", ["ones", "all", "alternate"])
def test_opcheck(row: str) -> None:
    optimizer, args = stepped(row)
    before = frozen(optimizer)
    found = torch.library.opcheck(torch.ops.aim_kernels.step.default, args)
    assert set(found.values()) == {"SUCCESS"}
    same_bits(before, frozen(optimizer))


@pytest.mark.parametrize("argument", MUTATED)
def test_opcheck_would_miss_a_declaration(argument: str) -> None:
    _, args = stepped()
    schema = re.sub(rf"Tensor\(\w!\)(\[\])? {argument}\b", rf"Tensor\1 {argument}", torch_compile._SCHEMA)
    assert schema != torch_compile._SCHEMA
    name = f"aim_kernels_test::without_{argument}"
    with torch.library._scoped_library("aim_kernels_test", "FRAGMENT") as library:
        torch.library.define(name, schema, lib=library)
        torch.library.impl(name, "CompositeExplicitAutograd", torch_compile._step, lib=library)
        operator = getattr(torch.ops.aim_kernels_test, f"without_{argument}").default
        with pytest.raises(Exception, match=f"{argument} is not defined as mutable"):
            torch.library.opcheck(operator, args, test_utils="test_schema")


def test_writes_its_arguments_and_nothing_else() -> None:
    optimizer, args = stepped()
    twin = copy.deepcopy(optimizer)
    assign(parameters_of(twin), [p.grad.clone() for p in parameters_of(optimizer)])
    before = frozen(optimizer)
    handed = [[t.clone() for t in a] if isinstance(a, list) else a.clone() for a in args[2:9]]
    with torch.no_grad():
        torch.ops.aim_kernels.step(*args[:2], *handed, *args[9:])
    same_bits(before, frozen(optimizer))
    for own, copied in zip(args[2:9], handed, strict=True):
        for to, value in zip(own, copied, strict=True) if isinstance(own, list) else ((own, copied),):
            to.copy_(value)
    twin.step()
    same_bits(frozen(twin), frozen(optimizer))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_version_counters(backend: str) -> None:
    optimizer = build("adamw", SHAPES)
    set_row(optimizer, 0, "all")
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    step = compile_step(optimizer, backend)
    for _ in range(2):
        assign(params, gradients())
        step()
    tensors = [*params, *(t for p in params for t in optimizer.state[p].values())]
    versions = [t._version for t in tensors]
    weight = params[0]
    loss = (torch.randn(2, 5, requires_grad=True) @ weight @ weight.detach().t()).square().sum()
    assign(params, gradients())
    step()
    assert all(t._version > old for t, old in zip(tensors, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_untouched_parameter_keeps_its_version() -> None:
    pair = Pair(lambda: build("adamw", SHAPES), "inductor")
    pair.step(without=(1,))
    version = pair.params[1][1]._version
    pair.step(without=(1,))
    assert pair.params[1][1]._version == version
