"""Triton kernels. Not there yet."""

import torch

ON_DEVICE, DEVICE, DESCRIPTION = True, "cuda, xpu", "Triton kernels"


def unavailable() -> str:
    """Why this backend cannot run; empty if it can."""
    return "not there yet"


def runs_on(device: torch.device) -> bool:
    """Whether tensors on ``device`` are this backend's."""
    return device.type != "cpu"
