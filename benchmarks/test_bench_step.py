"""pytest-benchmark over the candidates and sets of ``aim_kernels.bench``: one candidate after the other.

Ratios belong to ``python -m aim_kernels bench``, which interleaves; ``--benchmark-compare`` here finds a regression.
"""

from __future__ import annotations

from typing import Any

import pytest

from aim_kernels.bench import floor
from aim_kernels.bench.gate import verify
from aim_kernels.bench.peers import CANDIDATES, state_bytes
from aim_kernels.bench.shapes import SETS, Arrays


@pytest.fixture(scope="module")
def arrays(set_name: str) -> Arrays:
    """One set's arrays, shared by its candidates."""
    return Arrays(SETS[set_name])


@pytest.mark.parametrize("name", list(CANDIDATES))
def test_bench_step(benchmark: Any, set_name: str, arrays: Arrays, name: str) -> None:
    candidate = CANDIDATES[name]
    if reason := candidate.skips(arrays.shape_set):
        pytest.skip(reason)
    verify([candidate])
    step, states = candidate.build(arrays)
    step()
    benchmark.group = set_name
    benchmark.extra_info["state_bytes_per_param"] = state_bytes(states, arrays.params)
    run(benchmark, arrays, step)


@pytest.mark.parametrize("size", floor.BYTES)
def test_bench_floor(benchmark: Any, set_name: str, arrays: Arrays, size: int) -> None:
    benchmark.group = set_name
    run(benchmark, arrays, next(iter(floor.streams(arrays, {size}).values())))


def run(benchmark: Any, arrays: Arrays, step: Any) -> None:
    shape_set = arrays.shape_set
    benchmark.extra_info["params"] = arrays.numel
    benchmark.pedantic(step, rounds=shape_set.rounds, iterations=shape_set.repeats, warmup_rounds=2)
