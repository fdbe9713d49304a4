"""Instruction sets, threads, processes: the same bits everywhere. Native entry points: errors before any write."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import oracle
import pytest
import tolerances as tol
import torch
from helpers import DTYPES, ROWS, RULES, Gradients, assign, build, frozen, parameters_of, same_bits, set_row

import aim_kernels as ak
from aim_kernels import _C
from aim_kernels.step import layout

CHUNK = _C.CHUNK
SHAPES = (((1,), (15,), (16, 3), (70,), (1031,), (CHUNK + 5,)), ((2 * CHUNK + 33,), (0,), (7,)))


def trajectory(rule: str, row: str, dtype: str, steps: int = 3) -> bytes:
    """Digest of everything after some steps."""
    optimizer = build(rule, SHAPES, dtype)
    set_row(optimizer, 0, row)
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    for _ in range(steps):
        assign(params, gradients())
        optimizer.step()
    digest = hashlib.sha256()
    state = frozen(optimizer)
    tensors = [*state["params"], state["rows"], state["statistics"], state["control"]]
    tensors += [entry[name] for entry in state["state"] for name in sorted(entry)]
    for tensor in tensors:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def available() -> list[str]:
    return [name for name, _, supported in _C.isas() if supported]


def test_instruction_sets_are_named() -> None:
    names = [name for name, _, _ in _C.isas()]
    assert names == ["scalar", "avx2", "avx512", "neon"]
    assert "scalar" in available()
    assert _C.active_isa() in available()


@pytest.mark.parametrize("isa", ["avx2", "avx512", "neon"])
def test_instruction_sets_agree_bit_for_bit(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced by the environment, against the scalar one: every rule, row and storage type."""
    if isa not in available():
        pytest.skip(f"this build or this processor lacks {isa}")
    cases = [(rule, "all", "float32") for rule in RULES] + [("adamw", row, "float32") for row in ROWS]
    cases += [
        (rule, "all", dtype)
        for dtype in DTYPES
        for rule in ("adamw", "sgd-nesterov", "adagrad", "rmsprop-momentum", "lion")
    ]
    results = {}
    for name in ("scalar", isa):
        monkeypatch.setenv("AIM_KERNELS_ISA", name)
        assert _C.active_isa() == name
        results[name] = [trajectory(*case, steps=2) for case in cases]
    differing = [case for case, a, b in zip(cases, results["scalar"], results[isa], strict=True) if a != b]
    assert not differing


