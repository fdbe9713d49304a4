"""Pictures of the pages show what was recorded, and what the tables beside them say. `python benchmarks/pictures.py`
draws them anew."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_helpers import pictures
from result_lines import demo_line

from aim_kernels.aim import plots
from aim_kernels.experiments.demo import pictures as demo_pictures

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README, GUIDE, COMPARISON = (ROOT / name for name in ("README.md", "docs/guide.md", "docs/comparison.md"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
#: As the command knows them, below the root.
FOLDERS = ROOT / "docs", ROOT / "benchmarks"
COMMITTED = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in folder.rglob("*.png"))


def alike(left: Any, right: Any) -> bool:
    """The same tree; floats to five digits."""
    if isinstance(left, dict):
        return list(left) == list(right) and all(alike(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(alike, left, right))
    return math.isclose(left, right, rel_tol=1e-5, abs_tol=1e-9) if isinstance(left, float) else bool(left == right)


def shown_in(page: Path, picture: str) -> str:
    """The text in place of a picture on a page."""
    ((text,),) = [re.findall(rf"!\[([^\]]*)\]\([\w/]*{picture}\)", page.read_text(encoding="utf-8"))]
    return str(text)


def table(page: Path, *first: str) -> list[list[str]]:
    """The cells of the lines of a page that begin with these."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    found = [next(row for row in cells if row[0].startswith(name)) for name in first]
    return [row[1:] for row in found]


def with_error(values: Sequence[float], sign: str = "") -> str:
    return f"{statistics.fmean(values):{sign}.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


# -- all pictures ------------------------------------------------------------------------------------------------------


def test_every_picture_is_drawn_by_the_command_and_shown() -> None:
    assert sorted(pictures.PICTURES) == COMMITTED
    shown = {
        str((page.parent / link).resolve().relative_to(ROOT))
        for page in PAGES
        for link in re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", page.read_text(encoding="utf-8"))
    }
    assert shown == set(COMMITTED)


@pytest.mark.parametrize("name", COMMITTED)
def test_a_picture_shows_what_is_recorded(name: str, tmp_path: Path) -> None:
    pictures.PICTURES[name](tmp_path / "anew.png")
    anew, committed = (plots.numbers_of(path) for path in (tmp_path / "anew.png", ROOT / name))
    assert committed, "drawn by something else than benchmarks/pictures.py"
    assert alike(committed, anew)


def test_the_command_draws_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pictures.main(["demo.png", "--out", str(tmp_path / "here")]) == 0
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["demo.png"]
    with pytest.raises(SystemExit, match="2"):
        pictures.main(["demo.gif"])
    assert "argument NAME: 'demo.gif' is none of: demo.png" in capsys.readouterr().err


# -- the demo: lines, picture, table and text --------------------------------------------------------------------------


def demo_lines() -> dict[tuple[str, str], dict[int, dict[str, str]]]:
    """(data, method) -> seed -> line, read here on its own."""
    found: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    with (RESULTS / "demo" / "results.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["data"], row["method"]), {})[int(row["seed"])] = row
    return found


def of(data: str, method: str, column: str = "test") -> list[float]:
    return [float(row[column]) for row in demo_lines()[data, method].values()]


def best_ogm(data: str) -> str:
    return max((f"ogm-ge {alpha}" for alpha in ("0.5", "1", "2")), key=lambda name: statistics.fmean(of(data, name)))


def test_demo_picture_and_table_are_of_the_lines() -> None:
    lines = demo_lines()
    assert {(d, tuple(by_seed)) for (d, _), by_seed in lines.items()} == {
        ("digits", tuple(range(100, 110))),
        ("watch", (0, 1, 2)),
    }
    drawn = plots.numbers_of(ROOT / "docs/images/demo.png")
    assert drawn["panels"] == ["digits, 10 seeds (100 to 109)", "watch, 3 seeds (0 to 2)"]
    assert {(d, m) for d, methods in drawn["accuracy"].items() for m in methods} == lines.keys()
    for data, method in lines:
        mean, error = drawn["accuracy"][data][method]
        values = of(data, method)
        assert mean == pytest.approx(statistics.fmean(values), abs=1e-3)
        assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), rel=1e-4)

    rows = table(README, "coloured digits", "... linear probe of the grey", "smartwatch")
    for row, (data, column) in zip(rows, (("digits", "test"), ("digits", "probe_0"), ("watch", "test")), strict=True):
        assert row == [with_error(of(data, name, column)) for name in ("joint", best_ogm(data), "aim", "drop")]


def test_text_in_place_of_the_demo_picture_is_true() -> None:
    expected = []
    for data in ("digits", "watch"):
        alphas = [statistics.fmean(of(data, f"ogm-ge {alpha}")) for alpha in ("0.5", "1", "2")]
        joint, aim, drop = (statistics.fmean(of(data, name)) for name in ("joint", "aim", "drop"))
        expected += [f"{value:.1f}" for value in (joint, min(alphas), max(alphas), aim, drop)]
    assert re.findall(r"\d+\.\d", shown_in(README, "demo.png")) == expected
    assert "On the watch nothing is held back: AIM is joint training, to the bit." in " ".join(
        README.read_text(encoding="utf-8").split()
    )
    for column in ("test", "train", "probe_0"):
        assert of("watch", "joint", column) == of("watch", "aim", column) == of("watch", "drop", column)


