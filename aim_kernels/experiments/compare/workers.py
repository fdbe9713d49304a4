"""Trainings at a time: processes of their own, which end with the one that began them."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from aim_kernels.experiments.compare.lines import Line
from aim_kernels.experiments.runs import Run
from aim_kernels.experiments.sharing import WAIT

Trained = tuple[Line, list[dict[str, Any]]]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def one_thread() -> None:
    """Networks this small are fastest with one, and give the same bits everywhere."""
    torch.set_num_threads(1)


def _begin() -> None:
    end_with_parent()
    one_thread()


def end_with_parent() -> None:
    """From now on this process of :mod:`multiprocessing` ends if its parent does, also by SIGKILL.

    Everywhere a thread waits for the parent's end; on Linux the kernel ends the process too, which also reaches one
    that does not get back to Python.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent.pid:  # it ended before the call
            os._exit(1)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="watch of the parent", daemon=True).start()


@contextlib.contextmanager
def _not_interrupted() -> Iterator[None]:
    """Processes that begin within never see an interruption, which a terminal sends to all; this one sees it at the
    end. Windows has no mask that processes inherit."""
    seen: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    # The mask is of this thread alone: the system may give the signal to another, and Python then interrupts this one.
    handler = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number)) if main else None
    masked = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masked else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, handler)
    if seen:
        raise KeyboardInterrupt


def trained(runs: Iterable[Run | None], jobs: int, train: Callable[[Run], Trained]) -> Iterator[Trained]:
    """Results as they come, of as many trainings at a time as there are jobs; one job trains in this process.

    A run is asked for when there is a worker for it; None says that there is none at present.
    """
    if jobs == 1:
        threads = torch.get_num_threads()
        try:
            one_thread()
            for run in runs:
                if run is None:
                    time.sleep(WAIT)
                else:
                    yield train(run)
        finally:
            torch.set_num_threads(threads)
        return
    # spawned: a forked process would inherit threads that hold locks
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin)
    others = set(multiprocessing.active_children())
    try:
        yield from _of_pool(pool, iter(runs), jobs, train)
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # what they are at would end in minutes, and nobody waits for it
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _of_pool(
    pool: ProcessPoolExecutor, runs: Iterator[Run | None], jobs: int, train: Callable[[Run], Trained]
) -> Iterator[Trained]:
    running: set[Future[Trained]] = set()
    more = True
    while more or running:
        idle = False
        while more and not idle and len(running) <= jobs:  # one in wait, so that no worker is idle; the rest is free
            try:
                run = next(runs)
            except StopIteration:
                more = False
                break
            if run is None:
                idle = True
            else:
                with _not_interrupted():
                    running.add(pool.submit(train, run))
        if not running:
            if idle:
                time.sleep(WAIT)
            continue
        finished, running = wait(running, WAIT if idle else None, return_when=FIRST_COMPLETED)
        for future in finished:
            yield future.result()
