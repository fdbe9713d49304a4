"""Process groups for tests: a world is a number of processes, of which all run the same scenario at a time.

They are forked from a server that has imported torch and the scenarios once. A pipe leads to each: the name of a
scenario goes in, whether it passed comes out; what is printed, tracebacks too, goes into a file of each process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from backends_under_test import BUILT

TESTS = Path(__file__).resolve().parent
MODULES = sorted(path.stem for path in TESTS.glob("scenarios*.py"))

#: Seconds: of a collective and of a scenario, and until all processes of a world have met.
LIMIT, START = 60.0, 180.0
#: Seconds that the other processes have to say what is wrong with them, after the first has failed.
GRACE = 2.0

CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def serve() -> None:
    """Starts the process that all ranks are forked from. It ends with this one, however this one ends."""
    # What scenarios import late, all processes would import.
    CONTEXT.set_forkserver_preload(["worlds", *MODULES, "torch._dynamo", "fsspec"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", BUILT: "1"}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)  # Python 3.11 does not give it our sys.path
        forkserver.ensure_running()


class World:
    """``size`` processes, started by the first scenario, and anew by the next one after a failure: a collective that
    failed leaves a process group that is of no more use."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.ranks: list[Rank] = []

    def run(self, name: str, folder: Path, limit: float | None = None) -> str:
        """Runs a scenario in all processes; what they said. Raises AssertionError with all of it where one fails, dies,
        or has not come to an end after ``limit`` seconds."""
        try:
            if not self.ranks:
                self._start()
            for rank in self.ranks:
                rank.send((name, str(folder)))
            return self._wait(name, LIMIT if limit is None else limit)
        except BaseException:  # also of the keyboard
            self.kill()
            raise

    def _start(self) -> None:
        serve()
        store = tempfile.mktemp(dir=self.folder)
        for number in range(self.size):
            self.ranks.append(Rank(number, self.size, store, self.folder))
        self._wait("the start", START)

    def _wait(self, name: str, limit: float) -> str:
        """One answer of each."""
        for rank in self.ranks:
            rank.answer = ""
        waiting: dict[Connection, Rank] = {rank.pipe: rank for rank in self.ranks}
        deadline = time.monotonic() + limit
        while waiting and (ready := connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                rank.receive()
                if not rank.passed:  # others wait for it at a collective
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank in waiting.values():
            rank.abort()
        said = "\n".join(f"--- {name}, rank {rank.number}: {rank.answer}\n{rank.said()}" for rank in self.ranks)
        assert all(rank.passed for rank in self.ranks), said
        return said

    def end(self) -> None:
        """Has the processes leave their group. Raises AssertionError where one cannot."""
        for rank in self.ranks:
            rank.pipe.close()
        deadline = time.monotonic() + LIMIT
        for rank in self.ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        codes, said = [rank.process.exitcode for rank in self.ranks], [rank.said() for rank in self.ranks]
        self.kill()
        assert not any(code != 0 for code in codes), (codes, said)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.process.kill()
        for rank in self.ranks:
            rank.process.join()
            rank.pipe.close()
        self.ranks = []


class Rank:
    """One process of a world, as pytest sees it."""

    def __init__(self, number: int, size: int, store: str, folder: Path) -> None:
        self.number, self.answer, self.read = number, "", 0
        self.output = Path(tempfile.mkstemp(f"-rank{number}.txt", dir=folder)[1])
        self.pipe, there = CONTEXT.Pipe()
        # A daemon is ended by multiprocessing where pytest leaves without our doing.
        self.process = CONTEXT.Process(target=work, args=(number, size, store, self.output, there), daemon=True)
        self.process.start()
        there.close()  # or the end of the process would not be the end of the pipe

    @property
    def passed(self) -> bool:
        return self.answer.startswith("passed")

    def send(self, order: tuple[str, str]) -> None:
        with contextlib.suppress(OSError):  # of one that is dead: the answer will tell
            self.pipe.send(order)

    def receive(self) -> None:
        try:
            self.answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(GRACE)
            self.answer = f"died, exit {self.process.exitcode}"

    def abort(self) -> None:
        """Ends a process that is not done; faulthandler makes it say where it is."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGABRT)
        self.process.join(GRACE)
        self.answer = "was not done"

    def said(self) -> str:
        """What it has printed since this was asked last."""
        text = self.output.read_bytes()[self.read :]
        self.read += len(text)
        return text.decode(errors="replace")


# -- what the processes run ------------------------------------------------------------------------------------------


def work(number: int, size: int, store: str, output: Path, pipe: Connection) -> None:
    """Joins the group, then runs one scenario after the other until nobody holds the other end of the pipe."""
    threading.Thread(target=end_with_pytest, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends us
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=size, timeout=timedelta(seconds=LIMIT)
    )
    gc.freeze()  # collections between scenarios need not look through what was imported
    pipe.send("passed")
    for name, folder in orders(pipe):
        began = time.monotonic()
        faulthandler.dump_traceback_later(2 * LIMIT, exit=True)  # if even threads can do nothing, and pytest is dead
        try:
            with as_it_was():
                scenarios()[name][1](Path(folder))
                dist.barrier()
            answer = "passed"
        except BaseException:
            traceback.print_exc()
            answer = "failed"
        faulthandler.cancel_dump_traceback_later()
        gc.collect()
        pipe.send(f"{answer} ({time.monotonic() - began:.1f} s)")
    gc.collect()  # a process group that outlives its end now and then aborts the exit
    dist.destroy_process_group()


def end_with_pytest() -> None:
    """Even in the midst of a scenario. The server that we were forked from ends after us."""
    pytest_itself = multiprocessing.parent_process()
    assert pytest_itself is not None
    pytest_itself.join()
    os._exit(1)


def orders(pipe: Connection) -> Iterable[tuple[str, str]]:
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            yield pipe.recv()


def scenarios() -> dict[str, tuple[tuple[int, ...], object]]:
    for name in MODULES:
        importlib.import_module(name)
    return importlib.import_module("scenarios").SCENARIOS


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Begins with one state of the world, and leaves none of its own behind."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    environment, threads, dtype = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)
