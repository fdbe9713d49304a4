"""Checkpoints of released versions (tests/golden) load here, whole, and runs go on from them bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import make
from helpers import same_bits

from aim_kernels import _C

NAMES = sorted(path.stem for path in make.HERE.glob("*.pt"))
INSTRUCTION_SETS = [name for name, _, supported in _C.isas() if supported]


def opened(name: str) -> dict[str, Any]:
    return torch.load(make.HERE / f"{name}.pt", weights_only=True)


def resumed(name: str, golden: dict[str, Any]) -> tuple[Any, Any, list[torch.Tensor]]:
    """A new process: weights, schedule and optimizer as they were saved."""
    optimizer, schedule, params = make.build(name)
    for p, saved in zip(params, golden["weights"], strict=True):
        p.data.copy_(saved)
    optimizer.load_state_dict(golden["optimizer"])
    if schedule is not None:
        schedule.last_epoch = make.BEFORE
    return optimizer, schedule, params


def holds(optimizer: Any, params: list[torch.Tensor], weights: list[torch.Tensor], saved: dict[str, Any]) -> None:
    """Asserts that every recorded tensor, table and option is what the optimizer has now, and no tensor is missing.

    Options that later versions add are not in the record.
    """
    same_bits([p.detach() for p in params], weights, "weights")
    now = optimizer.state_dict()
    same_bits(now["state"], saved["state"], "state")
    assert len(now["param_groups"]) == len(saved["param_groups"])
    for number, (group, recorded) in enumerate(zip(now["param_groups"], saved["param_groups"], strict=True)):
        for table in ("modulation_row", "statistics_row", "control"):
            found, expected = (torch.tensor(g[table], dtype=torch.float64) for g in (group, recorded))
            same_bits(found, expected, f"group {number}, {table}")
            group.pop(table)
        assert {key: group[key] for key in recorded if key in group} == {
            key: value for key, value in recorded.items() if not key.endswith("_row") and key != "control"
        }


def test_there_is_one_of_every_case() -> None:
    assert sorted(make.CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_loads_as_it_was_saved(name: str) -> None:
    golden = opened(name)
    optimizer, _, params = resumed(name, golden)
    holds(optimizer, params, golden["weights"], golden["optimizer"])
    assert any("master" in state for state in golden["optimizer"]["state"].values())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("name", NAMES)
def test_goes_on_as_it_did(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIM_KERNELS_ISA", isa)
    golden = opened(name)
    optimizer, schedule, params = resumed(name, golden)
    make.run(optimizer, schedule, params, range(make.BEFORE, make.BEFORE + make.AFTER))
    holds(optimizer, params, golden["continued"]["weights"], golden["continued"]["optimizer"])


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_run_is_as_it_was(name: str) -> None:
    """From the first step: not only what was saved, also what led to it."""
    golden = opened(name)
    optimizer, schedule, params = make.build(name)
    make.run(optimizer, schedule, params, range(make.BEFORE))
    holds(optimizer, params, golden["weights"], golden["optimizer"])
