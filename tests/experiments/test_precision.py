"""The comparison of trainings with fewer bytes: what is run, resumed, and concluded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from result_lines import precision_line

from aim_kernels.experiments import precision
from aim_kernels.experiments.precision import summary, tasks
from aim_kernels.experiments.precision.configurations import CONFIGURATIONS, Configuration, Folder, Line
from aim_kernels.experiments.precision.drift import drift

pytestmark = pytest.mark.slow


def test_differences_are_paired_and_judged_by_standard_errors() -> None:
    base = [precision_line("text", "fp32", seed, loss) for seed, loss in enumerate((1.0, 2.0, 3.0))]
    close = [precision_line("text", "fp32+int8", seed, loss) for seed, loss in enumerate((1.1, 2.1, 3.4))]
    far = [precision_line("text", "bf16", seed, loss + 1) for seed, loss in enumerate((1.0, 2.0, 3.0))]
    found = {v.configuration: v for v in summary.verdicts([*base, *close, *far])}
    assert found["fp32+int8"].train == pytest.approx(0.2) and found["fp32+int8"].train_error == pytest.approx(0.1)
    assert found["fp32+int8"].spread == pytest.approx(1 / math.sqrt(3))
    assert found["fp32+int8"].reached and not found["bf16"].reached
    text = summary.table([*base, *close, *far], dict.fromkeys(CONFIGURATIONS, 0.5))
    assert "| bf16 | 10 | 50.00 % |" in text and "+1.0000 ± 0.0000 !" in text


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int, bool]] = []

    def training(configuration: Configuration, seed: int, watched: bool) -> Line:
        ran.append((configuration.name, seed, watched))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return precision_line("text", configuration.name, seed, 1.0 + seed, 0.9 if watched else math.nan)

    monkeypatch.setitem(tasks.TASKS, "text", training)
    monkeypatch.setattr(precision, "drift", lambda: dict.fromkeys(CONFIGURATIONS, 0.0))
    arguments = ["--tasks", "text", "--configurations", "fp32", "bf16", "--seeds", "2", "--out", str(tmp_path)]
    assert precision.main(arguments) == 130
    assert len(Folder(tmp_path).lines()) == 2
    assert precision.main(arguments) == 0
    done = Folder(tmp_path).lines()
    runs = {(x.configuration, x.seed, not math.isnan(x.agreement)) for x in done}
    assert len(done) == len(runs) == 6  # fp32 also watched
    assert (tmp_path / "precision.png").stat().st_size > 1000


@pytest.mark.parametrize("task", ["digits", "text"])
def test_trainings_are_reproducible_and_watched(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "STEPS", 30)
    monkeypatch.setattr(tasks, "EPOCHS", {"digits": 2})
    configuration = CONFIGURATIONS["fp32+int8"]
    torch.manual_seed(1)
    one = tasks.TASKS[task](configuration, 0, False)
    torch.manual_seed(2)
    assert one == tasks.TASKS[task](configuration, 0, False) or math.isnan(one.agreement)
    assert one.train_loss == tasks.TASKS[task](configuration, 0, False).train_loss
    watched = tasks.TASKS[task](configuration, 0, True)
    assert 0.8 < watched.agreement < 1 and 0.1 < watched.jaccard < 1
    plain = tasks.TASKS[task](CONFIGURATIONS["fp32"], 0, True)
    assert plain.agreement > 0.9999


def test_weights_drift_by_their_rounding() -> None:
    found = drift(8192, 60)
    assert found["fp32"] == found["bf16 split"] == found["bf16 master"] == 0
    assert 0 < found["bf16 kahan"] < 1e-3 < found["fp32+int8"] < found["bf16"]
