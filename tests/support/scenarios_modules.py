"""More of scenarios.py: modules under DDP and FSDP2, AIM, and their checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import parameters_of, same_bits
from scenarios import agree, same_sums, scenario, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import aim_kernels as ak
from aim_kernels.aim import Prototypes, Trial

CLASSES = 3


class Two(nn.Module):
    """Two encoders of two blocks. The head belongs to no block, and under FSDP2 to the root."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList([nn.Sequential(nn.Linear(6, 9), nn.ReLU()), nn.Sequential(nn.Linear(9, 5))])
        self.right = nn.ModuleList([nn.Sequential(nn.Linear(4, 9), nn.ReLU()), nn.Sequential(nn.Linear(9, 2))])
        self.head = nn.Linear(7, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        for block in self.left:
            left = block(left)
        for block in self.right:
            right = block(right)
        result: Tensor = self.head(torch.cat([left, right], 1))
        return result


def plain() -> nn.Module:
    torch.manual_seed(3)
    return Two()


def ddp() -> nn.Module:
    return DistributedDataParallel(plain())


def fsdp2() -> nn.Module:
    """The right encoder's blocks are sharded by the root, together with the head."""
    model = plain()
    for block in model.left:  # type: ignore[union-attr]
        fully_shard(block)
    return fully_shard(model)


def fsdp2_mixed() -> nn.Module:
    """The head stays whole: a plain parameter beside DTensors, whose gradient the script averages."""
    model = plain()
    return fully_shard(model, ignored_params=set(model.head.parameters()))  # type: ignore[union-attr]


MODELS: dict[str, Callable[[], nn.Module]] = {"plain": plain, "ddp": ddp, "fsdp2": fsdp2, "fsdp2-mixed": fsdp2_mixed}


def optimizer_of(model: nn.Module, **options: Any) -> ak.AIMFusedOptimizer:
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    groups = ak.block_param_groups(inner, {"left": list(inner.left), "right": list(inner.right)})
    return ak.AIMFusedOptimizer(groups, **({"lr": 1e-2, "under_optimized": ("fraction", 0.3), "seed": 5} | options))


def batch(number: int, rank: int | None = None, count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of one step, others on every rank; the right modality tells more."""
    random = torch.Generator().manual_seed(1000 * number + (dist.get_rank() if rank is None else rank))
    labels = torch.randint(CLASSES, (count,), generator=random)
    right = nn.functional.one_hot(labels, 4) * 2.0 + 0.5 * torch.randn(count, 4, generator=random)
    left = torch.randn(count, 6, generator=random)
    left[:, 0] += labels
    return left, right, labels


def backward(model: nn.Module, number: int) -> None:
    *inputs, labels = batch(number)
    backward_of(model, inputs, labels)


def backward_of(model: nn.Module, inputs: Sequence[Tensor], labels: Tensor) -> None:
    """Gradients that all ranks share: what DDP and FSDP2 do not average is averaged here."""
    model.zero_grad()
    nn.functional.cross_entropy(model(*inputs), labels).backward()
    for p in model.parameters():
        if not isinstance(model, DistributedDataParallel) and type(p.grad) is Tensor:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def follow(alone: ak.AIMFusedOptimizer, together: ak.AIMFusedOptimizer) -> None:
    """The gradients that all have together, for the one that steps alone."""
    for p, q in zip(parameters_of(alone), parameters_of(together), strict=True):
        p.grad = None if q.grad is None else whole(q.grad).clone()


def compare(alone: ak.AIMFusedOptimizer, together: ak.AIMFusedOptimizer, where: str) -> None:
    for p, q in zip(parameters_of(alone), parameters_of(together), strict=True):
        same_bits(p, whole(q), where)
        same_bits(dict(alone.state[p]), {name: whole(value) for name, value in together.state[q].items()}, where)
    same_bits(alone.tables.control, together.tables.control, where)
    same_bits(alone.tables.rows, together.tables.rows, where)
    same_sums(alone.tables.statistics, together.tables.statistics, where)
    agree(together.tables.rows, where)


@scenario(2, wrapper=["fsdp2-mixed"])
@scenario(2, 4, wrapper=["ddp", "fsdp2"])
def modules_with_aim(_: Path, wrapper: str) -> None:
    """Every process scores samples of its own; rows, weights and thresholds are those of one process that has the same
    scores and gradients."""
    model, single = MODELS[wrapper](), plain()
    together, alone = optimizer_of(model), optimizer_of(single)
    aims = [ak.AIM(m, o, CLASSES, probe=Prototypes(steps=3)) for m, o in ((model, together), (single, alone))]
    strengths = []
    for number in range(6):
        if number % 2 == 0:
            *inputs, labels = batch(100 + number, count=12)
            tables = [aim.update(inputs, labels) for aim in aims]
            assert repr(tables[0].to_dict()) == repr(tables[1].to_dict())
            strengths.append(max(tables[0].kappa["right"]))
        backward(model, number)
        follow(alone, together)
        for optimizer in (together, alone):
            optimizer.step()
        compare(alone, together, f"step {number}")
    assert max(strengths) > 0.1 and {row["modality"] for row in together.modulation()} >= {"left", "right"}


@scenario(2, wrapper=["ddp", "fsdp2", "fsdp2-mixed"])
def trials_agree_and_leave_nothing(_: Path, wrapper: str) -> None:
    """Processes whose held-out samples say different things try the same steps, come to one mean, and go back."""
    model = MODELS[wrapper]()
    tries_leave_nothing(model, optimizer_of(model))


def tries_leave_nothing(model: nn.Module, optimizer: Any) -> None:
    own = getattr(optimizer, "optim", optimizer)  # ZeRO keeps states in another one
    aim = ak.AIM(model, optimizer, CLASSES, rule=Trial(steps=4, confidence=0.0))
    for number in range(15):
        backward(model, number)
        optimizer.step()
    backward(model, 15)

    def everything() -> Any:
        values = [whole(p).detach().clone() for p in parameters_of(optimizer)]
        states = [{n: whole(v).clone() for n, v in own.state.get(p, {}).items()} for p in parameters_of(optimizer)]
        return [values, states, [whole(p.grad).clone() for p in parameters_of(optimizer)]]

    def train(inputs: Any, labels: Any) -> None:
        backward_of(model, inputs, labels)
        optimizer.step()

    before = everything()
    *inputs, labels = batch(2, count=12)
    left, right, classes = batch(3 + dist.get_rank(), count=32)
    others = [left, right.flip(0)]  # what tells most is of no use here
    for _ in range(3):
        table = aim.update(inputs, labels, held_out=(others, classes), train=train)
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, repr(table))
        assert table.rule == "trial" and len(set(said)) == 1
        same_bits(before, everything())
    assert aim.held_back, "nobody was held back: this test tells little"


@scenario(2)
def gathered_weights_are_not_used_again(_: Path) -> None:
    """FSDP2 keeps the root's gathered weights after a forward pass without a backward one. Exchanging live for true
    weights around a validation must reach them."""
    model = fsdp2()
    optimizer = optimizer_of(model)
    optimizer.set_strength("right", 0, 0.9)
    for number in range(3):
        backward(model, number)
        optimizer.step()
    *inputs, _labels = batch(0)
    outputs = []
    with torch.no_grad():
        outputs.append(model(*inputs))
        optimizer.eval()
        outputs.append(model(*inputs))
        optimizer.train()
        outputs.append(model(*inputs))
    same_bits(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1]), "the degraded block does not show: this test could not fail"
    single = plain()
    with optimizer.true_parameters():
        for p, q in zip(parameters_of(optimizer_of(single)), parameters_of(optimizer), strict=True):
            p.data.copy_(whole(q))
    same_bits(outputs[1], single(*inputs).detach())


@scenario(2)
def training_flags_and_gradients_stay(_: Path) -> None:
    model = fsdp2()
    optimizer = optimizer_of(model)
    aim = ak.AIM(model, optimizer, CLASSES, probe=Prototypes(steps=2))
    backward(model, 0)
    before = [whole(p.grad).clone() for p in parameters_of(optimizer)]
    *inputs, labels = batch(7)
    aim.update(inputs, labels)
    same_bits(before, [whole(p.grad) for p in parameters_of(optimizer)])
    assert all(module.training for module in model.modules())


# -- torch.distributed.checkpoint -----------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: ak.AIMFusedOptimizer, steps: range) -> None:
    for number in steps:
        backward(model, number)
        optimizer.step()


def snapshot(optimizer: ak.AIMFusedOptimizer) -> dict[str, Any]:
    return {
        "params": [whole(p).detach().clone() for p in parameters_of(optimizer)],
        "states": [
            {name: whole(value).clone() for name, value in optimizer.state[p].items()} for p in parameters_of(optimizer)
        ],
        **{name: getattr(optimizer.tables, name).clone() for name in ("rows", "statistics", "control")},
    }


def strengths(optimizer: ak.AIMFusedOptimizer) -> None:
    optimizer.set_phases(0.5)
    for number, group in enumerate(optimizer.param_groups):
        if group["modality"] == "right" and group["modulated"]:
            optimizer.set_phase_rows(number, aux={"live_well": 0.25, "grad_well": 0.5})


@scenario(2, wrapper=["plain", "ddp", "fsdp2-mixed"])
@scenario(2, 4, wrapper=["fsdp2"])
def the_dummy_step_is_harmless(_: Path, wrapper: str) -> None:
    """get_optimizer_state_dict steps an optimizer without states, with gradients of zero: nothing may come of it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    made = []
    for asked in (True, False):
        model = MODELS[wrapper]()
        optimizer = optimizer_of(model, anchor="init" if wrapper == "plain" else "zero")
        strengths(optimizer)
        before = [whole(p).detach().clone() for p in parameters_of(optimizer)]
        if asked:
            found = get_optimizer_state_dict(model, optimizer)
            assert len(found["state"]) == len(parameters_of(optimizer))
            assert all({"step", "exp_avg", "exp_avg_sq"} <= set(s) for s in found["state"].values())
            assert all(float(s["step"]) == 0 for s in found["state"].values())
            same_bits(before, [whole(p).detach() for p in parameters_of(optimizer)])
            assert optimizer.tables.control.tolist()[1] == 0 and not optimizer.tables.statistics.any()
        train(model, optimizer, range(4))
        made.append(snapshot(optimizer))
    same_bits(*made)


@scenario(2)
def a_first_step_of_rate_zero_is_a_step(_: Path) -> None:
    """A warm-up may begin at 0, with gradients that are zero on some processes only."""
    from scenarios import Pair

    pair = Pair("adamw", lr=0.0)
    pair.assign()
    for p, q in zip(parameters_of(pair.alone), parameters_of(pair.together), strict=True):
        p.grad.zero_()
        if p.dim():
            q.grad.zero_()
        else:
            q.grad.zero_()
    parameters_of(pair.alone)[0].grad[0, 0] = 1.0
    if dist.get_rank() == 0:
        parameters_of(pair.together)[0].grad.to_local()[0, 0] = 1.0
    for optimizer in (pair.alone, pair.together):
        optimizer.step()
    assert pair.together.tables.control.tolist()[1] == 1
    pair.compare("first step")


@scenario(2)
def resuming_under_ddp(folder: Path) -> None:
    """In a world of two, since DDP adds more than two gradients up in another order before and after it has rebuilt its
    buckets."""
    resuming_from_a_distributed_checkpoint(folder, ("ddp", "eval"))


@scenario(2, case=[("plain", "train"), ("fsdp2", "eval"), ("fsdp2-mixed", "train")])
@scenario(2, 4, case=[("fsdp2", "train")])
def resuming_from_a_distributed_checkpoint(folder: Path, case: tuple[str, str]) -> None:
    """Saved and loaded by torch.distributed.checkpoint, in either mode of the module; then trained on, bit for bit."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    wrapper, mode = case
    path = folder / f"{wrapper}-{mode}"

    def fresh() -> tuple[nn.Module, ak.AIMFusedOptimizer]:
        model = MODELS[wrapper]()
        return model, optimizer_of(model, keep_masters=True)

    model, optimizer = fresh()
    strengths(optimizer)
    train(model, optimizer, range(4))
    if mode == "eval":
        optimizer.eval()
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=path)
    optimizer.train()
    train(model, optimizer, range(4, 8))

    other, resumed = fresh()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    template = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    dcp.load(template, checkpoint_id=path)
    set_state_dict(other, resumed, model_state_dict=template["model"], optim_state_dict=template["optimizer"])
    assert any("master" in resumed.state[p] for p in parameters_of(resumed))
    train(other, resumed, range(4, 8))
    same_bits(snapshot(optimizer), snapshot(resumed))


@scenario(2)
def from_parts_to_a_whole(folder: Path) -> None:
    """What FSDP2 saved in parts, a module of one process loads, and goes on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, single = fsdp2(), plain()
    together, alone = (optimizer_of(m, keep_masters=True) for m in (model, single))
    strengths(together)
    train(model, together, range(3))
    dcp.save(get_optimizer_state_dict(model, together), checkpoint_id=folder / "parts")
    template = get_optimizer_state_dict(single, alone)
    dcp.load(template, checkpoint_id=folder / "parts")
    with torch.no_grad():
        for p, q in zip(parameters_of(alone), parameters_of(together), strict=True):
            p.copy_(whole(q))
    set_optimizer_state_dict(single, alone, template)
    compare(alone, together, "loaded")
    for number in range(3, 6):
        backward(model, number)
        follow(alone, together)
        together.step()
        alone.step()
        together.tables.statistics.copy_(alone.tables.statistics)  # noise is measured by them
        compare(alone, together, f"step {number}")


@scenario(2, 4)
def full_state_dicts(_: Path) -> None:
    """A full state dict of FSDP2, loaded into FSDP2, by torch and by hand, and into one process's optimizer."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = fsdp2()
    optimizer = optimizer_of(model)
    strengths(optimizer)
    train(model, optimizer, range(3))
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    single = plain()
    alone = optimizer_of(single)
    if dist.get_rank() == 0:  # the others get nothing
        set_optimizer_state_dict(single, alone, copy.deepcopy(saved))
    box = [alone.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    by_hand, by_torch = fsdp2(), fsdp2()
    loaded = [optimizer_of(by_hand), optimizer_of(by_torch), alone]
    loaded[0].load_state_dict(box[0])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(by_torch, loaded[1], saved, options=options)
    if dist.get_rank():
        loaded[2].load_state_dict(box[0])
    for number, other in enumerate(loaded):
        for index, (p, q) in enumerate(zip(parameters_of(optimizer), parameters_of(other), strict=True)):
            names = optimizer.state[p].keys()
            assert names == other.state[q].keys()
            for name in names:
                where = f"way {number}, parameter {index}, {name}"
                same_bits(whole(optimizer.state[p][name]), whole(other.state[q][name]), where)
        same_bits(optimizer.tables.rows, other.tables.rows)
        same_bits(optimizer.tables.control, other.tables.control)
