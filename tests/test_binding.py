"""The binding under arguments of every kind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aim_kernels import _C

HERE = Path(__file__).resolve().parent


def test_a_watch_reads_no_gradient_of_an_unknown_kind() -> None:
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)

    def read(kind: Any) -> bool:
        methods = (torch.Tensor.data_ptr, torch.Tensor.is_contiguous, torch.Tensor.stride)
        watch = _C.Watch([{"params": [p]}], [p], *methods, [None], [kind], {}, [], [])
        return watch.read(np.zeros(1, np.uint64), np.zeros(1, bool), [None])

    assert read((p.shape, p.dtype))
    assert not read((p.shape, torch.float64))
    assert not read((p.shape, p.dtype, None))


def test_any_arguments_work_or_raise() -> None:
    """tests/fuzz_binding.py, in a process of its own: nothing crashes, and what raises has written nothing."""
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(HERE / "fuzz_binding.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"exit status {ran.returncode}\n{ran.stdout[-3000:]}{ran.stderr[-6000:]}"
    worked, raised = map(int, re.fullmatch(r"(\d+) worked, (\d+) raised\n", ran.stdout).groups())  # type: ignore[union-attr]
    assert worked > 200 and raised > 200, "arguments all of one kind test little"
