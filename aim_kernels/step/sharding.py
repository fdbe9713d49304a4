"""Parameters that several processes hold: which part of one is here, who counts it, and what processes tell each other.

A step works on local tensors. Noise goes by global element index, thresholds and statistics by whole groups: each
element is counted by one process, and the sums of a step are added up over all of them before thresholds move.
"""

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from aim_kernels.step.inputs import StepSources
from aim_kernels.step.layout import ROW
from aim_kernels.step.tables import Tables

Group = dict[str, Any]


class Absent(enum.Enum):
    """What stands where something was left behind. Copies of it are the same object."""

    PROCESS_GROUP = "process_group"


#: Attribute of a parameter: the global index of its first element, for optimizers that see some of the parameters only.
FIRST = "_aim_first"


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a ``torch.distributed.tensor.DTensor``; imports nothing, since where nobody did there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, with the DTensor's memory; other tensors as they are."""
    if not is_dtensor(tensor):
        return tensor
    local: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    # A collective that is still under way.
    return local.wait() if hasattr(local, "wait") else local


def like(parameter: Tensor, local: Tensor) -> Tensor:
    """``local`` as a state of ``parameter``: a DTensor placed as it is, or as it stands."""
    if not is_dtensor(parameter):
        return local
    p: Any = parameter
    made: Tensor = type(p).from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return made


def in_place_of(parameter: Tensor, value: Tensor, name: str) -> Tensor:
    """A saved state, placed as ``parameter`` is. Whole tensors are cut where they are, without communication; states on
    the same mesh that are placed in another way are redistributed by all its processes.

    Raises:
        ValueError: a part of a tensor, where ``parameter`` is a whole one, or a state of another mesh.
    """
    if not is_dtensor(value) and not is_dtensor(parameter):
        return value
    p: Any = parameter
    v: Any = value
    if not is_dtensor(parameter) or (is_dtensor(value) and v.device_mesh != p.device_mesh):
        here = "not a DTensor" if not is_dtensor(parameter) else f"on {p.device_mesh}"
        raise ValueError(
            f"{name} is a DTensor on {v.device_mesh} in the checkpoint, the parameter here is {here}; load with "
            "torch.distributed.checkpoint, or save full tensors (StateDictOptions(full_state_dict=True))"
        )
    if is_dtensor(value):
        moved: Tensor = v if v.placements == p.placements else v.redistribute(p.device_mesh, p.placements)
        return moved
    if value.shape != parameter.shape:
        return value
    if tuple(size for _, size in _extents(p)) != tuple(local_of(p).shape):
        raise ValueError(
            f"{name} is a whole tensor in the checkpoint, but the parameter was not cut as torch.chunk does"
        )
    part = value
    for dim, (begin, size) in enumerate(_extents(p)):
        part = part.narrow(dim, begin, size)
    return like(parameter, part)


def placed_alike(tensor: Any, parameter: Any) -> bool:
    """Whether a gradient or a state is on the mesh of ``parameter`` and cut as it is."""
    if not is_dtensor(tensor) or not is_dtensor(parameter):
        return is_dtensor(tensor) == is_dtensor(parameter)
    return bool(tensor.placements == parameter.placements and tensor.device_mesh == parameter.device_mesh)


# -- where a parameter's elements are --------------------------------------------------------------------------------


def _is_plain_shard(placement: Any) -> bool:
    # Not isinstance: the strided shards of FSDP2 over tensor parallelism are cut in another order.
    return type(placement) is sys.modules["torch.distributed.tensor"].Shard


