"""Interleaved wall-clock samples."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Samples:
    """Nanoseconds of one call, sorted."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Samples:
        return cls(tuple(sorted(values)))

    def quantile(self, q: float) -> float:
        """Linear between the two nearest samples."""
        at = q * (len(self.values) - 1)
        low = int(at)
        high = min(low + 1, len(self.values) - 1)
        return self.values[low] + (at - low) * (self.values[high] - self.values[low])

    @property
    def median(self) -> float:
        return self.quantile(0.5)


@contextmanager
def collection_off() -> Iterator[None]:
    """No garbage collection inside."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    repeats: int = 1,
    between_rounds: Callable[[], Any] = lambda: None,
    gap: float = 0.0,
    warm_up: int = 2,
) -> dict[str, Samples]:
    """Time every case once a round, in a new random order each round.

    What ran before a case leaves its traces, such as other lines in the cache, so the order changes with every round
    (from a fixed seed). All cases run on torch's own thread pool, whose workers spin for a few milliseconds after each
    region; ``gap`` idle seconds before every sample let them fall asleep instead.
    A sample is one call; with ``repeats`` > 1 it is the mean of so many calls, after one that is not timed.
    """
    order = list(cases)
    shuffled = random.Random(0)
    nanoseconds: dict[str, list[float]] = {name: [] for name in cases}
    with collection_off():
        for number in range(-warm_up, rounds):
            between_rounds()
            shuffled.shuffle(order)
            for name in order:
                case = cases[name]
                time.sleep(gap)
                if repeats > 1:
                    case()
                start = time.perf_counter_ns()
                for _ in range(repeats):
                    case()
                elapsed = time.perf_counter_ns() - start
                if number >= 0:
                    nanoseconds[name].append(elapsed / repeats)
    return {name: Samples.of(values) for name, values in nanoseconds.items()}
