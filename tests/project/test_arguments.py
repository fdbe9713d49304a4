"""Arguments: a wrong one is one line of usage, one sentence that names option and value, and status 2, before any work.
Every option of every command."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_helpers import COMMANDS, release

from aim_kernels import __main__ as entry
from aim_kernels import bench, command_line
from aim_kernels.bench import gpu, packed
from aim_kernels.experiments import precision
from aim_kernels.experiments.compare import cli as compare_cli
from aim_kernels.experiments.compare import cost
from aim_kernels.experiments.compare import report as compare_report
from aim_kernels.experiments.compare.contestants import TUNING_SEEDS
from aim_kernels.experiments.demo import cli as demo_cli

#: Where the work of each begins.
WORK = [(demo_cli, "_main"), (bench, "_main"), (gpu, "_main"), (precision, "_main"), (release, "_main")]
WORK += [(cost, "measure"), (compare_cli, "_train_all"), (compare_report, "write"), (command_line, "make_folder")]


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to be in, and work that fails the test where it begins."""

    def work(*arguments: Any, **options: Any) -> None:
        pytest.fail("work began")

    for module, name in WORK:
        monkeypatch.setattr(module, name, work)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence of a command that ends with status 2."""
    command, *options = argv
    with pytest.raises(SystemExit) as end:
        COMMANDS[command](options)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    usage, sentence = err.splitlines()
    assert out == "" and usage.startswith("usage: python ") and f"{command} [options]" in usage
    return sentence.partition(": error: ")[2]


# -- numbers, names, seeds, devices, folders: every option of every command --------------------------------------------

HUGE = "1" + "0" * 23
NO_NUMBERS = ("x", "", " ", "nan", "inf", "-inf", "1e400", "0x10", "3;", "1" * 5000)
NO_WHOLES = ("-3", "-1", "0", "2.5", "1e3", "1_0", " 5", "\u0665", "\u00b2", HUGE, "-" + HUGE)
WHOLES = [
    ("demo", "--epochs"),
    ("bench", "--rounds"),
    ("bench", "--threads"),
    ("bench --bytes", "--numel"),
    ("bench --bytes", "--rounds"),
    ("bench --bytes", "--threads"),
    ("bench --device cpu", "--rounds"),
    ("compare", "--seeds"),
    ("compare", "--epochs"),
    ("compare", "--width"),
    ("compare", "--jobs"),
    ("compare --cost", "--width"),
    ("precision", "--seeds"),
    ("precision", "--threads"),
    *(("release.py", option) for option in ("--width", "--blocks", "--batch", "--rounds", "--turns", "--threads")),
]


@pytest.mark.parametrize(("command", "option"), WHOLES)
def test_whole_numbers(command: str, option: str, idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in (*NO_NUMBERS, *NO_WHOLES):
        said = refused([*command.split(), f"{option}={value}"], capsys)
        assert said.startswith(f"argument {option}: ") and " is not a whole number from " in said, value
        assert repr(value)[:30] in said and len(said) < 150
    for value in ("-3", "0", HUGE):  # as two words
        assert f"argument {option}: {value!r}"[:40] in refused([*command.split(), option, value], capsys)
    assert f"argument {option}: expected one argument" in refused([*command.split(), option], capsys)


def test_gap(idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in (*NO_NUMBERS, "-5", "-0.001", HUGE):
        said = refused(["bench", f"--gap={value}"], capsys)
        assert said.startswith("argument --gap: ") and "is not a number from 0 to 60000" in said, value
    assert "argument --gap: '-5' is" in refused(["bench", "--gap", "-5"], capsys)


@pytest.mark.parametrize(
    "value",
    [HUGE, f"0-{HUGE}", "0-1000000000", "5-2", "-1", "-5-2", "1-", "-", "1-2-3", "4294967296", "0.5", "1e3", "nan", "",
     " 1", "1_0", "\u0665", "1,2", "0-1000", "1" * 5000],
)  # fmt: skip
def test_seeds_of_the_demo(value: str, idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert refused(["demo", f"--seeds={value}"], capsys).startswith(f"argument --seeds: {value[:9]!r}"[:26])
    assert time.monotonic() - began < 5.0


def test_seeds_once_and_not_too_many(idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'3' is named twice" in refused(["demo", "--seeds", "1-3", "3"], capsys)
    assert "more than 1000 seeds" in refused(["demo", "--seeds", "0-600", "1000-1600"], capsys)
    assert command_line.seeds("4294967295") == range(4294967295, 4294967296)
    assert [len(command_line.seeds(text)) for text in ("7", "100-109", "0-999")] == [1, 10, 1000]
    # What the configurations are chosen by must not be reported.
    assert f"from 1 to {min(TUNING_SEEDS)}" in refused(["compare", "--seeds", str(min(TUNING_SEEDS) + 1)], capsys)


NAMES = [
    ("demo", "--data", "digits"),
    ("demo", "--method", "joint"),
    ("bench", "--sets", "64m"),
    ("bench", "--candidates", "aim"),
    ("bench --device cpu", "--sets", "256m"),
    ("bench --device cpu", "--dtypes", "float32"),
    ("compare", "--data", "digits"),
    ("compare", "--methods", "aim"),
    ("precision", "--tasks", "text"),
    ("precision", "--configurations", "fp32"),
]


@pytest.mark.parametrize(("command", "option", "name"), NAMES)
def test_names(command: str, option: str, name: str, idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("nosuch", "", name.upper(), f"{name} ", f"{name},{name}", HUGE):
        said = refused([*command.split(), option, wrong], capsys)
        assert said.startswith(f"argument {option}: ") and repr(wrong) in said and name in said
    assert f"{name!r} is named twice" in refused([*command.split(), option, name, name], capsys)
    assert "is given twice" in refused([*command.split(), option, name, option, name], capsys)
    assert "expected at least one argument" in refused([*command.split(), option], capsys)


@pytest.mark.parametrize(
    ("command", "option"), [("compare", "--backbone"), ("release.py", "--rule"), ("release.py", "--state-dtype")]
)
def test_one_name(command: str, option: str, idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("nosuch", "", "-1"):
        assert f"argument {option}: invalid choice: {wrong!r}" in refused([command, f"{option}={wrong}"], capsys)


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_devices(command: str, idle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "cpu:1 cpu:0 CPU meta cuda: cuda:-1 cuda:x -1 7 nosuch".split()
    for wrong in (*odd, "", f"cuda:{HUGE}"):
        assert refused([command, f"--device={wrong}"], capsys).startswith(f"argument --device: {wrong!r} is no")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for absent in ("cuda", "cuda:0", "cuda:1"):
        assert f"{absent!r} is not available here: torch" in refused([command, "--device", absent], capsys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [command_line.device(text) for text in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    assert "torch" in refused([command, "--device", "cuda:2"], capsys)


@pytest.mark.parametrize(
    "command",
    ["demo", "bench", "bench --bytes", "bench --memory", "bench --device cpu", "compare", "compare --cost",
     "compare --report", "precision", "pictures.py"],
)  # fmt: skip
def test_output_folders(command: str, idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (idle / "file").write_text("mine")
    (idle / "dangling").symlink_to(idle / "nowhere")
    folders = ["", "file", "file/below", "file/far/below", "new/\0", "n" * 300, "new/" + "n" * 300, "dangling"]
    folders += ["/proc/nosuch", "/proc/nosuch/below", "/dev/null", "/dev/full", "/dev/null/below"]
    for path in folders:
        assert refused([*command.split(), "--out", path], capsys).startswith(f"argument --out: {path[:9]!r}"[:24])
    assert sorted(path.name for path in idle.iterdir()) == ["dangling", "file"]
    assert (idle / "file").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written(
    code: int, idle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, for whom permissions are no hindrance."""

    def fails(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.TemporaryFile", fails)
    assert os.strerror(code) in refused(["demo", "--out", "a/b/c"], capsys)
    assert os.strerror(code) in refused(["precision"], capsys), "the default folder is tried as well"
    assert list(idle.iterdir()) == []


def test_a_good_folder_is_left_as_it_was(idle: Path) -> None:
    (idle / "there").mkdir()
    for path in ("there", "there/new", "new/newer", "new/../other", ".", str(idle / "absolute")):
        assert command_line.folder(path) == Path(path)
    assert [path.name for path in idle.rglob("*")] == ["there"]


# -- options that do not go together, or do not exist ------------------------------------------------------------------

TOGETHER = [
    ("bench --bytes --memory", "--bytes"),
    ("bench --numel 4", "--numel"),
    ("bench --memory --numel 4", "--numel"),
    ("bench --memory --rounds 4", "--rounds"),
    ("bench --memory --threads 1", "--threads"),
    ("bench --memory --gap 1", "--gap"),
    ("bench --memory --sets 64m", "--sets"),
    ("bench --bytes --gap 0", "--gap"),
    ("bench --bytes --sets 64m", "--sets"),
    ("bench --bytes --candidates aim", "--candidates"),
    ("bench --device cpu --bytes", "--bytes"),
    ("bench --device=cpu --gap 3", "--gap"),
    ("bench --device cpu --threads 1", "--threads"),
    ("bench --device cpu --sweep --sets 1000x1k", "--sweep"),
    ("bench --device cpu --sweep --dtypes bfloat16", "--sweep"),
    ("bench --dev cpu", "--dev"),
    ("bench --sweep", "--sweep"),
    ("compare --report --cost", "--cost"),
    *((f"compare --report {option}", option.split()[0]) for option in (
        "--data all", "--methods aim", "--seeds 3", "--epochs 1", "--backbone auto", "--width 64", "--no-tuning",
        "--jobs 1")),
    *((f"compare --cost {option}", option.split()[0]) for option in (
        "--seeds 3", "--epochs 1", "--no-tuning", "--jobs 2")),
    ("compare --data all digits", "--data"),
    ("compare --methods aim all", "--methods"),
    ("compare --data htad --backbone resnet18", "--backbone"),
    ("compare --data digits --backbone transformer --width 7", "--width"),
    ("release.py --only nosuch", "--only"),
    ("release.py --rule sgd --state-dtype int8x", "--state-dtype"),
    *((f"{command} --nosuch 3", "--nosuch") for command in COMMANDS),
    *((f"{command} stray", "stray") for command in COMMANDS if command != "pictures.py"),
    ("pictures.py nosuch.png", "nosuch.png"),
    ("demo --seed 3", "--seed"),
    ("precision --thread 3", "--thread"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "named"), TOGETHER)
def test_options_that_do_not_go_together(
    typed: str, named: str, idle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(typed.split(), capsys)
    assert list(idle.iterdir()) == []


def test_what_no_memory_holds(idle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "memory", lambda: 2.0**30)
    arrays = packed.Arrays(4096)
    bytes_there = sum(t.nbytes for t in (*arrays.buffers.values(), *arrays.source.values()))
    assert packed.bytes_of(4096) == bytes_there
    for typed in ("bench --bytes --numel 64", "compare --data digits --width 8192", "release.py --blocks 1000"):
        said = refused(typed.split(), capsys)
        assert typed.split()[-2] in said and "this machine has 1" in said
    monkeypatch.setattr(command_line, "memory", lambda: math.inf)
    with pytest.raises(pytest.fail.Exception, match="work began"):
        bench.main(["--bytes", "--numel", "64"])


def test_what_is_allowed_goes_on(idle: Path) -> None:
    """The other side of the bounds: work begins."""
    allowed = [
        ["demo", "--seeds", "0-999", "--epochs", "10000", "--out", "new/er"],
        ["bench", "--rounds", "1", "--threads", "1024", "--gap", "0", "--sets", "64m", "l3-256k", "--out", "."],
        ["bench", "--bytes", "--rounds", "10000", "--threads", "1", "--numel", "1"],
        ["bench", "--memory", "--out", "new"],
        ["bench", "--device", "cpu", "--sweep", "--sets", "resnet50", "--rounds", "1"],
        ["compare", "--data", "digits", "--seeds", "1000", "--jobs", "256", "--width", "1", "--no-tuning"],
        ["compare", "--cost", "--data", "digits", "--methods", "all"],
        ["precision", "--tasks", "text", "--seeds", "1", "--threads", "2"],
        ["release.py", "--rounds", "2", "--turns", "1", "--state-dtype", "bfloat16", "--rule", "sgd"],
    ]
    for command, *options in allowed:
        with pytest.raises(pytest.fail.Exception, match="work began"):
            COMMANDS[command](options)
    assert list(idle.iterdir()) == []


@pytest.mark.parametrize("there", [[], ["results.csv"], ["cost.csv"], ["results.csv", "cost.csv"], ["other.csv"]])
def test_a_report_of_nothing_is_refused(there: list[str], idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = idle / "results"
    if there:
        folder.mkdir()
    for name in there:
        (folder / name).write_text("")
    said = refused(["compare", "--report", "--out", str(folder)], capsys)
    nothing = f"{folder} has no results: neither runs in results.csv nor steps in cost.csv; --out names a folder that"
    missing = f"there is no folder {folder}; --out names one that"
    assert said == f"argument --report: {nothing if there else missing} a comparison wrote"
    assert sorted(path.name for path in folder.glob("*")) == sorted(there)
    assert folder.exists() == bool(there)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nosuch"], "unknown command 'nosuch'"),
        ([""], "unknown command ''"),
        (["-1"], "unknown command '-1'"),
        (["--nosuch"], "unknown command '--nosuch'"),
        (["report", "now"], "report takes no 'now'"),
        (["help", "demo"], "help takes no 'demo'"),
    ],
)
def test_commands(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[1] == f"python -m aim_kernels: error: {said}"
    assert err.startswith("usage: python -m aim_kernels, ") and len(err.splitlines()) == 2
