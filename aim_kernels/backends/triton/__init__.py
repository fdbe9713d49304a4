"""Triton kernels. Compiled and interpreted on the CPU; not yet run on a GPU.

Nothing of Triton is imported before a step is taken. On CPU tensors the kernels run in Triton's interpreter, where
``TRITON_INTERPRET=1`` is set before Triton is imported: slow, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aim_kernels.backends import device, pieces

if TYPE_CHECKING:
    from aim_kernels.backends.device import DeviceShard
    from aim_kernels.step.inputs import StepInputs
    from aim_kernels.step.plan import StepPlan

ON_DEVICE, ZEROES, DEVICE, DESCRIPTION = True, True, "cuda, xpu", "Triton kernels"

#: Elements of a program's chunk: many times what a program computes before its first element, and few enough that
#: programs fill every multiprocessor several times. Reasoned, not yet measured.
CHUNK = 8192


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def unavailable(device: torch.device | None = None) -> str:
    """Why this backend cannot run, on ``device`` or on any; empty if it can."""
    if not _installed():
        return "triton is not installed; pip install 'aim-kernels[triton]'"
    if _interpreted():
        return ""
    if device is not None and device.type == "cpu":
        return "Triton compiles for GPUs; set TRITON_INTERPRET=1 to interpret its kernels on the CPU, for tests"
    if not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())):
        return "PyTorch finds no GPU; look at nvidia-smi (rocm-smi, xpu-smi) and at the driver's version"
    return ""


def runs_on(device: torch.device) -> bool:
    """Whether tensors on ``device`` are this backend's: GPUs, and the CPU where Triton interprets."""
    return device.type in ("cuda", "xpu") or (device.type == "cpu" and _interpreted())


def step(plan: StepPlan, inputs: StepInputs) -> None:
    """One step over all tensors of the plan."""
    device.step(plan, inputs, _SELF)


def update(plan: StepPlan, inputs: StepInputs, indices: list[int]) -> list[Tensor]:
    """A step up to its sums, of some parameters only. Returns what they measured, [G, 7] a device."""
    return pieces.update(plan, inputs, _SELF, indices)


def finish(plan: StepPlan, inputs: StepInputs, piece_sums: list[list[Tensor]]) -> None:
    """The rest of a step, for the sums of all its parts."""
    pieces.finish(plan, inputs, _SELF, piece_sums)


def emit(plan: StepPlan) -> None:
    """Writes the live weights of all parameters that have a master."""
    device.emit(plan, _SELF)


class _Kernels:
    """``device.Kernels``: each call launches, and waits for nothing."""

    CHUNK = CHUNK

    def update(self, shard: DeviceShard) -> None:
        from aim_kernels.backends.triton import driver

        driver.update(shard)

    def finish(self, shard: DeviceShard) -> None:
        from aim_kernels.backends.triton import driver

        driver.finish(shard)

    def emit(self, shard: DeviceShard) -> None:
        from aim_kernels.backends.triton import driver

        driver.emit(shard)


_SELF = _Kernels()
