"""The benchmark on tiny sets: what it times is right, what it counts is right. Nothing here asserts a time."""

from __future__ import annotations

import csv
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from aim_kernels import bench
from aim_kernels.bench import floor, gate, peers, report, shapes, timing
from aim_kernels.bench.peers import CANDIDATES
from aim_kernels.bench.shapes import SETS, Arrays, ShapeSet

pytestmark = pytest.mark.slow

TINY = ShapeSet("tiny", ((16, 33), (7,), (1,), (2, 1024)), "a few small tensors", rounds=3, repeats=2)
UNCOMPILED = [c for c in CANDIDATES.values() if c.name != "aim-compiled"]


@pytest.fixture
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize(
    ("name", "tensors", "numel"),
    [
        ("64m", 1, 2**26),
        ("vit-b16", 152, 86_567_656),
        ("resnet18", 62, 11_689_512),
        ("1000x1k", 1000, 1_024_000),
        ("l3-256k", 4, 2**18),
    ],
)
def test_sets_have_the_sizes_that_their_names_promise(name: str, tensors: int, numel: int) -> None:
    assert len(SETS[name].shapes) == tensors
    assert SETS[name].numel == sum(prod(s) for s in SETS[name].shapes) == numel


@pytest.mark.parametrize("name", [c.name for c in UNCOMPILED])
def test_candidates_compute_what_they_claim(name: str) -> None:
    """AIM, written three times, agrees element by element; torch.optim is the row of ones."""
    gate.verify([CANDIDATES[name]])


@pytest.mark.slow
def test_compiled_peer_computes_what_it_claims() -> None:
    pytest.importorskip("torch._inductor")
    gate.verify([CANDIDATES["aim-compiled"]])


