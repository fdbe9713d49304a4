"""How commands end: what cannot be written is a sentence and status 1, an interruption one and 130; never a traceback,
and what was done so far is kept."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_helpers import COMMANDS, ROOT
from result_lines import compare_line, demo_history, demo_line, precision_line

from aim_kernels import bench, command_line
from aim_kernels.bench import gpu, packed, shapes
from aim_kernels.bench import memory as bench_memory
from aim_kernels.experiments import precision
from aim_kernels.experiments.compare import cli as compare_cli
from aim_kernels.experiments.compare import cost
from aim_kernels.experiments.compare.contestants import contestant
from aim_kernels.experiments.data import DATA_SETS
from aim_kernels.experiments.demo import cli as demo_cli

pytestmark = pytest.mark.slow

# -- files that cannot be written --------------------------------------------------------------------------------------


def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Every command with work that takes no time, and its arguments."""
    shape_set = shapes.ShapeSet("tiny", ((16, 33),), "a small tensor", rounds=1, repeats=1)
    monkeypatch.setitem(shapes.SETS, "tiny", shape_set)
    monkeypatch.setattr(gpu, "SETS", {"256m": shape_set})
    monkeypatch.setattr(gpu, "peers", lambda dtype, device, of=gpu.peers: of(dtype, device)[:1])
    monkeypatch.setattr(packed, "measure", lambda numel, rounds, names, of=packed.measure: of(8192, 1, names))
    monkeypatch.setattr(bench_memory, "OPTIMIZERS", {})

    def demo_train(run: Any, on_epoch: Any) -> Any:
        return demo_line(run.data, run.contestant, run.seed), demo_history() if run.contestant == "aim" else []

    def compare_train(run: Any) -> Any:
        options = contestant(run.contestant).options(run.choice)
        made = compare_line(run.contestant, run.seed, epochs=run.epochs, options=options)
        return made, demo_history() if run.contestant == "aim" else []

    def precision_train(configuration: Any, seed: int, watched: bool) -> Any:
        return precision_line("text", configuration.name, seed, 1.0, 0.9 if watched else math.nan)

    monkeypatch.setattr(demo_cli, "train", demo_train)
    monkeypatch.setattr(compare_cli, "train", compare_train)
    monkeypatch.setitem(
        precision.TASKS,
        "text",
        lambda c, seed, watched: precision_line("text", c.name, seed, 1.0, 0.9 if watched else math.nan),
    )
    monkeypatch.setattr(precision, "drift", lambda: dict.fromkeys(precision.CONFIGURATIONS, 0.0))
    return {
        "demo": ["demo", "--data", "digits", "--seeds", "0", "--epochs", "2"],
        "bench": ["bench", "--sets", "tiny", "--candidates", "aim", "torch-fused", "--rounds", "1", "--threads", "1"],
        "bytes": ["bench", "--bytes", "--threads", "1"],
        "memory": ["bench", "--memory"],
        "gpu": ["bench", "--device", "cpu", "--dtypes", "float32", "--rounds", "1"],
        "compare": ["compare", "--data", "digits", "--methods", "aim", "--no-tuning", "--seeds", "2", "--epochs", "2"],
        "precision": ["precision", "--tasks", "text", "--configurations", "fp32", "bf16", "--seeds", "2"],
    }


