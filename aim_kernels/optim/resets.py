"""True weights outlive the states they are kept in, and the groups they belong to: whoever clears, replaces or deletes
states while the module holds degraded weights, or moves a parameter to another group, gets the true ones back into the
module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.backends.reference import classes_of, live_weights
from aim_kernels.step.layout import ROW
from aim_kernels.step.sharding import local_of, reshard_all
from aim_kernels.step.states import exponents_key, moments_of

if TYPE_CHECKING:
    from aim_kernels.optim.interface import FusedOptimizer

Group = dict[str, Any]
State = dict[str, Any]


class Masters:
    """The masters of an optimizer, known also after their states are gone, and the groups that they were of."""

    def __init__(self) -> None:
        # The group; the dict that a state is kept in, in which tensors may be replaced; and what was in it.
        self._kept: dict[Tensor, tuple[Group, State, State]] = {}

    def note(self, groups: list[Group], state: dict[Tensor, State]) -> None:
        """Takes note of all masters that there are."""
        self._kept = {
            p: (group, own, dict(own))
            for group in groups
            for p in group["params"]
            if isinstance(own := state.get(p), dict) and own.get("master") is not None
        }

    def astray(self, groups: list[Group], state: dict[Tensor, State]) -> list[tuple[Tensor, Group, State]]:
        """Parameters whose master is gone, or who left their group, with that group and their states; they are
        forgotten."""
        if not self._kept:
            return []
        present = {p: group for group in groups for p in group["params"]}
        gone = [
            p
            for p, (group, _, _) in self._kept.items()
            if present.get(p) is not group or state.get(p, {}).get("master") is None
        ]
        found = [(p, *self._kept.pop(p)) for p in gone]
        return [(p, group, own if own.get("master") is not None else copied) for p, group, own, copied in found]

    def all(self) -> list[tuple[Tensor, Group, State]]:
        """Every parameter that has a master, with its group and its states."""
        return [(p, group, own) for p, (group, own, _) in self._kept.items()]


def restore(optimizer: FusedOptimizer) -> list[Tensor]:
    """Puts true weights back into the module whose state is gone, or whose parameter is in another group now, before
    anything else is done with them. Returns the parameters."""
    astray = optimizer._weights.known.astray(optimizer.param_groups, optimizer.state)
    if astray:
        optimizer._plan = None
        _put_back(optimizer, astray)
    return [p for p, _, _ in astray]


def restore_all(optimizer: FusedOptimizer) -> None:
    """The same for all masters: their states are about to be replaced."""
    restore(optimizer)
    _put_back(optimizer, optimizer._weights.known.all())


def _readable(group: Group, state: State) -> bool:
    """Whether the moments are still what a step has made of them."""
    kept = [name for name in moments_of(group).values() if name in state]
    exponent_keys = [exponents_key(name) for name in kept if getattr(state[name], "dtype", None) == torch.uint8]
    return all(isinstance(state.get(name), Tensor) for name in (*kept, *exponent_keys))


@torch.no_grad()
def _put_back(optimizer: FusedOptimizer, masters: list[tuple[Tensor, Group, State]]) -> None:
    """Elements that are no longer the live weights which the latest step wrote, since somebody has loaded or set
    others, stay as they are."""
    if not masters or optimizer._weights.holds_true or optimizer._weights.in_true_pass:
        return
    order = {p: index for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    control = optimizer._tables.control.tolist()
    rows: dict[int, list[float] | None] = {}
    for p, group, state in masters:
        local = {name: local_of(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        here, master = local_of(p), local["master"]
        if here.shape != master.shape or here.device != master.device:
            continue  # another tensor than the one whose weights these are
        if id(group) not in rows:
            rows[id(group)] = optimizer._tables.row_of(group)
        row = rows[id(group)]
        true = master.to(here.dtype)
        if row is not None and _readable(group, local):
            anchor = local.get("ema" if optimizer.anchor == "ema" and group["modulated"] else "anchor")
            emitted = (row[ROW["emitted_under"]], row[ROW["emitted_well"]])
            if "step" in local:
                under = classes_of(group, local, row, control, order.get(p, 0))
            else:  # frozen: well-optimized as a whole
                under, anchor, emitted = None, None, (emitted[1], emitted[1])
            live = live_weights(master, anchor, under, emitted).to(here.dtype)
            true = torch.where((here == live) | (here.isnan() & live.isnan()), true, here)
        here.copy_(true)
    reshard_all(p for p, _, _ in masters)
