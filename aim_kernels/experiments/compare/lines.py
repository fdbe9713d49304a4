"""One line of the comparison's results, and the training that it tells of."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from typing import Any

import torch

from aim_kernels.bench.report import commit
from aim_kernels.experiments import runs
from aim_kernels.experiments.compare.contestants import contestant
from aim_kernels.experiments.runs import Run


@dataclass(frozen=True)
class Line:
    """One line of results.csv. Accuracies, F1 and calibration error in percent; ``probes``: JSON, modality to percent.

    ``step_ms`` was measured beside whatever else ran; ``compare --cost`` measures time and memory by themselves.
    """

    commit: str
    date: str
    torch: str
    data: str
    contestant: str
    choice: int
    options: str
    seed: int
    epochs: int
    backbone: str
    width: int
    train_samples: int
    test_samples: int
    test: float
    validation: float
    train: float
    f1: float
    calibration: float
    probes: str
    kappa_mean: float
    kappa_max: float
    step_ms: float
    update_ms: float
    seconds: float

    @property
    def run(self) -> Run:
        return Run(self.data, self.contestant, self.choice, self.seed, self.epochs, self.backbone, self.width)


def train(run: Run) -> tuple[Line, list[dict[str, Any]]]:
    """Train and judge one network (:func:`runs.train`); returns its line, and AIM's history."""
    entry = contestant(run.contestant)
    found = runs.train(run, entry)
    line = Line(
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        torch=torch.__version__,
        data=run.data,
        contestant=run.contestant,
        choice=run.choice,
        options=entry.options(run.choice),
        seed=run.seed,
        epochs=run.epochs,
        backbone=run.backbone,
        width=run.width,
        train_samples=found.train_samples,
        test_samples=found.test_samples,
        test=found.test,
        validation=found.validation,
        train=found.train,
        f1=found.f1,
        calibration=found.calibration,
        probes=json.dumps({modality: round(percent, 4) for modality, percent in found.probes.items()}),
        kappa_mean=found.kappa_mean,
        kappa_max=found.kappa_max,
        step_ms=found.step_ms,
        update_ms=found.update_ms,
        seconds=found.seconds,
    )
    return line, found.history
