"""More of scenarios.py: state dicts that torch.distributed.checkpoint flattens, as torchtitan saves them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import helpers
import pytest
import scenarios_packed as packed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import parameters_of, same_bits
from scenarios import cut, scenario, whole
from scenarios_modules import MODELS, backward, batch, follow, fsdp2, optimizer_of, plain, strengths, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import aim_kernels as ak
from aim_kernels.step.sharding import local_of

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def held(optimizer: ak.AIMFusedOptimizer) -> dict[str, Any]:
    """Everything as whole tensors; statistics are of the latest step, and added up in another order elsewhere."""
    return {
        "params": [whole(p).detach().clone() for p in parameters_of(optimizer)],
        "states": [packed.values_of(optimizer, p) for p in parameters_of(optimizer)],
        **{name: getattr(optimizer.tables, name).clone() for name in ("rows", "control")},
    }


def save(model: nn.Module, optimizers: Any, path: Path, **options: Any) -> None:
    states = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizers, options=FLAT),
    }
    dcp.save(states, checkpoint_id=path, **options)


def load(model: nn.Module, optimizers: Any, path: Path, **options: Any) -> None:
    """In another process: nothing of the weights may be left, whatever they are."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    states = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizers, options=FLAT),
    }
    dcp.load(states, checkpoint_id=path, **options)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizers, states["optimizer"], options=FLAT)


RULES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"rule": "sgd", "momentum": 0.9, "nesterov": True},
    "rmsprop": {"rule": "rmsprop", "centered": True, "momentum": 0.5},
    "adamw-average": {"anchor": "ema", "ema_decay": 0.9, "amsgrad": True},
}


@scenario(
    2,
    case=[
        ("plain", "adamw", "train"),
        ("fsdp2", "adamw", "train"),
        ("fsdp2", "adamw-average", "eval"),
        ("fsdp2-mixed", "sgd", "train"),
        ("fsdp2", "rmsprop", "train"),
    ],
)
def resuming_from_a_flattened_checkpoint(folder: Path, case: tuple[str, str, str]) -> None:
    """With thresholds, rows, phases and masters; then trained on, bit for bit."""
    wrapper, rule, mode = case
    path = folder / f"flat-{'-'.join(case)}"

    def fresh() -> tuple[nn.Module, ak.AIMFusedOptimizer]:
        model = MODELS[wrapper]()
        return model, optimizer_of(model, keep_masters=True, **RULES[rule])

    model, optimizer = fresh()
    strengths(optimizer)
    train(model, optimizer, range(4))
    if mode == "eval":
        optimizer.eval()
    save(model, optimizer, path)
    optimizer.train()
    other, resumed = fresh()
    load(other, resumed, path)
    same_bits(held(optimizer), held(resumed))
    same_bits(optimizer.tables.statistics, resumed.tables.statistics)
    assert any("master" in resumed.state[p] for p in parameters_of(resumed))
    assert len(set(resumed.tables.rows[:, 3].tolist())) > 1, "no threshold has moved"
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, range(4, 7))
    same_bits(held(optimizer), held(resumed))


@scenario(4)
def resuming_flattened_in_four_parts(folder: Path) -> None:
    resuming_from_a_flattened_checkpoint(folder, ("fsdp2", "adamw", "train"))


@scenario(2)
def resuming_flattened_under_ddp(folder: Path) -> None:
    resuming_from_a_flattened_checkpoint(folder, ("ddp", "adamw", "train"))


