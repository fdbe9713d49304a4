"""The benchmark for a device, run dry on the CPU: what it counts, and what it does with candidates that fail."""

from __future__ import annotations

import csv
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aim_kernels import bench
from aim_kernels.backends import cuda
from aim_kernels.bench import gpu, gpu_peers, gpu_report, shapes
from aim_kernels.bench.gpu_peers import Peer, peers, step_bytes
from aim_kernels.bench.gpu_report import GpuResult
from aim_kernels.bench.peers import STEP
from aim_kernels.bench.shapes import Arrays, ShapeSet
from aim_kernels.bench.timing import Samples

pytestmark = pytest.mark.slow

TINY = ShapeSet("256m", ((16, 33), (7,), (1,)), "a few small tensors", rounds=3)


def test_sets_have_the_sizes_that_their_names_promise() -> None:
    sizes = {name: (len(s.shapes), s.numel) for name, s in gpu.SETS.items()}
    assert sizes == {
        "256m": (1, 2**28),
        "vit-l16": (296, 304_326_632),
        "resnet50": (161, 25_557_032),
        "1000x1k": (1000, 1_024_000),
    }
    assert shapes.SETS.keys() & gpu.SETS.keys() == {"1000x1k"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"param": 4}, 28),  # p, g, m, v read; p, m, v written
        ({"param": 4, "master": True}, 32),  # g, m, v, master read; m, v, master, p written
        ({"param": 2, "master": True}, 28),  # g in two bytes, p in two bytes
        ({"param": 2, "state": 2}, 14),
        ({"param": 2}, 22),  # float32 moments, no master
    ],
)
def test_bytes_of_a_step(arguments: dict[str, Any], expected: int) -> None:
    assert step_bytes(**arguments) == expected


@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_peers_compute_what_they_claim(dtype: str) -> None:
    """Those that run on a CPU; what is not installed says so."""
    chosen = [peer for peer in peers(dtype, "cpu") if peer.name != "aim-compiled"]
    told = {peer.name: reason for peer, reason in gpu.verified(chosen, dtype, "cpu")}
    if dtype == "float32":
        assert "not installed" in told.pop("flashoptim")
    else:
        told.pop("flashoptim")
    assert set(told.values()) == {""}, told


def test_a_wrong_peer_is_not_timed() -> None:
    right = next(peer for peer in peers("float32", "cpu") if peer.name == "aim-plain")
    wrong = replace(right, settings=STEP)
    assert [bool(reason) for _, reason in gpu.verified([right, wrong], "float32", "cpu")] == [False, True]


def sample(microseconds: float) -> Samples:
    return Samples.of([microseconds * 1e3] * 5)


def line(candidate: str, microseconds: float, fused: float | None = None, **columns: Any) -> GpuResult:
    """A line of a step that moves 280 bytes, where a copy moves 1e9 bytes a second: 0.28 us."""
    given = {"set": "256m", "dtype": "float32", "mode": "eager", "rounds": 5, "bytes_per_param": 28} | columns
    return gpu_report.result(
        sample(microseconds), 280, 1e9, sample(fused) if fused else None, candidate=candidate, **given
    )


def test_ratios() -> None:
    made = line("aim", 0.56, fused=1.12)
    assert made.ratio_to_copy == pytest.approx(2.0)
    assert made.ratio_to_torch_fused == pytest.approx(0.5)
    assert made.gb_per_s == pytest.approx(0.5)
    assert made.median_us == pytest.approx(0.56)


def test_targets_are_met_missed_or_not_measured() -> None:
    lines = [line("aim", 0.30, fused=0.31), line("torch-fused", 0.31, fused=0.31), line("aim-triton", 0.40)]
    lines.append(gpu_report.configured(line("aim", 99.0), 4096, 128))  # the sweep settles nothing
    told = gpu_report.verdicts(lines)
    assert len(told) == len(gpu_report.TARGETS)
    verdict = {text.split(": ")[0] + text.split(" x ")[1].split(" ")[0]: text.rpartition(": ")[2] for text in told}
    assert verdict["256m float32 aim (eager)copy"] == "met"
    assert verdict["256m float32 aim (eager)torch-fused"] == "met"
    assert verdict["256m float32 aim-triton (eager)aim"] == "MISSED"
    assert verdict["resnet50 float32 aim (eager)torch-fused"] == "not measured"


def test_a_case_that_raises_is_told_of_and_the_others_go_on() -> None:
    calls: list[str] = []

    def bad() -> None:
        calls.append("bad")
        raise ValueError("no such kernel")

    found = gpu.interleaved(gpu.Clock("cpu"), {"good": lambda: calls.append("good"), "bad": bad}, 4, lambda: None)
    assert found["bad"] == "ValueError: no such kernel"
    assert isinstance(found["good"], Samples) and len(found["good"].values) == 4
    assert calls.count("bad") == 1 and calls.count("good") == 6


