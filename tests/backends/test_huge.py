"""More than 2^31 elements, for real: a 32-bit size or index anywhere would leave weights unchanged, or hit others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import aim_kernels as ak

NUMEL = 2**31 + 1000
NEEDED = 11 * 2**30  # parameter and gradient, two bytes an element, and room for the others


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


@pytest.mark.nightly
def test_more_than_two_to_the_31_elements() -> None:
    if available_memory() < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory")
    p = torch.nn.Parameter(torch.ones(NUMEL, dtype=torch.bfloat16))
    p.grad = torch.full((NUMEL,), 2.0, dtype=torch.bfloat16)
    p.grad[-3:] = 4.0
    p.grad[2**31 - 1 : 2**31 + 1] = -2.0
    optimizer = ak.AIMFusedOptimizer([p], lr=0.25, rule="sgd", backend="cpu")
    optimizer.step()
    values = p.detach()
    assert values[2**31 - 2 : 2**31 + 2].tolist() == [0.5, 1.5, 1.5, 0.5]
    assert values[-4:].tolist() == [0.5, 0.0, 0.0, 0.0]
    assert sum(int((part != 0.5).sum()) for part in values.split(2**28)) == 5
    assert optimizer.statistics()[0]["grad_norm"] ** 2 == pytest.approx(4 * (NUMEL - 3) + 16 * 3, rel=1e-6)
