"""The comparison's folder, and which runs it is to hold."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from aim_kernels.experiments.compare.contestants import CONTESTANTS, TUNING_SEEDS, contestant
from aim_kernels.experiments.compare.lines import Line
from aim_kernels.experiments.data import DATA_SETS
from aim_kernels.experiments.results import RunResults
from aim_kernels.experiments.runs import ALONE, Run


class Folder(RunResults[Line]):
    """The comparison's output folder."""

    line_type = Line

    def lines(self) -> list[Line]:
        """The finished runs, as the contestants are now configured: those of another configuration are left out, and
        done again."""
        return [line for line in super().lines() if _as_configured(line)]

    def history_name(self, run: Run) -> str:
        network = "" if (run.backbone, run.width) == ("auto", 64) else f"-{run.backbone}{run.width}"
        return f"{run.data}{network}-{run.contestant}-{run.choice}-seed{run.seed}-epochs{run.epochs}"


def _as_configured(line: Line) -> bool:
    known = line.contestant in CONTESTANTS or line.contestant.startswith(ALONE)
    return known and contestant(line.contestant).options(line.choice) == line.options


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
