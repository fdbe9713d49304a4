"""The binding under arguments of every kind."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aim_kernels.step import watch

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.mark.parametrize("means", ["quick", "by methods"])
def test_a_watch_notices_whatever_moves(means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both means of looking at tensors: where it lies, what it is, how it lies."""
    assert watch._quick() is not None, "this torch is asked by its methods, which takes longer"
    if means == "by methods":
        monkeypatch.setattr(watch, "_quick", lambda: None)

    def edits() -> dict[str, Callable[[Tensor, Tensor, Tensor], Any]]:
        half = torch.ones(6, 6, dtype=torch.bfloat16)
        return {
            "nothing": lambda p, g, m: None,
            "gradient moves": lambda p, g, m: setattr(p, "grad", g.clone()),
            "parameter moves": lambda p, g, m: setattr(p, "data", p.data.clone()),
            "parameter is cut": lambda p, g, m: setattr(p, "data", p.data[:3]),
            "parameter is transposed": lambda p, g, m: setattr(p, "data", p.data.t()),
            "parameter is viewed": lambda p, g, m: setattr(p, "data", p.data.view(4, 9)),
            "parameter is cast": lambda p, g, m: setattr(p, "data", half),
            "gradient is cut": lambda p, g, m: setattr(g, "data", g.data[:3]),
            "gradient is cast": lambda p, g, m: setattr(g, "data", half),
            "state moves": lambda p, g, m: setattr(m, "data", m.data.clone()),
            "state is cut": lambda p, g, m: setattr(m, "data", m.data[:3]),
            "state is transposed": lambda p, g, m: setattr(m, "data", m.data.t()),
            "state is viewed": lambda p, g, m: setattr(m, "data", m.data.view(4, 9)),
            "state is cast": lambda p, g, m: setattr(m, "data", half),
        }

    for name, edit in edits().items():
        p = torch.nn.Parameter(torch.ones(6, 6))
        p.grad, state = torch.ones(6, 6), {"exp_avg": torch.ones(6, 6), "mine": [0]}
        groups, states = [{"params": [p]}], {p: state}
        made = watch.watch_over(groups, [p], [False], [(6, 1)], states, {p: {"exp_avg": state["exp_avg"]}})
        addresses, odd, grads = np.zeros(1, np.uint64), np.zeros(1, bool), [None]
        assert made.read(addresses, odd, grads) and addresses[0] == p.grad.data_ptr() and not odd[0]
        edit(p, p.grad, state["exp_avg"])
        state["mine"] = ["somebody else's"]
        assert made.read(addresses, odd, grads) == (name in ("nothing", "gradient moves")), name
        assert addresses[0] == p.grad.data_ptr() or name not in ("nothing", "gradient moves")


@pytest.mark.parametrize("means", ["quick", "by methods"])
def test_a_watch_tells_which_gradients_cannot_be_read_as_they_are(means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if means == "by methods":
        monkeypatch.setattr(watch, "_quick", lambda: None)
    p = torch.nn.Parameter(torch.ones(2, 3))
    made = watch.watch_over([{"params": [p]}], [p], [False], [(3, 1)], {}, {})
    plain = torch.ones(2, 3)
    gradients = {
        "plain": (plain, False),
        "of another order": (plain.t().contiguous().t(), True),
        "negated when read": (torch._neg_view(plain), True),
        "without memory": (torch._efficientzerotensor(2, 3), True),
    }
    for name, (grad, is_odd) in gradients.items():
        p.grad = grad
        addresses, odd, grads = np.zeros(1, np.uint64), np.zeros(1, bool), [None]
        assert made.read(addresses, odd, grads), name
        assert odd[0] == is_odd and addresses[0] and grads[0] is p.grad, name


@pytest.mark.slow
def test_any_arguments_work_or_raise() -> None:
    """tests/support/fuzz_binding.py, in a process of its own: nothing crashes, and what raises has written nothing."""
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(SUPPORT / "fuzz_binding.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"exit status {ran.returncode}\n{ran.stdout[-3000:]}{ran.stderr[-6000:]}"
    worked, raised = map(int, re.fullmatch(r"(\d+) worked, (\d+) raised\n", ran.stdout).groups())  # type: ignore[union-attr]
    assert worked > 200 and raised > 200, "arguments all of one kind test little"
