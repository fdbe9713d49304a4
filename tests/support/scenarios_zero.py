"""More of scenarios.py: ZeroRedundancyOptimizer, torch's own and ours."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends_under_test import enter
from helpers import parameters_of, same_bits
from scenarios import agree, same_sums, scenario
from scenarios_modules import CLASSES, backward, batch, ddp, follow, optimizer_of, plain, tries_leave_nothing
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import aim_kernels as ak
from aim_kernels.aim import Prototypes
from aim_kernels.optim.zero_redundancy import AIMZeroRedundancyOptimizer


def zero_of(model: nn.Module, **options: Any) -> AIMZeroRedundancyOptimizer:
    groups = [dict(group) for group in optimizer_of(model).param_groups]
    kept = ("params", "modality", "depth", "module", "modulated", "weight_decay")
    return AIMZeroRedundancyOptimizer(
        [{name: group[name] for name in kept} for group in groups],
        **({"lr": 1e-2, "under_optimized": ("fraction", 0.3), "seed": 5} | options),
    )


def alike(alone: ak.AIMFusedOptimizer, zero: AIMZeroRedundancyOptimizer, where: str) -> None:
    for p, q in zip(parameters_of(alone), parameters_of(zero), strict=True):
        same_bits(p, q, where)
        agree(q, where)
        if zero._param_to_rank[q] == dist.get_rank():
            same_bits(dict(alone.state[p]), dict(zero.optim.state[q]), where)
    same_bits(alone.tables.control, zero.optim.tables.control, where)
    same_bits(alone.tables.rows, zero.optim.tables.rows, where)
    same_sums(alone.tables.statistics, zero.optim.tables.statistics, where)


@scenario(2, 4, buckets=[False, True])
def zero_redundancy(folder: Path, buckets: bool) -> None:
    """States in parts, with AIM and noise; then resumed from a consolidated checkpoint, and from one of one process."""
    model, single = ddp(), plain()
    options: dict[str, Any] = {"threshold_rate": 0.5}  # so that some elements are well-optimized after four steps
    zero, alone = zero_of(model, parameters_as_bucket_view=buckets, **options), optimizer_of(single, **options)
    for group in (*zero.param_groups, *alone.param_groups):
        group["lr"] = 7e-3  # as a scheduler does; a loaded checkpoint has it
    pairs: Any = ((model, zero), (single, alone))
    aims = [ak.AIM(m, o, CLASSES, probe=Prototypes(steps=2), mixing="weights") for m, o in pairs]

    def step(number: int) -> None:
        backward(model, number)
        follow(alone, zero)
        zero.step()
        alone.step()
        alike(alone, zero, f"step {number}")
        zero.optim.tables.statistics.copy_(alone.tables.statistics)  # noise is measured by them

    for number in range(4):
        if number % 2 == 0:
            *inputs, labels = batch(100 + number, count=12)
            assert repr(aims[0].update(inputs, labels).to_dict()) == repr(aims[1].update(inputs, labels).to_dict())
            for optimizer in (zero, alone):
                optimizer.set_modulation(0, noise=0.2)
        step(number)
    assert any("master" in state for state in alone.state.values())
    same_bits([row["numel"] for row in zero.statistics()], [row["numel"] for row in alone.statistics()])
    live_weights = [p.detach().clone() for p in parameters_of(alone)]
    for optimizer in (zero, alone):
        optimizer.eval()
    alike(alone, zero, "true weights")
    degraded = zip(live_weights, parameters_of(alone), strict=True)
    assert not all(torch.equal(live, p) for live, p in degraded), "nothing is degraded"
    for optimizer in (zero, alone):
        optimizer.train()
    alike(alone, zero, "live weights")

    zero.consolidate_state_dict(to=0)
    box = [zero.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    saved: Any = box[0]
    for state in (saved, copy.deepcopy(alone.state_dict())):
        before = [p.detach().clone() for p in parameters_of(zero)]
        zero.train()
        zero = zero_of(model, parameters_as_bucket_view=buckets, **options)
        for p in model.parameters():
            p.data.mul_(2.0)
        zero.load_state_dict(copy.deepcopy(state))
        live = {index for index, p in enumerate(parameters_of(alone)) if "master" in alone.state[p]}
        assert live
        for index, (p, value) in enumerate(zip(parameters_of(zero), before, strict=True)):
            if index not in live:
                p.data.copy_(value)
        alike(alone, zero, "loaded")
    for number in range(4, 7):
        step(number)


@scenario(2)
def trials_under_zero(_: Path) -> None:
    model = ddp()
    tries_leave_nothing(model, zero_of(model))


@scenario(4, backend=["cpu", "reference", "cuda"])
def processes_without_parameters(_: Path, backend: str) -> None:
    """Two parameters for four processes: those that have none take the same steps, and know the same thresholds."""
    with pytest.MonkeyPatch.context() as patch:
        name = enter(backend, patch)
        params = [[torch.arange(n, dtype=torch.float32).requires_grad_() for n in (3, 5)] for _ in range(2)]
        options: dict[str, Any] = {"lr": 0.1, "under_optimized": ("fraction", 0.3), "threshold_rate": 0.2}
        zero = AIMZeroRedundancyOptimizer(
            [{"params": params[0], "modulated": True}], backend=name, parameters_as_bucket_view=False, **options
        )
        alone = ak.AIMFusedOptimizer([{"params": params[1], "modulated": True}], backend="cpu", **options)
        assert sum(not group["params"] for group in zero.optim.param_groups) == (dist.get_rank() > 1)
        for optimizer in (zero, alone):
            optimizer.set_phases(0.5)
            optimizer.set_phase_rows(0, aux={"live_well": 0.5, "grad_well": 0.5})
        for number in range(4):
            for p, q in zip(*params, strict=True):
                p.grad = torch.linspace(-1, 1, p.numel()) * (1.0 + number % 2)
                q.grad = p.grad.clone()
            zero.step()
            alone.step()
            alike(alone, zero, f"step {number}")


@scenario(4, backend=["cpu", "reference", "cuda"])
def zero_redundancy_clips_by_the_norm_of_all(_: Path, backend: str) -> None:
    """Also on processes that have no parameters."""
    with pytest.MonkeyPatch.context() as patch:
        name = enter(backend, patch)
        params = [[torch.arange(n, dtype=torch.float32).requires_grad_() for n in (3, 5)] for _ in range(2)]
        zero = AIMZeroRedundancyOptimizer(params[0], rule="sgd", lr=0.1, backend=name, max_grad_norm=0.5)
        alone = ak.AIMFusedOptimizer(params[1], rule="sgd", lr=0.1, backend="cpu", max_grad_norm=0.5)
        assert "max_grad_norm" not in zero.param_groups[0]
        for largest in (0.5, None, 0.25):
            zero.max_grad_norm = alone.max_grad_norm = largest
            for p, q in zip(*params, strict=True):
                p.grad = torch.linspace(-1, 1, p.numel())
                q.grad = p.grad.clone()
            zero.step()
            alone.step()
            for norm in (zero.grad_norm, alone.grad_norm):
                assert (norm is None) == (largest is None)
                if norm is not None:
                    torch.testing.assert_close(norm, torch.tensor(4.5**0.5))
            for p, q in zip(*params, strict=True):
                torch.testing.assert_close(p, q)
        assert not zero.holds_true_weights and len(zero.tables.rows) == 1


@scenario(2)
def zero_redundancy_is_not_for_distributed_checkpoints(_: Path) -> None:
    """torch has no way from one to the other; that it asks must not step the optimizer."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = ddp()
    zero = zero_of(model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="consolidate"):
        get_optimizer_state_dict(model, zero)
    same_bits(before, [p.detach() for p in model.parameters()])
    assert zero.optim.tables.control.tolist()[1] == 0


