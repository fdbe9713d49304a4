"""Backend registry and selection.

"auto" lets the tensors' device decide; an explicit request that cannot be met raises, with the reason.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import dataclass
from types import ModuleType

import torch

NAMES = ("cpu", "cuda", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """What ``aim_kernels.backends()`` says of one backend."""

    available: bool
    reason: str
    device: str


@functools.cache  # every step asks
def _module(name: str) -> ModuleType:
    """A backend: ``unavailable() -> str`` (why it cannot run; empty if it can), ``runs_on(device) -> bool``,
    ``step(plan, inputs)``, ``emit(plan)``, ``ON_DEVICE``: whether numbers in a device's memory are read there, and
    ``ZEROES``: whether its kernels clear the gradients that records ask it to."""
    return importlib.import_module(f"aim_kernels.backends.{name}")


def backends() -> dict[str, Backend]:
    """For each backend: whether it is available, why not, and the device it runs on."""
    found = {}
    for name in NAMES:
        module = _module(name)
        reason = module.unavailable()
        found[name] = Backend(not reason, reason or module.DESCRIPTION, module.DEVICE)
    return found


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
    source = f"backend={name!r}"
    if name == "auto" and (wish := os.environ.get("AIM_KERNELS_BACKEND")):
        name, source = wish, f"AIM_KERNELS_BACKEND={wish!r}"
    if name == "auto":
        # The first that runs there; on a CPU, Triton would be its interpreter.
        names = ("cpu", "reference") if device.type == "cpu" else ("cuda", "triton", "reference")
        for each in names:
            module = _module(each)
            if module.runs_on(device) and not module.unavailable():
                return module
    if name not in NAMES:
        raise ValueError(f"{source}: unknown backend; choose one of {', '.join(('auto', *NAMES))}")
    module = _module(name)
    if not module.runs_on(device):
        raise ValueError(f"{source} does not run on {device}; use backend='auto' or move the parameters")
    if reason := module.unavailable():
        raise RuntimeError(f"{source} is not available: {reason}")
    return module
