"""Mixing of auxiliary blocks into training: the rows of each ``mixing``, and the two passes of "split"."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.aim.strengths import ModulationTable

if TYPE_CHECKING:
    from aim_kernels.aim.aim import AIM

#: Columns of a block that does not learn, by ``hold``: its gradient counts as zero, or it stays as it is.
_HELD = {
    "fade": {"grad_under": 0.0, "grad_well": 0.0},
    "freeze": {"grad_under": 0.0, "grad_well": 0.0, "step_under": 0.0, "step_well": 0.0},
}


def stimulus(aim: AIM, table: ModulationTable, group: dict[str, Any]) -> dict[str, float]:
    """``step_under`` of a weak modality's modulated group where ``decouple="all"``."""
    modality = group.get("modality")
    if aim.decouple != "all" or modality not in table.weak or not group.get("modulated"):
        return {}
    return {"step_under": 1.0 + aim.beta * table.weak_kappa[modality][group["depth"]]}


def _write_alternate(aim: AIM, table: ModulationTable) -> None:
    held = _HELD[aim.hold]
    for index, group in enumerate(aim.optimizer.param_groups):
        modality = group.get("modality")
        true: dict[str, float] = {}
        aux: dict[str, float] = {}
        if modality in table.dominant:
            # biases and normalization have no classes, but they are held with their block
            aux = dict(held)
            if group.get("modulated"):
                aux |= {"live_under": 1.0, "live_well": 1.0 - table.kappa[modality][group["depth"]]}
                if aim.learn_dominant_in_aux == "under":
                    aux |= {"grad_under": 1.0, "step_under": 1.0}
        elif modality in table.weak:
            aux = stimulus(aim, table, group)
            true = dict(aux) if aim.learn_weak_in_true_phase else {**aux, **held}
        elif modality is None and table.dominant and aim.head_from != "average":
            (true if aim.head_from == "auxiliary" else aux).update(held)
        aim.optimizer.set_phase_rows(index, true=true, aux=aux)
    aim.optimizer.set_phases(_probability(aim, table) if table.dominant else 0.0)


def _probability(aim: AIM, table: ModulationTable) -> float:
    """Of the auxiliary phase: given, or the greatest strength of a dominant modality's blocks."""
    if not isinstance(aim.probability, str):
        return aim.probability
    return max(kappa for modality in table.dominant for kappa in table.kappa[modality])


def _write_split(aim: AIM, table: ModulationTable) -> None:
    for index, group in enumerate(aim.optimizer.param_groups):
        row = stimulus(aim, table, group)
        if group.get("modality") in table.dominant and group.get("modulated"):
            row = {"live_well": 1.0 - table.kappa[group["modality"]][group["depth"]]}
        aim.optimizer.set_phase_rows(index, true=row, aux=row)
    # With equal rows the phase only tells what the module holds.
    aim.optimizer.set_phases(1.0 if table.dominant else 0.0)


def _write_weights(aim: AIM, table: ModulationTable) -> None:
    aim.optimizer.set_phases(0.0)
    for index, group in enumerate(aim.optimizer.param_groups):
        modality, depth = group.get("modality"), group.get("depth")
        if modality is None or not group.get("modulated"):
            continue
        if modality in table.dominant:
            aim.optimizer.set_strength(modality, depth, table.kappa[modality][depth], coefficients=aim.coefficients)
        else:
            row = stimulus(aim, table, group)
            aim.optimizer.set_phase_rows(index, true=row, aux=row)


def _write_features(aim: AIM, table: ModulationTable) -> None:
    aim.optimizer.set_phases(0.0)
    for index, group in enumerate(aim.optimizer.param_groups):
        row = stimulus(aim, table, group)
        aim.optimizer.set_phase_rows(index, true=row, aux=row)


#: Writers of rows, by ``mixing``.
WRITERS: dict[str, Callable[[AIM, ModulationTable], None]] = {
    "alternate": _write_alternate,
    "split": _write_split,
    "weights": _write_weights,
    "features": _write_features,
}

# -- two passes -------------------------------------------------------------------------------------------------------

#: What gets through a pass of "split": (auxiliary, true), by ``head_from``, of the parameters of no modality.
_HEAD = {"average": (0.5, 0.5), "true": (0.0, 1.0), "auxiliary": (1.0, 0.0)}


def _scaled(factor: float) -> Callable[[Tensor], Tensor]:
    # Not grad * 0: what overflowed in a pass that does not count must not come through as NaN.
    return torch.zeros_like if factor == 0.0 else lambda grad: grad * factor


@contextlib.contextmanager
def _routed(aim: AIM, table: ModulationTable, auxiliary: bool) -> Iterator[None]:
    """Inside, each parameter's gradient is multiplied by its share of this pass as it comes, before it is added to
    ``grad``: so gradients accumulate, are scaled and are exchanged between processes as ever."""
    handles = []
    for group in aim.optimizer.param_groups:
        modality = group.get("modality")
        if modality is None:
            share = _HEAD[aim.head_from][0 if auxiliary else 1]
        else:
            share = float((modality in table.dominant) != auxiliary)
        factor = share * aim.auxiliary_weight if auxiliary else share
        if factor != 1.0:
            handles += [p.register_hook(_scaled(factor)) for p in group["params"] if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_exchange(model: Any) -> contextlib.AbstractContextManager[Any]:
    """DDP exchanges what has accumulated, so only the last pass of a step need do it."""
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()


def backward(aim: AIM, closure: Callable[[], Tensor], run: Callable[[Tensor], Any]) -> Tensor:
    """:meth:`AIM.backward`."""
    optimizer = aim.optimizer
    table = aim.history[-1] if aim.history else None
    if aim.mixing == "split":
        optimizer.refuse_passes()
        if table is not None and table.dominant:
            optimizer.begin_live_pass()
            with _without_exchange(aim.wrapped), _routed(aim, table, True), torch.enable_grad():
                run(closure())
            optimizer.begin_true_pass()
            with _routed(aim, table, False), torch.enable_grad():
                loss = closure()
                run(loss)
            return loss.detach()
        if any(earlier.dominant for earlier in aim.history):
            # The module may still hold what the last dominant table made of it.
            optimizer.begin_true_pass()
    with torch.enable_grad():
        loss = closure()
        run(loss)
    return loss.detach()
