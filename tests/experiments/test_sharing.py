"""Several processes with one folder, and processes that end in the midst of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from result_lines import compare_line

from aim_kernels.experiments.compare import main
from aim_kernels.experiments.compare.results import Folder
from aim_kernels.experiments.runs import Run
from aim_kernels.experiments.sharing import Claim, Share, alone_in

RUNS = [Run("digits", "joint", 0, seed, 1) for seed in range(3)]
COMMAND = [sys.executable, "-m", "aim_kernels", "compare", "--data", "digits", "--methods", "joint"]
NOT_COMPARED = ("commit", "date", "step_ms", "update_ms", "seconds")
posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def share(path: Path, done: set[Run], runs: list[Run] = RUNS) -> Share:
    return Share(path / "claims", runs, lambda run: f"seed{run.seed}", lambda: done)


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    begun: list[subprocess.Popen[str]] = []

    def begin(*options: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        pipe = subprocess.PIPE
        command = [*COMMAND, *options, "--out", str(tmp_path)]
        begun.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def results(path: Path) -> dict[Run, dict[str, object]]:
    """By run; every run is there once."""
    lines = Folder(path).lines()
    found = {x.run: {n: v for n, v in vars(x).items() if n not in NOT_COMPARED} for x in lines}
    assert len(found) == len(lines) == len(Folder(path).file.read_text().splitlines()) - 1
    return found


def test_each_run_is_claimed_once(tmp_path: Path) -> None:
    done: set[Run] = set()
    one, other = share(tmp_path, done), share(tmp_path, done)
    a, b = iter(one), iter(other)
    assert (next(a), next(b), next(a), next(b)) == (RUNS[0], RUNS[1], RUNS[2], None)
    assert f"process {os.getpid()} on " in (tmp_path / "claims" / "seed0").read_text()
    assert next(a) is None, "what the other holds is not done yet"
    done |= {RUNS[0], RUNS[2]}
    one.release(RUNS[0])
    one.release(RUNS[2])
    assert list(b) == [] and other.done == 2
    other.close()  # not done: it is free again
    assert next(iter(share(tmp_path, done))) == RUNS[1]


def test_what_was_done_between_reading_and_claiming_is_not_done_again(tmp_path: Path) -> None:
    done: set[Run] = set()
    late = share(tmp_path, done)
    done.update(RUNS)
    assert [run for run in late if run] == []
    late.close()
    assert not (tmp_path / "claims").exists()


def test_a_file_of_a_dead_process_is_no_claim(tmp_path: Path) -> None:
    (tmp_path / "seed0").write_text("process 1 on another\n")
    claim = Claim(tmp_path / "seed0")
    assert claim.taken and not Claim(tmp_path / "seed0").taken
    claim.release()
    assert not (tmp_path / "seed0").exists()
    with alone_in(tmp_path / "a", "b"):
        assert not Claim(tmp_path / "a" / "b").taken
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    options = ["--epochs", "1", "--seeds", "3"]
    both = [start(*options), start(*options)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    mine = [out.count(" test ") for out, _ in said]
    assert sum(mine) == 9 and min(mine) > 0, mine
    together = results(tmp_path)
    assert len(together) == 9
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "history", "report.md", "report.html"}
    assert main([*COMMAND[4:], *options, "--out", str(tmp_path / "alone")]) == 0
    assert results(tmp_path / "alone") == together


def children(pid: int) -> list[int]:
    """Processes that this one began, also those that they did."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            table[int(path.parent.name)] = int(parent)
    found = [child for child, parent in table.items() if parent == pid]
    return [*found, *(grandchild for child in found for grandchild in children(child))]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the table of processes")
def test_workers_end_with_a_killed_parent_and_the_same_command_goes_on(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    options = ["--epochs", "2", "--seeds", "3", "--jobs", "2"]
    parent = start(*options)
    until(lambda: bool(Folder(tmp_path).lines()))
    workers = children(parent.pid)
    assert len(workers) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not any(map(lives, workers)), 10.0)
    kept = results(tmp_path)
    assert 0 < len(kept) < 9 and any((tmp_path / "claims").iterdir())

    again = start(*options)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.count(" test ") == 9 - len(kept), "none is done twice, none left out"
    found = results(tmp_path)
    assert len(found) == 9 and kept.items() <= found.items()
    assert not (tmp_path / "claims").exists()


@posix
@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_interruption_gives_back_what_was_claimed(
    jobs: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start("--epochs", "500", "--jobs", jobs)
    until(lambda: (tmp_path / "claims").is_dir() and bool(list((tmp_path / "claims").iterdir())))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    assert f"Interrupted. Finished runs are in {tmp_path / 'results.csv'}; the same command continues." in err
    assert not (tmp_path / "claims").exists()


def test_a_report_of_a_folder_that_is_not_there_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--report", "--out", str(tmp_path / "misspelt")])
    assert f"there is no folder {tmp_path / 'misspelt'}; --out names one that" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_lines_of_processes_that_append_at_once_are_whole(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from aim_kernels.command_line import append_lines\n"
        "for n in range(20): append_lines(Path(sys.argv[1]), 'head\\n', sys.argv[2] * 9000 + '\\n')"
    )
    file = tmp_path / "table"
    both = [subprocess.Popen([sys.executable, "-c", code, str(file), letter]) for letter in "ab"]
    assert [process.wait(60) for process in both] == [0, 0]
    lines = file.read_text().splitlines()
    assert lines[0] == "head" and sorted(lines[1:]) == ["a" * 9000] * 20 + ["b" * 9000] * 20


def test_other_networks_have_other_claims(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    runs = [compare_line(width=width).run for width in (64, 128)]
    assert len({folder.file_stem(run) for run in runs}) == 2
