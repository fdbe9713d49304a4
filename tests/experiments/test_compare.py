"""The comparison: what it runs, measures, keeps and says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from result_lines import compare_line

from aim_kernels.bench.report import append_csv
from aim_kernels.experiments import measures
from aim_kernels.experiments.compare import cli, cost, main, report
from aim_kernels.experiments.compare.contestants import BUDGET, CONTESTANTS, TUNING_SEEDS, contestant
from aim_kernels.experiments.compare.lines import Line, train
from aim_kernels.experiments.compare.results import Folder, alone, seed_runs, tuned, tuning_runs
from aim_kernels.experiments.data import DATA_SETS
from aim_kernels.experiments.runs import PROBE_SAMPLES, Contestant, Run, held_out_of
from aim_kernels.methods import METHODS, Blocks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # as the comparison itself does

TINY = ["--data", "digits", "--methods", "joint", "--epochs", "1"]
NOT_COMPARED = ("commit", "date", "step_ms", "update_ms", "seconds")


def trained(line: Line) -> dict[str, Any]:
    return {name: value for name, value in vars(line).items() if name not in NOT_COMPARED}


def test_it_writes_everything_and_continues(tmp_path: Path) -> None:
    assert main([*TINY, "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"history", "report.html", "report.md", "results.csv"}
    folder = Folder(tmp_path)
    first = folder.lines()
    names = ["joint", "alone:grey", "alone:colour"]
    assert [(x.contestant, x.seed) for x in first] == [(name, seed) for seed in range(2) for name in names]
    assert all(0.0 < x.test <= 100.0 and x.step_ms > 0.0 for x in first)
    assert set(json.loads(first[0].probes)) == {"grey", "colour"}

    # a line that an interruption cut short is done again, a finished one is not
    folder.file.write_text(folder.file.read_text()[:-30])
    done: list[Run] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "train", lambda run: done.append(run) or train(run))
        assert main([*TINY, "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert [(run.contestant, run.seed) for run in done] == [("alone:colour", 1)]
    assert [trained(x) for x in folder.lines()] == [trained(x) for x in first]


def test_several_at_a_time_give_the_same(tmp_path: Path) -> None:
    runs = [Run("digits", name, 0, 3, 1) for name in ("joint", "alone:grey")]
    together = {x.contestant: trained(x) for x, _ in cli._trained(runs, 2)}
    assert together == {run.contestant: trained(train(run)[0]) for run in runs}


def test_interruption_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(run: Run) -> tuple[Line, list[dict[str, Any]]]:
        if run.seed == 1:
            raise KeyboardInterrupt
        return compare_line(run.contestant, run.seed, epochs=run.epochs), []

    monkeypatch.setattr(cli, "train", fake)
    torch.set_num_threads(2)
    assert main([*TINY, "--out", str(tmp_path)]) == 130
    assert torch.get_num_threads() == 2
    assert [x.seed for x in Folder(tmp_path).lines()] == [0, 0, 0]


@pytest.mark.parametrize("name", ["aim (gap)", "aim (trial)"])
def test_contestants_begin_alike_and_history_is_kept(name: str, tmp_path: Path) -> None:
    """A method that has nothing to balance is joint training, bit for bit, also where it tried steps."""
    joint, _ = train(Run("digits", "joint", 0, 0, 1))
    aim, history = train(Run("digits", name, 0, 0, 1))
    assert not any(kappa for table in history for row in table["kappa"].values() for kappa in row)
    assert bool(history[0]["trial_losses"]) == (name == "aim (trial)")
    differing = {name for name, value in trained(joint).items() if value != trained(aim)[name]}
    assert differing == {"contestant", "options"}
    folder = Folder(tmp_path)
    folder.add(aim, history)
    assert repr([table.to_dict() for table in folder.history(aim.run)]) == repr(history)  # there are NaNs in it
    assert folder.history(joint.run) == []


def test_contestants_are_methods_with_equal_budgets() -> None:
    for name, entry in CONTESTANTS.items():
        assert entry.method in METHODS, name
        assert 1 <= len(entry.grid) <= BUDGET, name
        assert contestant(name) is entry
    with pytest.raises(ValueError, match="unknown contestant 'agn'"):
        contestant("agn")
    with pytest.raises(SystemExit):
        main(["--methods", "agn"])


def test_tuning_takes_the_best_complete_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTESTANTS, "x", Contestant("joint", ({}, {"a": 1}, {"a": 2})))
    runs = tuning_runs(["digits"], ["joint", "x"], 2)
    assert [(r.contestant, r.choice, r.seed) for r in runs] == [("x", c, s) for s in TUNING_SEEDS for c in range(3)]
    first, second = TUNING_SEEDS
    found = [compare_line("x", first, validation=v, choice=c) for c, v in enumerate((70.0, 60.0, 99.0))]
    found += [compare_line("x", second, validation=v, choice=c) for c, v in enumerate((70.0, 81.0))]
    assert tuned(found, runs) == {("digits", "x"): 1}
    found[1] = replace(found[1], validation=59.0)
    assert tuned(found, runs) == {("digits", "x"): 0}, "the default where two are equal"
    longer = [replace(x, epochs=3, validation=90.0) for x in found[1::3]]
    assert tuned([*found, *longer], runs) == {("digits", "x"): 0}, "other epochs are another comparison"
    assert tuned([compare_line("x", 0)], runs) == {}
    runs = seed_runs(["digits"], ["joint", "x"], 1, None, {("digits", "x"): 1})
    assert [(r.contestant, r.choice, r.epochs) for r in runs] == [
        (name, int(name == "x"), DATA_SETS["digits"].epochs) for name in ("joint", "x", *alone("digits"))
    ]


def test_measures() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    assert measures.accuracy(logits, labels) == 75.0
    # class 0: precision 1, recall 1/2; class 1: precision 2/3, recall 1
    assert measures.macro_f1(logits, labels) == pytest.approx(100.0 * (2.0 / 3.0 + 0.8) / 2.0)
    confidence = 1.0 / (1.0 + math.exp(-2.0))
    assert measures.calibration_error(logits, labels) == pytest.approx(100.0 * (confidence - 0.75))
    assert measures.calibration_error(torch.tensor([[50.0, 0.0]]), torch.tensor([0])) == pytest.approx(0.0)
    mean, half = measures.paired([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.302653 / math.sqrt(3.0), rel=1e-6)  # the quantile of t with 2 degrees of freedom
    # splits of the same samples, a quarter as many to test as to train: (1 / 3 + 1 / 4) in place of 1 / 3
    _, wider = measures.paired([3.0, 5.0, 7.0], [2.0, 3.0, 4.0], 0.25)
    assert wider == pytest.approx(half * math.sqrt(1.0 + 0.25 * 3))
    assert math.isnan(measures.paired([1.0], [0.0])[1])


def test_report_says_where_aim_stands(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(3):
        folder.add(compare_line("joint", seed, 50.0 + seed), [])
        better = json.dumps({"grey": 70.0 + seed / 10, "colour": 10.0 + seed / 10})
        seconds = 1.5 * (2.0, 4.0, 9.0)[seed]
        folder.add(compare_line("aim", seed, 60.0 + seed, probes=better, seconds=seconds), [])
        folder.add(compare_line("aim", seed, 0.0, epochs=1), [])
        folder.add(compare_line("aim", seed, 1.0, options='{"alpha": 3}'), [])
        folder.add(compare_line("ogm", seed, 59.5 + seed), [])
        folder.add(compare_line("alone:grey", seed, 90.0, probes="{}"), [])
    folder.add(compare_line("aim", TUNING_SEEDS[0], 0.0), [])
    rows = report.standings(report.reported(folder.lines()))["digits"]
    assert [s.contestant for s in rows] == ["joint", "aim", "ogm", "alone:grey"]
    aim = rows[1]
    assert (aim.seeds, aim.test, aim.difference, aim.half) == (3, 61.0, 10.0, 0.0)
    assert aim.time == 4.0, "the median of a run's seconds over joint training's"
    assert aim.error == pytest.approx(1.0 / math.sqrt(3.0))
    said = report.findings({"digits": rows})
    assert "on 1 of 1 data sets (digits)" in said[0]
    assert "on 0: none" in said[1]
    assert "on 0 (none)" in said[2]
    assert "raised grey of digits (+10.1); lowered colour of digits (-9.9)" in said[3]
    fallen = {"test": 40.0, "difference": -10.0, "by_seed": {0: 39.0, 1: 40.0, 2: 41.0}}
    worse = [replace(s, **fallen) if s.contestant == "aim" else s for s in rows]
    said = report.findings({"digits": worse})
    assert "on 0 of 1 data sets (none)" in said[0]
    assert "on 1: digits (ogm, +20.5 ± 0.0)" in said[1]
    assert "on 1 (digits)" in said[2]
    assert report.findings({"digits": rows[:1]}) == ["AIM was not among the methods."]

    written = report.write(folder)
    assert {path.name for path in written} == {"digits.png", "differences.png", "report.md", "report.html"}
    text = (tmp_path / "report.md").read_text()
    assert "| aim † | 3 | 61.0 ± 0.6 | +10.0 ± 0.0 | 1.5 | 1.5 | 4.00 | 70.1 | 10.1 |  |" in text
    assert "abc, torch 2" in text
    assert "<td>+10.0 ± 0.0</td>" in (tmp_path / "report.html").read_text()
    report.write(folder, [Run("digits", "aim", 0, seed, 1) for seed in range(3)])
    assert "| aim † | 3 | 0.0 ± 0.0 |" in (tmp_path / "report.md").read_text()


def test_other_networks_are_other_runs(tmp_path: Path) -> None:
    made, _ = train(Run("digits", "joint", 0, 0, 1, "transformer", 16))
    assert (made.backbone, made.width) == ("transformer", 16)
    assert trained(made) != trained(train(Run("digits", "joint", 0, 0, 1))[0])
    wide = [compare_line(name, seed, width=128) for name in ("joint", "aim") for seed in range(2)]
    narrow = [compare_line(name, seed) for name in ("joint", "aim", "ogm") for seed in range(2)]
    assert report.reported([*narrow, *wide]) == wide, "beside the latest joint training"
    assert report.reported([*wide, *narrow]) == narrow
    with pytest.raises(SystemExit, match="2"):
        main(["--methods", "joint", "--backbone", "resnet18", "--data", "htad", "--out", str(tmp_path / "no")])
    runs = seed_runs(["digits"], ["joint"], 1, 2, {}, "resnet18", 128)
    assert {(run.backbone, run.width) for run in runs} == {("resnet18", 128)}
    folder = Folder(tmp_path)
    others = [replace(runs[0], backbone="auto", width=width) for width in (64, 128)]
    assert len({folder.history_file(run) for run in (runs[0], *others)}) == 3


def test_a_line_that_was_cut_short_does_not_swallow_the_next(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in (1, 2):
        folder.add(compare_line(seed=seed), [])
    text = folder.file.read_text()
    folder.file.write_text(text[: text.rindex("colour") + 3])  # within a quoted field
    for seed in (3, 4):
        folder.add(compare_line(seed=seed), [])
    assert [x.seed for x in folder.lines()] == [1, 3, 4]


def test_results_of_another_version_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.csv"
    file.write_text("commit,date\nabc,today\n")
    for options in (TINY, ["--report"]):
        assert main([*options, "--out", str(tmp_path)]) == 1
        assert "results.csv has other columns than this version writes; give another folder" in capsys.readouterr().err
    assert file.read_text() == "commit,date\nabc,today\n"
    assert not (tmp_path / "report.md").exists()


def test_costs_are_medians_of_the_latest_commit(tmp_path: Path) -> None:
    empty = dict.fromkeys(("date", "cpu", "os", "python", "torch", "isa", "backbone"), "")

    def line(commit: str, name: str, step_ms: float, update_ms: float, peak_mib: float) -> cost.CostLine:
        numbers = {"step_ms": step_ms, "fastest": 0.0, "slowest": 9.0, "update_ms": update_ms, "peak_mib": peak_mib}
        return cost.CostLine(**empty, commit=commit, threads=1, data="digits", contestant=name, width=64, **numbers)

    lines = [line("old", "joint", 9.0, 9.0, 9.0)]
    lines += [line("new", "joint", ms, 0.0, 10.0) for ms in (1.0, 5.0, 2.0)]
    lines += [line("new", "aim", ms, 30.0, 12.0) for ms in (2.5, 1.0, 9.0)]
    append_csv(tmp_path / "cost.csv", lines, cost.CostLine)
    assert report._costs(tmp_path / "cost.csv")[1:] == [
        ["digits", "joint", "2.00", "1.00", "0.00", "10"],
        ["digits", "aim", "2.50", "1.25", "30.00", "12"],
    ]
    assert report._costs(tmp_path / "none.csv") == []
    report.write(Folder(tmp_path))
    written = (tmp_path / "report.md").read_text()
    assert "| digits | aim | 2.50 | 1.25 |" in written and "Nothing was trained" in written


def test_cost_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "STEPS", 2)
    held = []
    monkeypatch.setattr(
        cost, "_hold_the_first", lambda method, hold=cost._hold_the_first: (hold(method), held.append(method))
    )
    cost.cost_of("digits", "aim (gap, weights)")
    table = held[0].aim.history[-1]
    assert table.dominant == ("grey",)
    assert table.kappa["grey"] == pytest.approx([0.5] * len(table.kappa["grey"]))
    found = cost.cost_of("digits", "joint")
    assert found["fastest"] <= found["step_ms"] <= found["slowest"]
    assert found["step_ms"] > 0.0
    assert found["update_ms"] >= 0.0
    assert found["peak_mib"] >= 0.0 or math.isnan(found["peak_mib"])


def test_training_on_held_out_samples_takes_the_union(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch has every training and every validation sample once; the training batches are those of all others."""
    data = DATA_SETS["digits"].make(0)
    batches: dict[str, list[torch.Tensor]] = {}
    for name in ("joint", "train-on-held"):
        forward = Blocks.forward
        seen: list[torch.Tensor] = batches.setdefault(name, [])
        with monkeypatch.context() as patch:
            patch.setattr(
                Blocks, "forward", lambda s, x, y, forward=forward, seen=seen: (seen.append(x[1]), forward(s, x, y))[1]
            )
            train(Run("digits", name, 0, 0, 1))
    assert len(batches["joint"]) == len(batches["train-on-held"])
    extra = []
    for plain, both in zip(batches["joint"], batches["train-on-held"], strict=True):
        assert torch.equal(both[: len(plain)], plain)
        extra.append(both[len(plain) :])

    def rows(x: torch.Tensor) -> list[list[float]]:
        return sorted(x.flatten(1).tolist())

    assert rows(torch.cat(extra)) == rows(data.validation.inputs[1])
    assert max(map(len, extra)) - min(map(len, extra[:-1])) <= 1, "spread evenly"
    draws = torch.Generator().manual_seed(0)
    assert held_out_of(contestant("train-on-held"), data, draws) is data.validation
    for name in ("best-subset", "aim"):
        assert len(held_out_of(contestant(name), data, draws)) == min(PROBE_SAMPLES, len(data.validation))


@pytest.mark.parametrize("name", ["train-on-held", "best-subset", "modality-dropout"])
def test_baselines_are_trained_and_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line, history = train(Run("digits", name, 0, 0, 1))
    assert 0.0 < line.test <= 100.0 and not history and line.seconds > 0.0
    assert set(json.loads(line.probes)) == {"grey", "colour"}
    monkeypatch.setattr(cost, "STEPS", 1)
    assert cost.cost_of("digits", name)["step_ms"] > 0.0
