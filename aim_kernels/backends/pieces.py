"""A step on devices in pieces (gradient release): some parameters at a time, and at last what they measured together.

Every piece is a share that is not home, so its ``finish`` only counts steps and leaves its sums; home is a share
without parameters, which takes the total.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from aim_kernels.backends.device import Kernels, Share

if TYPE_CHECKING:
    from aim_kernels.step.plan import StepPlan


class Pieces:
    """The shares of a plan's pieces, kept from step to step."""

    def __init__(self, plan: StepPlan, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        nothing = np.zeros(0, np.int64)
        self.home = Share(plan, plan.tables.rows.device, nothing, chunk_size, others=1)
        self._shares: dict[tuple[int, ...], Share] = {}

    def share(self, plan: StepPlan, indices: list[int]) -> Share:
        """That of some parameters on one device, with the tables as they are at home."""
        tables = plan.tables
        own = (tables.rows, tables.statistics, tables.control)
        share = self._shares.get(tuple(indices))
        if share is None:
            device = plan.params[indices[0]].device
            share = Share(plan, device, np.array(indices, np.int64), self.chunk_size, home=False)
            if device == self.home.device:
                share.rows, share.statistics, share.control = own
            self._shares[tuple(indices)] = share
        if share.device != self.home.device:
            for table, value in zip((share.rows, share.statistics, share.control), own, strict=True):
                table.copy_(value, non_blocking=True)
        return share


def update(plan: StepPlan, kernels: Kernels, indices: list[int]) -> list[Tensor]:
    """Steps some parameters, or emits those without a gradient. Returns what they measured, [G, 7] a device; the next
    call for the same parameters overwrites it."""
    if plan.pieces is None or plan.pieces.chunk_size != kernels.CHUNK:
        plan.pieces = Pieces(plan, kernels.CHUNK)
    pieces = plan.pieces
    plan.load_staged(indices)
    measured = []
    for device in dict.fromkeys(plan.params[index].device for index in indices):
        share = pieces.share(plan, [index for index in indices if plan.params[index].device == device])
        with share.current():
            share.send()
            kernels.update(share)
            kernels.finish(share)
        assert share.sums is not None
        measured.append(share.sums)
        pieces.home.phases.copy_(share.phases, non_blocking=True)
    plan.store_staged(indices)
    return measured


def finish(plan: StepPlan, kernels: Kernels, parts: list[list[Tensor]]) -> None:
    """Moves thresholds, latched columns, statistics and the phase by the sums of all pieces."""
    assert plan.pieces is not None
    home = plan.pieces.home
    assert home.others is not None
    with home.current():
        home.send()
        total = torch.stack([sums.to(home.device, non_blocking=True) for part in parts for sums in part]).sum(0)
        home.others[0].copy_(total)
        kernels.finish(home)