def test_modulation_picture_is_of_the_history_and_as_its_text_says() -> None:
    history = json.loads((RESULTS / "demo/history/digits-aim-seed100-epochs40-cpu.json").read_text())
    drawn = plots.numbers_of(ROOT / "docs/images/modulation-digits.png")
    assert drawn["title"].startswith("digits, AIM, seed 100")
    assert {entry["rule"] for entry in history} == {"reliance"}
    columns = {"reliance in training": "scores", "reliance held out": "held_out_scores", "strength kappa": "kappa"}
    for panel, field in columns.items():
        for modality, line in drawn[panel].items():
            assert line == pytest.approx([entry[field][modality][0] for entry in history], rel=1e-5)
    found, limit = drawn["standard errors above 1 + dead zone"], drawn["limit"]
    for modality in ("grey", "colour"):
        for update, entry in enumerate(history):
            excess, error = entry["excess"][modality][0], entry["excess_errors"][modality][0]
            if error:
                own = (excess - 1.0 - entry["dead_zone"]) / error
                assert found[modality][update] == pytest.approx(own, rel=1e-4)
    text = shown_in(GUIDE, "modulation-digits.png")
    assert (
        "seed 100" in text and "below the limit of 3 for grey at all times, for colour above 6 from update 1 on" in text
    )
    assert set(limit["grey"]) == {3.0} and max(x for x in found["grey"] if x is not None) < 3.0
    assert min(found["colour"][1:]) > 6.0
    assert "held back from update 1 on" in text and min(drawn["strength kappa"]["colour"][1:]) > 0.0
    assert set(drawn["strength kappa"]["grey"]) == {0.0}
    assert "grey's grows to 14 in both" in text and drawn["reliance held out"]["grey"][-1] > 14.0
    assert "colour's stays near 0 on held-out samples" in text
    assert max(map(abs, drawn["reliance held out"]["colour"])) < 0.3 < max(drawn["reliance in training"]["colour"])


def test_seeds_are_told() -> None:
    def told(*seeds: int) -> str:
        return demo_pictures.seeds_of([demo_line(seed=seed) for seed in seeds], "digits")

    assert [told(7), told(3, 1), told(1, 2, 5), told(2, 1, 0)] == [
        "seed 7", "2 seeds (1, 3)", "3 seeds (1, 2, 5)", "3 seeds (0 to 2)",
    ]  # fmt: skip


# -- the other pictures and the tables beside them ---------------------------------------------------------------------


def test_comparison_picture_agrees_with_the_table() -> None:
    drawn = plots.numbers_of(ROOT / "docs/images/comparison.png")
    assert {"aim", "aim (trial)", "own-losses", "ogm-ge"} <= drawn.keys()
    for data in drawn["aim"]:
        (cells,) = table(COMPARISON, data)
        for contestant, cell in zip(("aim", "aim (trial)", "own-losses"), cells[1:4], strict=True):
            difference, half = drawn[contestant][data]
            told = f"{difference:+.1f} ± {half:.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")
            assert cell == ("0" if difference == 0.0 else told), (data, contestant)


def test_precision_picture_agrees_with_the_table() -> None:
    drawn = plots.numbers_of(ROOT / "docs/images/precision.png")
    text = GUIDE.read_text(encoding="utf-8")
    lines = text[text.index("| float32 | 12 | 0 |") :].splitlines()[1:12]
    told = [re.findall(r"([+-]\d\.\d{4}) ± (\d\.\d{4})", line) for line in lines]
    for column, task in enumerate(("digits", "watch", "text")):
        found = list(drawn["difference"][task].values())
        assert len(found) == len(told) == 11
        for (difference, error), cells in zip(found, told, strict=True):
            assert (float(cells[column][0]), float(cells[column][1])) == pytest.approx((difference, error), abs=6e-5)
    bands = (
        ", ".join(f"{drawn['band'][task]:.3f}" for task in ("digits", "watch")) + f" and {drawn['band']['text']:.3f}"
    )
    assert f"That error is {bands}: the grey band." in " ".join(text.split())


def test_speed_picture_agrees_with_the_table() -> None:
    drawn = plots.numbers_of(RESULTS / "results.png")
    names = {
        "AIM: mask, modulation": "aim",
        "the same, writing live": "aim-live",
        "row of ones": "aim-plain",
        "`torch.optim.AdamW(fused": "torch-fused",
        "`torch.optim.AdamW(foreach": "torch-foreach",
        "AIM in tuned eager": "aim-eager",
        "AIM under": "aim-compiled",
    }
    rows = table(README, *names)
    for row, candidate in zip(rows, names.values(), strict=True):
        for cell, found in zip(row, drawn.values(), strict=True):
            assert f" · {found[candidate]:.2f} · " in cell if candidate in found else len(cell) == 1, candidate