@scenario(2, 4)
def flattened_in_other_parts(folder: Path) -> None:
    """Saved in parts: loaded by one process, by processes of which each has a copy, and in two dimensions; and back."""
    size = dist.get_world_size()
    shapes = [(size, 1), (2, size // 2)] if size > 2 else [(size, 1)]
    meshes = [init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")) for shape in shapes]

    def in_parts(mesh: Any) -> nn.Module:
        model = plain()
        for block in model.left:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model = fsdp2()
    optimizer = optimizer_of(model, keep_masters=True)
    strengths(optimizer)
    train(model, optimizer, range(3))
    save(model, optimizer, folder / "parts")
    others: list[tuple[nn.Module, ak.AIMFusedOptimizer]] = []
    for number, made in enumerate((plain(), *map(in_parts, meshes))):
        resumed = optimizer_of(made, keep_masters=True)
        load(made, resumed, folder / "parts", no_dist=number == 0)
        same_bits(held(optimizer), held(resumed), f"way {number}")
        others.append((made, resumed))
    single, alone = others[0]
    if dist.get_rank() == 0:
        save(single, alone, folder / "whole", no_dist=True)
    dist.barrier()
    again = fsdp2()
    back = optimizer_of(again, keep_masters=True)
    load(again, back, folder / "whole")
    same_bits(held(optimizer), held(back), "back in parts")
    others.append((again, back))
    for number in range(3, 5):
        backward(model, number)
        for _, other in others:
            grads = [whole(p.grad) for p in parameters_of(optimizer) if p.grad is not None]
            for p, grad in zip(parameters_of(other), grads, strict=True):
                p.grad = placed_as(p, grad)
        for each in (optimizer, *(other for _, other in others)):
            each.step()
        for way, (_, other) in enumerate(others):
            same_bits(held(optimizer), held(other), f"step {number}, way {way}")


def placed_as(p: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A whole gradient as the parameter is placed."""
    return cut(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad.clone()


@scenario(2, name=["int8", "bfloat16", "int8-split", "bfloat16-kahan"])
def packed_and_flattened(folder: Path, name: str) -> None:
    """Moments in fewer bits and the bits that 16-bit weights lack, in parts and whole."""
    dtype = helpers.DTYPES[packed.OPTIONS[name][0]]
    model, single = packed.sharded(dtype), packed.Wide(dtype)
    together, alone = packed.optimizer_of(model, name), packed.optimizer_of(single, name)
    for number in range(3):
        packed.backward(model, number, dtype)
        follow(alone, together)
        together.step()
        alone.step()
    save(model, together, folder / f"flat-{name}")
    if dist.get_rank() == 0:
        save(single, alone, folder / f"flat-{name}-whole", no_dist=True)
    dist.barrier()
    resumed = []
    for made, path, no_dist in (
        (packed.sharded(dtype), f"flat-{name}", False),
        (packed.Wide(dtype), f"flat-{name}-whole", True),
    ):
        fresh = packed.optimizer_of(made, name)
        load(made, fresh, folder / path, no_dist=no_dist)
        packed.compare(alone, fresh, path)
        resumed.append(fresh)
    packed.backward(model, 3, dtype)
    follow(alone, together)
    for p, q, r in zip(*map(parameters_of, (together, *resumed)), strict=True):
        q.grad = p.grad
        r.grad = whole(p.grad).clone()
    for optimizer in (together, alone, *resumed):
        optimizer.step()
    for optimizer in (together, *resumed):
        packed.compare(alone, optimizer, "a step later")


@scenario(2)
def one_optimizer_a_part(folder: Path) -> None:
    """As torchtitan does it: one optimizer for each part of the model, saved into one flat dict; several groups,
    of which one has a frozen parameter; names, and keys of a scheduler's and a user's own."""

    def fresh() -> tuple[nn.Module, list[ak.AIMFusedOptimizer]]:
        model: Any = fsdp2()
        model.left[0][0].weight.requires_grad_(False)
        left = [{"params": list(block.named_parameters()), "modulated": True, "mine": [1, "a"]} for block in model.left]
        rest = [*model.right.named_parameters(), *model.head.named_parameters()]
        options: dict[str, Any] = {"under_optimized": ("fraction", 0.3), "keep_masters": True, "seed": 5}
        optimizers = [
            ak.AIMFusedOptimizer(left, lr=1e-2, **options),
            ak.AIMFusedOptimizer([{"params": rest, "modulated": True}], lr=2e-2, rule="lion", **options),
        ]
        for optimizer in optimizers:
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return model, optimizers

    def go_on(model: nn.Module, optimizers: list[ak.AIMFusedOptimizer], steps: range) -> None:
        for number in steps:
            backward_all(model, number)
            for optimizer in optimizers:
                optimizer.step()

    model, optimizers = fresh()
    optimizers[0].set_modulation(1, live_well=0.5, grad_well=0.5)
    go_on(model, optimizers, range(3))
    optimizers[1].param_groups[0]["lr"] = 3e-3
    save(model, optimizers, folder / "titan")
    other, resumed = fresh()
    load(other, resumed, folder / "titan")
    for m, both in ((model, optimizers), (other, resumed)):
        assert both[1].param_groups[0]["lr"] == 3e-3 and both[0].param_groups[0]["mine"] == [1, "a"]
        go_on(m, both, range(3, 5))
    for one, two in zip(optimizers, resumed, strict=True):
        trained = [[p for p in parameters_of(o) if p.requires_grad] for o in (one, two)]
        for p, q in zip(*trained, strict=True):
            same_bits(whole(p).detach(), whole(q).detach())
            same_bits(packed.values_of(one, p), packed.values_of(two, q))
        same_bits(one.tables.rows, two.tables.rows)
        same_bits(one.tables.control, two.tables.control)


def backward_all(model: nn.Module, number: int) -> None:
    *inputs, labels = batch(number)
    model.zero_grad()
    nn.functional.cross_entropy(model(*inputs), labels).backward()


@scenario(2)
def full_and_flattened(_: Path) -> None:
    """Whole tensors, on the host or not, are cut where they are loaded; torch itself cannot load a flattened dict with
    full_state_dict=True, only without."""
    model = fsdp2()
    optimizer = optimizer_of(model, keep_masters=True)
    strengths(optimizer)
    train(model, optimizer, range(3))
    for offload in (False, True):
        full = StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=True, cpu_offload=offload)
        box = [get_optimizer_state_dict(model, optimizer, options=full)]
        dist.broadcast_object_list(box)  # with cpu_offload the others get nothing
        for make in (fsdp2, plain):
            other = make()
            resumed = optimizer_of(other, keep_masters=True)
            with torch.no_grad():
                for p, q in zip(parameters_of(optimizer), parameters_of(resumed), strict=True):
                    q.copy_(p if make is fsdp2 else whole(p))
            set_optimizer_state_dict(other, resumed, copy.deepcopy(box[0]), options=FLAT)
            same_bits(held(optimizer), held(resumed), make.__name__)
            same_bits(optimizer.tables.statistics, resumed.tables.statistics)


@scenario(2)
def flattened_without_masters_is_refused(_: Path) -> None:
    """torch asks for what the fresh optimizer has, and that has no masters before anything is degraded."""
    model = fsdp2()
    optimizer = optimizer_of(model)
    strengths(optimizer)
    train(model, optimizer, range(3))
    saved = get_optimizer_state_dict(model, optimizer, options=FLAT)
    assert any("master" in key for key in saved if key.startswith("state."))
    other = fsdp2()
    fresh = optimizer_of(other)
    with pytest.raises(ValueError, match=r"parameter 0 of group.*has no master.*keep_masters=True"):
        set_optimizer_state_dict(other, fresh, saved, options=FLAT)
    kept = optimizer_of(other, keep_masters=True)
    with torch.no_grad():
        for p, q in zip(parameters_of(optimizer), parameters_of(kept), strict=True):
            q.copy_(p)
    set_optimizer_state_dict(other, kept, saved, options=FLAT)
    for p, q in zip(parameters_of(optimizer), parameters_of(kept), strict=True):
        same_bits(whole(p).detach(), whole(q).detach())
        if "master" in optimizer.state[p]:
            same_bits(whole(optimizer.state[p]["master"]), whole(kept.state[q]["master"]))


@scenario(2)
def what_others_keep_in_parts(_: Path) -> None:
    """Beside DTensors, whose moments in 8 bits are saved in another form: that is for ours alone."""
    dtype = torch.float32
    model = packed.sharded(dtype)
    optimizer = packed.optimizer_of(model, "int8")
    packed.backward(model, 0, dtype)
    optimizer.step()
    for p in parameters_of(optimizer):
        z = (p.detach() * 2).requires_grad_(False)
        optimizer.state[p].update(a=torch.zeros(3, dtype=torch.uint8), a_scale=torch.ones(3), note="mine", z=z)
    optimizer.state["a wrapper's"] = 3  # type: ignore[index]
    other = packed.sharded(dtype)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.copy_(p)
    resumed = packed.optimizer_of(other, "int8")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (model, other):
        packed.backward(each, 1, dtype)
    for each in (optimizer, resumed):
        each.step()
    assert resumed.state["a wrapper's"] == 3  # type: ignore[index]
    for p, q in zip(parameters_of(optimizer), parameters_of(resumed), strict=True):
        state = resumed.state[q]
        assert state["note"] == "mine" and state["a"].dtype == torch.uint8 and isinstance(state["z"], DTensor)
        same_bits(state["a_scale"], torch.ones(3))
        same_bits(whole(optimizer.state[p]["z"]), whole(state["z"]))
        for name in ("exp_avg", "exp_avg_sq"):
            same_bits(local_of(optimizer.state[p][name]), local_of(state[name]))
