"""Nothing outside the optimizer: memory does not grow, threads and processes do not meet."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Gradients, assign, build, frozen, parameters_of, same_bits, set_row

#: Growth over the steps below: a hundredth of what one forgotten tensor or table a step would take.
PYTHON_SLACK, RESIDENT_SLACK = 64 * 1024, 8 * 2**20
STEPS = 800


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["same gradients", "new gradients", "strengths", "evaluation", "checkpoints"])
def test_memory_does_not_grow(what: str, one_thread: None) -> None:
    """New gradients (one of them copied into its parameter's order), blocks degraded and restored with masters that
    come and go, live and true weights, checkpoints: after a start, no Python object and no page more."""
    optimizer = build("adamw", (((2, 3, 8, 8), (700,)), ((33,),)), layouts=("channels_last", "contiguous", "sliced"))
    params = parameters_of(optimizer)
    assign(params, Gradients(params)())
    if what == "evaluation":
        optimizer.set_strength("audio", 0, 0.5)

    def drive(steps: int) -> None:
        for number in range(steps):
            if what == "new gradients":
                assign(params, [torch.full(p.shape, 0.1) for p in params])
            elif what == "strengths" and number % 5 == 0:
                optimizer.set_strength("audio", 0, 0.5 if number % 10 else 0.0)
            elif what == "evaluation":
                with optimizer.true_parameters():
                    pass
            elif what == "checkpoints" and number % 10 == 0:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
            if what == "new gradients":
                optimizer.zero_grad()

    drive(200)
    gc.collect()
    pages = resident()
    drive(STEPS)
    gc.collect()
    assert resident() - pages < RESIDENT_SLACK
    tracemalloc.start()
    try:
        drive(50)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        drive(STEPS // 3)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < PYTHON_SLACK


VARIANTS: tuple[dict[str, Any], ...] = (
    {"rule": "adamw", "row": "alternate", "dtype": "float32", "seed": 1},
    {"rule": "sgd-nesterov", "row": "all", "dtype": "bfloat16", "seed": 2},
    {"rule": "adam-maximize", "row": "chain", "dtype": "float64", "seed": 3},
)


def trained(variant: dict[str, Any], steps: int = 12) -> dict[str, Any]:
    options = dict(variant)
    row = options.pop("row")
    optimizer = build(options.pop("rule"), (((40, 41), (17,)), ((20000,),)), options.pop("dtype"), **options)
    set_row(optimizer, 0, row)
    gradients = Gradients(parameters_of(optimizer))
    for _ in range(steps):
        assign(parameters_of(optimizer), gradients())
        optimizer.step()
    return frozen(optimizer)


def test_unlike_optimizers_in_threads_do_what_they_do_alone() -> None:
    alone = [trained(variant) for variant in VARIANTS]
    together: dict[int, dict[str, Any]] = {}
    start = threading.Barrier(len(VARIANTS))

    def work(number: int) -> None:
        start.wait()
        together[number] = trained(VARIANTS[number])

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(VARIANTS))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, expected in enumerate(alone):
        same_bits(expected, together[number])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_after_a_fork_parent_and_child_go_on_alike_and_apart() -> None:
    """Steps, live and true weights, strengths, a checkpoint: the child's bits are the parent's, its memory its own."""
    optimizer = build("adamw", (((40, 41), (17,)), ((20000,),)))
    set_row(optimizer, 0, "alternate")
    params = parameters_of(optimizer)

    def go_on(first: int) -> list[bytes]:
        for number in range(first, first + 3):
            for index, p in enumerate(params):
                p.grad = torch.linspace(-1, 1 + number + index, p.numel()).view(p.shape)
            optimizer.step()
        optimizer.set_strength("audio", 1, 0.25)
        optimizer.step()
        optimizer.eval()
        optimizer.train()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        return [t.detach().numpy().tobytes() for t in (*params, optimizer.tables.rows, optimizer.tables.statistics)]

    torch.set_num_threads(2)
    go_on(0)
    torch.set_num_threads(1)  # torch's own operations may not use their pool in a child
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)  # a child that waits for threads it does not have must not hang the tests
            os.close(read)
            with os.fdopen(write, "wb") as pipe:
                pipe.write(pickle.dumps(go_on(3)))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    assert data, "the child died"
    same_bits(pickle.loads(data), go_on(3))


def test_no_state_outlives_its_optimizer() -> None:
    """Two runs in one process, the second as the first in a fresh one: nothing was remembered."""
    first = trained(VARIANTS[0])
    for variant in VARIANTS[1:]:
        trained(variant, steps=2)
    same_bits(first, trained(VARIANTS[0]))
