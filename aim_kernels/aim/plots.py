"""Pictures. matplotlib is imported inside the functions: it comes with the optional extra ``demo``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim_kernels._extras import require
from aim_kernels.aim.strengths import ModulationTable, Scores
from aim_kernels.command_line import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is compared with the limit.
ABOVE = "standard errors above 1 + dead zone"


def _figure(width: float, height: float) -> Figure:
    require("matplotlib", "plotting")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the user's pyplot backend alone
    return figure


def save(figure: Figure, path: Path, numbers: Any, dpi: int = 120) -> None:
    """A PNG that tells what it shows: ``numbers`` (lists, dictionaries, text and numbers) go along as JSON, floats to
    six digits, in a text chunk named "Numbers", so that a picture can be told from a stale one."""
    with writing(path):
        figure.savefig(path, dpi=dpi, metadata={"Numbers": json.dumps(_rounded(numbers))})


def numbers_of(path: Path) -> Any:
    """What :func:`save` put into a picture; None where there is nothing."""
    from PIL import Image

    with Image.open(path) as picture:
        text = picture.info.get("Numbers")
    return json.loads(text) if text else None


def _rounded(numbers: Any) -> Any:
    """Six digits, as results files have; None in place of NaN, which JSON does not know."""
    if isinstance(numbers, Mapping):
        return {str(key): _rounded(value) for key, value in numbers.items()}
    if isinstance(numbers, float):
        return float(f"{numbers:.6g}") if numbers == numbers else None
    return [_rounded(value) for value in numbers] if isinstance(numbers, (list, tuple)) else numbers


def plot_modulation(aim: Any) -> Figure:
    """What was decided, update by update (x), one column a modality.

    Rules "reliance" and "trial", which hold whole modalities back: lines of the excess, in standard errors above ``1 +
    dead_zone``, beside the limit ``confidence``, shaded where the modality was held back; under "reliance" below it
    what the loss rests on it, in training and on held-out samples. Other rules, and histories of several: heat maps
    with depth (y) of score, strength and under-optimized share.

    ``aim``: an :class:`AIM` that has been updated, or a list of its tables. Returns a matplotlib figure
    (``figure.savefig("modulation.png")``). Cells without a value, the under-optimized share before the first step, stay
    white.

    Raises ValueError where there is no update to show, MissingPackageError without matplotlib.
    """
    history: Sequence[ModulationTable] = list(getattr(aim, "history", aim))
    if not history:
        raise ValueError("nothing to plot: aim.history is empty; call aim.update first")
    return _decisions(history) if of_whole_modalities(history) else _heat_maps(history)


def of_whole_modalities(history: Sequence[ModulationTable]) -> bool:
    """Whether :func:`plot_modulation` shows lines (:func:`decision_panels`), not heat maps
    (:func:`modulation_panels`)."""
    return all(table.whole for table in history) and len({table.rule for table in history}) == 1


def shown(history: Sequence[ModulationTable]) -> Mapping[str, Any]:
    """The panels that :func:`plot_modulation` shows."""
    return decision_panels(history) if of_whole_modalities(history) else modulation_panels(history)


def _heat_maps(history: Sequence[ModulationTable]) -> Figure:
    modalities = history[0].modalities
    updates = [table.update for table in history]
    panels = modulation_panels(history)
    figure = _figure(1.0 + 4.0 * len(modalities), 6.5)
    axes = figure.subplots(len(panels), len(modalities), squeeze=False)
    for row, (name, grids) in enumerate(panels.items()):
        values = [v for grid in grids.values() for line in grid for v in line if v == v]
        top = 1.0 if name == "strength kappa" else max([*values, 1e-9])
        for column, modality in enumerate(modalities):
            axis = axes[row, column]
            cells = grids[modality]
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


def _decisions(history: Sequence[ModulationTable]) -> Figure:
    modalities, updates, panels = history[0].modalities, [table.update for table in history], decision_panels(history)
    reliance = {name: panels[name] for name in panels if name.startswith("reliance")}
    figure = _figure(1.0 + 4.0 * len(modalities), 6.5 if reliance else 3.5)
    axes = figure.subplots(2 if reliance else 1, len(modalities), squeeze=False, sharex=True, sharey="row")
    for column, modality in enumerate(modalities):
        top = axes[0, column]
        top.plot(updates, panels[ABOVE][modality], "o-", markersize=3, label="found")
        top.step(updates, panels["limit"][modality], "k--", where="mid", linewidth=1.0, label="limit")
        top.set_title(f"{modality} (shaded: held back)", fontsize=10)
        if reliance:
            for name, values in reliance.items():
                axes[1, column].plot(updates, values[modality], "o-", markersize=3, label=name)
            axes[1, column].axhline(0.0, color="0.7", linewidth=0.8)
        for axis in axes[:, column]:
            for update, kappa in zip(updates, panels["strength kappa"][modality], strict=True):
                if kappa > 0.0:  # the weaker, the paler
                    axis.axvspan(update - 0.5, update + 0.5, color="tab:red", alpha=0.2 * kappa, lw=0)
        axes[-1, column].set_xlabel("update")
    for axis, name in zip(axes[:, 0], (ABOVE, "part of the loss"), strict=False):
        axis.set_ylabel(name, fontsize=9)
        axis.legend(fontsize=8)
    return figure


def decision_panels(history: Sequence[ModulationTable]) -> dict[str, dict[str, list[float]]]:
    """What :func:`plot_modulation` shows of rules that hold whole modalities back: ``panels[name][modality][update]``.
    All depths are alike."""

    def lines(tables: Sequence[Scores]) -> dict[str, list[float]]:
        return {m: [table[m][0] for table in tables] for m in history[0].modalities}

    limits = [table.confidence for table in history]
    panels = {
        ABOVE: lines([table.above for table in history]),
        "limit": dict.fromkeys(history[0].modalities, limits),
        "strength kappa": lines([table.kappa for table in history]),
    }
    outside = [table.held_out_scores for table in history if table.held_out_scores is not None]
    if history[0].rule == "reliance" and len(outside) == len(history):
        panels["reliance in training"] = lines([table.scores for table in history])
        panels["reliance held out"] = lines(outside)
    return panels


def modulation_panels(history: Sequence[ModulationTable]) -> dict[str, dict[str, list[list[float]]]]:
    """What the heat maps of :func:`plot_modulation` show: ``panels[name][modality][depth][update]``."""

    def grids(tables: list[Scores]) -> dict[str, list[list[float]]]:
        return {
            modality: [[table[modality][depth] for table in tables] for depth in range(len(tables[0][modality]))]
            for modality in history[0].modalities
        }

    return {
        "score": grids([table.scores for table in history]),
        "strength kappa": grids([table.kappa for table in history]),
        "under-optimized share": grids([table.under_fraction for table in history]),
    }


def plot_accuracy(
    summary: Mapping[str, Mapping[str, tuple[float, float]]],
    ylabel: str = "test accuracy (%)",
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """Bars with standard errors: ``summary[data][method] = (mean, standard error)``, one panel a data set. ``titles``
    of the panels, by data set; without it their names."""
    figure = _figure(5.0 * max(len(summary), 1), 4.0)
    axes = figure.subplots(1, max(len(summary), 1), squeeze=False)[0]
    for axis, (data, methods) in zip(axes, summary.items(), strict=False):
        means = [mean for mean, _ in methods.values()]
        errors = [error if error == error else 0.0 for _, error in methods.values()]
        colours = ["tab:red" if name == "aim" else "0.55" if name == "drop" else "tab:blue" for name in methods]
        bars = axis.bar(range(len(methods)), means, yerr=errors, capsize=4, color=colours)
        axis.bar_label(bars, [f"{mean:.1f}" for mean in means], label_type="center", color="white", fontsize=9)
        axis.set_xticks(range(len(methods)), list(methods), rotation=30, ha="right")
        axis.set_title((titles or {}).get(data, data))
        axis.set_ylabel(ylabel)
        axis.set_ylim(0.0, 100.0)
    return figure
