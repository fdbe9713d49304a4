"""How steps on a device are timed, with a device made of numbers: events, spinning and replays are counted."""

from __future__ import annotations

import pytest
import torch

from aim_kernels.bench import gpu_timing
from aim_kernels.bench.gpu_timing import FIRST_HOLD, LONGEST_HOLD, Clock, Holds, Replay, interleaved
from aim_kernels.bench.timing import Samples


class Device:
    """A device that takes a queue of work, and a host; both times in milliseconds."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.order: list[str] = []

    def queue(self, work: float, host: float = 0.0) -> None:
        """The host needs ``host`` to queue what keeps the device busy for ``work``."""
        self.host += host
        self.device = max(self.device, self.host) + work

    def wait(self) -> None:
        self.host = max(self.host, self.device)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = max(self.device.device, self.device.host)
        self.device.order.append("event")

    def query(self) -> bool:
        return self.at <= self.device.host

    def synchronize(self) -> None:
        self.device.wait()

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


class Flush:
    def __init__(self, device: Device) -> None:
        self.device = device

    def zero_(self) -> None:
        self.device.queue(0.05)
        self.device.order.append("flush")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    def sleep(cycles: int) -> None:
        made.queue(cycles / gpu_timing._CYCLES)
        made.order.append("spin")

    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    return made


@pytest.fixture
def clock(device: Device) -> Clock:
    made = Clock("cpu")
    made.on_device = True
    made.start, made.end, made.flush = Event(device), Event(device), Flush(device)  # type: ignore[assignment]
    made.wait = device.wait  # type: ignore[method-assign]
    return made


def test_a_sample_is_cold_and_lies_between_its_events(clock: Clock, device: Device) -> None:
    nanoseconds, late = clock.sample(lambda: device.order.append("call") or device.queue(2.0), hold=1.0)
    assert device.order == ["flush", "spin", "event", "call", "event"]
    assert (nanoseconds, late) == (pytest.approx(2e6), False)


def test_the_host_s_time_is_not_the_device_s(clock: Clock, device: Device) -> None:
    """Half a millisecond of work that the host takes three to queue: held back long enough, only the work counts."""
    holds = Holds()
    for _ in range(3):
        assert holds.sample(clock, "slow to queue", lambda: device.queue(0.5, host=3.0)) == pytest.approx(0.5e6)
    assert clock.wall(lambda: device.queue(0.5, host=3.0), 4) > 0
    assert not holds.waiting()


def test_what_waits_for_the_device_is_timed_with_its_waiting(clock: Clock, device: Device) -> None:
    calls: list[int] = []

    def waits() -> None:
        calls.append(1)
        device.queue(0.5)
        device.wait()
        device.host += 1.0

    holds = Holds()
    assert holds.sample(clock, "waits", waits) == pytest.approx(1.5e6)
    assert holds.waiting() == {"waits"}
    tried = len(calls)
    assert FIRST_HOLD * 2 ** (tried - 2) == LONGEST_HOLD
    holds.sample(clock, "waits", waits)
    assert len(calls) == tried + 1, "held back again"


def test_every_case_once_a_round_and_failures_left_out() -> None:
    calls: list[str] = []

    def broken() -> None:
        raise MemoryError

    cases = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = interleaved(Clock("cpu"), cases | {"x": broken}, 4, lambda: calls.append("|"), warm_up=1)
    rounds = "".join(calls).split("|")[1:]
    assert [sorted(order) for order in rounds] == [["a", "b", "c"]] * 5
    assert len(set(rounds)) > 1
    assert found.pop("x") == "MemoryError: "
    assert all(isinstance(sample, Samples) and len(sample.values) == 4 for sample in found.values())


def test_a_replay_keeps_its_step_alive() -> None:
    """Its graph reads the states and tables of the optimizer that it was captured from."""
    import gc
    import weakref

    class Optimizer:
        def step(self) -> None: ...

    class Graph:
        replays = 0

        def replay(self) -> None:
            self.replays += 1

    optimizer, graph = Optimizer(), Graph()
    alive, replay = weakref.ref(optimizer), Replay(graph, optimizer.step)
    del optimizer
    gc.collect()
    replay()
    assert alive() is not None and graph.replays == 1


def test_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = {"torch": Samples.of([2e3]), "ours": Samples.of([1e3])}
    monkeypatch.setattr(gpu_timing, "interleaved", lambda *arguments: fake)
    assert gpu_timing.copy_bandwidth(Clock("cpu"), "cpu", 4000) == pytest.approx(8000 / 1e-6)
    fake["ours"] = "RuntimeError: no kernel"  # type: ignore[assignment]
    assert gpu_timing.copy_bandwidth(Clock("cpu"), "cpu", 4000) == pytest.approx(8000 / 2e-6)