@pytest.mark.parametrize("isa", ["sse9", "neon", "avx512"])
def test_instruction_set_that_cannot_be_had(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa in available():
        pytest.skip(f"this processor has {isa}")
    optimizer = build()
    set_row(optimizer, 0, "all")
    assign(parameters_of(optimizer), Gradients(parameters_of(optimizer))())
    before = frozen(optimizer)
    monkeypatch.setenv("AIM_KERNELS_ISA", isa)
    with pytest.raises((ValueError, RuntimeError), match=isa):
        optimizer.step()
    after = frozen(optimizer)
    same_bits(
        {k: before[k] for k in ("params", "rows", "statistics", "control")},
        {k: after[k] for k in before if k != "state"},
    )
    assert all(float(s["step"]) == 0 for s in after["state"] if s)


@pytest.mark.parametrize(("rule", "row", "dtype"), [("adamw", "all", "float32"), ("sgd-nesterov", "all", "bfloat16")])
def test_thread_counts_agree_bit_for_bit(rule: str, row: str, dtype: str) -> None:
    results = []
    for threads in (1, 2, 3, 7, 16):
        torch.set_num_threads(threads)
        results.append(trajectory(rule, row, dtype))
    assert len(set(results)) == 1


def test_runs_repeat() -> None:
    assert trajectory("adamw", "alternate", "float32") == trajectory("adamw", "alternate", "float32")


def test_optimizers_step_in_parallel_threads() -> None:
    expected = trajectory("adamw", "all", "float32")
    results: list[bytes] = []
    workers = [threading.Thread(target=lambda: results.append(trajectory("adamw", "all", "float32"))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [expected] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_steps_on_its_own() -> None:
    """After a parallel step in the parent, whose thread pool the child does not inherit."""
    torch.set_num_threads(4)
    optimizer = build("adamw", SHAPES)
    set_row(optimizer, 0, "all")
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    for _ in range(2):
        assign(params, gradients())
        optimizer.step()
    assign(params, gradients())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)  # a child that waits for threads it does not have must not hang the tests
            os.close(read)
            optimizer.step()
            # Converting through numpy: torch's own parallel operations are not ours to test after a fork.
            data = pickle.dumps([p.detach().numpy() for p in params])
            with os.fdopen(write, "wb") as pipe:
                pipe.write(data)
        finally:
            os._exit(0)
    os.close(write)
    optimizer.step()
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    assert data, "the child died"
    for p, values in zip(params, pickle.loads(data), strict=True):
        assert np.array_equal(p.detach().numpy(), values)


@pytest.mark.slow
def test_import_is_quiet_and_needs_no_compiler() -> None:
    code = (
        "import aim_kernels, torch; p = torch.ones(3, requires_grad=True); p.grad = p.detach().clone(); "
        "aim_kernels.AIMFusedOptimizer([p]).step(); assert (p != 1).all()"
    )
    environment = {**os.environ, "PATH": "", "CC": "false", "CXX": "false"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(ak.__file__).parents[1],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Call:
    """One tensor and one group, called directly; fields may be spoilt before the call."""

    def __init__(self, size: int = 40, rule: str = "sgd", first: int = 0, noise: float = 0.0) -> None:
        random = np.random.default_rng(0)
        self.param, self.grad = (random.standard_normal(size).astype(np.float32) for _ in range(2))
        self.exp_avg, self.exp_avg_sq = (np.zeros(size, np.float32) for _ in range(2))
        self.step = np.zeros((), np.float32)
        self.tensors = np.zeros(1, layout.TENSOR_RECORD)
        for name in ("param", "grad", "exp_avg", "exp_avg_sq", "step"):
            self.tensors[name] = getattr(self, name).ctypes.data
        self.tensors["numel"], self.tensors["first"] = size, first
        self.groups = np.zeros(1, layout.GROUP_RECORD)
        for name, value in {"lr": 1.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "scale": 1.0}.items():
            self.groups[name] = value
        self.groups["rule"] = layout.RULES.index(rule)
        self.rows = np.array([layout.neutral_row()])
        self.rows[0, layout.ROW["noise"]] = noise
        self.statistics = np.zeros((1, len(layout.STATISTICS_COLUMNS)))
        self.control = np.array([2**40 + 3, 5, 0, 0], np.int64)

    def __call__(self, threads: int = 1) -> None:
        _C.step(self.tensors, self.groups, self.rows, self.statistics, self.control, threads)

    def bytes(self) -> bytes:
        written = (self.param, self.exp_avg, self.exp_avg_sq, self.step, self.rows, self.statistics, self.control)
        return b"".join(array.tobytes() for array in written)


@pytest.mark.parametrize("first", [0, 3, 2**31 - 2, 2**32 - 1, 2**32 + 1, 2**34 - 6, 2**40 + 2])
def test_noise_of_elements_beyond_32_bits(first: int) -> None:
    """Where a tensor begins so far out that 32-bit indices, or 32-bit counters of four, would wrap."""
    call = Call(first=first, noise=1.0)
    call.statistics[0, :4] = (40, 0, 0, 40)  # standard deviation one
    before = call.param.astype(np.float64) - call.grad
    call()
    z, radius = oracle.normals(2**40 + 3, 5, first, 40)
    found = before - call.param
    bound = tol.NORMAL_ROUNDOFFS * tol.NORMAL_UNIT * (radius + np.abs(z) + np.abs(before) + 1)
    assert (np.abs(found - z) <= tol.SAFETY * bound).all()


def spoil(field: str, value: int) -> object:
    def act(call: Call) -> None:
        table = call.tensors if field in call.tensors.dtype.names else call.groups
        table[field] = value

    return pytest.param(act, id=f"{field}={value}")


@pytest.mark.parametrize(
    "act",
    [
        spoil("group", 1),
        spoil("group", -1),
        spoil("dtype", 9),
        spoil("dtype", -1),
        spoil("rule", 7),
        spoil("numel", -1),
        spoil("first", -1),
        spoil("first", 2**63 - 5),
        spoil("param", 0),
        spoil("exp_avg", 0),
        spoil("step", 0),
    ],
)
def test_bad_tables_are_refused_before_anything_is_written(act) -> None:
    call = Call(rule="adamw")
    act(call)
    before = call.bytes()
    with pytest.raises(ValueError, match=r"\w"):
        call()
    assert call.bytes() == before


@pytest.mark.parametrize("field", ["param", "grad", "exp_avg", "exp_avg_sq", "step"])
def test_addresses_between_two_numbers_are_refused(field: str) -> None:
    call = Call(rule="adamw")
    call.tensors[field] += 2
    before = call.bytes()
    with pytest.raises(ValueError, match="multiple"):
        call()
    assert call.bytes() == before


@pytest.mark.parametrize("name", ["rows", "statistics", "control"])
def test_tables_of_another_size_or_type_are_refused(name: str) -> None:
    """One row, one number less; other numbers; numbers that do not lie side by side; memory that nobody may write."""
    call = Call()
    table = getattr(call, name)
    frozen = table.copy()
    frozen.setflags(write=False)
    wrong = [table[:0], table.ravel()[:-1], table.astype(np.float32), np.repeat(table, 2, -1)[..., ::2], frozen]
    for bad in [*wrong, np.concatenate([table, table]), table.tolist(), 64, None]:
        setattr(call, name, bad)
        others = [getattr(call, other).tobytes() for other in ("param", "exp_avg", "step")]
        with pytest.raises((ValueError, TypeError)):
            call()
        assert others == [getattr(call, other).tobytes() for other in ("param", "exp_avg", "step")]


def test_a_thread_pool_is_a_capsule_of_its_name() -> None:
    call = Call()
    before = call.bytes()
    for pool in (64, object(), "aim.thread_pool", _C.step):
        with pytest.raises((ValueError, TypeError)):
            _C.step(call.tensors, call.groups, call.rows, call.statistics, call.control, 2, pool)
    assert call.bytes() == before


def test_rows_that_split_a_stateless_group_are_refused_by_the_kernel() -> None:
    call = Call(rule="sgd")
    call.tensors["exp_avg_sq"] = 0
    call.rows[0, layout.ROW["aux_live_well"]] = 0.5
    before = call.bytes()
    with pytest.raises(ValueError, match="optimization state"):
        call()
    assert call.bytes() == before


def test_arrays_of_other_records_are_refused() -> None:
    call = Call()
    tables = (call.rows, call.statistics, call.control)
    with pytest.raises((ValueError, TypeError), match="tensors"):
        _C.step(np.zeros(3), call.groups, *tables, 1)
    with pytest.raises((ValueError, TypeError), match="tensors"):
        _C.step(np.zeros(4, layout.TENSOR_RECORD)[::2], call.groups, *tables, 1)
    with pytest.raises((ValueError, TypeError), match="threads"):
        call(threads=0)


def test_no_tensors_is_no_step() -> None:
    call = Call()
    before = call.bytes()
    call.tensors = call.tensors[:0]
    call()
    assert call.bytes() == before


def in_two_parts(call: Call, sums: np.ndarray) -> None:
    tables = (call.rows, call.statistics, call.control)
    _C.update(call.tensors, call.groups, *tables, sums, 1)
    _C.finish(call.groups, sums, *tables)


def test_a_step_in_two_parts_is_a_step() -> None:
    one, two = Call(rule="adamw", noise=0.5), Call(rule="adamw", noise=0.5)
    sums = np.full((1, 7), 9.0)
    for _ in range(3):
        one()
        in_two_parts(two, sums)
        assert one.bytes() == two.bytes()
    assert sums[0, 0] == 40


def test_what_another_process_counts_is_stepped_but_not_counted() -> None:
    one, two = Call(rule="adamw"), Call(rule="adamw")
    two.tensors["uncounted"] = 1
    two.statistics[:] = 3.0
    one()
    two()
    for name in ("param", "exp_avg", "exp_avg_sq", "step"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes()
    assert one.statistics[0, 0] == 40
    assert (two.statistics == 3.0).all(), "a step that counted nothing leaves statistics alone"


def test_parts_of_a_step_refuse_absent_tables() -> None:
    call = Call(rule="adamw")
    before = call.bytes()
    sums = np.zeros((1, 7))
    tables = (call.rows, call.statistics, call.control)
    for spoilt in range(3):
        absent = [table[:0] if index == spoilt else table for index, table in enumerate(tables)]
        with pytest.raises(ValueError, match="contiguous"):
            _C.update(call.tensors, call.groups, *absent, sums, 1)
        with pytest.raises(ValueError, match="contiguous"):
            _C.finish(call.groups, sums, *absent)
    with pytest.raises(ValueError, match="contiguous"):
        _C.update(call.tensors, call.groups, *tables, sums[:0], 1)
    with pytest.raises(ValueError, match="contiguous"):
        _C.finish(call.groups, sums[:0], *tables)
    assert call.bytes() == before
