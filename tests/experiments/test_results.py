"""The one reader and writer of result lines, as demo, comparison and precision use it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from result_lines import compare_line, demo_history, demo_line, precision_line

from aim_kernels.command_line import OtherVersionError
from aim_kernels.experiments.compare.results import Folder as CompareFolder
from aim_kernels.experiments.demo.results import Folder as DemoFolder
from aim_kernels.experiments.precision.configurations import Folder as PrecisionFolder
from aim_kernels.experiments.results import Results, RunResults
from aim_kernels.experiments.runs import Outcome, Run

RECORDED = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
THIRD = 100.0 / 3.0
#: Of each experiment: its folder, two lines, and how 100 / 3 is written.
KINDS: dict[str, tuple[type[Results[Any]], Any, Any, str]] = {
    "demo": (DemoFolder, demo_line(test=THIRD), demo_line(seed=1), "33.333333333333336"),
    "compare": (CompareFolder, compare_line(test=THIRD), compare_line(seed=1), "33.3333"),
    "precision": (
        PrecisionFolder,
        precision_line("text", "fp32", 0, THIRD, 1.0),
        precision_line("text", "fp32", 1, 2.0, 1.0),
        "33.3333",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_lines_are_kept_and_one_cut_short_is_left_out(kind: str, tmp_path: Path) -> None:
    folder_type, first, second, written = KINDS[kind]
    folder = folder_type(tmp_path / "out")
    assert folder.lines() == [] and not folder.path.exists()
    for line in (first, second, first):
        folder.append(line)
    assert f",{written}," in folder.file.read_text().splitlines()[1]
    kept = folder.lines()
    assert kept[1] == second and kept[0] == kept[2]
    text = folder.file.read_text()
    for cut in (text.rindex(written) + 3, text.rindex(written) - 7):  # also within a quoted field
        folder.file.write_text(text[:cut])
        folder.append(second)
        folder.append(second)
        assert folder.lines() == [kept[0], second, second, second]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_other_columns_is_neither_read_nor_written(kind: str, tmp_path: Path) -> None:
    folder_type, line, *_ = KINDS[kind]
    folder = folder_type(tmp_path)
    folder.file.write_text("a,b\n1,2\n")
    for use in (folder.lines, lambda: folder.append(line)):
        with pytest.raises(OtherVersionError, match="other columns than this version writes; give another folder"):
            use()
    assert folder.file.read_text() == "a,b\n1,2\n"


def test_what_is_not_a_number_is_kept(tmp_path: Path) -> None:
    PrecisionFolder(tmp_path).append(precision_line("text", "fp32", 0, 1.0))
    (line,) = PrecisionFolder(tmp_path).lines()
    assert math.isnan(line.agreement) and line.train_loss == 1.0


@pytest.mark.parametrize(
    ("folder_type", "line", "name"),
    [
        (DemoFolder, demo_line(method="ogm-ge 0.5"), "digits-ogm-ge0.5-seed0-epochs2-cpu.json"),
        (DemoFolder, replace(demo_line(), device="cuda:1"), "digits-joint-seed0-epochs2-cuda1.json"),
        (CompareFolder, compare_line("aim (gap)"), "digits-aim(gap)-0-seed0-epochs2.json"),
        (CompareFolder, compare_line("alone:grey", width=16), "digits-auto16-alonegrey-0-seed0-epochs2.json"),
    ],
)
def test_histories_have_the_names_of_recorded_ones(
    folder_type: type[RunResults[Any]], line: Any, name: str, tmp_path: Path
) -> None:
    folder = folder_type(tmp_path)
    folder.add(line, demo_history())
    assert [path.name for path in (tmp_path / "history").iterdir()] == [name]
    assert [table.update for table in folder.history(line.run)] == [0, 1, 2]
    assert folder.history(replace(line.run, seed=9)) == []


def test_recorded_files_are_read_whole() -> None:
    for folder in (DemoFolder(RECORDED / "demo"), PrecisionFolder(RECORDED)):
        assert len(folder.lines()) == len(folder.file.read_text().splitlines()) - 1 > 70
    # Contestants whose configuration has changed since are done again.
    compared = CompareFolder(RECORDED / "compare")
    assert 3000 < len(compared.lines()) < len(compared.file.read_text().splitlines())
    assert len(DemoFolder(RECORDED / "demo").history(Run("digits", "aim", 0, 100, 40))) == 40


def test_strengths_of_an_outcome() -> None:
    percents = dict.fromkeys(("test", "validation", "train", "f1", "calibration"), 0.0)
    others = {"train_samples": 1, "test_samples": 1, "step_ms": 0.0, "update_ms": 0.0, "seconds": 0.0}
    tables = [{"kappa": {"a": [0.5, 0.25], "b": [0.0]}}, {"kappa": {"a": [1.0, 0.0], "b": [0.0]}}]
    outcome = Outcome(**percents, **others, probes={}, history=tables)
    assert (outcome.kappa_mean, outcome.kappa_max) == ((0.375 + 0.5) / 4, 1.0)
    nothing = replace(outcome, history=[])
    assert (nothing.kappa_mean, nothing.kappa_max) == (0.0, 0.0)
