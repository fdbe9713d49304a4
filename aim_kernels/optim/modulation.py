"""The modulation API, which sets strengths, rows and phases and reads statistics: the part of ``AIMFusedOptimizer``
that no step runs through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.optim.torch_compile import outside_graphs
from aim_kernels.optim.weights import HeldWeights
from aim_kernels.step import validation
from aim_kernels.step.layout import PHASE_COLUMNS, PHASES, ROW, STATISTIC
from aim_kernels.step.states import has_classes
from aim_kernels.step.supported import numel_of
from aim_kernels.step.tables import Tables


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of training frameworks (Accelerate, Lightning), which keep it as
    ``optimizer``."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


class Modulated(torch.optim.Optimizer):
    """An optimizer with a row, and statistics, for each param group."""

    process_group: Any
    keep_masters: bool
    _tables: Tables
    _weights: HeldWeights

    @property
    def tables(self) -> Tables:
        """Rows, statistics and control; a row belongs to its group, wherever that stands in ``param_groups``."""
        self._follow_groups()
        return self._tables

    def _follow_groups(self) -> None:
        if not self._tables.are_of(self.param_groups):
            self._refuse_open_step("editing param_groups")
            self._weights.restore_astray()
            self._tables.follow(self.param_groups, self._begin_row)
            self._reset()

    def _begin_row(self, group: dict[str, Any]) -> tuple[float, bool]:
        """Threshold of a group's first row, and whether it has masters at all times."""
        how, value = group["under_optimized"]
        return float(value) if how == "absolute" else 0.0, bool(self.keep_masters and group["modulated"])

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning's wrapper imitates the class, so that our methods run with the wrapper as self: reading falls
        # through to the wrapped optimizer, and what they write has to get there as well.
        wrapped = self.__dict__.get("_optimizer")
        target = wrapped if isinstance(wrapped, Modulated) and name in wrapped.__dict__ else self
        object.__setattr__(target, name, value)

    if TYPE_CHECKING:  # optimizer.py has them

        def _reset(self) -> None: ...
        def _refuse_open_step(self, call: str) -> None: ...

    @outside_graphs
    def set_strength(self, modality: str, depth: int, kappa: float | Tensor, coefficients: str = "chain") -> None:
        """Turns a block into its Auxiliary Block of strength ``kappa``, in both phases (docs/design.md).

        The next step emits ``live = anchor + (theta - anchor) * (1 if under else 1 - kappa)``.

        Args:
            modality, depth: the block, as in its param group.
            kappa: in [0, 1); 0 undoes it. A 0-dim tensor on the parameters' device is taken without waiting for it.
            coefficients: how the gradient of a well-optimized element follows: "chain" (times 1 - kappa, the
                chain rule), "straight-through" (unchanged), "step" (unchanged, but its step is scaled by 1 - kappa).

        Raises:
            ValueError: no such block, kappa outside [0, 1), or unknown coefficients.
        """
        validation.check_kappa(kappa)
        keep = 1.0 - (kappa if isinstance(kappa, Tensor) else float(kappa))
        row: dict[str, Any] = {"live_well": keep}
        if coefficients == "chain":
            row["grad_well"] = keep
        elif coefficients == "step":
            row["step_well"] = keep
        elif coefficients != "straight-through":
            raise ValueError(f"coefficients: expected 'chain', 'straight-through' or 'step', got {coefficients!r}")
        for number in self._block(modality, depth):
            self.set_phase_rows(number, true=row, aux=row)

    @outside_graphs
    def set_modulation(self, group: int | tuple[str, int], **columns: float | Tensor) -> None:
        """Writes columns of a row by hand; they hold in both phases, from the next step on.

        With all four ``grad_*`` and ``step_*`` at zero the block is held: weights (their decay too), moments, threshold
        and step counts stay as they are. With ``grad_*`` at zero alone momentum goes on and moments fade.

        Args:
            group: index of a param group, or the (modality, depth) of a block.
            columns: any of grad_under, grad_well, step_under, step_well, live_under, live_well, tau_prev, tau, noise.

        Raises:
            ValueError: no such group, an unknown column, a value that it cannot hold, or noise for a DTensor whose
                part here is not a run of consecutive elements.
        """
        validation.check_columns(columns)
        numbers = self._block(*group) if isinstance(group, tuple) else [self._group_number(group)]
        for number in numbers:
            self._check_state_suffices(number, columns)
            if validation.may_differ(columns.get("noise", 0.0), 0.0):
                validation.check_noise(self.param_groups, self.process_group, {number})
        for number in numbers:
            written: dict[str, Any] = {}
            for column, value in columns.items():
                if column in PHASE_COLUMNS:
                    written |= {f"{phase}_{column}": value for phase in PHASES}
                if column not in PHASE_COLUMNS or column.startswith("grad"):
                    written[column] = value
            self.tables.set_columns(number, **written)
            self._weights.note(number)

    @outside_graphs
    def set_phase_rows(
        self, group: int, *, true: dict[str, Any] | None = None, aux: dict[str, Any] | None = None
    ) -> None:
        """Writes what holds in the true and in the auxiliary phase; columns not named become one.

        Live columns shape the next emission; the gradient columns take effect one step later, when the live weights
        they belong to are those that the forward pass saw.
        """
        number = self._group_number(group)
        for row in (true or {}, aux or {}):
            validation.check_columns(row, PHASE_COLUMNS)
            self._check_state_suffices(number, row)
        self.tables.set_phase_row(number, "true", true or {})
        self.tables.set_phase_row(number, "aux", aux or {})
        self._weights.note(number)

    @outside_graphs
    def set_phases(self, probability: float) -> None:
        """Probability of drawing the auxiliary phase for the next forward pass; 0: always the true one."""
        validation.check_number("probability", probability, 0.0, 1.0)
        self.tables.set_draw_limit(round(probability * 2**32))

    @property
    def phase(self) -> str:
        """Phase of the live weights that the module holds: "true" or "auxiliary"."""
        return ("true", "auxiliary")[self.tables.phase()]

    @outside_graphs
    def modulation(self) -> list[dict[str, Any]]:
        """The rows as the next step will apply them, one dict a group."""
        tables = self.tables
        return [
            {"modality": group["modality"], "depth": group["depth"], **tables.public_row(number)}
            for number, group in enumerate(self.param_groups)
        ]

    @outside_graphs
    def statistics(self) -> list[dict[str, Any]]:
        """What the latest step measured, one dict a group. The only call that waits for the device.

        Keys: modality, depth, numel, under_fraction (share of under-optimized elements; NaN where the group keeps no
        optimization state or has not been stepped), threshold (tau), grad_norm (of the gradients as given; unscaled and
        clipped where the step does that), update_norm (of what the step subtracted), param_norm (of the true weights),
        nonfinite (NaN and infinite gradient elements). Norms are L2.
        """
        rows, sums = self.tables.lists()
        result = []
        for number, group in enumerate(self.param_groups):
            row, total = rows[number], sums[number]
            stepped = total[STATISTIC["numel"]]
            result.append(
                {
                    "modality": group["modality"],
                    "depth": group["depth"],
                    "numel": sum(map(numel_of, group["params"])),
                    "under_fraction": total[STATISTIC["under"]] / stepped if stepped else float("nan"),
                    "threshold": row[ROW["tau"]],
                    "grad_norm": total[STATISTIC["grad_sq"]] ** 0.5,
                    "update_norm": total[STATISTIC["update_sq"]] ** 0.5,
                    "param_norm": total[STATISTIC["param_sq"]] ** 0.5,
                    "nonfinite": int(total[STATISTIC["nonfinite"]]),
                }
            )
        return result

    def _block(self, modality: str, depth: int) -> list[int]:
        found = [
            number
            for number, group in enumerate(self.param_groups)
            if group["modality"] == modality and group["depth"] == depth and group["modulated"]
        ]
        if not found:
            blocks = sorted({(g["modality"], g["depth"]) for g in self.param_groups if g["modulated"]}, key=str)
            raise ValueError(f"no modulated block {(modality, depth)!r}; the blocks are {blocks}")
        return found

    def _group_number(self, group: int) -> int:
        if not isinstance(group, int) or not 0 <= group < len(self.param_groups):
            raise ValueError(f"no param group {group!r}; there are {len(self.param_groups)}, numbered from 0")
        return group

    def _check_state_suffices(self, number: int, columns: dict[str, Any]) -> None:
        group = self.param_groups[number]
        if has_classes(group):
            return
        row = {**dict.fromkeys(PHASE_COLUMNS, 1.0), **columns}
        for stage in ("grad", "step", "live"):
            if row[f"{stage}_under"] is not row[f"{stage}_well"] and row[f"{stage}_under"] != row[f"{stage}_well"]:
                raise ValueError(
                    f"group {number}: {stage}_under and {stage}_well differ, but under rule {group['rule']!r} a "
                    "group that is not modulated keeps no optimization state; give the group modulated=True"
                )