def _extents(p: Any) -> list[tuple[int, int]]:
    """(begin, size) by dimension of the local part; mesh dimensions cut one after the other, as torch.chunk does."""
    extents = [(0, size) for size in p.shape]
    mesh = p.device_mesh
    for placement, count, coordinate in zip(p.placements, mesh.shape, mesh.get_coordinate(), strict=True):
        if placement.is_replicate():
            continue
        if not _is_plain_shard(placement):
            raise ValueError(f"{placement} is not a plain shard")
        begin, size = extents[placement.dim]
        most = -(-size // count)
        start = min(most * coordinate, size)
        extents[placement.dim] = begin + start, min(most, size - start)
    return extents


def offset_of(p: Tensor) -> int | None:
    """Index in the whole parameter of the first element here, in memory order; None where the elements here are not
    consecutive in the whole (shards along another dimension than the first)."""
    if not is_dtensor(p):
        return 0
    d: Any = p
    if all(placement.is_replicate() for placement in d.placements):
        return 0
    if not all(placement.is_replicate() or _is_plain_shard(placement) for placement in d.placements):
        return None
    extents = _extents(d)
    if tuple(size for _, size in extents) != tuple(local_of(p).shape):  # cut by hand
        return None
    if 0 in (size for _, size in extents):
        return 0
    whole = [begin == 0 and size == full for (begin, size), full in zip(extents, d.shape, strict=True)]
    # Consecutive: one dimension may be cut where those before it have one element here, and those after it all.
    cut = [dim for dim, is_whole in enumerate(whole) if not is_whole]
    if not cut:
        return 0
    if not p.is_contiguous() or not local_of(p).is_contiguous() or any(size != 1 for _, size in extents[: cut[-1]]):
        return None
    return sum(begin * math.prod(d.shape[dim + 1 :]) for dim, (begin, _) in enumerate(extents))


def first_indices(groups: Sequence[Group], process_group: Any) -> list[int | None]:
    """Global index of every parameter's first element here: parameters in the order of the groups, elements in memory
    order. None where elements are not consecutive, or where only some parameters are here and this one has no number
    (:func:`number_parameters`)."""
    params = [p for group in groups for p in group["params"]]
    if process_group is not None:
        return [getattr(p, FIRST, None) for p in params]
    found: list[int | None] = []
    total = 0
    for p in params:
        offset = offset_of(p)
        found.append(None if offset is None else total + offset)
        total += p.numel()
    return found


def number_parameters(params: Iterable[Tensor]) -> None:
    """Leaves on every parameter the global index of its first element, counted in this order."""
    total = 0
    for p in params:
        setattr(p, FIRST, total)
        total += p.numel()


# -- meshes ----------------------------------------------------------------------------------------------------------


def widest_of(meshes: list[Any]) -> Any:
    """The mesh of all, of which the others are slices."""
    return max(meshes, key=lambda mesh: mesh.ndim)


def is_within(mesh: Any, widest: Any) -> bool:
    """Whether a mesh is a slice of another, or the same."""
    if mesh == widest:
        return True
    names, all_names = mesh.mesh_dim_names, widest.mesh_dim_names
    if not names or not all_names or not set(names) <= set(all_names) or mesh.ndim == widest.ndim:
        return False
    return bool(widest[names] == mesh)


def _mesh_of(params: Sequence[Tensor]) -> Any:
    meshes = [p.device_mesh for p in params if is_dtensor(p)]  # type: ignore[attr-defined]
    return widest_of(meshes) if meshes else None


def uncounted(params: Sequence[Tensor]) -> list[bool]:
    """For each parameter, whether another process counts it: the one at coordinate 0 of every mesh dimension along
    which it is replicated. Plain parameters beside DTensors are replicated over the whole mesh."""
    mesh = _mesh_of(params)
    if mesh is None:
        return [False] * len(params)
    found = []
    for p in params:
        coordinate = list(mesh.get_coordinate())
        if is_dtensor(p):
            d: Any = p
            whole = d.device_mesh == mesh
            dims = range(mesh.ndim) if whole else map(mesh.mesh_dim_names.index, d.device_mesh.mesh_dim_names)
            for dim, placement in zip(dims, d.placements, strict=True):
                if not placement.is_replicate():
                    coordinate[dim] = 0
        found.append(any(coordinate))
    return found


def any_dtensor(groups: Iterable[Group]) -> bool:
    """Whether any parameter is a DTensor."""
    return any(is_dtensor(p) for group in groups for p in group["params"])


# -- what processes tell each other ----------------------------------------------------------------------------------


class Exchange:
    """Makes a step's sums those of all processes, or, in steps between exchanges, of none, so that thresholds and
    statistics hold."""

    def __init__(self, process_groups: Sequence[Any], every: int, tables: Tables) -> None:
        self.process_groups, self.every, self.tables = process_groups, every, tables

    def __call__(self, sums: Tensor) -> None:
        """``sums``: float64 [G, 7], in place."""
        due = self.tables.steps % self.every == 0
        self.tables.steps += 1
        if not due:
            sums.zero_()
            return
        self.add_up(sums)

    def add_up(self, values: Tensor) -> None:
        """One all-reduce a process group."""
        for group in self.process_groups:
            torch.distributed.all_reduce(values, group=group)


def exchange_of(params: Sequence[Tensor], process_group: Any, every: int, tables: Tables) -> Exchange | None:
    """None where nobody else has anything to add, and every step counts."""
    if process_group is not None:
        groups = [process_group] if torch.distributed.get_world_size(process_group) > 1 else []
    else:
        mesh = _mesh_of(params)
        groups = [] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.shape[dim] > 1]
    return Exchange(groups, every, tables) if groups or every > 1 else None


