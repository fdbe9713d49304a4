"""What happens in the worlds of test_distributed.py: every scenario is run by all processes of a world, and compares
what they do together with what one process does alone, in each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.distributed as dist
from backends_under_test import enter
from helpers import Gradients, parameters_of, same_bits, set_row
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import aim_kernels as ak
from aim_kernels.step.layout import STATISTIC

Scenario = Callable[[Path], None]
#: By name: the sizes of the worlds that run it, and what they run.
SCENARIOS: dict[str, tuple[tuple[int, ...], Scenario]] = {}

#: Uneven and empty shards, over 2 and over 4 processes; one dimension, a tensor without elements, a scalar.
SHAPES = (((5, 3), (2, 4), (), (8, 2)), ((7,), (1, 6), (0, 3), (4, 3, 2)))

#: Sums over elements, which processes add up in another order than one: a few roundings of float32 in a chunk.
SUMS_RTOL = 1e-5


def scenario(*sizes: int, **cases: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a scenario of these worlds; ``cases``: one keyword and its values."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        if not cases:
            SCENARIOS[function.__name__] = (sizes, function)
        for keyword, values in cases.items():
            for value in values:
                case = "-".join(value) if isinstance(value, tuple) else str(value)
                name = f"{function.__name__}-{case}"
                SCENARIOS[name] = (sizes, lambda folder, k=keyword, v=value: function(folder, **{k: v}))
        return function

    return register


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut(tensor: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> torch.Tensor:
    """A tensor that every process has as a whole, as a DTensor."""
    return distribute_tensor(tensor.detach().clone(), mesh, placements, src_data_rank=None)


class Pair:
    """One optimizer over whole tensors, alone in this process, and one over DTensors (or the same tensors, where
    ``placements`` says None) with all others; stepped with the same gradients and compared. ``alone``: the backend of
    the first, where it is another."""

    def __init__(
        self,
        rule: str = "adamw",
        placements: Sequence[Sequence[Placement] | None] = ((Shard(0),),),
        mesh: DeviceMesh | None = None,
        shapes: Any = SHAPES,
        dtype: str = "float32",
        alone: str | None = None,
        **options: Any,
    ) -> None:
        self.alone = helpers.build(rule, shapes, dtype, **(options | ({"backend": alone} if alone else {})))
        self.mesh = mesh or mesh_of_all()
        self.placements: list[Sequence[Placement] | None] = []
        groups = []
        for group in self.alone.param_groups:
            members: list[torch.Tensor] = []
            for p in group["params"]:
                placed = placements[len(self.placements) % len(placements)] if p.dim() else None
                self.placements.append(placed)
                leaf = p.detach().clone() if placed is None else cut(p, self.mesh, placed)
                members.append(leaf.requires_grad_())
            groups.append({**{k: group[k] for k in ("modality", "depth", "modulated")}, "params": members})
        defaults = {"under_optimized": ("fraction", 0.4), "threshold_rate": 0.3, "seed": 1234567890123}
        self.together = ak.AIMFusedOptimizer(groups, **(helpers.RULES[rule] | {"backend": "cpu"} | defaults | options))
        self.gradients = Gradients(parameters_of(self.alone))

    def set_row(self, name: str) -> None:
        for optimizer in (self.alone, self.together):
            set_row(optimizer, 0, name)

    def assign(self, missing: Sequence[int] = ()) -> None:
        pairs = zip(parameters_of(self.alone), parameters_of(self.together), strict=True)
        for index, ((one, other), grad) in enumerate(zip(pairs, self.gradients(), strict=True)):
            if index in missing:
                one.grad = other.grad = None
                continue
            placed = self.placements[index]
            one.grad = grad
            other.grad = grad.clone() if placed is None else cut(grad, self.mesh, placed)

    def step(self, missing: Sequence[int] = ()) -> None:
        self.assign(missing)
        self.alone.step()
        self.together.step()

    def run(self, steps: int, missing: Sequence[int] = ()) -> None:
        for number in range(steps):
            self.step(missing if number % 2 else ())
            self.compare(f"step {number}")

    def compare(self, where: str, states: bool = True) -> None:
        one, other = self.alone, self.together
        for index, (p, q) in enumerate(zip(parameters_of(one), parameters_of(other), strict=True)):
            entry = f"{where}, parameter {index} {tuple(p.shape)} {self.placements[index]}"
            same_bits(p, whole(q), entry)
            if states:
                kept = {name: whole(value) for name, value in other.state[q].items()}
                same_bits(one.state[p], kept, entry)
        same_bits(one.tables.control, other.tables.control, where)
        same_bits(one.tables.rows, other.tables.rows, where)
        same_sums(one.tables.statistics, other.tables.statistics, where)
        agree(other.tables.rows, where)
        agree(other.tables.statistics, where)

    def share_statistics(self) -> None:
        """Noise is measured by them: where it is compared bit for bit, both must have the same."""
        self.together.tables.statistics.copy_(self.alone.tables.statistics)


def same_sums(one: torch.Tensor, other: torch.Tensor, where: str = "") -> None:
    counts = [STATISTIC[name] for name in ("numel", "under", "nonfinite")]
    same_bits(one[:, counts], other[:, counts], f"{where}, counts")
    # A sum of both signs is small: its error is measured by the sum of squares.
    scale = (one[:, STATISTIC["grad_sq"]] * one[:, STATISTIC["numel"]]).sqrt() + 1e-30
    bound = SUMS_RTOL * torch.where(torch.arange(7) == STATISTIC["grad_sum"], scale[:, None], one.abs())
    assert bool(((one - other).abs() <= bound).logical_or(one.isnan() & other.isnan()).all()), (where, one, other)


def agree(tensor: torch.Tensor, where: str) -> None:
    """All processes have the same bits."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.detach().contiguous())
    for rank, other in enumerate(found):
        same_bits(found[0], other, f"{where}, ranks 0 and {rank}")


