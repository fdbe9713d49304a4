"""Results of trainings that never ran, as the three experiments write them."""

from __future__ import annotations

import json
import math
from typing import Any

from aim_kernels.aim.rules import Ratio
from aim_kernels.aim.strengths import Measured
from aim_kernels.experiments.compare.lines import Line as CompareLine
from aim_kernels.experiments.demo.results import Line as DemoLine
from aim_kernels.experiments.precision.configurations import Line as PrecisionLine


def compare_line(contestant: str = "joint", seed: int = 0, test: float = 50.0, **more: Any) -> CompareLine:
    numbers = dict.fromkeys(
        ("validation", "train", "f1", "calibration", "kappa_mean", "kappa_max", "step_ms", "update_ms", "seconds"), 1.5
    )
    probes = json.dumps({"grey": 60.0, "colour": 20.0})
    text = {"commit": "abc", "date": "today", "torch": "2", "data": "digits", "options": "{}", "probes": probes}
    made: dict[str, Any] = {**text, **numbers, "contestant": contestant, "choice": 0, "seed": seed, "epochs": 2}
    made |= {"train_samples": 100, "test_samples": 25, "backbone": "auto", "width": 64}
    return CompareLine(**made | {"test": test} | more)


def precision_line(task: str, name: str, seed: int, loss: float, agreement: float = math.nan) -> PrecisionLine:
    return PrecisionLine("c", "t", task, name, seed, 10, loss, 2 * loss, 50.0, agreement, agreement)


def demo_line(data: str = "digits", method: str = "joint", seed: int = 0, test: float = 50.0) -> DemoLine:
    numbers = ("validation", "train", "probe_0", "probe_1", "step_ms", "update_ms", "kappa_max")
    return DemoLine(data, method, seed, 2, "cpu", test, **dict.fromkeys(numbers, 1.25))


def demo_history() -> list[dict[str, Any]]:
    tables = []
    for update in range(3):
        nan = {"grey": [math.nan] * 2, "colour": [math.nan] * 3}
        scores = {"grey": [0.1, 0.2], "colour": [0.3, 0.4, 0.5]}
        measured = Measured(scores, {m: [0.0] * len(row) for m, row in scores.items()})
        tables.append(Ratio().assess(update, measured, None, nan, alpha=1.0).to_dict())
    return tables
