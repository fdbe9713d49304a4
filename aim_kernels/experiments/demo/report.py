"""The demo's tables, from lines of its folder."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from aim_kernels.experiments.data import DATA_SETS
from aim_kernels.experiments.demo.contestants import CONTESTANTS, DATA
from aim_kernels.experiments.demo.results import Line
from aim_kernels.experiments.measures import mean_and_error
from aim_kernels.experiments.report import markdown_table, with_error


def summary(lines: Sequence[Line]) -> dict[str, dict[str, tuple[float, float]]]:
    """``summary[data][method]``: mean test accuracy and its standard error, in the order of DATA and METHODS."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for data in DATA:
        for method in CONTESTANTS:
            values = [line.test for line in lines if (line.data, line.method) == (data, method)]
            if values:
                found.setdefault(data, {})[method] = mean_and_error(values)
    return found


def table(lines: Sequence[Line], data: str) -> list[list[str]]:
    """Header and lines for one data set: accuracies and probes in percent, mean +- standard error over seeds.

    "vs joint" is the paired difference over the seeds that both have.
    """
    first, second = DATA_SETS[data].modalities
    rows = [["method", "test accuracy", "vs joint", f"probe {first}", f"probe {second}", "ms/step", "max kappa"]]
    joint = {line.seed: line.test for line in lines if (line.data, line.method) == (data, "joint")}
    for method in summary(lines).get(data, {}):
        own = [line for line in lines if (line.data, line.method) == (data, method)]
        paired = [line.test - joint[line.seed] for line in own if line.seed in joint]
        rows.append(
            [
                method,
                with_error(*mean_and_error([line.test for line in own])),
                with_error(*mean_and_error(paired), "+") if paired and method != "joint" else "",
                with_error(*mean_and_error([line.probe_0 for line in own])),
                with_error(*mean_and_error([line.probe_1 for line in own])),
                f"{statistics.median(line.step_ms for line in own):.2f}",
                f"{max(line.kappa_max for line in own):.2f}" if method in ("aim", "drop") else "",
            ]
        )
    return rows


def markdown(lines: Sequence[Line]) -> str:
    """Every data set's table for table.md."""
    return "\n".join(f"## {data}\n\n{markdown_table(table(lines, data))}\n" for data in summary(lines))
