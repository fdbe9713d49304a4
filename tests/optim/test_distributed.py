"""Several processes do what one does: the scenarios of scenarios*.py, in worlds of 2 and 4."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import worlds
from backends_under_test import cuda_on_cpu
from worlds import World

#: One worker of pytest-xdist runs them all (`--dist loadgroup`): another would start other processes for its share.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("worlds")]

SCENARIOS = [(size, name) for size in (2, 4) for name, (sizes, _) in worlds.scenarios().items() if size in sizes]


@pytest.fixture(scope="module")
def by_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, World]]:
    """Worlds whose processes start when they get their first scenario."""
    made = {size: World(size, tmp_path_factory.mktemp(f"world{size}")) for size in (2, 4)}
    yield made
    for world in made.values():
        world.end()


@pytest.mark.parametrize(("size", "name"), SCENARIOS, ids=[f"{size}-{name}" for size, name in SCENARIOS])
def test_scenario(by_size: dict[int, World], size: int, name: str, tmp_path: Path) -> None:
    """Passes on every rank. Runs among the same processes as all of its size."""
    if "cuda" in name:
        cuda_on_cpu()  # is built here, not by each of the processes
    print(by_size[size].run(name, tmp_path))


# -- worlds in which something goes wrong ----------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[World]:
    """A world of two; it works at the end of every test, whatever has happened."""
    made = World(2, tmp_path)
    yield made
    said = made.run("agrees", tmp_path)
    assert said.count("agreed among 2") == 2
    made.end()


def processes(world: World) -> set[int]:
    return {rank.process.pid or 0 for rank in world.ranks}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails_on_the_last", r"rank 0: .*rank 0 is here.*rank 1: failed.*rank 1 is here.*AssertionError: on purpose"),
        ("fails_on_all", r"rank 0: failed.*KeyError: 'of rank 0'.*rank 1: failed.*KeyError: 'of rank 1'"),
        ("dies_on_the_last", r"rank 0: .*rank 0 is here.*rank 1: died, exit 7\nrank 1 is here"),
        ("hangs_on_the_last", r"rank 0: .*rank 0 is here.*rank 1: was not done\nrank 1 is here.*in hangs_on_the_last"),
        ("unheard_of", r"rank 0: failed.*KeyError: 'unheard_of'.*rank 1: failed"),
    ],
    ids=["fails-on-one", "fails-on-all", "dies", "hangs", "unheard-of"],
)
def test_a_failure_is_of_one_scenario_only(pair: World, tmp_path: Path, name: str, said: str) -> None:
    """Everything that every process said is shown, nobody waits for a collective to give up, and the next one passes,
    in other processes."""
    pair.run("agrees", tmp_path)
    before, began = processes(pair), time.monotonic()
    with pytest.raises(AssertionError, match=f"(?s){said}"):
        pair.run(name, tmp_path, limit=3.0 if "hangs" in name else None)
    assert time.monotonic() - began < worlds.LIMIT / 2
    assert len(before) == 2 and not pair.ranks and not any(map(is_running, before))


def test_a_process_that_died_meanwhile(pair: World, tmp_path: Path) -> None:
    pair.run("agrees", tmp_path)
    pair.ranks[1].process.kill()
    pair.ranks[1].process.join()
    with pytest.raises(AssertionError, match=r"rank 1: died, exit -9"):
        pair.run("agrees", tmp_path)


def test_scenarios_share_processes_and_nothing_else(pair: World, tmp_path: Path) -> None:
    found = []
    for name in ("leaves_traces", "finds_no_traces"):
        (tmp_path / name).mkdir()
        pair.run(name, tmp_path / name)
        found.append([(tmp_path / name / f"process{rank}").read_text().split() for rank in range(2)])
    (one, other), again = found
    assert [one, other] == again, "other processes, or another seed"
    assert one[0] != other[0] and one[1] == other[1]


def test_ctrl_c_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(2, tmp_path)
    world.run("agrees", tmp_path)
    before = processes(world)

    def interrupt(*_: object) -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(worlds, "connection", SimpleNamespace(wait=interrupt))
    with pytest.raises(KeyboardInterrupt):
        world.run("hangs_on_the_last", tmp_path)
    assert len(before) == 2 and not any(map(is_running, before))


def test_no_process_outlives_pytest(tmp_path: Path) -> None:
    """Even if it is killed while a scenario hangs."""
    code = f"""
import pathlib, sys, threading, worlds
if __name__ == "__main__":
    folder = pathlib.Path({str(tmp_path)!r})
    world = worlds.World(2, folder)
    world.run("agrees", folder)
    print(*(rank.process.pid for rank in world.ranks), worlds.forkserver._forkserver._forkserver_pid, flush=True)
    world.run("hangs_on_the_last", folder)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(worlds.TESTS), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as started:
        assert started.stdout is not None
        left = {int(pid) for pid in started.stdout.readline().split()}
        time.sleep(0.5)
        assert len(left) == 3 and all(map(is_running, left))
        started.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 20
        while any(map(is_running, left)) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not any(map(is_running, left))


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that is dead and not yet asked for does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
