"""The report of a comparison: Markdown and HTML, tables and pictures, every figure from lines of results.csv."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

from aim_kernels.bench.report import read
from aim_kernels.command_line import write_text
from aim_kernels.experiments.compare import pictures
from aim_kernels.experiments.compare.contestants import BUDGET, TUNING_SEEDS, is_control, reads_held_out
from aim_kernels.experiments.compare.cost import CostLine
from aim_kernels.experiments.compare.lines import Line
from aim_kernels.experiments.compare.results import Folder
from aim_kernels.experiments.compare.standings import Standing, reported, standings
from aim_kernels.experiments.data import DATA_SETS
from aim_kernels.experiments.measures import paired
from aim_kernels.experiments.report import html_table, markdown_table, number, with_error
from aim_kernels.experiments.runs import ALONE, HYPERPARAMETERS, Run

#: The contestants of which the summary speaks, and how.
OURS = {
    "aim": "AIM",
    "aim (own losses)": "AIM with losses of the modalities' own",
    "aim (trial)": "AIM by trials",
    "aim (gap)": "AIM by the gap rule",
}


def table(rows: Sequence[Standing]) -> list[list[str]]:
    """Header and lines of one data set."""
    modalities = list(DATA_SETS[rows[0].data].modalities)
    header = ["method", "seeds", "test accuracy", "vs joint (95 %)", "macro F1", "calibration error", "x joint's time"]
    lines = [[*header, *(f"probe {m}" for m in modalities), "configuration"]]
    for s in rows:
        versus = "" if s.contestant == "joint" else with_error(s.difference, s.half, "+")
        name = f"{s.contestant} (control)" if is_control(s.contestant) else s.contestant
        name += " †" if reads_held_out(s.contestant) else ""
        probes = [number(s.probes.get(m, math.nan)) for m in modalities]
        figures = [with_error(s.test, s.error), versus, number(s.f1), number(s.calibration)]
        figures.append("" if math.isnan(s.time) else f"{s.time:.2f}")
        lines.append([name, str(s.seeds), *figures, *probes, "" if s.options == "{}" else s.options])
    return lines


def findings(found: dict[str, list[Standing]]) -> list[str]:
    """What the comparison says of AIM, whichever way it falls."""
    said = [sentence for name, spoken in OURS.items() for sentence in _findings_of(found, name, spoken)]
    return said or ["AIM was not among the methods."]


def _findings_of(found: dict[str, list[Standing]], name: str, spoken: str) -> list[str]:
    """The same of one contestant, which is set beside all others but variants of AIM."""
    sets, best_or_near, worse, raised, lowered, behind = [], [], [], [], [], []
    for data, rows in found.items():
        ours = next((s for s in rows if s.contestant == name), None)
        if ours is None:
            continue
        sets.append(data)
        best = max((s for s in rows if s is ours or not s.contestant.startswith((ALONE, "aim"))), key=lambda s: s.test)
        if ours.test >= best.test - (0.0 if math.isnan(best.error) else best.error):
            best_or_near.append(data)
        seeds = sorted(ours.by_seed.keys() & best.by_seed.keys())
        lead, half = paired([best.by_seed[s] for s in seeds], [ours.by_seed[s] for s in seeds], ours.test_share)
        if lead - half > 0.0:
            behind.append(f"{data} ({best.contestant}, {lead:+.1f} ± {half:.1f})")
        if ours.upper < 0.0:
            worse.append(data)
        for modality, (mean, half) in ours.probe_differences.items():
            if mean - half > 0.0:
                raised.append(f"{modality} of {data} ({mean:+.1f})")
            elif mean + half < 0.0:
                lowered.append(f"{modality} of {data} ({mean:+.1f})")
    if not sets:
        return []
    return [
        f"{spoken} is the best, or within one standard error of the best method, on {len(best_or_near)} of {len(sets)} "
        f"data sets ({', '.join(best_or_near) or 'none'}).",
        "Compared seed by seed, the best method is ahead of it by more than its 95 % interval (chosen after the fact, "
        f"so favoured) on {len(behind)}: {', '.join(behind) or 'none'}.",
        f"It is worse than joint training by more than its 95 % interval on {len(worse)} "
        f"({', '.join(worse) or 'none'}).",
        "Linear probes of encoders, against joint training, outside of the interval: "
        f"raised {', '.join(raised) or 'none'}; lowered {', '.join(lowered) or 'none'}.",
    ]


def _costs(path: Path) -> list[list[str]]:
    """Header and lines of cost.csv, relative to joint training on the same data set: medians of the latest commit."""
    found = read(path, CostLine)
    if not found:
        return []
    measured: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for line in found:
        if line.commit == found[-1].commit:
            measured.setdefault((line.data, line.contestant), []).append((line.step_ms, line.update_ms, line.peak_mib))
    middle = {key: [statistics.median(column) for column in zip(*of, strict=True)] for key, of in measured.items()}
    lines = [["data", "method", "ms a step", "x joint", "ms an update", "peak MiB"]]
    for (data, name), (step, update, peak) in middle.items():
        joint = middle.get((data, "joint"))
        ratio = f"{step / joint[0]:.2f}" if joint else ""
        lines.append([data, name, f"{step:.2f}", ratio, f"{update:.2f}", f"{peak:.0f}"])
    return lines


def protocol(lines: Sequence[Line]) -> str:
    """How the numbers came about."""
    if not lines:
        return "Nothing was trained: results.csv has no lines that are reported."
    versions = sorted({f"{line.commit or 'no checkout'}, torch {line.torch}" for line in lines})
    settings = ", ".join(f"{name} {value}" for name, value in HYPERPARAMETERS.items())
    networks = sorted({f"{line.backbone} {line.width}" for line in lines})
    return (
        f"All methods: {settings}; encoders (backbone and width) {', '.join(networks)}; equal splits, batches and "
        "initial weights for each seed; the network of the last epoch is judged, and the test split read once. A "
        f"method with options chose one of at most {BUDGET} configurations by mean validation accuracy over the seeds "
        f"{' and '.join(map(str, TUNING_SEEDS))}, which are "
        "not reported (their splits are drawn from the same samples, so some of a reported test split was in them). "
        "Methods marked † also read labelled validation samples while they train; on coloured digits and MNIST those "
        "have the shift of the test split; train-on-held trains on all of them. Accuracies, macro F1 and calibration "
        "error in percent; ± is the standard error over seeds, in 'vs joint' the half width of the 95 % interval of "
        "the paired difference (Student's t over seeds, corrected for splits of the same samples: Nadeau and Bengio "
        "2003). "
        "x joint's time: seconds of a whole run over those of joint training on the same seed, median over seeds, "
        "measured beside whatever else ran; they include loading and judging, which draw it towards 1. Probes: test "
        "accuracy of a ridge classifier on an encoder's frozen features; for 'alone:' the encoder was trained by "
        "itself, for 'best-subset' they are of the chosen network, whose other encoders are untrained. From "
        f"results.csv, written by: {'; '.join(versions)}."
    )


STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;"
    "font-size:13px}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}td:first-child,"
    "th:first-child,td:last-child{text-align:left}img{max-width:100%}"
)


def is_empty(folder: Folder) -> bool:
    """Whether there is nothing to report.

    Raises :class:`OtherVersionError` where results.csv is of another version.
    """
    return not reported(folder.lines()) and not _costs(folder.path / "cost.csv")


def write(folder: Folder, wanted: Collection[Run] | None = None) -> list[Path]:
    """report.md, report.html and the pictures, of :func:`reported` lines; returns what was written."""
    lines = reported(folder.lines(), wanted)
    found = standings(lines)
    written = pictures.draw(folder.path, found)
    sections: list[tuple[str, list[str], list[list[str]], str]] = []
    if found:
        sections.append(("What it says", findings(found), [], "differences.png"))
    for data, rows in found.items():
        sections.append((data, [], table(rows), f"{data}.png"))
    costs = _costs(folder.path / "cost.csv")
    if costs:
        sections.append(
            (
                "Cost of a step",
                [
                    "One thread; each method in processes of its own, all methods in turn, medians. AIM and its "
                    "controls hold the first modality back by 0.5 while steps are timed."
                ],
                costs,
                "",
            )
        )
    there = {path.name for path in written}
    markdown, page = ["# Comparison\n"], [f"<!doctype html><meta charset=utf-8><title>Comparison</title><style>{STYLE}"]
    page.append("</style><h1>Comparison</h1>")
    for title, said, rows_of, picture in sections:
        markdown.append(f"## {title}\n")
        page.append(f"<h2>{html.escape(title)}</h2>")
        for sentence in said:
            markdown.append(f"- {sentence}")
            page.append(f"<p>{html.escape(sentence)}</p>")
        if said:
            markdown.append("")
        if rows_of:
            markdown.append(markdown_table(rows_of) + "\n")
            page.append(html_table(rows_of))
        if picture in there:
            markdown.append(f"![{title}]({picture})\n")
            page.append(f'<img src="{picture}" alt="{html.escape(title)}">')
    markdown.append(f"## How\n\n{protocol(lines)}\n")
    page.append(f"<h2>How</h2><p>{html.escape(protocol(lines))}</p>")
    for name, text in (("report.md", "\n".join(markdown)), ("report.html", "\n".join(page))):
        write_text(folder.path / name, text)
        written.append(folder.path / name)
    return written
