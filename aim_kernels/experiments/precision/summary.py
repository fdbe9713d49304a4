"""Tables and a picture of the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aim_kernels.aim.plots import save
from aim_kernels.experiments.measures import mean_and_error, standard_error
from aim_kernels.experiments.precision.configurations import CONFIGURATIONS, Line
from aim_kernels.experiments.precision.tasks import TASKS, WATCHED


@dataclass(frozen=True)
class Verdict:
    """Of one configuration on one task: paired differences of final losses to float32, with their standard errors."""

    task: str
    configuration: str
    train: float
    train_error: float
    test: float
    test_error: float
    spread: float  # standard error of float32's own final training loss over the seeds

    @property
    def reached(self) -> bool:
        """Final training loss within one standard error of float32's: its own over the seeds, or that of the paired
        difference, whichever is larger."""
        return self.train <= max(self.spread, self.train_error)


def verdicts(lines: Sequence[Line]) -> list[Verdict]:
    """For all that has the seeds of float32."""
    plain = {(x.task, x.configuration, x.seed): x for x in lines if math.isnan(x.agreement)}
    found = []
    for task in TASKS:
        base = {seed: x for (t, c, seed), x in plain.items() if t == task and c == "fp32"}
        for name in CONFIGURATIONS:
            pairs = [(plain[task, name, seed], x) for seed, x in base.items() if (task, name, seed) in plain]
            if name == "fp32" or len(pairs) < 2:
                continue
            train = mean_and_error([a.train_loss - b.train_loss for a, b in pairs])
            test = mean_and_error([a.test_loss - b.test_loss for a, b in pairs])
            spread = standard_error([x.train_loss for x in base.values()])
            found.append(Verdict(task, name, *train, *test, spread))
    return found


def table(lines: Sequence[Line], drifts: dict[str, float]) -> str:
    """Markdown: bytes, drift under equal gradients, differences to float32 by task ("!": not within one standard
    error)."""
    by_task = {(v.task, v.configuration): v for v in verdicts(lines)}
    head = "| configuration | bytes | drift | " + " | ".join(f"{task}: loss, held-out loss" for task in TASKS) + " |"
    rows = [head, "|---" * (3 + len(TASKS)) + "|"]
    for name, configuration in CONFIGURATIONS.items():
        cells = []
        for task in TASKS:
            v = by_task.get((task, name))
            if v is None:
                base = [x.train_loss for x in lines if (x.task, x.configuration) == (task, name) and name == "fp32"]
                cells.append(f"{statistics.fmean(base):.4f}" if base else "")
                continue
            mark = "" if v.reached else " !"
            cells.append(f"{v.train:+.4f} ± {v.train_error:.4f}{mark}, {v.test:+.3f} ± {v.test_error:.3f}")
        rows.append(f"| {name} | {configuration.bytes:g} | {100 * drifts[name]:.2f} % | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def masks(lines: Sequence[Line]) -> str:
    """Markdown: agreement of the classes with those of float32 moments of the same gradients."""
    rows = ["| configuration | " + " | ".join(f"{task}: same class, overlap" for task in TASKS) + " |"]
    rows.append("|---" * (1 + len(TASKS)) + "|")
    for name in WATCHED:
        cells = []
        for task in TASKS:
            found = [x for x in lines if (x.task, x.configuration) == (task, name) and not math.isnan(x.agreement)]
            if found:
                agreement = statistics.fmean(x.agreement for x in found)
                overlap = statistics.fmean(x.jaccard for x in found)
                cells.append(f"{100 * agreement:.2f} %, {overlap:.3f}")
            else:
                cells.append("")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(path: Path, lines: Sequence[Line]) -> None:
    """Differences of the final training losses to float32, a panel a task; the band is float32's own standard error."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = verdicts(lines)
    figure, axes = pyplot.subplots(1, len(TASKS), figsize=(4 * len(TASKS), 3.6), sharey=True, layout="constrained")
    names = [name for name in CONFIGURATIONS if name != "fp32"][::-1]
    for axis, task in zip(axes, TASKS, strict=True):
        mine = {v.configuration: v for v in found if v.task == task}
        if mine:
            spread = next(iter(mine.values())).spread
            axis.axvspan(-spread, spread, color="#dddddd", label="standard error of float32")
        for at, name in enumerate(names):
            if name in mine:
                v = mine[name]
                axis.errorbar(v.train, at, xerr=v.train_error, fmt="o", color="#4c72b0" if v.reached else "#c44e52")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(task, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("final training loss minus that of float32 (paired over seeds, ± standard error)", fontsize=9)
    numbers = {task: {v.configuration: (v.train, v.train_error) for v in found if v.task == task} for task in TASKS}
    save(figure, path, {"difference": numbers, "band": {v.task: v.spread for v in found}}, dpi=130)
    pyplot.close(figure)
