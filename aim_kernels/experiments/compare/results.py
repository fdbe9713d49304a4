"""The comparison's folder: results.csv grows by a line a run, everything else is drawn from it."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from aim_kernels.aim.strengths import ModulationTable
from aim_kernels.bench.report import append_csv
from aim_kernels.command_line import OtherVersionError, make_folder, write_text
from aim_kernels.experiments.compare.contestants import ALONE, TUNING_SEEDS, contestant
from aim_kernels.experiments.compare.training import Line, Run
from aim_kernels.experiments.data import DATA_SETS


class Folder:
    """Reads and writes one output folder. A run counts as done once its line in results.csv is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path / "results.csv"

    def make(self) -> None:
        """Makes the folder where it is missing: not before there is something to put into it."""
        make_folder(self.path / "history")

    def lines(self) -> list[Line]:
        """The finished runs, as the contestants are now configured. A line that an interruption cut short, and one of
        another configuration, is left out, and its run done again.

        Raises :class:`OtherVersionError` where the file has other columns.
        """
        if not self.file.exists() or not self.file.stat().st_size:
            return []
        types = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Line)}
        found = []
        header, *texts = self.file.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if header != ",".join(types):
            raise OtherVersionError(f"{self.file} is of another version; give another folder, or move it away")
        # One by one: a quote that was cut off would swallow the next line.
        for text in texts:
            try:
                (row,) = csv.reader([text], strict=True)
                line = Line(**{n: read(value) for (n, read), value in zip(types.items(), row, strict=True)})
                if contestant(line.contestant).options(line.choice) == line.options:
                    found.append(line)
            except (csv.Error, ValueError):
                continue
        return found

    def add(self, line: Line, history: list[dict[str, Any]]) -> None:
        """The history first: a line in results.csv promises that it is there."""
        self.make()
        if history:
            write_text(self._history_file(line.run), json.dumps(history))
        append_csv(self.file, [line], Line)

    def history(self, run: Run) -> list[ModulationTable]:
        file = self._history_file(run)
        return [ModulationTable.from_dict(table) for table in json.loads(file.read_text())] if file.exists() else []

    def _history_file(self, run: Run) -> Path:
        network = "" if (run.backbone, run.width) == ("auto", 64) else f"-{run.backbone}{run.width}"
        name = f"{run.data}{network}-{run.contestant}-{run.choice}-seed{run.seed}-epochs{run.epochs}"
        return self.path / "history" / f"{name.replace(' ', '').replace(':', '')}.json"


def tuned(lines: Iterable[Line], runs: Iterable[Run]) -> dict[tuple[str, str], int]:
    """The configuration of each (data, contestant) of tuning ``runs`` with the best mean validation accuracy over the
    tuning seeds; the default where two are equal."""
    wanted = set(runs)
    found: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
    for line in lines:
        if line.run in wanted:
            found.setdefault((line.data, line.contestant), {}).setdefault(line.choice, {})[line.seed] = line.validation
    best = {}
    for key, choices in found.items():
        complete = {c: statistics.fmean(v.values()) for c, v in choices.items() if len(v) == len(TUNING_SEEDS)}
        if complete:
            best[key] = max(sorted(complete), key=lambda choice, of=complete: of[choice])  # type: ignore[misc]
    return best


def alone(data: str) -> list[str]:
    """The contestants that are one encoder of a data set by itself."""
    return [f"{ALONE}{modality}" for modality in DATA_SETS[data].modalities]


def tuning_runs(
    data: Sequence[str], names: Sequence[str], epochs: int | None, backbone: str = "auto", width: int = 64
) -> list[Run]:
    """Every configuration of those that have a choice, on the tuning seeds."""
    return [
        Run(d, name, choice, seed, epochs or DATA_SETS[d].epochs, backbone, width)
        for seed in TUNING_SEEDS
        for d in data
        for name in names
        if len(contestant(name).grid) > 1
        for choice in range(len(contestant(name).grid))
    ]


def seed_runs(
    data: Sequence[str],
    names: Sequence[str],
    seeds: int,
    epochs: int | None,
    choices: dict[tuple[str, str], int],
    backbone: str = "auto",
    width: int = 64,
) -> list[Run]:
    """Seed by seed, so that every comparison is complete as early as can be."""
    return [
        Run(d, name, choices.get((d, name), 0), seed, epochs or DATA_SETS[d].epochs, backbone, width)
        for seed in range(seeds)
        for d in data
        for name in (*names, *alone(d))
    ]
