"""The benchmarks of fewer bytes: plain streams of any arrays, configurations on common memory, sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aim_kernels import _C
from aim_kernels.bench import memory, packed
from aim_kernels.step.layout import STREAM_RECORD

pytestmark = pytest.mark.slow


def runs_of(*arrays: tuple[np.ndarray, str]) -> np.ndarray:
    table = np.zeros(len(arrays), STREAM_RECORD)
    for run, (array, how) in zip(table, arrays, strict=True):
        run["address"], run["size"] = array.ctypes.data, array.itemsize
        run["reads"], run["writes"] = "r" in how, "w" in how
    return table


@pytest.mark.parametrize("chunk", [0, 1, 512, 5000, 2**63 - 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_stream_writes_every_element_once(chunk: int, threads: int) -> None:
    numel = 4096 + 512
    read, both, small, filled = (np.zeros(numel, dtype) for dtype in (np.int32, np.int32, np.uint8, np.int64))
    table = runs_of((read, "r"), (both, "rw"), (small, "rw"), (filled, "w"))
    for _ in range(3):
        _C.stream_runs(table, numel, chunk, 0x01010101, threads)
    assert (read == 0).all()
    assert (both == 3 * 0x01010101).all()
    assert (small == 3).all()
    assert (filled == 0x0101010101010101).all()


def test_a_stream_refuses_what_it_cannot_read() -> None:
    array = np.zeros(512, np.float32)
    for field, value in (("size", 3), ("size", 0), ("address", 0)):
        table = runs_of((array, "rw"))
        table[field] = value
        with pytest.raises(ValueError, match=r"absent|negative or too large"):
            _C.stream_runs(table, 512, 0, 1, 1)
    for numel, chunk in ((-1, 0), (512, -1)):
        with pytest.raises(ValueError, match="negative"):
            _C.stream_runs(runs_of((array, "rw")), numel, chunk, 1, 1)
    with pytest.raises(ValueError, match="records"):
        _C.stream_runs(np.zeros(1, np.int64), 512, 0, 1, 1)
    _C.stream_runs(runs_of((array, "rw")), 0, 0, 1, 1)
    assert (array == 0).all()


@pytest.mark.parametrize("name", packed.CONFIGURATIONS)
def test_a_configuration_steps_the_arrays_of_its_floor(name: str) -> None:
    configuration = packed.CONFIGURATIONS[name]
    arrays = packed.Arrays(8192)
    step, prepare = configuration.build(arrays)
    prepare()
    before = {role: buffer.clone() for role, buffer in arrays.buffers.items()}
    step()
    written = {role for role, (_, how) in configuration.arrays.items() if "w" in how}
    # The remainder of a split weight, and an average, are there as well.
    assert {role for role in before if not torch.equal(before[role], arrays.buffers[role])} == written
    for floor in configuration.floors(arrays).values():
        kept = {role: buffer.clone() for role, buffer in arrays.buffers.items()}
        floor()  # adds nothing
        read_too = [role for role, (_, how) in configuration.arrays.items() if "r" in how]
        assert all(torch.equal(kept[role], arrays.buffers[role]) for role in read_too)


def test_lines_of_a_run() -> None:
    names = ["fp32", "fp32+int8"]
    lines = packed.measure(8192, 2, names)
    assert [line.candidate for line in lines] == [*names, "torch fp32", "torch bf16", *packed.beside_names()]
    assert lines[0].bytes == 28 and lines[1].bytes == 16
    assert lines[0].x_fp32 == 1 and all(line.median_ns > 0 for line in lines)


@pytest.mark.parametrize(
    ("name", "states"),
    [("torch AdamW fused", 8), ("aim, state_dtype=int8", 2 + 2 / 128), ("aim, bfloat16, master=split", 10)],
)
def test_state_bytes_are_those_of_the_tensors(name: str, states: float) -> None:
    numel = 64 * 1024
    found = memory.work(name, [(64, 1024)])
    assert found["states"] == states * numel + 4  # the step count
    assert found["gradients"] == found["weights"] == (2 if "bfloat16" in name else 4) * numel
