"""True weights outlive the states they are kept in: whoever clears, replaces or deletes states while the module holds
degraded weights gets the true ones back into the module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.backends.reference import classes_of, live_weights
from aim_kernels.distributed import local_of, reshard_all
from aim_kernels.rows import ROW

if TYPE_CHECKING:
    from aim_kernels.optimizer import AIMFusedOptimizer

State = dict[str, Any]


class Masters:
    """The masters of an optimizer, known also after their states are gone."""

    def __init__(self) -> None:
        # The dict that a state is kept in, in which tensors may be replaced, and what was in it.
        self._kept: dict[Tensor, tuple[State, State]] = {}

    def note(self, state: dict[Tensor, State]) -> None:
        """Takes note of all masters that there are."""
        self._kept = {p: (own, dict(own)) for p, own in state.items() if isinstance(own, dict) and "master" in own}

    def lost(self, state: dict[Tensor, State]) -> list[tuple[Tensor, State]]:
        """Parameters whose master is gone, with the states that it was gone with; they are forgotten."""
        gone = [p for p in self._kept if "master" not in state.get(p, ())]
        pairs = [(p, *self._kept.pop(p)) for p in gone]
        return [(p, own if "master" in own else copied) for p, own, copied in pairs]


@torch.no_grad()
def restore(optimizer: AIMFusedOptimizer) -> None:
    """Puts true weights whose state is gone back into the module, before anything else is done with it.

    Elements that are no longer the live weights which the latest step wrote, since somebody has loaded or set others,
    stay as they are.
    """
    lost = optimizer._known_masters.lost(optimizer.state)
    if not lost:
        return
    optimizer._plan = None
    if optimizer._holds_true_weights or optimizer._in_true_pass:
        return
    tables = optimizer.tables
    place = {p: (number, group) for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    order = {p: index for index, p in enumerate(place)}
    for p, state in lost:
        local = {name: local_of(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        here, master = local_of(p), local["master"]
        if here.shape != master.shape or here.device != master.device:
            continue  # another tensor than the one whose weights these are
        true = master.to(here.dtype)
        if p in place:
            number, group = place[p]
            row = tables.rows[number].tolist()
            anchor = local.get("ema" if optimizer.anchor == "ema" and group["modulated"] else "anchor")
            emitted = (row[ROW["emitted_under"]], row[ROW["emitted_well"]])
            if "step" in local:
                under = classes_of(group, local, row, tables.control.tolist(), order[p])
            else:  # frozen: well-optimized as a whole
                under, emitted = None, (emitted[1], emitted[1])
            live = live_weights(master, anchor, under, emitted).to(here.dtype)
            true = torch.where((here == live) | (here.isnan() & live.isnan()), true, here)
        here.copy_(true)
    reshard_all(p for p, _ in lost)
