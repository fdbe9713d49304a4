"""The tables of one optimizer: rows, statistics, control. ``layout.py`` names their columns, docs/design.md explains
them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from aim_kernels.step.layout import CONTROL, PHASE_COLUMNS, PHASES, ROW, ROW_COLUMNS, STATISTICS_COLUMNS, neutral_row
from aim_kernels.step.philox import draw_phase

#: Under which keys a checkpoint has them in each param group. In the groups of an optimizer they are there and None.
KEYS = ("modulation_row", "statistics_row", "control")

Group = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")

_LIVE_COLUMNS = tuple(f"{phase}_live_{side}" for phase in PHASES for side in ("under", "well"))


def _outside_modes(method: Callable[P, T]) -> Callable[P, T]:
    """A table holds numbers also inside of FakeTensorMode and its like, which would make shapes of them."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not is_in_torch_dispatch_mode():
            return method(*args, **kwargs)
        with _disable_current_modes():
            return method(*args, **kwargs)

    return wrapped


class Tables:
    """Rows ``[G, 19]`` and statistics ``[G, 7]`` (float64), control ``[4]`` (int64), on one device.

    ``steps`` counts on the host, for what happens every so many steps only.

    Writers assign tensor elements, so a value may be a number or a 0-dim tensor on the device: no synchronization.
    """

    steps: int = 0

    #: The group dicts whose rows these are, in the order of the rows, and the rows of groups that were taken out of the
    #: list of groups, with them: whoever comes back finds its own.
    groups: list[Group]
    _away: list[tuple[Group, Tensor, Tensor, dict[str, float], bool]]

    @_outside_modes
    def __init__(self, device: torch.device, seed: int) -> None:
        self.rows = torch.empty(0, len(ROW_COLUMNS), dtype=torch.float64, device=device)
        self.statistics = torch.empty(0, len(STATISTICS_COLUMNS), dtype=torch.float64, device=device)
        self.control = torch.tensor([seed, 0, 0, 0], dtype=torch.int64, device=device)
        # What the rows' live columns hold, as far as the host knows: looking at a device's rows would wait for it.
        self._live: list[dict[str, float]] = []
        self._always_live: list[bool] = []
        self._arrays: Any = None
        self.groups, self._away = [], []

    @_outside_modes
    def add_groups(self, groups: list[tuple[Group, float, bool]]) -> None:
        """Appends a neutral row for each ``(dict, tau, always_live)``; the latter: as if its live columns always
        degraded."""
        self.groups += [group for group, _, _ in groups]
        self._always_live += [always_live for _, _, always_live in groups]
        self._live += [dict.fromkeys(_LIVE_COLUMNS, 1.0) for _ in groups]
        rows = [neutral_row(tau) for _, tau, _ in groups]
        made = torch.tensor(rows, dtype=torch.float64, device=self.rows.device).view(len(groups), len(ROW_COLUMNS))
        self.rows = torch.cat([self.rows, made])
        self.statistics = torch.cat([self.statistics, self.statistics.new_zeros(len(groups), len(STATISTICS_COLUMNS))])

    def are_of(self, groups: list[Group]) -> bool:
        """Whether the rows are those of the groups in a list, in its order."""
        return len(groups) == len(self.groups) and all(map(operator.is_, groups, self.groups))

    @_outside_modes
    def row_of(self, group: Group) -> list[float] | None:
        """The row of a group dict, also of one that was taken out of the list; None if it has none."""
        for number, known in enumerate(self.groups):
            if known is group:
                return self.rows[number].tolist()
        return next((row.tolist() for known, row, *_ in self._away if known is group), None)

    @_outside_modes
    def follow(self, groups: list[Group], begin: Callable[[Group], tuple[float, bool]]) -> None:
        """Puts the rows into the order in which their groups now stand in a list.

        A group is the same as before if its dict is, or if it has all the parameters of a dict that has left the list
        (frameworks copy groups); others begin with a neutral row.

        Args:
            begin: threshold, and ``always_live``, of a group that is new.
        """
        present = zip(self.groups, self.rows, self.statistics, self._live, self._always_live, strict=True)
        known = [*present, *self._away]
        by_dict = {id(entry[0]): number for number, entry in reversed(list(enumerate(known)))}
        staying = {by_dict[id(group)] for group in groups if id(group) in by_dict}
        by_params = {_identities(known[n][0]): n for n in reversed(range(len(known))) if n not in staying}
        rows, statistics = [], []
        live, always = self._live, self._always_live = [], []
        used = set()
        for group in groups:
            number = by_dict.get(id(group), by_params.get(_identities(group)) if group["params"] else None)
            if number is None:
                tau, always_live = begin(group)
                row = torch.tensor(neutral_row(tau), dtype=torch.float64, device=self.rows.device)
                found = (row, torch.zeros_like(self.statistics[0:1].sum(0)), dict.fromkeys(_LIVE_COLUMNS, 1.0))
                entry: Any = (group, *found, always_live)
            else:
                entry = known[number]
                used.add(number)
            rows.append(entry[1].clone())
            statistics.append(entry[2].clone())
            live.append(dict(entry[3]))
            always.append(entry[4])
        self._away = [(e[0], e[1].clone(), e[2].clone(), *e[3:]) for n, e in enumerate(known) if n not in used]
        self.groups = list(groups)
        for name, table in (("rows", rows), ("statistics", statistics)):
            old = getattr(self, name)
            new = torch.stack(table) if table else old[:0].clone()
            # In place if it fits: graphs and views hold the tensor.
            setattr(self, name, old.copy_(new) if old.shape == new.shape else new)

    @_outside_modes
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

    @_outside_modes
    def set_phase_row(self, group: int, phase: str, columns: dict[str, Any]) -> None:
        """Writes the six columns of one phase; columns not named become one."""
        self.set_columns(group, **{f"{phase}_{column}": columns.get(column, 1.0) for column in PHASE_COLUMNS})

    def has_live_weights(self, group: int) -> bool:
        """Whether a phase of this group degrades its live weights, or may: numbers in a device's memory are not looked
        at, and count as degrading."""
        return self._always_live[group] or self.degrades(group)

    def degrades(self, group: int) -> bool:
        """The same, whether or not masters are kept at all times."""
        return any(value != 1.0 for value in self._live[group].values())

    def live_columns(self) -> list[dict[str, float]]:
        """What the rows' live columns hold, as far as the host knows, per group; a copy."""
        return [dict(columns) for columns in self._live]

    def set_live_columns(self, columns: list[dict[str, float]]) -> None:
        """Goes back to what :meth:`live_columns` returned, as the rows have gone back."""
        self._live = [dict(of_group) for of_group in columns]

    def keeps_masters(self, group: int) -> bool:
        """Whether the group's masters stay where nothing is degraded."""
        return self._always_live[group]

    @_outside_modes
    def lists(self) -> tuple[list[list[float]], list[list[float]]]:
        """Rows and statistics as numbers; waits for a device."""
        return self.rows.tolist(), self.statistics.tolist()

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Rows, statistics and control as numpy sees their memory; on a CPU."""
        # Kept for as long as the tensors are the same: making them takes some microseconds.
        if self._arrays is not None:
            (rows, statistics, control), arrays = self._arrays
            if rows is self.rows and statistics is self.statistics and control is self.control:
                return arrays
        arrays = (self.rows.numpy(), self.statistics.numpy(), self.control.numpy())
        self._arrays = ((self.rows, self.statistics, self.control), arrays)
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}  # a copy's arrays would be of no tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @_outside_modes
    def to(self, device: torch.device) -> None:
        """Moves the tables."""
        self.rows, self.statistics, self.control = (t.to(device) for t in (self.rows, self.statistics, self.control))

    @_outside_modes
    def set_draw_limit(self, limit: int) -> None:
        """The next phase is auxiliary where a 32-bit draw lies below it."""
        self.control[CONTROL["threshold"]].fill_(limit)

    @_outside_modes
    def phase(self) -> int:
        """Phase of the live weights now in the module: 0 true, 1 auxiliary."""
        return int(self.control[CONTROL["phase"]])

    @_outside_modes
    def next_phase(self) -> int:
        """Phase of the live weights that the next step will write."""
        seed, counter, limit, _ = self.control.tolist()
        return draw_phase(seed, counter, limit)

    @_outside_modes
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

    @_outside_modes
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
            numeric = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
            if not numeric:
                raise ValueError(f"group {group}: the checkpoint's {key} is not a list of numbers")
            if len(values) != len(tables[key]):
                raise ValueError(
                    f"group {group}: the checkpoint's {key} has {len(values)} columns, this version's "
                    f"{len(tables[key])}; load it with the version that saved it"
                )

    @_outside_modes
    def from_lists(self, group: int, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`to_lists`; keys that are absent leave the tables as they are."""
        if "modulation_row" in saved:
            self.rows[group] = torch.tensor(saved["modulation_row"], dtype=torch.float64, device=self.rows.device)
            self._live[group] = {name: float(saved["modulation_row"][ROW[name]]) for name in _LIVE_COLUMNS}
        if "statistics_row" in saved:
            row = torch.tensor(saved["statistics_row"], dtype=torch.float64, device=self.statistics.device)
            self.statistics[group] = row
        if "control" in saved:
            self.control.copy_(torch.tensor(saved["control"], dtype=torch.int64, device=self.control.device))
            self.steps = int(saved["control"][CONTROL["counter"]])


def _identities(group: Group) -> tuple[int, ...]:
    return tuple(map(id, group["params"]))
