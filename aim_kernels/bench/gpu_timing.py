"""Samples of steps on a device: what runs there alone, with the host, and as a CUDA graph."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from aim_kernels._native import load
from aim_kernels.bench.timing import Samples, collection_off

Step = Callable[[], Any]

#: Milliseconds that the device is held back at first, and at most, while the host queues a step.
FIRST_HOLD, LONGEST_HOLD = 0.25, 64.0
#: Clock cycles of a device in a millisecond, of the fastest there are: a hold is rather too long than too short.
_CYCLES = 2_000_000


class Clock:
    """Nanoseconds of a call on a device: events on the stream there, the wall clock on a CPU (for dry runs)."""

    def __init__(self, device: str) -> None:
        self.on_device = device != "cpu"
        size = 0
        if self.on_device:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush = torch.zeros(size, dtype=torch.uint8, device=device)

    def sample(self, call: Step, hold: float = 0.0) -> tuple[float, bool]:
        """Time of a call, and whether the device had to wait for the host, as far as that can be told.

        Before, the caches are written full. The call then finds as many modified lines to be written back as it leaves
        behind, so that all of its traffic, and no more, lies in its time. For ``hold`` milliseconds the device spins
        while the host queues the call: without that, its first launches would be timed by the host's speed.
        """
        self.flush.zero_()
        if not self.on_device:
            before = time.perf_counter_ns()
            call()
            return float(time.perf_counter_ns() - before), False
        if hold:
            torch.cuda._sleep(int(hold * _CYCLES))
        self.start.record()
        call()
        late = bool(hold) and self.start.query()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e6, late

    def wall(self, call: Step, steps: int) -> float:
        """Mean over steps that follow each other, the host's work included."""
        self.wait()
        before = time.perf_counter_ns()
        for _ in range(steps):
            call()
        self.wait()
        return (time.perf_counter_ns() - before) / steps

    def wait(self) -> None:
        if self.on_device:
            torch.cuda.synchronize()


class Holds:
    """How long the device is held back for each case: doubled until the host is done before the device begins.

    A case that waits for the device itself is never done in time. From the longest hold on it is not held back any
    more: its samples contain its waiting.
    """

    def __init__(self) -> None:
        self._milliseconds: dict[str, float] = {}

    def sample(self, clock: Clock, name: str, call: Step) -> float:
        while True:
            hold = self._milliseconds.setdefault(name, FIRST_HOLD)
            nanoseconds, late = clock.sample(call, hold)
            if not late:
                return nanoseconds
            self._milliseconds[name] = 2 * hold if 2 * hold <= LONGEST_HOLD else 0.0

    def waiting(self) -> set[str]:
        """The cases that wait for the device themselves."""
        return {name for name, hold in self._milliseconds.items() if not hold}


def interleaved(
    clock: Clock, cases: Mapping[str, Step], rounds: int, between_rounds: Callable[[], Any], warm_up: int = 2
) -> dict[str, Samples | str]:
    """Every case once a round, in an order drawn anew each round. A case that raises is left out from then on; its
    error stands in the place of its samples."""
    shuffled, alive, holds = random.Random(0), list(cases), Holds()
    values: dict[str, list[float]] = {name: [] for name in cases}
    errors: dict[str, str] = {}
    with collection_off():
        for number in range(-warm_up, rounds):
            between_rounds()
            shuffled.shuffle(alive)
            for name in list(alive):
                try:
                    sample = holds.sample(clock, name, cases[name])
                except Exception as error:  # whatever it is, the others go on
                    errors[name] = told(error)
                    alive.remove(name)
                    continue
                if number >= 0:
                    values[name].append(sample)
    return {name: errors[name] if name in errors else Samples.of(values[name]) for name in cases}


def told(error: BaseException) -> str:
    """An error in one line."""
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0]


def graphed(step: Step) -> Step:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Garbage of earlier runs must not be freed in the middle of a capture.
    with collection_off(), torch.cuda.graph(graph):
        step()
    return Replay(graph, step)


class Replay:
    """A graph and the step that it was captured from, whose states and tables it reads: they must not be freed."""

    def __init__(self, graph: Any, step: Step) -> None:
        self.graph, self.step = graph, step

    def __call__(self) -> None:
        self.graph.replay()


def copy_bandwidth(clock: Clock, device: str, size: int, rounds: int = 15) -> float:
    """Bytes a second, read and written, of the best plain copy of ``size`` bytes: this library's kernel or torch's.

    Raises:
        RuntimeError: neither of them runs.
    """
    source, target = (torch.empty(size // 4, device=device).normal_() for _ in range(2))
    cases: dict[str, Step] = {"torch": lambda: target.copy_(source)}
    if clock.on_device:
        cases["ours"] = lambda: _own_copy(source, target)
    samples = interleaved(clock, cases, rounds, lambda: None)
    medians = [sample.median for sample in samples.values() if isinstance(sample, Samples)]
    if not medians:
        raise RuntimeError(f"no copy runs: {samples}")
    return 2 * size / (min(medians) * 1e-9)


def _own_copy(source: torch.Tensor, target: torch.Tensor) -> None:
    _cuda, _ = load("_cuda")
    device = source.device
    stream = torch.cuda.current_stream(device).cuda_stream
    _cuda.copy_bytes(source.data_ptr(), target.data_ptr(), source.nbytes, device.index or 0, stream)
