"""The torch.optim contract, and that a cached plan notices everything that moves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Gradients, assign, build, frozen, parameter, parameters_of, same_bits, set_row
from lockstep import Twin, run_twin

import aim_kernels as ak


def test_is_an_optimizer_with_groups_and_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = ak.AIMFusedOptimizer(model.named_parameters(), backend="cpu")
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert "lr" in repr(optimizer)
    optimizer.zero_grad(set_to_none=False)


def test_training_reduces_a_loss() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = ak.AIMFusedOptimizer(model.parameters(), lr=1e-2)
    x = torch.randn(64, 6)
    y = x[:, :1] * x[:, 1:2]
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_closure_runs_once_with_gradients_enabled() -> None:
    optimizer = build()
    params, calls = parameters_of(optimizer), []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in params), torch.zeros(()))
        loss.backward()
        return loss

    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and loss.item() > 0
    assert not torch.equal(before[0], params[0])
    assert optimizer.step() is None


def test_version_counters_of_parameters_and_states() -> None:
    optimizer = build("adamw", (((4, 3), (5,)),), layouts=("contiguous", "sliced"))
    set_row(optimizer, 0, "all")
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    for _ in range(2):
        assign(params, gradients())
        optimizer.step()
    tensors = [*params, *(t for p in params for t in optimizer.state[p].values())]
    versions = [t._version for t in tensors]
    assign(params, gradients())
    optimizer.step()
    assert all(t._version > old for t, old in zip(tensors, versions, strict=True))


def test_version_counter_of_a_parameter_that_is_only_emitted() -> None:
    optimizer = build("adamw", (((4, 3), (5,)),))
    set_row(optimizer, 0, "all")
    first, second = parameters_of(optimizer)
    gradients = Gradients([first, second])
    for _ in range(2):
        assign([first, second], gradients())
        optimizer.step()
    version = second._version
    assign([first, second], [gradients()[0], None])
    optimizer.step()
    assert second._version > version


def test_backward_over_an_old_graph_is_an_error() -> None:
    p = parameter((4, 4))
    optimizer = ak.AIMFusedOptimizer([p], backend="cpu")
    x = torch.randn(2, 4, requires_grad=True)
    loss = (x @ p @ p).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_step_counts_are_kept_for_each_parameter() -> None:
    optimizer = build("adamw", (((4,), (5,), (6,)),))
    params = parameters_of(optimizer)
    made = Twin(optimizer, "adamw")
    gradients = Gradients(params)
    for number in range(9):
        grads: list[torch.Tensor | None] = list(gradients())
        for index in range(3):
            if number % (index + 1):
                grads[index] = None
        made.step(grads)
    made.finish()
    assert [int(optimizer.state[p]["step"]) for p in params] == [9, 5, 3]
    steps = [optimizer.state[p]["step"] for p in params]
    assert all(s.dtype == torch.float32 and s.dim() == 0 for s in steps)
    assert len({s.data_ptr() for s in steps}) == 3


def replace_data(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    p.data = p.data.clone()


def replace_moment(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()


def replace_second(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].clone()


def replace_step(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    optimizer.state[p]["step"] = optimizer.state[p]["step"].clone()


def replace_master(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    optimizer.state[p]["master"] = optimizer.state[p]["master"].clone()


def change_layout(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    p.data = p.data.t().contiguous().t()


def restride_in_place(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    p.data = p.data.t()


def change_betas(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    optimizer.param_groups[0].update(betas=(0.5, 0.75), eps=1e-3, weight_decay=0.3)


def change_lr(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def change_tables(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    set_row(optimizer, 0, "alternate")


def clear_state(optimizer: ak.AIMFusedOptimizer, p: torch.Tensor) -> None:
    optimizer.set_modulation(0, live_well=1.0, live_under=1.0)
    p.data.copy_(optimizer.state[p]["master"])
    del optimizer.state[p]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "change",
    [
        replace_data,
        replace_moment,
        replace_second,
        replace_step,
        replace_master,
        change_layout,
        restride_in_place,
        change_betas,
        change_lr,
        change_tables,
        clear_state,
    ],
)
def test_whatever_moves_between_steps_is_noticed(change: Callable[..., None], backend: str) -> None:
    """Old tensors are overwritten with NaN by nobody, so a stale pointer shows as an update that went elsewhere."""
    optimizer = build("adamw", (((4, 4), (7,)),), backend=backend)
    set_row(optimizer, 0, "all")
    made = Twin(optimizer, "adamw")
    gradients = Gradients(parameters_of(optimizer))
    run_twin(made, gradients, 3)
    change(optimizer, parameters_of(optimizer)[0])
    run_twin(made, gradients, 3)
    change(optimizer, parameters_of(optimizer)[0]) if change is not clear_state else None
    run_twin(made, gradients, 2)


def test_gradients_accumulated_in_place_and_replaced() -> None:
    optimizer = build("adamw", (((4, 4), (7,)),))
    params = parameters_of(optimizer)
    made = Twin(optimizer, "adamw")
    gradients = Gradients(params)
    held = gradients()
    for number in range(6):
        grads = gradients()
        if number % 2:
            for old, new in zip(held, grads, strict=True):
                old.copy_(new)
            grads = held
        made.step(grads)
    made.finish()


def test_add_param_group_in_mid_run() -> None:
    optimizer = build("adamw", (((4, 4),), ((3,),)))
    set_row(optimizer, 0, "all")
    made = Twin(optimizer, "adamw")
    run_twin(made, Gradients(parameters_of(optimizer)), 4)
    rows = optimizer.tables.rows.clone()
    optimizer.add_param_group(
        {"params": [parameter((6, 2), seed=9)], "modality": "video", "depth": 0, "modulated": True, "lr": 0.5}
    )
    same_bits(rows, optimizer.tables.rows[:2])
    made.reload()
    run_twin(made, Gradients(parameters_of(optimizer)), 4)
    optimizer.set_strength("video", 0, 0.5)
    run_twin(made, Gradients(parameters_of(optimizer)), 4)
    assert "master" in optimizer.state[parameters_of(optimizer)[-1]]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
    ],
    ids=["cosine", "one-cycle", "lambda"],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_and_tensor_learning_rates(make: Callable[..., Any], tensor_lr: bool) -> None:
    optimizer = build("adamw", (((4, 4),), ((3,),)), lr=torch.tensor(0.02) if tensor_lr else 0.02)
    scheduler = make(optimizer)
    made = Twin(optimizer, "adamw")
    gradients, rates = Gradients(parameters_of(optimizer)), set()
    for _ in range(8):
        made.step(gradients())
        rates.add(float(optimizer.param_groups[0]["lr"]))
        scheduler.step()
    assert len(rates) == 8
    made.finish()


def test_grad_scaler_skips_whole_steps() -> None:
    optimizer = build("adamw", (((4, 4), (3,)),))
    set_row(optimizer, 0, "alternate")
    params = parameters_of(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for number in range(4):
        loss = scaler.scale(sum((p.square().sum() for p in params), torch.zeros(())))
        optimizer.zero_grad()
        loss.backward()
        if number == 2:
            params[1].grad[0] = float("inf")
        before = frozen(optimizer)
        scaler.step(optimizer)
        scaler.update()
        after = frozen(optimizer)
        if number == 2:
            same_bits(before, after)
        else:
            assert int(after["control"][1]) == int(before["control"][1]) + 1


def test_hooks_run() -> None:
    optimizer, calls = build(), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    assign(parameters_of(optimizer), Gradients(parameters_of(optimizer))())
    optimizer.step()
    assert calls == ["pre", "post"]


def test_parameters_without_gradients_have_no_state() -> None:
    optimizer = build("adamw", (((4,), (3,)),))
    first, second = parameters_of(optimizer)
    kept = second.detach().clone()
    run_twin(Twin(optimizer, "adamw"), lambda: [Gradients([first])()[0], None], 3)
    assert not optimizer.state.get(second)
    same_bits(kept, second.detach())


def test_frozen_parameters_in_a_group() -> None:
    p, q = parameter((4,)), torch.ones(3)
    optimizer = ak.AIMFusedOptimizer([p, q], backend="cpu")
    p.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(q, torch.ones(3))


def test_groups_step_with_their_own_hyperparameters() -> None:
    params = [parameter((9,), seed=i) for i in range(3)]
    optimizer = ak.AIMFusedOptimizer(
        [
            {"params": params[:1], "lr": 0.1, "betas": (0.5, 0.6)},
            {"params": params[1:2], "weight_decay": 0.9, "maximize": True},
            {"params": params[2:], "eps": 0.5},
        ],
        lr=0.01,
        backend="cpu",
    )
    made = Twin(optimizer, "adamw", under_optimized=("fraction", 0.1), threshold_rate=0.1)
    run_twin(made, Gradients(params), 6)


def test_statistics_report() -> None:
    optimizer = build("adamw", (((30, 3), (9,)), ((5,),)))
    set_row(optimizer, 0, "all")
    made = Twin(optimizer, "adamw")
    gradients = Gradients(parameters_of(optimizer))
    for _ in range(4):
        made.step(gradients())
        for index, report in enumerate(optimizer.statistics()):
            sums = made.oracle.blocks[index].sums
            assert (report["modality"], report["depth"], report["numel"]) == ("audio", index, sums["numel"])
            assert report["under_fraction"] == sums["under"] / sums["numel"]
            assert report["threshold"] == optimizer.modulation()[index]["tau"]
            assert report["nonfinite"] == 0
            for name, column in (("grad_norm", "grad_sq"), ("update_norm", "update_sq"), ("param_norm", "param_sq")):
                assert report[name] == pytest.approx(sums[column] ** 0.5, rel=1e-4)


def test_the_optimizer_can_be_collected() -> None:
    optimizer = build()
    assign(parameters_of(optimizer), Gradients(parameters_of(optimizer))())
    optimizer.step()
    p = weakref.ref(parameters_of(optimizer)[0])
    seen = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert seen() is None and p() is None


@pytest.mark.parametrize("strided", [False, True], ids=["as is", "copied into the order of the parameter"])
def test_gradients_are_not_kept_alive(strided: bool) -> None:
    p = torch.nn.Parameter(torch.randn(8, 6))
    optimizer = ak.AIMFusedOptimizer([p], backend="cpu")
    for _ in range(2):
        p.grad = torch.randn(6, 8).t() if strided else torch.randn(8, 6)
        seen = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        assert seen() is None