def test_gate_refuses_a_wrong_candidate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One that claims the modulated step but takes the plain one."""
    wrong = replace(CANDIDATES["aim-plain"], settings=peers.STEP)
    with pytest.raises(gate.WrongResultError, match=r"aim-plain, step \d+, params\[0\]"):
        gate.verify([wrong])
    monkeypatch.setitem(CANDIDATES, "aim-plain", wrong)
    assert bench.main(["--sets", "l3-256k", "--candidates", "aim-plain"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("no times:")


def test_states_cost_what_the_base_rule_needs() -> None:
    """8 bytes a parameter, 4 more for live weights, and a step count a tensor."""
    steps = 4 * len(TINY.shapes) / TINY.numel
    for candidate, expected in {"aim": 8, "aim-plain": 8, "torch-fused": 8, "aim-live": 12, "aim-chain": 12}.items():
        arrays = Arrays(TINY)
        step, states = CANDIDATES[candidate].build(arrays)
        step()
        assert peers.state_bytes(states, arrays.params) == pytest.approx(expected + steps)


def test_all_candidates_step_the_same_arrays() -> None:
    arrays = Arrays(TINY)
    before = [t.data_ptr() for t in (*arrays.params, *arrays.exp_avg, *arrays.exp_avg_sq, *arrays.master)]
    for candidate in UNCOMPILED:
        step, states = candidate.build(arrays)
        moments = [m.clone() for m in arrays.exp_avg]
        step()
        assert all((new != old).any() for new, old in zip(arrays.exp_avg, moments, strict=True)), candidate.name
        for i, param in enumerate(arrays.params):
            assert states[param]["exp_avg"].data_ptr() == arrays.exp_avg[i].data_ptr(), candidate.name
            assert states[param]["exp_avg_sq"].data_ptr() == arrays.exp_avg_sq[i].data_ptr(), candidate.name
    assert before == [t.data_ptr() for t in (*arrays.params, *arrays.exp_avg, *arrays.exp_avg_sq, *arrays.master)]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("nontemporal", [False, True])
@pytest.mark.parametrize("chunk", [0, 1, 1000, 1 << 20])
def test_stream_writes_every_element_once(live: bool, nontemporal: bool, chunk: int) -> None:
    """With a factor other than zero every array gets the gradient added, whatever the cuts."""
    from aim_kernels import _C

    arrays = Arrays(TINY)
    for master, param in zip(arrays.master, arrays.params, strict=True):
        master.copy_(param * 2)
    old = {
        name: [t.detach().clone() for t in getattr(arrays, name)]
        for name in ("params", "exp_avg", "exp_avg_sq", "master")
    }
    _C.stream(arrays.table(), live, nontemporal, chunk, 0.5, 2)
    for i, grad in enumerate(arrays.grads):
        added = grad * 0.5
        torch.testing.assert_close(arrays.exp_avg[i], old["exp_avg"][i] + added, rtol=0, atol=0)
        torch.testing.assert_close(arrays.exp_avg_sq[i], old["exp_avg_sq"][i] + added, rtol=0, atol=0)
        theta = old["master" if live else "params"][i] + added
        torch.testing.assert_close(arrays.params[i].detach(), theta, rtol=0, atol=0)
        torch.testing.assert_close(arrays.master[i], theta if live else old["master"][i], rtol=0, atol=0)


def test_floor_streams_leave_the_arrays_as_they_are() -> None:
    arrays = Arrays(TINY)
    old = [t.detach().clone() for t in (*arrays.params, *arrays.exp_avg, *arrays.exp_avg_sq, *arrays.master)]
    for stream in floor.streams(arrays, {28, 32}).values():
        stream()
    for got, want in zip((*arrays.params, *arrays.exp_avg, *arrays.exp_avg_sq, *arrays.master), old, strict=True):
        assert torch.equal(got.detach(), want)


def test_stream_refuses_what_it_cannot_read() -> None:
    from aim_kernels import _C

    table = Arrays(TINY).table()
    for field, value, message in (
        ("dtype", 1, "dtype"),
        ("exp_avg", 0, "pointer"),
        ("master", 0, "pointer"),
        ("numel", -1, "count"),
    ):
        broken = table.copy()
        broken[field][1] = value
        with pytest.raises(ValueError, match=message):
            _C.stream(broken, True, False, 0, 0.0, 1)
    _C.stream(np.empty(0, table.dtype), False, False, 0, 0.0, 2)


def test_best_floor_is_the_lowest_median_of_its_size() -> None:
    samples = {
        "aim": timing.Samples.of([1.0]),
        "stream-28-shares": timing.Samples.of([9.0, 2.0, 3.0]),
        "stream-28-65536": timing.Samples.of([1.0, 4.0, 5.0]),
        "stream-32-nt-shares": timing.Samples.of([7.0]),
    }
    best = floor.best(samples)
    assert {size: name for size, (name, _) in best.items()} == {28: "stream-28-shares", 32: "stream-32-nt-shares"}


def test_quantiles() -> None:
    samples = timing.Samples.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    assert (samples.median, samples.quantile(0.2), samples.quantile(0.8)) == (3.5, 2.0, 5.0)
    assert timing.Samples.of([7.0]).quantile(0.8) == 7.0


def test_every_case_is_timed_once_a_round() -> None:
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = timing.interleaved(cases, rounds=4, gap=0, warm_up=1, between_rounds=lambda: calls.append("|"))
    assert {name: len(s.values) for name, s in samples.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = "".join(calls).split("|")[1:]
    assert [sorted(r) for r in rounds] == [["a", "b", "c"]] * 5
    assert len(set(rounds)) > 1


def test_stirred_gradients_keep_both_classes_populated() -> None:
    arrays = Arrays(ShapeSet("one", ((64, 64),), ""))
    step, _ = CANDIDATES["aim-eager"].build(arrays)
    addresses = [g.data_ptr() for g in arrays.grads]
    under = []
    for _ in range(12):
        step()
        under.append(step.__self__.under)
        arrays.stir()
    assert all(0 < count < 4096 for count in under[2:])
    assert addresses == [g.data_ptr() for g in arrays.grads]


def test_command_line_writes_table_results_and_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(shapes.SETS, "tiny", TINY)
    arguments = ["--sets", "tiny", "--candidates", "aim", "aim-live", "torch-fused", "--rounds", "3", "--gap", "0"]
    for _ in range(2):
        assert bench.main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "x torch fused" in capsys.readouterr().out
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (3 + 2)  # candidates, and the best stream of 28 and of 32 bytes
    by_name = {line["candidate"]: line for line in lines[:5]}
    assert by_name["torch-fused"]["ratio_to_torch_fused"] == "1"
    assert {n: line["bytes_per_param"] for n, line in by_name.items() if "aim" in n} == {"aim": "28", "aim-live": "32"}
    for line in lines:
        assert float(line["p20"]) <= float(line["median_ns_per_param"]) <= float(line["p80"])
        assert line["threads"] == "1"
        if line["candidate"].startswith("stream"):
            assert line["ratio_to_floor"] == "1"


def test_results_of_another_format_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        report.append_csv(path, [])
    assert path.read_text() == "a,b\n1,2\n"


def test_targets_read_the_right_ratios() -> None:
    shared = dict.fromkeys(("commit", "date", "cpu", "os", "python", "torch", "isa"), "")
    numbers = dict.fromkeys(("threads", "rounds", "median_ns_per_param", "p20", "p80", "step_ms"), 1)
    sizes = {"bytes_per_param": 28, "state_bytes_per_param": 8.0}
    ratios = {"ratio_to_floor": 1.04, "ratio_to_torch_fused": 0.9}
    line = report.Result(**shared, **numbers, **sizes, **ratios, set="64m", candidate="aim")
    fused = replace(line, candidate="torch-fused", median_ns_per_param=1.25)
    reached = {(t.candidate, t.against): ratio for t, ratio in report.check_targets([line, fused])}
    assert reached == {("aim", "floor"): 1.04, ("aim", "torch-fused"): 0.8}
