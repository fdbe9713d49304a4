"""The CUDA kernels as a program of their own, with the processor as their device (tests/native/cuda_on_cpu), under
sanitizers."""

from __future__ import annotations

import re
import subprocess

import pytest
from backends_under_test import make

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("program", "least"),
    [
        # Address and undefined behaviour: every load and store of every thread stays inside its buffers.
        ("test_cuda", 300),
        # Threads: what one writes to shared memory, others read only behind a barrier.
        pytest.param("test_cuda_tsan", 90, marks=pytest.mark.nightly),
    ],
)
def test_kernels_under_sanitizers(program: str, least: int) -> None:
    ran = subprocess.run([str(make(program))], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    cases, failures = map(int, re.fullmatch(r"(\d+) cases, (\d+) failures\n", ran.stdout).groups())  # type: ignore[union-attr]
    assert cases >= least
    assert failures == 0
