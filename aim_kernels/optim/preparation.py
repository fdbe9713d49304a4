"""What is done before a plan is made: the optimizer follows its module, and every parameter gets its states."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from aim_kernels.step import options, sharding, validation
from aim_kernels.step.ownership import drop_absent
from aim_kernels.step.states import arithmetic_dtype, is_frozen, make_states, master_of
from aim_kernels.step.supported import is_idle, primary_device

if TYPE_CHECKING:
    from aim_kernels.optim.interface import FusedOptimizer


def has_gradient(p: Tensor) -> bool:
    """Whether a parameter is about to be stepped."""
    return p.grad is not None


def estimate(optimizer: FusedOptimizer) -> None:
    """A step of shapes without numbers (FakeTensorMode): there are states after it, and nothing is computed."""
    for number, group in enumerate(optimizer.param_groups):
        options.check_hyperparameters(group, number)
    ensure_states(optimizer)
    if optimizer.max_grad_norm is not None:
        given = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        optimizer.grad_norm = given[0].new_zeros((), dtype=arithmetic_dtype(given[0].dtype))


def ensure_states(
    optimizer: FusedOptimizer, is_stepped: Callable[[Tensor], bool] = has_gradient, *, masters: bool = True
) -> None:
    """States of parameters that meet their first gradient, and masters where live weights are to exist."""
    tables = optimizer.tables
    primary = tables.rows.device
    for number, group in enumerate(optimizer.param_groups):
        live = tables.has_live_weights(number)
        # Also of parameters that meet no gradient now: once there is a plan, nobody asks again.
        params = [p for p in group["params"] if live or is_stepped(p) or "step" in optimizer.state.get(p, ())]
        if tables.degrades(number):
            validation.check_degradable(optimizer.param_groups, number, primary)
        params = [p for p in params if not is_idle(p, primary)]
        if live:
            stays = {p: not is_stepped(p) and is_frozen(p, optimizer.state.get(p, {})) for p in params}
            params = [p for p in params if not stays[p]]
            for p, frozen in stays.items():
                if frozen and masters and not optimizer.state.get(p):
                    optimizer.state[p] = {"master": master_of(p)}
        ensure_group_states(optimizer, group, params, live=live, masters=masters)
        if not live and optimizer._weights.superfluous(number):
            optimizer._weights.leaving.add(number)
    optimizer._weights.known.note(optimizer.param_groups, optimizer.state)


def ensure_group_states(
    optimizer: FusedOptimizer, group: dict[str, Any], params: list[Tensor], *, live: bool, masters: bool = True
) -> None:
    """The states of some parameters of one group, as its options ask for them."""
    make_states(group, params, optimizer.state, live=live, masters=masters)
    for p in params:
        if p in optimizer._anchors:
            optimizer.state[p]["anchor"] = optimizer._anchors.pop(p)


def sync_with_module(optimizer: FusedOptimizer) -> None:
    """Follows what changed outside since the last look: a moved module, tables that came back, options."""
    primary = primary_device(p for group in optimizer.param_groups for p in group["params"])
    if primary is not None and primary != optimizer.tables.rows.device:  # the module was moved
        optimizer.tables.to(primary)
    optimizer._weights.restore_astray()
    if optimizer.process_group is sharding.Absent.PROCESS_GROUP:
        raise RuntimeError(
            "a process group is neither pickled nor copied: assign optimizer.process_group before the next step"
        )
    validation.check_flag("zero_grad_in_step", optimizer.zero_grad_in_step)
    validation.check_whole("sync_every", optimizer.sync_every, 1)
    earlier: dict[int, int] = {}
    for number, group in enumerate(optimizer.param_groups):
        options.check_hyperparameters(group, number)
        validation.check_measure(group, number, optimizer.backend)
        validation.check_anchor(group, number, optimizer.anchor)
        validation.check_parameters(group, number, group["params"], optimizer._tables.rows.device, earlier)
        earlier.update(dict.fromkeys(map(id, group["params"]), number))
    validation.check_meshes(optimizer.param_groups, optimizer.process_group)
    if optimizer.process_group is not None or sharding.any_dtensor(optimizer.param_groups):
        validation.check_noise(optimizer.param_groups, optimizer.process_group, sharding.noisy_groups(optimizer.tables))
    validation.check_states(optimizer.param_groups, optimizer.state)
    drop_absent(optimizer.param_groups, optimizer.state)
    for p, anchor in optimizer._anchors.items():
        if anchor.device != p.device and anchor.shape == p.shape:
            optimizer._anchors[p] = anchor.to(p.device)
    anchors = {p: {"anchor": anchor} for p, anchor in optimizer._anchors.items()}
    validation.check_states(optimizer.param_groups, anchors, "make a new optimizer, of the weights as they are now")
