"""Who carries out a step. "auto" lets the tensors' device decide; an explicit request that cannot be met raises, with
the reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType

import torch

NAMES = ("cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """What ``aim_kernels.backends()`` says of one backend."""

    available: bool
    reason: str
    device: str


def backends() -> dict[str, Backend]:
    """For each backend: whether it is available, why not, and the device it runs on."""
    from aim_kernels.backends import cpu

    reason = cpu.unavailable()
    return {
        "cpu": Backend(not reason, reason or "compiled kernels", "cpu"),
        "reference": Backend(True, "eager PyTorch", "any"),
    }


def check_name(name: str) -> None:
    """Raises ValueError for a name that is no backend's."""
    if name not in ("auto", *NAMES):
        raise ValueError(f"backend={name!r}: unknown backend; choose one of {', '.join(('auto', *NAMES))}")


def select(name: str, device: torch.device) -> ModuleType:
    """The backend module for tensors on ``device``. ``name`` "auto" first asks the environment variable
    AIM_KERNELS_BACKEND.

    Raises:
        ValueError: an unknown name, or a backend that does not run on this device.
        RuntimeError: an explicitly named backend that is not available here.
    """
    from aim_kernels.backends import cpu, reference

    source = f"backend={name!r}"
    if name == "auto" and (wish := os.environ.get("AIM_KERNELS_BACKEND")):
        name, source = wish, f"AIM_KERNELS_BACKEND={wish!r}"
    if name == "auto":
        return cpu if device.type == "cpu" and not cpu.unavailable() else reference
    if name == "reference":
        return reference
    if name != "cpu":
        raise ValueError(f"{source}: unknown backend; choose one of {', '.join(('auto', *NAMES))}")
    if device.type != "cpu":
        raise ValueError(f"{source} does not run on {device}; use backend='auto' or move the parameters to the CPU")
    if reason := cpu.unavailable():
        raise RuntimeError(f"{source} is not available: {reason}")
    return cpu
