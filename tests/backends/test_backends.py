"""The compiled backend against the eager one: the same order of operations, so a few roundings apart at most."""

from __future__ import annotations

import pytest
import tolerances as tol
import torch
from helpers import DTYPES, ROWS, RULES, Gradients, assign, build, parameters_of, same_bits, set_row

import aim_kernels as ak
from aim_kernels.backends import NAMES, select

SHAPES = (((5, 7), (70,), (), (0,)), ((1031,),))


def pair(rule: str, row: str, dtype: str, steps: int) -> list[ak.AIMFusedOptimizer]:
    made = []
    for backend in ("cpu", "reference"):
        optimizer = build(rule, SHAPES, dtype, ("contiguous", "transposed"), backend=backend)
        set_row(optimizer, 0, row)
        params = parameters_of(optimizer)
        gradients = Gradients(params)
        for _ in range(steps):
            assign(params, gradients())
            optimizer.step()
        made.append(optimizer)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ["ones", "all", "alternate"])
@pytest.mark.parametrize("rule", RULES)
def test_backends_agree(rule: str, row: str, dtype: str) -> None:
    cpu, reference = pair(rule, row, dtype, 5)
    same_bits(cpu.tables.control, reference.tables.control)
    unit = tol.UNIT[dtype]
    torch.testing.assert_close(cpu.tables.rows, reference.tables.rows, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        cpu.tables.statistics, reference.tables.statistics, rtol=200 * tol.UNIT["float32"], atol=1e-4
    )
    for p, q in zip(parameters_of(cpu), parameters_of(reference), strict=True):
        assert cpu.state[p].keys() == reference.state[q].keys()
        for name, value in cpu.state[p].items():
            other = reference.state[q][name]
            assert value.dtype == other.dtype
            # Five steps of ten roundings each, in weights and moments of order one (momentum sums five).
            torch.testing.assert_close(
                value, other, rtol=100 * unit, atol=400 * (unit if row == "ones" else tol.NORMAL_UNIT)
            )
        if dtype in tol.NARROW:
            torch.testing.assert_close(p, q, rtol=2.0 ** (1 - tol.NARROW[dtype][0]), atol=1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_reports_agree(row: str) -> None:
    cpu, reference = pair("adamw", row, "float32", 4)
    for one, other in zip(cpu.statistics(), reference.statistics(), strict=True):
        assert one.keys() == other.keys()
        assert (one.pop("modality"), one.pop("depth")) == (other.pop("modality"), other.pop("depth"))
        assert one == pytest.approx(other, rel=1e-4)
    same_bits(cpu.modulation(), reference.modulation())


def test_backends_are_reported() -> None:
    found = ak.backends()
    assert {"cpu", "reference"} <= set(found)
    for name in ("cpu", "reference"):
        assert found[name].available, found[name].reason


def test_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment decides where the user did not."""
    monkeypatch.setenv("AIM_KERNELS_BACKEND", "nonsense")
    with pytest.raises((ValueError, RuntimeError), match="nonsense"):
        run(build(backend="auto"))
    run(build(backend="reference"))
    monkeypatch.setenv("AIM_KERNELS_BACKEND", "reference")
    run(build(backend="auto"))
    monkeypatch.delenv("AIM_KERNELS_BACKEND")
    run(build(backend="auto"))


def test_a_device_that_no_backend_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for wish in ("", "auto"):
        monkeypatch.setenv("AIM_KERNELS_BACKEND", wish)
        with pytest.raises(ValueError, match=r"='auto': no backend runs on meta; move the parameters"):
            select("auto", torch.device("meta"))
    for name in NAMES:
        with pytest.raises(ValueError, match=f"backend='{name}' does not run on meta"):
            select(name, torch.device("meta"))
    with pytest.raises(ValueError, match="backend='gpu': unknown backend; choose one of auto, cpu"):
        select("gpu", torch.device("cpu"))


def run(optimizer: ak.AIMFusedOptimizer) -> None:
    params = parameters_of(optimizer)
    assign(params, Gradients(params)())
    optimizer.step()


def test_backend_can_change_between_optimizers_of_one_run() -> None:
    """A checkpoint of one backend goes on under the other."""
    cpu, reference = pair("adamw", "alternate", "float32", 4)
    for p, q in zip(parameters_of(cpu), parameters_of(reference), strict=True):
        q.data.copy_(p.detach())
    reference.load_state_dict(cpu.state_dict())
    same_bits(cpu.tables.rows, reference.tables.rows)
    for optimizer in (cpu, reference):
        run(optimizer)
    for p, q in zip(parameters_of(cpu), parameters_of(reference), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
