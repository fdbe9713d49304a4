"""A step on devices in pieces (gradient release): some parameters at a time, and at last what they measured together.

Every piece is a shard that is not the primary, so its ``finish`` only counts steps and leaves its sums; the primary is
a shard without parameters, which takes the total.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from aim_kernels.backends.device import DeviceShard, Kernels

if TYPE_CHECKING:
    from aim_kernels.step.inputs import StepInputs
    from aim_kernels.step.plan import StepPlan


class Pieces:
    """The shards of a plan's pieces, kept from step to step."""

    def __init__(self, plan: StepPlan, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        nothing = np.zeros(0, np.int64)
        self.primary = DeviceShard(plan, plan.tables.rows.device, nothing, chunk_size, peers=1)
        self._shards: dict[tuple[int, ...], DeviceShard] = {}

    def shard(self, plan: StepPlan, indices: list[int]) -> DeviceShard:
        """The shard of some parameters on one device, with the tables as they are on the primary device."""
        tables = plan.tables
        own = (tables.rows, tables.statistics, tables.control)
        shard = self._shards.get(tuple(indices))
        if shard is None:
            device = plan.params[indices[0]].device
            shard = DeviceShard(plan, device, np.array(indices, np.int64), self.chunk_size, primary=False)
            if device == self.primary.device:
                shard.rows, shard.statistics, shard.control = own
            self._shards[tuple(indices)] = shard
        if shard.device != self.primary.device:
            for table, value in zip((shard.rows, shard.statistics, shard.control), own, strict=True):
                table.copy_(value, non_blocking=True)
        return shard


def update(plan: StepPlan, inputs: StepInputs, kernels: Kernels, indices: list[int]) -> list[Tensor]:
    """Steps some parameters, or emits those without a gradient. Returns what they measured, [G, 7] a device; the next
    call for the same parameters overwrites it."""
    if plan.pieces is None or plan.pieces.chunk_size != kernels.CHUNK:
        plan.pieces = Pieces(plan, kernels.CHUNK)
    pieces = plan.pieces
    plan.load_staged(indices)
    measured = []
    for device in dict.fromkeys(plan.params[index].device for index in indices):
        shard = pieces.shard(plan, [index for index in indices if plan.params[index].device == device])
        with shard.current():
            shard.send(inputs)
            kernels.update(shard)
            kernels.finish(shard)
        assert shard.sums is not None
        measured.append(shard.sums)
        pieces.primary.phases.copy_(shard.phases, non_blocking=True)
    plan.store_staged(indices)
    return measured


def finish(plan: StepPlan, inputs: StepInputs, kernels: Kernels, piece_sums: list[list[Tensor]]) -> None:
    """Moves thresholds, latched columns, statistics and the phase. ``piece_sums``: what ``update`` returned, per piece
    and device."""
    assert plan.pieces is not None
    primary = plan.pieces.primary
    assert primary.peer_sums is not None
    with primary.current():
        primary.send(inputs)
        parts = [sums.to(primary.device, non_blocking=True) for piece in piece_sums for sums in piece]
        total = torch.stack(parts).sum(0)
        primary.peer_sums[0].copy_(total)
        kernels.finish(primary)
