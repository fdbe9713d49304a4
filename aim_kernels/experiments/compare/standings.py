"""Standings of a comparison: what each contestant reached on each data set, beside joint training."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from aim_kernels.experiments.compare.contestants import TUNING_SEEDS
from aim_kernels.experiments.compare.lines import Line
from aim_kernels.experiments.data import DATA_SETS
from aim_kernels.experiments.measures import mean_and_error, paired
from aim_kernels.experiments.runs import ALONE, Run


@dataclass(frozen=True)
class Standing:
    """One contestant on one data set, over its seeds; errors are standard errors, ``half`` is the half width of the
    95 % interval of the paired difference to joint training, ``time`` the median over seeds of a run's seconds over
    those of joint training on the same seed (not a number without joint training)."""

    data: str
    contestant: str
    seeds: int
    test: float
    error: float
    difference: float
    half: float
    f1: float
    calibration: float
    time: float
    probes: dict[str, float]
    probe_differences: dict[str, tuple[float, float]]
    kappa: float
    options: str
    by_seed: dict[int, float]
    test_share: float

    @property
    def lower(self) -> float:
        return self.difference - self.half

    @property
    def upper(self) -> float:
        return self.difference + self.half


def _setting(line: Line) -> tuple[int, str, int]:
    """What lines have in common that stand beside each other."""
    return line.epochs, line.backbone, line.width


def reported(lines: Sequence[Line], wanted: Collection[Run] | None = None) -> list[Line]:
    """What was trained on seeds that nothing was chosen by, once a run: the lines of ``wanted``; without it those of
    the latest configuration of each contestant, with network and epochs of the latest joint training on that data
    set."""
    lines = [line for line in lines if line.seed not in TUNING_SEEDS]
    if wanted is None:
        latest = {line.data: _setting(line) for line in lines if line.contestant == "joint"}
        alike = [line for line in lines if _setting(line) == latest.get(line.data)]
        choice = {(line.data, line.contestant): line.choice for line in alike}
        wanted = {line.run for line in alike if line.choice == choice[line.data, line.contestant]}
    return list({line.run: line for line in lines if line.run in wanted}.values())


def standings(lines: Sequence[Line]) -> dict[str, list[Standing]]:
    """Of reported lines, by data set: joint training first, then by test accuracy; encoders trained alone last."""
    found: dict[str, list[Standing]] = {}
    for data in DATA_SETS:
        here = [line for line in lines if line.data == data]
        joint = {line.seed: line for line in here if line.contestant == "joint"}
        for name in dict.fromkeys(line.contestant for line in here):
            own = [line for line in here if line.contestant == name]
            both = [(line, joint[line.seed]) for line in own if line.seed in joint]
            share = statistics.fmean(line.test_samples / line.train_samples for line in own)
            difference, half = math.nan, math.nan
            if both:
                difference, half = paired([a.test for a, _ in both], [b.test for _, b in both], share)
            ours = [(json.loads(a.probes), json.loads(b.probes)) for a, b in both]
            probes = [json.loads(line.probes) for line in own]
            modalities = list(probes[0])
            times = [a.seconds / b.seconds for a, b in both]
            versus = {m: paired([a[m] for a, _ in ours], [b[m] for _, b in ours], share) for m in modalities if ours}
            test, error = mean_and_error([line.test for line in own])
            found.setdefault(data, []).append(
                Standing(
                    data=data,
                    contestant=name,
                    seeds=len(own),
                    test=test,
                    error=error,
                    difference=difference,
                    half=half,
                    f1=statistics.fmean(line.f1 for line in own),
                    calibration=statistics.fmean(line.calibration for line in own),
                    time=statistics.median(times) if times else math.nan,
                    probes={m: statistics.fmean(p[m] for p in probes) for m in modalities},
                    probe_differences=versus,
                    kappa=statistics.fmean(line.kappa_mean for line in own),
                    options=own[0].options,
                    by_seed={line.seed: line.test for line in own},
                    test_share=share,
                )
            )
        if data in found:
            found[data].sort(key=lambda s: (s.contestant.startswith(ALONE), s.contestant != "joint", -s.test))
    return found