# -- parameters in parts ------------------------------------------------------------------------------------------


@scenario(2, 4, case=[("adamw", "ones"), ("adamw", "chain"), ("adamw", "alternate"), ("sgd-nesterov", "alternate")])
def sharded(_: Path, case: tuple[str, str]) -> None:
    """Uneven and empty shards, some parameters without a gradient in every second step."""
    pair = Pair(case[0])
    pair.set_row(case[1])
    pair.run(5, missing=(1, 4))
    pair.set_row("ones")
    pair.run(2)


@scenario(2, 4)
def noise_goes_by_global_index(_: Path) -> None:
    pair = Pair("adamw")
    pair.set_row("all")
    for number in range(4):
        pair.step()
        pair.compare(f"step {number}")
        pair.share_statistics()
    level = [optimizer.tables.rows[0].tolist() for optimizer in (pair.alone, pair.together)]
    assert level[0] == level[1] and level[0][4] == 0.3


@scenario(2, 4)
def noise_with_statistics_of_its_own(_: Path) -> None:
    """The deviation that noise is scaled by is a sum over processes: equal to SUMS_RTOL, not to the bit."""
    pair = Pair("sgd", lr=1e-3)
    pair.set_row("noise")
    for _number in range(3):
        pair.step()
    for p, q in zip(parameters_of(pair.alone), parameters_of(pair.together), strict=True):
        torch.testing.assert_close(whole(q), p, rtol=SUMS_RTOL, atol=1e-6)


@scenario(2, 4, backend=["reference", "cuda"])
def other_backends(_: Path, backend: str, **how: Any) -> None:
    """The sums of a step are handed over there too, and what another process counts is not counted."""
    with pytest.MonkeyPatch.context() as patch:
        name = enter(backend, patch)
        pair = Pair("adamw", ((Shard(0),), (Replicate(),), None), backend=name, **how)
        pair.set_row("alternate")
        pair.run(3)
        pair.together.eval()
        pair.alone.eval()
        pair.compare("true weights")