HISTORY = {
    "demo": "history/digits-aim-seed0-epochs2-cpu.json",
    "compare": "history/digits-aim-0-seed0-epochs2.json",
}
FILES = [
    *itertools.product(["demo"], ["config.json", "results.csv", HISTORY["demo"], "table.md", "accuracy.png"]),
    ("demo", "modulation-digits.png"),
    *itertools.product(["bench"], ["results.csv", "results.png"]),
    ("bytes", "bytes.csv"),
    ("memory", "memory.csv"),
    *itertools.product(["gpu"], ["gpu-cpu-dry-run.csv", "gpu-cpu-dry-run.md", "gpu-cpu-dry-run.png"]),
    *itertools.product(["compare"], ["results.csv", HISTORY["compare"], "report.md", "report.html", "digits.png"]),
    *itertools.product(["precision"], ["precision.csv", "precision.png"]),
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
@pytest.mark.parametrize(("mode", "name"), FILES)
def test_a_full_disk_is_a_sentence(
    mode: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = tiny(monkeypatch)[mode]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to("/dev/full")
    assert COMMANDS[command]([*options, "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert f"python -m aim_kernels {command}: error: cannot write {tmp_path / name}: No space left on device\n" in err
    assert "the same command continues" in err or "are printed above" in err
    assert Path("/dev/full").is_char_device()

    # With room again the same command goes on, and ends.
    (tmp_path / name).unlink()
    assert COMMANDS[command]([*options, "--out", str(tmp_path)]) == 0
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", ["demo", "bench", "bytes", "memory", "gpu", "compare", "precision"])
def test_what_became_unwritable_later_is_a_sentence(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is tried, and then goes: its parent becomes a file."""
    command, *options = tiny(monkeypatch)[mode]
    folder, tried = tmp_path / "parent" / "out", command_line.folder

    def gone(text: str) -> Path:
        path = tried(text)
        (tmp_path / "parent").write_text("")
        return path

    monkeypatch.setattr(command_line, "folder", gone)
    assert COMMANDS[command]([*options, "--out", str(folder)]) == 1
    assert f"cannot write {folder}" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("mode", "name"), [*(file for file in FILES if file[1].endswith(".csv")), ("compare", "cost.csv")]
)
def test_files_of_others_are_left_alone(
    mode: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a comparison's results.csv where the demo's is to be: told before anything is trained or timed."""
    command, *options = tiny(monkeypatch)[mode]
    if name == "cost.csv":
        options = ["--cost", "--data", "digits", "--methods", "joint"]
    for module in (demo_cli, compare_cli):
        monkeypatch.setattr(module, "train", lambda *_: pytest.fail("work began"))
    monkeypatch.setitem(precision.TASKS, "text", lambda *_: pytest.fail("work began"))
    for module in (bench, gpu, packed, bench_memory):
        monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("work began"))
    for content in (b"a,b\n1,2\n", b"\xff\xfe\x00binary", b"no header"):
        (tmp_path / name).write_bytes(content)
        assert COMMANDS[command]([*options, "--out", str(tmp_path)]) == 1
        assert f"error: {tmp_path / name} " in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert COMMANDS[command]([*options, "--out", str(tmp_path)]) == 1
    assert f"{tmp_path / name}: Is a directory" in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", ["demo", "compare", "precision"])
def test_a_line_cut_short_by_a_full_disk_is_done_again(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, *options = tiny(monkeypatch)[mode]
    assert COMMANDS[command]([*options, "--out", str(tmp_path)]) == 0
    file = tmp_path / ("precision.csv" if mode == "precision" else "results.csv")
    whole = file.read_text().splitlines()
    file.write_text(file.read_text()[:-15])
    assert COMMANDS[command]([*options, "--out", str(tmp_path)]) == 0
    assert file.read_text().splitlines() == whole


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["demo", "bench", "bytes", "memory", "gpu", "compare", "cost", "precision", "release"])
def test_an_interruption_is_a_sentence(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    commands = tiny(monkeypatch)
    commands |= {"cost": ["compare", "--cost", "--data", "digits"], "release": ["release.py"]}
    command, *options = commands[mode]
    for module in (bench, packed, bench_memory):
        monkeypatch.setattr(module, "measure", interrupted)
    monkeypatch.setattr(gpu, "copy_bandwidth", interrupted)
    for module in (demo_cli, compare_cli):
        monkeypatch.setattr(module, "train", interrupted)
    monkeypatch.setitem(precision.TASKS, "text", interrupted)
    monkeypatch.setattr(cost, "append_csv", interrupted)
    monkeypatch.setattr(cost.subprocess, "run", interrupted)
    if mode != "release":
        options += ["--out", str(tmp_path)]
    assert COMMANDS[command](options) == 130
    assert "\nInterrupted." in capsys.readouterr().err


def test_a_process_of_its_own_that_fails_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **options: Any) -> None:
        raise subprocess.CalledProcessError(-9, command, "", "Traceback ...\nRuntimeError: no memory\n")

    monkeypatch.setattr(subprocess, "run", run)
    for command, *options in (["release.py"], ["compare", "--cost", "--data", "digits", "--out", str(tmp_path)]):
        assert COMMANDS[command](options) == 1
        assert "error: a process of its own ended with status -9: RuntimeError: no memory\n" in capsys.readouterr().err


def test_a_data_set_that_is_not_there_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = [FileNotFoundError("there is no mfeat.zip"), KeyboardInterrupt()]

    def make(seed: int) -> None:
        raise ends.pop(0)

    monkeypatch.setitem(DATA_SETS, "digits", DATA_SETS["digits"]._replace(make=make))
    for code in (1, 130):
        assert COMMANDS["compare"](["--data", "digits", "--out", str(tmp_path / "out")]) == code
        assert ("there is no mfeat.zip\n" in capsys.readouterr().err) == (code == 1)
    assert list(tmp_path.iterdir()) == []


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([sys.executable, *arguments], text=True, capture_output=True, env=environment, **options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--rounds", "-3"], "argument --rounds: '-3' is not a whole number from 1 to 10000"),
        (["demo", "--seeds", "0-1000000000"], "argument --seeds: '0-1000000000' is 1000000001 seeds"),
        (["compare", "--report", "--out", "nowhere"], "argument --report: there is no folder nowhere"),
    ],
)
def test_as_a_process(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = python("-m", "aim_kernels", *arguments, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and len(done.stderr.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_output_that_finds_no_room(tmp_path: Path) -> None:
    command = f"{sys.executable} -m aim_kernels > /dev/full"
    done = subprocess.run(command, shell=True, text=True, capture_output=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 1
    assert done.stderr == "python -m aim_kernels: error: cannot write the output: No space left on device\n"
    done = subprocess.run(
        f"{sys.executable} -m aim_kernels | head -c 0", shell=True, text=True, capture_output=True, env=os.environ
    )
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux tells who a process has started")
def test_control_c(tmp_path: Path) -> None:
    """Sent to a process and those that train for it, as a terminal does; here to them first, while they import."""
    command = [sys.executable, "-m", "aim_kernels", "compare", "--data", "digits", "--methods", "joint", "--no-tuning"]
    process = subprocess.Popen(
        [*command, "--jobs", "2", "--epochs", "10000", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        # Whoever runs the tests in the background has had it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        _interrupt(process, tmp_path / "out")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _interrupt(process: subprocess.Popen[str], folder: Path) -> None:
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    while process.poll() is None and len(started.read_text().split()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)  # two that train, and one that watches over what they share
    time.sleep(0.5)
    for child in map(int, started.read_text().split()):
        os.kill(child, signal.SIGINT)
    time.sleep(3)  # they had the time to say something
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    results = folder / "results.csv"
    assert f"Interrupted. Finished runs are in {results}; the same command continues." in err