def noisy_groups(tables: Tables) -> set[int]:
    """Groups whose rows add noise; waits for a device."""
    return {number for number, level in enumerate(tables.rows[:, ROW["noise"]].tolist()) if level}


def averaged(values: Tensor) -> Tensor:
    """The mean over the ranks of an initialized process group, so that all of them decide alike; else the values."""
    processes = torch.distributed
    if not (processes.is_available() and processes.is_initialized() and processes.get_world_size() > 1):
        return values
    total = values.detach().clone()
    processes.all_reduce(total)
    return total / processes.get_world_size()


def reshard(modules: Iterable[Any]) -> None:
    """Frees what FSDP2 modules have gathered, after their parameters were written outside of a step.

    After a forward pass without a backward one the root keeps its gathered weights, and would go on computing with
    them.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in modules:
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def reshard_all(written: Iterable[Tensor]) -> None:
    """The same where only parameters are known, from which torch has no way to their modules: all FSDP2 modules of the
    process are asked. Where this torch does not list them, ``module.reshard()`` is left to the user."""
    registry = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None)
    if registry is not None and any(map(is_dtensor, written)):
        reshard(list(registry))


def makes_states_only(sources: StepSources) -> bool:
    """Whether a step is the one that ``torch.distributed.checkpoint`` takes to have states made: no states yet, every
    learning rate 0, every gradient 0. Nothing but the states, with a count of 0, may come of it."""
    groups = sources.param_groups
    # Of a process group, one may have no parameters, and never states: steps are counted there.
    shared = sources.process_group is not None
    states = (sources.state.get(p, ()) for group in groups for p in group["params"])
    if sources.tables.steps if shared else any("step" in state for state in states):
        return False
    for group in groups:
        lr = group["lr"]
        # A number in a device's memory is not looked at: torch puts one on the host in its place.
        if isinstance(lr, Tensor) and (lr.device.type != "cpu" or lr.numel() != 1):
            return False
        if float(lr) != 0.0:
            return False
    params = [p for group in groups for p in group["params"]]
    found = sum(int(torch.count_nonzero(local_of(p.grad))) for p in params if p.grad is not None)
    # All processes must come to the same answer, though a gradient may be zero here and not elsewhere.
    exchange = exchange_of(params, sources.process_group, 1, sources.tables)
    if exchange is not None:
        total = torch.tensor(found, dtype=torch.int64, device=sources.tables.rows.device)
        exchange.add_up(total)
        found = int(total)
    return found == 0