@scenario(2)
def interpreted_triton(folder: Path) -> None:
    """A tensor of each kind (cut unevenly, replicated, whole, of one process only), as each takes half a second; beside
    the CPU's bits, which are the same."""
    other_backends(folder, "triton", shapes=(((5, 3), (2, 4), ()), ((1, 6),)), alone="cpu")


@scenario(2, 4)
def mixed_with_whole_parameters(_: Path) -> None:
    pair = Pair("adamw", ((Shard(0),), None, (Replicate(),), (Shard(0),), None))
    pair.set_row("chain")
    pair.run(4)


@scenario(2, 4, backend=["cpu", "reference", "cuda"])
def clipping_by_the_norm_of_all(_: Path, backend: str) -> None:
    """Of gradients cut, replicated and whole: every element once, whoever has it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter(backend, monkeypatch)
        pair = Pair("sgd", ((Shard(0),), None, (Replicate(),)), backend=backend, max_grad_norm=0.05, weight_decay=0.0)
        for _ in range(3):
            pair.step()
            grads = [p.grad for p in parameters_of(pair.alone)]
            exact = torch.cat([g.double().flatten() for g in grads if g is not None]).norm()
            for optimizer in (pair.alone, pair.together):
                assert optimizer.grad_norm is not None
                torch.testing.assert_close(optimizer.grad_norm.double(), exact, rtol=SUMS_RTOL, atol=0)
            # The norm's last bits, and with them the factor's, differ by the order of its sum.
            for one, other in zip(parameters_of(pair.alone), parameters_of(pair.together), strict=True):
                torch.testing.assert_close(one.detach(), whole(other).detach(), rtol=SUMS_RTOL, atol=SUMS_RTOL)


@scenario(2)
def sixteen_bits(_: Path) -> None:
    pair = Pair("adam", ((Shard(0),), None), dtype="bfloat16")
    pair.set_row("alternate")
    pair.run(4)


@scenario(4, row=["chain", "alternate"])
def two_dimensions(_: Path, row: str) -> None:
    """Replicated over one dimension of the mesh and sharded over the other (HSDP), and sharded over both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    placements = ((Replicate(), Shard(0)), (Shard(0), Shard(0)), (Shard(0), Shard(1)), (Replicate(), Replicate()), None)
    pair = Pair("adamw", placements, mesh)
    pair.set_row(row)
    pair.run(4)
    hsdp = Pair("adamw", ((Replicate(), Shard(0)),), mesh)
    hsdp.set_row("all")
    for number in range(3):
        hsdp.step()
        hsdp.compare(f"noise, step {number}")
        hsdp.share_statistics()


@scenario(2, every=[1, 3])
def exchanging_every_few_steps(_: Path, every: int) -> None:
    """Thresholds hold in between, in one process as well; and only every so many steps is there a collective."""
    pair = Pair("adamw", sync_every=every)
    pair.set_row("chain")
    taus, calls = [], []
    with pytest.MonkeyPatch.context() as patch:
        reduce = dist.all_reduce
        patch.setattr(dist, "all_reduce", lambda *args, **kwargs: calls.append(1) or reduce(*args, **kwargs))
        for _number in range(7):
            pair.step()
            taus.append(pair.together.statistics()[0]["threshold"])
    pair.compare("after 7 steps")
    assert len(calls) == len(range(0, 7, every))
    assert len(set(taus)) == len(calls), taus


