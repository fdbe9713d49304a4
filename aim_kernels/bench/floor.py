"""The memory floor: the best plain stream of a step's bytes, over the candidates' arrays (csrc/bench/stream.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from aim_kernels._native import load
from aim_kernels.bench.shapes import Arrays
from aim_kernels.bench.timing import Samples

#: Elements that a thread takes at a time; 0: one contiguous share for every thread.
CHUNKS = (0, 1 << 16, 1 << 20)

#: Bytes a float32 parameter. 28: read param, grad, moments, write param, moments. 32: read grad, moments, master, write
#: moments, master, param.
BYTES = (28, 32)


def streams(arrays: Arrays, wanted: set[int]) -> dict[str, Callable[[], Any]]:
    """The streams to be timed, by name; names start with the number of bytes."""
    from aim_kernels.backends.cpu import _thread_pool

    _C, _ = load("_C")
    table, threads, pool = arrays.table(), torch.get_num_threads(), _thread_pool()
    cases: dict[str, Callable[[], Any]] = {}
    for size in sorted(wanted):
        live = size == 32
        for chunk in CHUNKS:
            for nontemporal in (False, True) if live else (False,):
                name = f"stream-{size}{'-nt' if nontemporal else ''}-{chunk or 'shares'}"
                cases[name] = partial(_C.stream, table, live, nontemporal, chunk, 0.0, threads, pool)
    return cases


def best(samples: dict[str, Samples]) -> dict[int, tuple[str, Samples]]:
    """Of the streams of every size, the one with the lowest median."""
    found: dict[int, tuple[str, Samples]] = {}
    for name, sample in samples.items():
        if not name.startswith("stream-"):
            continue
        size = int(name.split("-")[1])
        if size not in found or sample.median < found[size][1].median:
            found[size] = (name, sample)
    return found
