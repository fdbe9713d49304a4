"""The main job: its options, its output folder, and that an interrupted run continues."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from result_lines import demo_history, demo_line

from aim_kernels.aim.plots import plot_accuracy, plot_modulation
from aim_kernels.experiments.data import DATA_SETS
from aim_kernels.experiments.demo import cli, main
from aim_kernels.experiments.demo.contestants import DATA
from aim_kernels.experiments.demo.report import markdown, summary, table
from aim_kernels.experiments.demo.results import Folder, Line, train
from aim_kernels.experiments.measures import mean_and_error
from aim_kernels.experiments.runs import Run, network_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # as the demo itself does

TINY = ["--data", "digits", "--seeds", "0", "--epochs", "2"]


def untimed(line: Line) -> dict[str, Any]:
    return {name: value for name, value in vars(line).items() if name not in ("step_ms", "update_ms")}


def test_demo_writes_everything_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([*TINY, "--method", "joint", "aim", "--out", str(out)]) == 0
    screen = capsys.readouterr().out
    assert "joint" in screen
    assert "probe" in screen
    names = {path.name for path in out.iterdir()}
    assert names == {"accuracy.png", "config.json", "history", "modulation-digits.png", "results.csv", "table.md"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith(".png"))
    config = json.loads((out / "config.json").read_text())
    assert config["epochs"] == {"digits": 2}
    assert config["optimizer"]["betas"] == [0.9, 0.99]
    lines = Folder(out).lines()
    assert [(x.method, x.seed) for x in lines] == [("joint", 0), ("aim", 0)]
    assert all(0.0 < x.test <= 100.0 and x.step_ms > 0.0 for x in lines)
    assert len(Folder(out).history(Run("digits", "aim", 0, 0, 2))) == 2

    # a line cut short by an interruption is done again, a finished one is not
    text = (out / "results.csv").read_text()
    (out / "results.csv").write_text(text[:-20])
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "train", lambda run, on_epoch: trained.append(run.contestant) or train(run, on_epoch))
        assert main([*TINY, "--method", "joint", "aim", "--out", str(out)]) == 0
    assert trained == ["aim"]
    assert [untimed(x) for x in Folder(out).lines()] == [untimed(x) for x in lines]


def test_interruption_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(run: Run, on_epoch: Any) -> Any:
        if run.contestant == "aim":
            raise KeyboardInterrupt
        return demo_line(method=run.contestant, seed=run.seed), []

    monkeypatch.setattr(cli, "train", fake)
    torch.set_num_threads(2)
    assert main([*TINY, "--out", str(tmp_path)]) == 130
    assert torch.get_num_threads() == 2
    assert [x.method for x in Folder(tmp_path).lines()] == ["joint", "ogm-ge 0.5", "ogm-ge 1", "ogm-ge 2"]


def test_every_method_trains_on_both_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in DATA:
        full = DATA_SETS[data].make(0)
        few = type(full)(
            full.name,
            full.modalities,
            full.num_classes,
            *(s.take(torch.arange(0, len(s), 20)) for s in (full.train, full.validation, full.test)),
        )
        monkeypatch.setitem(DATA_SETS, data, DATA_SETS[data]._replace(make=lambda seed, few=few: few))
        assert DATA_SETS[data].modalities == full.modalities
        for method in ("joint", "ogm-ge 1", "aim", "drop"):
            found, tables = train(Run(data, method, 0, 0, 2))
            assert found.run == Run(data, method, 0, 0, 2)
            assert all(math.isfinite(value) for value in vars(found).values() if isinstance(value, float))
            assert len(tables) == (2 if method in ("aim", "drop") else 0)
    with pytest.raises(ValueError, match="unknown contestant 'agm'"):
        train(Run("digits", "agm", 0, 0, 1))


def test_equal_runs_give_equal_results_and_seeds_differ() -> None:
    def measured(run: Run) -> list[float]:
        found, _ = train(run)
        return [found.test, found.validation, found.train, found.probe_0, found.probe_1]

    first = measured(Run("digits", "joint", 0, 3, 3))
    torch.rand(7)
    assert measured(Run("digits", "joint", 0, 3, 3)) == first
    assert measured(Run("digits", "joint", 0, 4, 3)) != first
    assert measured(Run("digits", "aim", 0, 3, 3)) != first


def test_aim_beats_joint_training_on_the_shortcut() -> None:
    # a quarter of the demo's training; the demo itself is judged on ten fresh seeds
    joint, _ = train(Run("digits", "joint", 0, 11, 20))
    aim, tables = train(Run("digits", "aim", 0, 11, 20))
    assert aim.test > joint.test + 5.0
    assert tables[-1]["dominant"] == ("colour",)
    assert max(tables[-1]["kappa"]["grey"]) == 0.0


def test_networks_match_their_data() -> None:
    for data in DATA:
        split = DATA_SETS[data].make(0)
        model = network_of(split, 0)
        inputs = [x[:3] for x in split.train.inputs]
        assert model(*inputs).shape == (3, split.num_classes)
        blocks = model.blocks()
        assert list(blocks) == list(split.modalities)
        assert all(len(row) == 3 for row in blocks.values())
        z = inputs[0]
        for block in blocks[split.modalities[0]]:
            z = block(z)
        assert torch.equal(z, model.features(*inputs)[0])


def test_plan_follows_the_options() -> None:
    options = cli.parser().parse_args(["--data", "watch", "--method", "aim", "ogm-ge", "--seeds", "7", "100-101"])
    runs = cli.planned(options)
    assert [(r.contestant, r.seed) for r in runs] == [
        (method, seed) for seed in (7, 100, 101) for method in ("ogm-ge 0.5", "ogm-ge 1", "ogm-ge 2", "aim")
    ]
    assert {(r.data, r.epochs, r.device) for r in runs} == {("watch", DATA_SETS["watch"].epochs, "cpu")}
    everything = cli.planned(cli.parser().parse_args([]))
    assert len(everything) == len(set(everything)) == 2 * 6 * 3
    assert cli.parser().parse_args([]).out == Path("demo-output")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "x"], "'x' is neither a seed like 7 nor a range like 100-109"),
        (["--seeds", "9-1"], "neither a seed"),
        (["--epochs", "0"], "'0' is not a whole number from 1"),
        (["--device", "toaster"], "is no device"),
        (["--method", "agm"], "invalid choice: 'agm'"),
    ],
)
def test_option_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn", "seglearn"])
def test_a_missing_package_is_a_sentence(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert main(["--out", str(tmp_path / "out")]) == 1
    assert 'which is not installed: pip install "aim-kernels[demo]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_table_pairs_seeds() -> None:
    found = [demo_line(seed=s, test=t) for s, t in ((0, 40.0), (1, 50.0))]
    found += [demo_line(method="aim", seed=s, test=t) for s, t in ((0, 60.0), (1, 71.0), (2, 99.0))]
    header, *rows = table(found, "digits")
    assert header[:5] == ["method", "test accuracy", "vs joint", "probe grey", "probe colour"]
    assert [row[:3] for row in rows] == [["joint", "45.0 ± 5.0", ""], ["aim", "76.7 ± 11.6", "+20.5 ± 0.5"]]
    assert summary(found)["digits"]["joint"] == mean_and_error([40.0, 50.0]) == (45.0, 5.0)
    assert "| aim | 76.7 ± 11.6 | +20.5 ± 0.5 |" in markdown(found)
    assert table(found[:1], "digits")[1][1] == "40.0"


def test_folder_reads_what_it_wrote(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.lines() == []
    folder.add(demo_line(test=100.0 / 3.0), [])
    folder.add(demo_line(method="aim"), demo_history())
    assert folder.lines() == [demo_line(test=100.0 / 3.0), demo_line(method="aim")], "with all digits"
    assert [table.update for table in folder.history(Run("digits", "aim", 0, 0, 2))] == [0, 1, 2]
    assert folder.history(Run("digits", "joint", 0, 0, 2)) == []


def test_plot_modulation(tmp_path: Path) -> None:
    class Stub:
        history = Folder(tmp_path).history(Run("digits", "aim", 0, 0, 2))

    with pytest.raises(ValueError, match="history is empty"):
        plot_modulation(Stub())
    Folder(tmp_path).add(demo_line(method="aim"), demo_history())
    Stub.history = Folder(tmp_path).history(Run("digits", "aim", 0, 0, 2))
    figure = plot_modulation(Stub())
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert [image.shape for image in images] == [(2, 3), (3, 3)] * 3
    assert images[1][2].tolist() == [0.5] * 3
    assert images[3][0].tolist() == pytest.approx([math.tanh(0.3 / 0.1 - 1.0)] * 3)
    figure.savefig(tmp_path / "picture.png")


def test_plot_accuracy() -> None:
    figure = plot_accuracy({"digits": {"joint": (40.0, 1.0), "aim": (60.0, math.nan)}, "watch": {"joint": (80.0, 2.0)}})
    assert [[bar.get_height() for bar in axis.patches] for axis in figure.axes] == [[40.0, 60.0], [80.0]]
