"""The compiled CPU kernels (csrc/cpu)."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from aim_kernels._native import load

if TYPE_CHECKING:
    from aim_kernels.step.inputs import StepInputs
    from aim_kernels.step.plan import StepPlan

_Sums = NDArray[np.float64]
_C, _REASON = load("_C")

_PROCESS = os.getpid()
_POOL = b"aim.thread_pool"  # of the capsule, which keeps this very pointer

ON_DEVICE, ZEROES, DEVICE, DESCRIPTION = False, True, "cpu", "compiled kernels"


def unavailable() -> str:
    """Why this backend cannot run; empty if it can."""
    if not _REASON:
        return ""
    return f"the extension aim_kernels._C was not built or does not load ({_REASON}); run `pip install .`"


def runs_on(device: torch.device) -> bool:
    """Whether tensors on ``device`` are this backend's."""
    return device.type == "cpu"


@functools.cache
def _torch_thread_pool() -> object:
    """``GOMP_parallel`` of the OpenMP runtime that torch itself uses, in a capsule; None if there is none.

    Steps run on torch's own pool: a second one would fight it for the cores, as torch's workers spin for a while
    after each of its operations.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return make(ctypes.cast(parallel, ctypes.c_void_p), _POOL, None)


def _thread_pool() -> object:
    # An OpenMP pool does not survive a fork; a child process starts threads of its own (None).
    return _torch_thread_pool() if os.getpid() == _PROCESS else None


def step(plan: StepPlan, inputs: StepInputs) -> None:
    """One step over all tensors of the plan."""
    plan.load_staged()
    if plan.exchange is not None:
        sums = torch.empty_like(plan.tables.statistics)
        _C.update(
            plan.records, plan.groups, *plan.tables.arrays(), sums.numpy(), torch.get_num_threads(), _thread_pool()
        )
        plan.store_staged()
        plan.exchange(sums)
        _C.finish(plan.groups, sums.numpy(), *plan.tables.arrays())
        return
    _C.step(plan.records, plan.groups, *plan.tables.arrays(), torch.get_num_threads(), _thread_pool())
    plan.store_staged()


def update(plan: StepPlan, inputs: StepInputs, indices: list[int]) -> _Sums:
    """A step up to its sums, of some parameters only. Returns what they measured, [G, 7]."""
    plan.load_staged(indices)
    sums = np.empty(plan.tables.statistics.shape)
    first, last = indices[0], indices[-1] + 1
    records = plan.records[first:last] if last - first == len(indices) else plan.records[indices]
    _C.update(records, plan.groups, *plan.tables.arrays(), sums, torch.get_num_threads(), _thread_pool())
    plan.store_staged(indices)
    return sums


def finish(plan: StepPlan, inputs: StepInputs, piece_sums: list[_Sums]) -> None:
    """The rest of a step, for the sums of all its parts, in the order of the parameters."""
    total = np.zeros(plan.tables.statistics.shape)
    for piece in piece_sums:
        total += piece
    _C.finish(plan.groups, total, *plan.tables.arrays())


def squares(plan: StepPlan) -> float:
    """The sum of squares of all gradients but the uncounted ones'."""
    return float(_C.squares(plan.records, torch.get_num_threads(), _thread_pool()))


def emit(plan: StepPlan) -> None:
    """Writes the live weights of all parameters that have a master."""
    plan.load_staged()
    rows = plan.tables.arrays()[0]
    _C.emit(plan.records, plan.groups, rows, torch.get_num_threads(), _thread_pool())
    plan.store_staged()