def test_measuring_names_failures_and_counts_bytes() -> None:
    def broken(arrays: Arrays, capturable: bool) -> Any:
        raise RuntimeError("cannot be built\nwith details")

    chosen = [p for p in peers("float32", "cpu") if p.name in ("aim", "torch-fused")] + [Peer("x", "", broken, 28)]
    lines = {(r.candidate, r.mode): r for r in gpu.measure(TINY, "float32", chosen, "cpu", 1e9)}
    timed = {(name, mode) for name in ("aim", "torch-fused") for mode in ("eager", "wall")}
    assert lines.keys() == timed | {("x", "eager")}
    assert lines["x", "eager"].error == "RuntimeError: cannot be built"
    assert lines["torch-fused", "wall"].ratio_to_torch_fused == 1.0
    for key, made in lines.items():
        if key[0] != "x":
            assert made.median_us > 0
            assert made.gb_per_s == pytest.approx(28 * TINY.numel / made.median_us / 1e3)


def test_configurations_are_put_back() -> None:
    before = cuda._Kernels.CHUNK, cuda.THREADS
    with gpu.configured(4096, 128):
        assert (cuda._Kernels.CHUNK, cuda.THREADS) == (4096, 128)
    assert before == (cuda._Kernels.CHUNK, cuda.THREADS)


def test_configurations_of_triton_are_put_back() -> None:
    pytest.importorskip("triton", reason="the Triton backend is an extra")
    from aim_kernels.backends import triton
    from aim_kernels.backends.triton import driver

    before = triton._Kernels.CHUNK, dict(driver.BLOCKS)
    with gpu.configured_triton(4096, 256) as threads:
        assert (triton._Kernels.CHUNK, driver.BLOCKS["float32"], threads) == (4096, 256, 64)
        assert driver.specialization(0, 4096)["BLOCK"] == 256
    assert before == (triton._Kernels.CHUNK, dict(driver.BLOCKS))


def test_sweep_times_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the kernels, and only on the stream; each line says what it was measured with."""
    pytest.importorskip("triton", reason="the Triton backend is an extra")
    monkeypatch.setattr(gpu, "SETS", {"256m": TINY})
    monkeypatch.setattr(gpu, "CHUNKS", (1024, 2048))
    lines = list(gpu.sweep(["256m"], peers("float32", "cpu"), "cpu", 1e9, 2))
    assert {line.mode for line in lines} == {"eager"}
    ours = {(line.chunk, line.threads) for line in lines if line.candidate == "aim"}
    assert ours == {(chunk, threads) for chunk in (1024, 2048) for threads in gpu.THREADS}
    theirs = {(line.chunk, line.candidate) for line in lines if line.candidate != "aim"}
    assert theirs == {(chunk, f"aim-triton-block{block}") for chunk in (1024, 2048) for block in gpu.BLOCKS}


def test_a_set_that_fails_is_one_line_more() -> None:
    def lines() -> Any:
        yield line("aim", 1.0)
        raise torch.OutOfMemoryError("no room\nfor it")

    first, second = gpu.attempt(lines(), "vit-l16", "float32")
    assert (first.candidate, first.error) == ("aim", "")
    assert (second.set, second.error) == ("vit-l16", "OutOfMemoryError: no room")


def test_who_is_ours() -> None:
    names = {peer.name for dtype in gpu.DTYPES for peer in peers(dtype, "cpu")}
    strangers = {"torch-fused", "torch-fused-bf16", "torch-foreach", "aim-compiled", "aim-eager", "flashoptim"}
    assert {name for name in names if not gpu_report.is_ours(name)} == strangers


@pytest.mark.parametrize(("name", "on_cpu"), [("torch-fused", False), ("torch-foreach", True)])
def test_torch_s_step_counts_are_where_torch_keeps_them(
    name: str, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count on the device would make every foreach step wait for it."""
    adopted: list[Any] = []
    adopt = gpu_peers.adopt

    def spied(optimizer: Any, arrays: Arrays) -> None:
        adopt(optimizer, arrays)
        adopted.append((optimizer, optimizer.state[arrays.params[0]]["step"]))

    monkeypatch.setattr(gpu_peers, "adopt", spied)
    peer = next(peer for peer in peers("float32", "cpu") if peer.name == name)
    arrays = Arrays(TINY)
    peer.build(arrays, False)
    ((optimizer, beside_the_parameter),) = adopted
    kept = optimizer.state[arrays.params[0]]["step"]
    assert (kept is not beside_the_parameter) == on_cpu


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, with files."""
    monkeypatch.setattr(gpu, "SETS", {"256m": TINY})
    some = ("aim", "aim-live", "aim-live-triton", "torch-fused", "flashoptim")
    monkeypatch.setattr(gpu, "peers", lambda dtype, device: [p for p in peers(dtype, device) if p.name in some])
    for _ in range(2):
        code = bench.main(["--device", "cpu", "--sets", "256m", "--rounds", "3", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert code == 0
    assert "flashoptim (float32) is not timed: RuntimeError: flashoptim is not installed" in told
    assert "resnet50 float32 aim (eager)" in told
    rows = list(csv.DictReader((tmp_path / "gpu-cpu-dry-run.csv").open(encoding="utf-8")))
    assert list(rows[0]) == [field.name for field in fields(GpuResult)]
    assert {row["dtype"] for row in rows} == set(gpu.DTYPES)
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert len(rows) == 2 * len({(row["set"], row["dtype"], row["candidate"], row["mode"]) for row in rows})
    page = (tmp_path / "gpu-cpu-dry-run.md").read_text(encoding="utf-8")
    assert "## 256m, bfloat16" in page and "| aim-live |" in page
    assert (tmp_path / "gpu-cpu-dry-run.png").stat().st_size > 10_000