@scenario(2, 4)
def true_and_live_weights(_: Path) -> None:
    pair = Pair("adamw", ((Shard(0),), None))
    pair.set_row("chain")
    pair.run(3)
    live = [whole(p).clone() for p in parameters_of(pair.together)]
    for optimizer in (pair.alone, pair.together):
        optimizer.eval()
    pair.compare("true weights")
    assert any(not torch.equal(a, whole(b)) for a, b in zip(live, parameters_of(pair.together), strict=True))
    for optimizer in (pair.alone, pair.together):
        optimizer.train()
    pair.compare("live weights")
    same_bits(live, [whole(p) for p in parameters_of(pair.together)])
    with pair.together.true_parameters(), torch.no_grad():
        for p in parameters_of(pair.together):
            p.add_(1.0)
    with pair.alone.true_parameters(), torch.no_grad():
        for p in parameters_of(pair.alone):
            p.add_(1.0)
    pair.run(2)


@scenario(2)
def copies_and_pickles(_: Path) -> None:
    """They go on as the original does; a process group is left behind, and missed."""
    pair = Pair("adamw")
    pair.set_row("alternate")
    pair.run(2)
    original = pair.together
    pair.together = copy.deepcopy(original)
    pair.run(3)
    group = dist.group.WORLD
    p = torch.ones(3, requires_grad=True)
    owner = ak.AIMFusedOptimizer([p], process_group=group)
    again = copy.deepcopy(owner)
    parameters_of(again)[0].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"assign optimizer\.process_group"):
        again.step()
    again.process_group = group
    again.step()
    assert again.tables.control.tolist()[1] == 1
    assert again.statistics()[0]["grad_norm"] == 6**0.5, "two processes have three elements each"


@scenario(2)
def what_is_refused(_: Path) -> None:
    """By name, before anything was written, and on all processes alike."""
    mesh = mesh_of_all()
    other_mesh = DeviceMesh("cpu", [dist.get_rank()])
    named = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    good = cut(torch.ones(4, 4), mesh, [Shard(0)]).requires_grad_()

    def optimizer_of(*params: torch.Tensor, **options: Any) -> ak.AIMFusedOptimizer:
        return ak.AIMFusedOptimizer([(f"p{index}", p) for index, p in enumerate(params)], **options)

    partial = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"'p1'.*partial sum"):
        optimizer_of(good, partial)
    for foreign in (cut(torch.ones(4), other_mesh, [Shard(0)]), cut(torch.ones(4), named, [Shard(0), Replicate()])):
        with pytest.raises(ValueError, match=r"mesh.*is no part of"):
            optimizer_of(good, foreign)
    optimizer_of(cut(torch.ones(4), named, [Shard(0), Replicate()]), cut(torch.ones(4), named["a"], [Shard(0)]))
    with pytest.raises(ValueError, match=r"'p0'.*process_group is for plain parameters"):
        optimizer_of(good, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="sync_every"):
        optimizer_of(good, sync_every=0)

    columns = cut(torch.ones(4, 4), mesh, [Shard(1)]).requires_grad_()
    optimizer = optimizer_of(good, columns)
    with pytest.raises(ValueError, match=r"'p1'.*noise goes by global element index.*first dimension"):
        optimizer.set_modulation(0, noise=0.1)
    optimizer.tables.set_columns(0, noise=0.1)  # as a checkpoint does
    good.grad, columns.grad = (p.detach().clone() for p in (good, columns))
    with pytest.raises(ValueError, match=r"'p1'.*noise"):
        optimizer.step()
    optimizer.tables.set_columns(0, noise=0.0)
    optimizer.step()

    before = [p.detach().to_local().clone() for p in (good, columns)]
    columns.grad = cut(torch.ones(4, 4), mesh, [Replicate()])
    for _attempt in range(2):
        with pytest.raises(RuntimeError, match=r"'p1'.*gradient.*Replicate.*the parameter.*Shard\(dim=1\)"):
            optimizer.step()
    columns.grad = cut(torch.ones(4, 4), mesh, [Shard(1)])
    state = optimizer.state[columns]
    kept, state["exp_avg"] = state["exp_avg"], torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match=r"'p1'.*its state exp_avg is a plain tensor"):
        optimizer.step()
    state["exp_avg"] = kept
    same_bits(before, [p.detach().to_local() for p in (good, columns)])
    optimizer.step()
