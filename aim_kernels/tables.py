"""The tables of one optimizer: rows, statistics, control. ``rows.py`` names their columns, docs/design.md explains
them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aim_kernels.philox import draw_phase
from aim_kernels.rows import CONTROL, PHASE_COLUMNS, PHASES, ROW, ROW_COLUMNS, STATISTICS_COLUMNS, neutral_row

_LIVE_COLUMNS = tuple(f"{phase}_live_{kind}" for phase in PHASES for kind in ("under", "well"))


class Tables:
    """Rows ``[G, 19]`` and statistics ``[G, 7]`` (float64), control ``[4]`` (int64), on one device.

    ``steps`` counts on the host, for what happens every so many steps only.

    Writers assign tensor elements, so a value may be a number or a 0-dim tensor on the device: no synchronization.
    """

    steps: int = 0

    def __init__(self, device: torch.device, seed: int) -> None:
        self.rows = torch.empty(0, len(ROW_COLUMNS), dtype=torch.float64, device=device)
        self.statistics = torch.empty(0, len(STATISTICS_COLUMNS), dtype=torch.float64, device=device)
        self.control = torch.tensor([seed, 0, 0, 0], dtype=torch.int64, device=device)
        # What the rows' live columns hold, as far as the host knows: looking at a device's rows would wait for it.
        self._live: list[dict[str, float]] = []
        self._always_live: list[bool] = []
        self._arrays: Any = None

    def add_groups(self, groups: list[tuple[float, bool]]) -> None:
        """Appends a neutral row for each ``(tau, always_live)``; the latter: as if its live columns always degraded."""
        self._always_live += [always_live for _, always_live in groups]
        self._live += [dict.fromkeys(_LIVE_COLUMNS, 1.0) for _ in groups]
        rows = [neutral_row(tau) for tau, _ in groups]
        made = torch.tensor(rows, dtype=torch.float64, device=self.rows.device).view(len(groups), len(ROW_COLUMNS))
        self.rows = torch.cat([self.rows, made])
        self.statistics = torch.cat([self.statistics, self.statistics.new_zeros(len(groups), len(STATISTICS_COLUMNS))])

    def set_columns(self, group: int, **columns: float | torch.Tensor) -> None:
        for name, value in columns.items():
            cell = self.rows[group, ROW[name]]
            # Not cell = value: for a number that copies from the host's memory, and waits for the device.
            if isinstance(value, torch.Tensor):
                cell.copy_(value.reshape(()))
            else:
                cell.fill_(value)
            if name in _LIVE_COLUMNS:
                unknown = isinstance(value, torch.Tensor) and value.device.type != "cpu"
                self._live[group][name] = float("nan") if unknown else float(value)

    def set_phase_row(self, group: int, phase: str, columns: dict[str, Any]) -> None:
        """Writes the six columns of one phase; columns not named become one."""
        self.set_columns(group, **{f"{phase}_{column}": columns.get(column, 1.0) for column in PHASE_COLUMNS})

    def has_live_weights(self, group: int) -> bool:
        """Whether a phase of this group degrades its live weights, or may: numbers in a device's memory are not looked
        at, and count as degrading."""
        return self._always_live[group] or any(value != 1.0 for value in self._live[group].values())

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Rows, statistics and control as numpy sees their memory; on a CPU."""
        # Kept for as long as the tensors are the same: making them takes some microseconds.
        current = (self.rows, self.statistics, self.control)
        if self._arrays is None or any(a is not b for a, b in zip(current, self._arrays[0], strict=True)):
            self._arrays = (current, (self.rows.numpy(), self.statistics.numpy(), self.control.numpy()))
        return self._arrays[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}  # a copy's arrays would be of no tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._always_live = [False] * len(state["_live"])  # an earlier release has none
        self.__dict__.update(state)

    def to(self, device: torch.device) -> None:
        """Moves the tables."""
        self.rows, self.statistics, self.control = (t.to(device) for t in (self.rows, self.statistics, self.control))

    def set_threshold(self, threshold: int) -> None:
        """The next phase is auxiliary where a 32-bit draw lies below it."""
        self.control[CONTROL["threshold"]].fill_(threshold)

    def phase(self) -> int:
        """Phase of the live weights now in the module: 0 true, 1 auxiliary."""
        return int(self.control[CONTROL["phase"]])

    def next_phase(self) -> int:
        """Phase of the live weights that the next step will write."""
        seed, counter, threshold, _ = self.control.tolist()
        return draw_phase(seed, counter, threshold)

    def public_row(self, group: int) -> dict[str, float]:
        """The nine columns as the next step will apply them."""
        row = self.rows[group].tolist()
        now, following = PHASES[self.phase()], PHASES[self.next_phase()]
        return {
            "grad_under": row[ROW["grad_under"]],
            "grad_well": row[ROW["grad_well"]],
            "step_under": row[ROW[f"{now}_step_under"]],
            "step_well": row[ROW[f"{now}_step_well"]],
            "live_under": row[ROW[f"{following}_live_under"]],
            "live_well": row[ROW[f"{following}_live_well"]],
            "tau_prev": row[ROW["tau_prev"]],
            "tau": row[ROW["tau"]],
            "noise": row[ROW["noise"]],
        }

    def to_lists(self, group: int) -> dict[str, list[float] | list[int]]:
        """What a checkpoint keeps of one group (plain numbers, so ``weights_only`` loading works)."""
        return {
            "modulation_row": self.rows[group].tolist(),
            "statistics_row": self.statistics[group].tolist(),
            "control": self.control.tolist(),
        }

    def check_lists(self, group: int, saved: dict[str, Any]) -> None:
        """Raises ValueError where a saved table has another number of columns than this version's."""
        tables = {"modulation_row": self.rows[group], "statistics_row": self.statistics[group], "control": self.control}
        for key, values in saved.items():
            if not all(isinstance(value, (int, float)) for value in values):
                raise ValueError(f"group {group}: the checkpoint's {key} is not a list of numbers")
            if len(values) != len(tables[key]):
                raise ValueError(
                    f"group {group}: the checkpoint's {key} has {len(values)} columns, this version's "
                    f"{len(tables[key])}; load it with the version that saved it"
                )

    def from_lists(self, group: int, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`to_lists`; keys that are absent leave the tables as they are."""
        if "modulation_row" in saved:
            self.rows[group] = torch.tensor(saved["modulation_row"], dtype=torch.float64)
            self._live[group] = {name: float(saved["modulation_row"][ROW[name]]) for name in _LIVE_COLUMNS}
        if "statistics_row" in saved:
            self.statistics[group] = torch.tensor(saved["statistics_row"], dtype=torch.float64)
        if "control" in saved:
            self.control.copy_(torch.tensor(saved["control"], dtype=torch.int64))
            self.steps = int(saved["control"][CONTROL["counter"]])
