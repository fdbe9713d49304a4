"""Pictures. matplotlib is imported inside the functions: it comes with the optional extra ``demo``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aim_kernels.data.common import require
from aim_kernels.modulation.strengths import ModulationTable, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> Figure:
    require("matplotlib", "plotting")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the user's pyplot backend alone
    return figure


def plot_modulation(aim: Any) -> Figure:
    """Heat maps over update (x) and depth (y), one column a modality: score, strength, under-optimized share.

    ``aim``: an :class:`AIM` that has been updated, or a list of its tables. Returns a matplotlib figure
    (``figure.savefig("modulation.png")``). Cells without a value, the under-optimized share before the first step, stay
    white.

    Raises ValueError where there is no update to show, MissingPackageError without matplotlib.
    """
    history: Sequence[ModulationTable] = list(getattr(aim, "history", aim))
    if not history:
        raise ValueError("nothing to plot: aim.history is empty; call aim.update first")
    modalities = history[0].modalities
    updates = [table.update for table in history]

    def grid(tables: list[Scores], modality: str) -> list[list[float]]:
        return [[table[modality][depth] for table in tables] for depth in range(len(tables[0][modality]))]

    panels: list[tuple[str, list[Scores], float | None]] = [
        ("score", [table.scores for table in history], None),
        ("strength kappa", [table.kappa for table in history], 1.0),
        ("under-optimized share", [table.under_fraction for table in history], None),
    ]
    figure = _figure(1.0 + 4.0 * len(modalities), 6.5)
    axes = figure.subplots(len(panels), len(modalities), squeeze=False)
    for row, (name, tables, top) in enumerate(panels):
        values = [v for table in tables for cells in table.values() for v in cells if v == v]
        top = top or max([*values, 1e-9])
        for column, modality in enumerate(modalities):
            axis = axes[row, column]
            cells = grid(tables, modality)
            # each update in a cell of its own, centred on its number
            axis.imshow(
                cells,
                aspect="auto",
                interpolation="nearest",
                vmin=0.0,
                vmax=top,
                extent=(updates[0] - 0.5, updates[-1] + 0.5, len(cells) - 0.5, -0.5),
            )
            axis.set_yticks(range(len(cells)))
            axis.set_title(f"{modality}: {name}", fontsize=10)
            axis.set_ylabel("depth")
            axis.set_xlabel("update")
        figure.colorbar(axes[row, -1].images[0], ax=list(axes[row]))
    return figure


def plot_accuracy(
    summary: Mapping[str, Mapping[str, tuple[float, float]]], ylabel: str = "test accuracy (%)"
) -> Figure:
    """Bars with standard errors: ``summary[data][method] = (mean, standard error)``, one panel a data set."""
    figure = _figure(5.0 * max(len(summary), 1), 4.0)
    axes = figure.subplots(1, max(len(summary), 1), squeeze=False)[0]
    for axis, (data, methods) in zip(axes, summary.items(), strict=False):
        means = [mean for mean, _ in methods.values()]
        errors = [error if error == error else 0.0 for _, error in methods.values()]
        bars = axis.bar(range(len(methods)), means, yerr=errors, capsize=4, color="tab:blue")
        axis.bar_label(bars, [f"{mean:.1f}" for mean in means], label_type="center", color="white", fontsize=9)
        axis.set_xticks(range(len(methods)), list(methods), rotation=30, ha="right")
        axis.set_title(data)
        axis.set_ylabel(ylabel)
        axis.set_ylim(0.0, 100.0)
    return figure
