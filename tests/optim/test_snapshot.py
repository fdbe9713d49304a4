"""``optimizer.snapshot()``: everything that steps change, whatever became of the list of groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same_bits

import aim_kernels as ak


def made() -> Any:
    torch.manual_seed(0)
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(5, 3))], "modality": name, "depth": 0, "modulated": True}
        for name in ("a", "b")
    ]
    optimizer = ak.AIMFusedOptimizer(groups, lr=0.1)
    optimizer.set_strength("a", 0, 0.7)
    for _ in range(2):
        step(optimizer)
    return optimizer


def step(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, 0.5)
    optimizer.step()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "steps": lambda optimizer: None,
    "reversed": lambda optimizer: optimizer.param_groups.reverse(),
    "one more": lambda optimizer: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(4))]}),
    "one less": lambda optimizer: optimizer.param_groups.pop(0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_return_to_their_groups(change: str) -> None:
    optimizer = made()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    values = [p.detach().clone() for p in weights]
    before, rows = optimizer.state_dict(), optimizer.modulation()
    restore = optimizer.snapshot()
    CHANGES[change](optimizer)
    step(optimizer)
    for _ in range(2):  # as often as one likes
        with torch.no_grad():
            for p, value in zip(weights, values, strict=True):
                p.copy_(value)
        restore()
        same_bits(before, optimizer.state_dict())
        assert optimizer.modulation() == rows
        step(optimizer)
