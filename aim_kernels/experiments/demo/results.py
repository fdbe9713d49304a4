"""The demo's output folder: results.csv grows by a line a run, everything else is drawn from it."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aim_kernels.aim.strengths import ModulationTable
from aim_kernels.command_line import OtherVersionError, append_lines, make_folder, write_text
from aim_kernels.experiments.demo.trainer import DATA, METHODS, Run

TEXT = ("data", "method", "device")
WHOLE = ("seed", "epochs")
NUMBERS = ("test", "validation", "train", "probe_0", "probe_1", "step_ms", "update_ms", "kappa_max")
COLUMNS = ("data", "method", "seed", "epochs", "device", *NUMBERS)


def run_of(row: dict[str, Any]) -> Run:
    return Run(row["data"], row["method"], row["seed"], row["epochs"], row["device"])


class Folder:
    """Reads and writes one output folder. A run counts as done once its line in results.csv is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path / "results.csv"

    def make(self) -> None:
        """Makes the folder where it is missing: not before there is something to put into it."""
        make_folder(self.path / "history")

    def rows(self) -> list[dict[str, Any]]:
        """The finished runs. A line that an interruption cut short is left out, and its run done again.

        Raises :class:`OtherVersionError` where the file has other columns.
        """
        if not self.file.exists() or not self.file.stat().st_size:
            return []
        found = []
        with self.file.open(newline="", encoding="utf-8", errors="replace") as stream:
            lines = csv.DictReader(stream)
            if tuple(lines.fieldnames or ()) != COLUMNS:
                raise OtherVersionError(
                    f"{self.file} is not of this version's demo; give another folder, or move it away"
                )
            for line in lines:
                try:
                    row: dict[str, Any] = {name: line[name] for name in TEXT}
                    row |= {name: int(line[name]) for name in WHOLE}
                    found.append(row | {name: float(line[name]) for name in NUMBERS})
                except (KeyError, TypeError, ValueError):
                    continue
        return found

    def add(self, row: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """The history first: a line in results.csv promises that it is there."""
        self.make()
        if history:
            write_text(self._history_file(run_of(row)), json.dumps(history))
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, lineterminator="\n").writerow(row)
        append_lines(self.file, ",".join(COLUMNS) + "\n", text.getvalue())

    def history(self, run: Run) -> list[ModulationTable]:
        """What AIM did, update by update; empty where nothing of it was kept."""
        file = self._history_file(run)
        return [ModulationTable.from_dict(table) for table in json.loads(file.read_text())] if file.exists() else []

    def _history_file(self, run: Run) -> Path:
        name = f"{run.data}-{run.method}-seed{run.seed}-epochs{run.epochs}-{run.device}".replace(" ", "").replace(
            ":", ""
        )
        return self.path / "history" / f"{name}.json"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of one value is not a number."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def _shown(values: Sequence[float], sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.1f}" if math.isnan(error) else f"{mean:{sign}.1f} ± {error:.1f}"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """``summary[data][method]``: mean test accuracy and its standard error, in the order of DATA and METHODS."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for data in DATA:
        for method in (name for names in METHODS.values() for name in names):
            values = [row["test"] for row in rows if (row["data"], row["method"]) == (data, method)]
            if values:
                found.setdefault(data, {})[method] = mean_and_error(values)
    return found


def table_of(rows: Sequence[dict[str, Any]], data: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines for one data set: accuracies and probes in percent, mean +- standard error over seeds.

    "vs joint" is the paired difference over the seeds that both have.
    """
    first, second = DATA[data].modalities
    header = [
        "method",
        "test accuracy",
        "vs joint",
        f"probe {first}",
        f"probe {second}",
        "ms/step",
        "max kappa",
    ]
    joint = {row["seed"]: row["test"] for row in rows if (row["data"], row["method"]) == (data, "joint")}
    lines = []
    for method in summary(rows).get(data, {}):
        own = [row for row in rows if (row["data"], row["method"]) == (data, method)]
        paired = [row["test"] - joint[row["seed"]] for row in own if row["seed"] in joint]
        lines.append(
            [
                method,
                _shown([row["test"] for row in own]),
                _shown(paired, "+") if paired and method != "joint" else "",
                _shown([row["probe_0"] for row in own]),
                _shown([row["probe_1"] for row in own]),
                f"{statistics.median(row['step_ms'] for row in own):.2f}",
                f"{max(row['kappa_max'] for row in own):.2f}" if method in ("aim", "drop") else "",
            ]
        )
    return header, lines


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Every data set's table for table.md."""
    parts = []
    for data in summary(rows):
        header, lines = table_of(rows, data)
        table = [header, ["---"] * len(header), *lines]
        parts.append(f"## {data}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in table) + "\n")
    return "\n".join(parts)
