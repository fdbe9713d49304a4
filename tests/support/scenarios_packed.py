"""More of scenarios.py: states in fewer bytes, in parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import helpers
import torch
import torch.distributed as dist
from helpers import parameters_of, same_bits
from scenarios import Pair, agree, same_sums, scenario, whole
from scenarios_modules import follow
from scenarios_zero import alike
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import aim_kernels as ak
from aim_kernels.optim.zero_redundancy import AIMZeroRedundancyOptimizer
from aim_kernels.step.sharding import like, local_of
from aim_kernels.step.states import exponents_key, read_moment

#: Rows of 256 elements: every shard begins at a multiple of that, though shards are uneven.
WHOLE_BLOCKS = (((35, 256), (3, 256)), ((64, 256), (2, 256)))
#: Shards that begin anywhere, of which some are empty.
ANYWHERE = (((50, 101), (7,)), ((4099,), (1, 5), ()))

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("float32", {"state_dtype": "int8", "ema_decay": 0.9, "zero_grad_in_step": True}),
    "bfloat16": ("float32", {"state_dtype": "bfloat16"}),
    "int8-split": ("bfloat16", {"state_dtype": "int8", "master": "split"}),
    "bfloat16-stochastic": ("bfloat16", {"state_dtype": "bfloat16", "master": "stochastic"}),
    "bfloat16-kahan": ("bfloat16", {"state_dtype": "bfloat16", "master": "kahan", "ema_decay": 0.9}),
}


def values_of(optimizer: ak.AIMFusedOptimizer, p: Tensor) -> dict[str, Tensor]:
    """All states as whole tensors; moments in 8 bits as the numbers they stand for."""
    state = optimizer.state[p]
    found = {}
    for name, value in state.items():
        if exponents_key(name) in state:
            found[name] = whole(like(p, read_moment(state, name)))
        elif name == "remainder":  # gloo has no 16-bit integers
            found[name] = whole(like(p, local_of(value).view(torch.bfloat16)))
        elif not name.endswith("_scale"):
            found[name] = whole(value)
    return found


def compare(one: ak.AIMFusedOptimizer, other: ak.AIMFusedOptimizer, where: str) -> None:
    for index, (p, q) in enumerate(zip(parameters_of(one), parameters_of(other), strict=True)):
        same_bits(p.detach(), whole(q.detach()), f"{where}, parameter {index}")
        same_bits(values_of(one, p), values_of(other, q), f"{where}, parameter {index}")
    same_bits(one.tables.control, other.tables.control, where)
    same_bits(one.tables.rows, other.tables.rows, where)
    same_sums(one.tables.statistics, other.tables.statistics, where)
    agree(other.tables.rows, where)


@scenario(2, 4, name=list(OPTIONS))
def packed_in_parts(_: Path, name: str) -> None:
    """Bit for bit what one process does; live weights come and go meanwhile."""
    dtype, options = OPTIONS[name]
    for shapes in (WHOLE_BLOCKS, ANYWHERE)[: 1 if "int8" in name else 2]:
        pair = Pair("adamw", ((Shard(0),), None), dtype=dtype, shapes=shapes, **options)
        for number, row in enumerate(("ones", "ones", "chain", "chain", "ones", "ones")):
            if row == "ones":
                for optimizer in (pair.alone, pair.together):
                    optimizer.set_modulation(0, live_well=1.0, grad_well=1.0)
            else:
                pair.set_row(row)
            pair.step(missing=(1,) if number % 2 else ())
            compare(pair.alone, pair.together, f"step {number}")
            if options.get("zero_grad_in_step"):
                for p in parameters_of(pair.together):
                    assert p.grad is None or not bool(local_of(p.grad).any())
    stored = {str(value.dtype) for s in pair.together.state.values() for key, value in s.items() if key == "exp_avg"}
    assert ("torch.uint8" if "int8" in name else "torch.bfloat16") in stored


@scenario(2, 4)
def packed_blocks_that_begin_anywhere(_: Path) -> None:
    """Exponents belong to the blocks of one process, so moments in 8 bits are rounded in other steps there."""
    pair = Pair("adamw", ((Shard(0),),), shapes=ANYWHERE, state_dtype="int8")
    pair.step()
    for index, (p, q) in enumerate(zip(parameters_of(pair.alone), parameters_of(pair.together), strict=True)):
        same_bits(p.detach(), whole(q.detach()), f"the first step goes by moments before they are rounded: {index}")
        one, other = values_of(pair.alone, p), values_of(pair.together, q)
        for key, smallest in (("exp_avg", 2.0**-10), ("exp_avg_sq", 2.0**-18)):
            a, b = one[key], other[key]
            # A step of either is a sixteenth of the value, or the linear one of a block.
            bound = a.abs().maximum(b.abs()) / 8 + 4 * smallest * a.abs().max()
            assert bool(((a - b).abs() <= bound).all())
    pair.gradients()
    for _number in range(3):
        pair.step()
    for p, q in zip(parameters_of(pair.alone), parameters_of(pair.together), strict=True):
        # Directions differ by an eighth and a root of that, of some steps of the learning rate.
        torch.testing.assert_close(whole(q.detach()), p.detach(), rtol=0, atol=3 * 0.25 * helpers.RULES["adamw"]["lr"])


# -- modules ---------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Two weights of 4096 elements and more, cut at multiples of 256."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([nn.Linear(8, 512, dtype=dtype), nn.Linear(512, 16, dtype=dtype)])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks[1](torch.relu(self.blocks[0](x)))
        return result


def sharded(dtype: torch.dtype, mesh: DeviceMesh | None = None) -> nn.Module:
    model = Wide(dtype)
    fully_shard(model.blocks[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizer_of(model: nn.Module, name: str) -> ak.AIMFusedOptimizer:
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    groups = ak.block_param_groups(inner, {"one": list(inner.blocks)})
    options = {key: value for key, value in OPTIONS[name][1].items() if key != "zero_grad_in_step"}
    return ak.AIMFusedOptimizer(groups, lr=1e-2, under_optimized=("fraction", 0.3), seed=5, **options)


def backward(model: nn.Module, number: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(100 * number + dist.get_rank())
    x = torch.randn(16, 8, generator=random).to(dtype)
    model.zero_grad()
    model(x).square().mean().backward()


@scenario(2, name=["int8", "bfloat16", "int8-split"])
def packed_under_fsdp2(folder: Path, name: str) -> None:
    """As one process does, and saved by torch.distributed.checkpoint: for the same parts and for one that is whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    dtype = helpers.DTYPES[OPTIONS[name][0]]
    model, single = sharded(dtype), Wide(dtype)
    together, alone = optimizer_of(model, name), optimizer_of(single, name)
    for number in range(3):
        backward(model, number, dtype)
        follow(alone, together)
        together.step()
        alone.step()
        compare(alone, together, f"step {number}")
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, together), strict=True))
    dtypes = {str(s["exp_avg"].dtype) for s in saved["optimizer"]["state"].values()}
    assert dtypes <= {"torch.bfloat16", "torch.float32"} and "torch.bfloat16" in dtypes
    path = folder / f"packed-{name}"
    dcp.save(saved, checkpoint_id=path)
    by_hand = optimizer_of(sharded(dtype), name)
    by_hand.load_state_dict(copy.deepcopy(alone.state_dict()))  # of one process, cut here
    for p, q in zip(parameters_of(alone), parameters_of(by_hand), strict=True):
        same_bits(values_of(alone, p), values_of(by_hand, q), "cut")
    resumed = []
    copies = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("copies", "parts"))
    for mesh in (None, copies):
        other = sharded(dtype, mesh)
        fresh = optimizer_of(other, name)
        template = dict(zip(("model", "optimizer"), get_state_dict(other, fresh), strict=True))
        dcp.load(template, checkpoint_id=path)
        set_state_dict(other, fresh, model_state_dict=template["model"], optim_state_dict=template["optimizer"])
        for p, q in zip(parameters_of(together), parameters_of(fresh), strict=True):
            same_bits(whole(p.detach()), whole(q.detach()))
            same_bits(values_of(together, p), values_of(fresh, q))
        resumed.append(fresh)
    for number in range(3, 5):
        backward(model, number, dtype)
        follow(alone, together)
        for p, q, r in zip(*map(parameters_of, (together, *resumed)), strict=True):
            q.grad = p.grad
            r.grad = like(r, whole(p.grad))
        for optimizer in (together, alone, *resumed):
            optimizer.step()
        compare(alone, together, f"step {number}")
        for p, q in zip(parameters_of(together), parameters_of(resumed[0]), strict=True):
            same_bits(
                {k: local_of(v) for k, v in together.state[p].items()},
                {k: local_of(v) for k, v in resumed[0].state[q].items()},
                "codes",
            )
        for other in resumed:
            compare(alone, other, f"resumed, step {number}")


@scenario(2)
def packed_zero_redundancy(_: Path) -> None:
    """ZeroRedundancyOptimizer: states in 8 bits in parts, then resumed from a consolidated checkpoint."""
    model = DistributedDataParallel(Wide(torch.float32))
    single = Wide(torch.float32)
    alone = optimizer_of(single, "int8")

    def make() -> AIMZeroRedundancyOptimizer:
        kept = ("params", "modality", "depth", "module", "modulated", "weight_decay")
        groups = [{name: group[name] for name in kept} for group in optimizer_of(model, "int8").param_groups]
        options = {"lr": 1e-2, "under_optimized": ("fraction", 0.3), "seed": 5}
        return AIMZeroRedundancyOptimizer(groups, state_dtype="int8", ema_decay=0.9, **options)

    zero = make()
    for number in range(6):
        if number == 3:
            zero.consolidate_state_dict(to=0)
            box = [zero.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box)
            zero = make()
            zero.load_state_dict(copy.deepcopy(box[0]))
        backward(model, number, torch.float32)
        follow(alone, zero)
        zero.step()
        alone.step()
        alike(alone, zero, f"step {number}")
    assert any("exp_avg_scale" in state for state in alone.state.values())
