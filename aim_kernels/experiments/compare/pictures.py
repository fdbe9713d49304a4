"""Pictures of a comparison: differences to joint training with their intervals, and what happened to the encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim_kernels.aim.plots import save
from aim_kernels.experiments.compare.contestants import is_control
from aim_kernels.experiments.runs import ALONE

if TYPE_CHECKING:
    from aim_kernels.experiments.compare.standings import Standing


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _forest(path: Path, rows: Sequence[Standing], title: str) -> None:
    """One line a method: paired difference to joint training in points, with its 95 % interval."""
    figure, axes = _figure(7.5, 1.2 + 0.26 * len(rows))
    for y, row in enumerate(rows):
        colour = "tab:red" if row.contestant.startswith("aim") else "0.55" if is_control(row.contestant) else "C0"
        half = 0.0 if row.half != row.half else row.half
        axes.errorbar(row.difference, y, xerr=half, fmt="o", color=colour, capsize=3, markersize=5)
    axes.set_yticks(range(len(rows)), [row.contestant for row in rows])
    axes.invert_yaxis()
    axes.axvline(0.0, color="0.3", linewidth=1)
    axes.set_xlabel("test accuracy, points above joint training (95 % interval of the paired difference)")
    axes.set_title(title)
    save(figure, path, {row.contestant: (row.difference, row.half) for row in rows})


def overview(path: Path, found: dict[str, list[Standing]]) -> None:
    """Methods by data sets, coloured by the difference; draws nothing where there is no method beside joint
    training."""
    names = list(dict.fromkeys(s.contestant for rows in found.values() for s in rows if not _aside(s)))
    if not names:
        return
    table = {(s.contestant, s.data): s for rows in found.values() for s in rows}
    figure, axes = _figure(2.6 + 1.05 * len(found), 1.4 + 0.3 * len(names))
    values = [[table[n, d].difference if (n, d) in table else float("nan") for d in found] for n in names]
    shown = axes.imshow(values, cmap="RdBu", vmin=-10.0, vmax=10.0, aspect="auto")
    for y, name in enumerate(names):
        for x, data in enumerate(found):
            if (name, data) in table:
                s = table[name, data]
                clear = s.lower > 0.0 or s.upper < 0.0
                colour = "white" if abs(s.difference) > 6.0 else "black"
                axes.text(x, y, f"{s.difference:+.1f}", ha="center", va="center", fontsize=8, color=colour,
                          fontweight="bold" if clear else "normal")  # fmt: skip
    axes.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title("points above joint training (bold: 95 % interval without 0)")
    figure.colorbar(shown, ax=axes, extend="both")
    shown_numbers = {
        n: {d: (table[n, d].difference, table[n, d].half) for d in found if (n, d) in table} for n in names
    }
    save(figure, path, shown_numbers)


def _aside(row: Standing) -> bool:
    return row.contestant == "joint" or row.contestant.startswith(ALONE)


def draw(folder: Path, found: dict[str, list[Standing]]) -> list[Path]:
    """differences.png over all data sets, and one picture a data set."""
    written = []
    for data, rows in found.items():
        shown = [row for row in rows if not _aside(row)]
        if shown:
            _forest(folder / f"{data}.png", shown, data)
            written.append(folder / f"{data}.png")
    if written:
        overview(folder / "differences.png", found)
        written.append(folder / "differences.png")
    return written