@scenario(2)
def zero_redundancy_by_hand(_: Path) -> None:
    """torch's class takes the optimizer as well; without a place for its parameters there is no noise."""
    model, single = ddp(), plain()
    kept = ("params", "modulated", "weight_decay")
    groups = [{name: g[name] for name in kept} for g in optimizer_of(model).param_groups]
    world = dist.group.WORLD
    zero = ZeroRedundancyOptimizer(
        groups,
        functools.partial(ak.AIMFusedOptimizer, process_group=world, under_optimized=("fraction", 0.3), seed=5),
        lr=1e-2,
    )
    alone = optimizer_of(single)
    for number in range(3):
        backward(model, number)
        follow(alone, zero)
        zero.step()
        alone.step()
        alike(alone, zero, f"step {number}")
    if zero.optim.param_groups[0]["params"]:  # the processes that have none of its parameters have none to name
        with pytest.raises(ValueError, match="AIMZeroRedundancyOptimizer"):
            zero.optim.set_modulation(0, noise=0.5)


@scenario(2)
def zero_redundancy_clears_and_averages(_: Path) -> None:
    """Gradients of what others step are cleared too; averages go again after an exception, on all processes."""
    model = ddp()
    zero = zero_of(model, zero_grad_in_step=True, ema_decay=0.5)
    for number in range(2):
        backward(model, number)
        assert all(bool(p.grad.count_nonzero()) for p in model.parameters() if p.grad is not None)
        zero.step()
        assert not any(bool(p.grad.count_nonzero()) for p in model.parameters() if p.grad is not None)
    trained = [p.detach().clone() for p in model.parameters()]

    def evaluate() -> None:
        with zero.ema_parameters():
            for p, before in zip(model.parameters(), trained, strict=True):
                assert not torch.equal(p, before)
                agree(p, "averages")
            raise KeyError("evaluation")

    with pytest.raises(KeyError, match="evaluation"):
        evaluate()
    same_bits(trained, [p.detach() for p in model.parameters()])
