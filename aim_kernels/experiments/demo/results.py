"""The demo's output folder, one line of its results, and the training that it tells of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aim_kernels.experiments import runs
from aim_kernels.experiments.demo.contestants import CONTESTANTS
from aim_kernels.experiments.results import RunResults
from aim_kernels.experiments.runs import Run, contestant_of


@dataclass(frozen=True)
class Line:
    """One line of results.csv: accuracies in percent, linear probes of the first and the second modality, times."""

    data: str
    method: str
    seed: int
    epochs: int
    device: str
    test: float
    validation: float
    train: float
    probe_0: float
    probe_1: float
    step_ms: float
    update_ms: float
    kappa_max: float

    @property
    def run(self) -> Run:
        return Run(self.data, self.method, 0, self.seed, self.epochs, device=self.device)


class Folder(RunResults[Line]):
    """The demo's output folder."""

    line_type = Line
    float_format = ""

    def history_name(self, run: Run) -> str:
        return f"{run.data}-{run.contestant}-seed{run.seed}-epochs{run.epochs}-{run.device}"


def train(run: Run, on_epoch: Callable[[int], None] = lambda epoch: None) -> tuple[Line, list[dict[str, Any]]]:
    """Train and judge one network (:func:`runs.train`); returns its line, and AIM's history."""
    # Recorded lines scored samples that were drawn by the seed of the batches.
    found = runs.train(run, contestant_of(CONTESTANTS, run.contestant), on_epoch, draw_seed=run.seed)
    probe_0, probe_1 = found.probes.values()
    line = Line(
        data=run.data,
        method=run.contestant,
        seed=run.seed,
        epochs=run.epochs,
        device=run.device,
        test=found.test,
        validation=found.validation,
        train=found.train,
        probe_0=probe_0,
        probe_1=probe_1,
        step_ms=found.step_ms,
        update_ms=found.update_ms if found.history else 0.0,
        kappa_max=found.kappa_max,
    )
    return line, found.history
