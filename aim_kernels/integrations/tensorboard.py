"""Statistics and AIM's tables as scalars, for TensorBoard's ``SummaryWriter`` or anything else that has
``add_scalar``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from aim_kernels.aim.accuracies import ALL
from aim_kernels.aim.strengths import ModulationTable
from aim_kernels.optim.modulation import unwrapped
from aim_kernels.step.layout import ROW

#: The entries of ``optimizer.statistics()`` that are written.
MEASURED = ("under_fraction", "threshold", "grad_norm", "update_norm", "param_norm", "nonfinite")


class Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


def statistics_scalars(optimizer: Any) -> dict[str, float]:
    """Tag to number: what the latest step measured in each group, and the strength of each block.

    Tags are ``aim/<modality>/<depth>/<name>`` for the modulated weights of a block, ``aim/<modality>/<depth>/rest/...``
    for its biases and normalization, ``aim/group<number>/...`` for plain groups. ``strength`` is what the auxiliary
    phase takes from well-optimized weights, ``1 - live_well``; only modulated groups have one. NaN is left out. Waits
    for the device. ``optimizer`` may be wrapped by Accelerate or Lightning.
    """
    optimizer = unwrapped(optimizer)
    live_well = optimizer.tables.rows[:, ROW["aux_live_well"]].tolist()
    scalars: dict[str, float] = {}
    for number, (group, row) in enumerate(zip(optimizer.param_groups, optimizer.statistics(), strict=True)):
        tag = f"aim/group{number}"
        if row["modality"] is not None:
            tag = f"aim/{row['modality']}/{row['depth']}" + ("" if group["modulated"] else "/rest")
        scalars |= {f"{tag}/{name}": float(row[name]) for name in MEASURED}
        if group["modulated"]:
            scalars[f"{tag}/strength"] = 1.0 - live_well[number]
    return {tag: value for tag, value in scalars.items() if not math.isnan(value)}


def update_scalars(table: ModulationTable) -> dict[str, float]:
    """Tag to number: ``aim/<modality>/<depth>/score``, ``held_out_score`` (where there was one), ``excess`` and
    ``kappa`` of one :meth:`AIM.update`."""
    columns = {
        "score": table.scores,
        "held_out_score": table.held_out_scores,
        "excess": table.excess,
        "kappa": table.kappa,
    }
    return {
        f"aim/{modality}/{depth}/{name}": value
        for name, cells in columns.items()
        if cells is not None
        for modality, row in cells.items()
        for depth, value in enumerate(row)
        if not math.isnan(value)
    }


def accuracy_scalars(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Tag to number: ``aim/<modality>/accuracy_alone`` and ``aim/accuracy`` of :func:`unimodal_accuracies`."""
    return {"aim/accuracy" if m == ALL else f"aim/{m}/accuracy_alone": value for m, value in accuracies.items()}


def write_statistics(writer: Writer, optimizer: Any, step: int) -> None:
    """Writes :func:`statistics_scalars` at ``step``; call it every so many steps, since it waits for the device."""
    for tag, value in statistics_scalars(optimizer).items():
        writer.add_scalar(tag, value, step)


def write_update(writer: Writer, table: ModulationTable, step: int) -> None:
    """Writes :func:`update_scalars` of what ``aim.update`` returned, at ``step``."""
    for tag, value in update_scalars(table).items():
        writer.add_scalar(tag, value, step)
