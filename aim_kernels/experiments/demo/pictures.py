"""The demo's pictures, each from lines and histories of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aim_kernels.aim.plots import of_whole_modalities, plot_accuracy, plot_modulation, save, shown
from aim_kernels.aim.strengths import ModulationTable
from aim_kernels.experiments.demo.report import summary
from aim_kernels.experiments.demo.results import Line
from aim_kernels.experiments.runs import Run


def seeds_of(lines: Sequence[Line], data: str) -> str:
    """The seeds of a data set in words: "10 seeds (100 to 109)"."""
    seeds = sorted({line.seed for line in lines if line.data == data})
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    gapless = len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1
    return f"{len(seeds)} seeds ({f'{seeds[0]} to {seeds[-1]}' if gapless else ', '.join(map(str, seeds))})"


def draw_accuracy(path: Path, lines: Sequence[Line]) -> None:
    """Test accuracy by method, mean and standard error over seeds, a panel a data set."""
    found = summary(lines)
    titles = {data: f"{data}, {seeds_of(lines, data)}" for data in found}
    figure = plot_accuracy(found, "test accuracy (%), mean ± standard error", titles)
    save(figure, path, {"panels": list(titles.values()), "accuracy": found})


def draw_modulation(path: Path, run: Run, history: Sequence[ModulationTable]) -> None:
    """What AIM saw and held back in one run, by depth and update."""
    figure = plot_modulation(history)
    title = f"{run.data}, AIM, seed {run.seed}: one update an epoch"
    if not of_whole_modalities(history):
        title += ", depth 0 is next to the input"
    figure.suptitle(title, fontsize=10)
    save(figure, path, {"title": title, **shown(history)})
