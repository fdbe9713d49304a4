"""What a parameter keeps between steps: names, types and memory order of its states, and how they begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aim_kernels.distributed import is_dtensor, like, local_of

#: States of parameters up to this many elements share a buffer: fewer allocations, and one version counter to bump.
_SMALL = 1 << 16
_ALIGN = 16  # elements, so that every state in a buffer starts on a cache line


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of moments, masters and arithmetic for parameters of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments_of(group: dict[str, Any]) -> dict[str, str]:
    """The moments that a group keeps: field of ``rows.TENSOR_RECORD`` -> state key, torch.optim's where it has one.

    Modulated groups keep a first and a second moment under every rule: what the classes are made of.
    """
    rule, modulated, momentum = group["rule"], group["modulated"], group["momentum"]
    first: Any = None
    second: Any = None
    extra: Any = None
    if rule in ("adamw", "adam"):
        first, second = "exp_avg", "exp_avg_sq"
        extra = "max_exp_avg_sq" if group["amsgrad"] else None
    elif rule == "sgd":
        first = "momentum_buffer" if momentum else "exp_avg" if modulated else None
        second = "exp_avg_sq" if modulated else None
    elif rule == "adagrad":
        first, second = "exp_avg" if modulated else None, "sum"
    elif rule == "rmsprop":
        first, second = "grad_avg" if group["centered"] else "exp_avg" if modulated else None, "square_avg"
        extra = "momentum_buffer" if momentum else None
    elif rule == "lion":
        first, second = "exp_avg", "exp_avg_sq" if modulated else None
    names = {"exp_avg": first, "exp_avg_sq": second, "extra": extra}
    return {field: name for field, name in names.items() if name}


def has_classes(group: dict[str, Any]) -> bool:
    """Whether a group's moments tell under-optimized elements from others."""
    return moments_of(group).keys() >= {"exp_avg", "exp_avg_sq"}


def step_count(p: Tensor, steps: float = 0.0) -> Tensor:
    """A parameter's state "step": 0-dim float32, beside the parameter, where its kernel counts."""
    return torch.tensor(steps, dtype=torch.float32, device=p.device)


def state_layout(p: Tensor) -> torch.memory_format:
    """Memory order of a parameter's states: its own, or contiguous where it fills no block of memory."""
    return torch.preserve_format if is_dense(local_of(p)) else torch.contiguous_format


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of the dimensions."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def master_of(p: Tensor) -> Tensor:
    """A copy in the arithmetic type, in the memory order of ``p`` (contiguous where ``p`` fills no block of memory)."""
    return like(p, local_of(p).detach().to(dtype=arithmetic_dtype(p.dtype), memory_format=state_layout(p), copy=True))


def zeros_like_all(params: list[Tensor]) -> list[Tensor]:
    """A zero moment for every parameter, small ones as views of shared buffers."""
    result: dict[int, Tensor] = {}
    buffers: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, p in enumerate(params):
        dtype = arithmetic_dtype(p.dtype)
        if not is_dtensor(p) and p.is_contiguous() and 0 < p.numel() <= _SMALL:
            buffers.setdefault((dtype, p.device), []).append(index)
        else:
            local = local_of(p)
            zeros = torch.zeros_like(local, dtype=dtype, memory_format=state_layout(p), requires_grad=False)
            result[index] = like(p, zeros)
    for (dtype, device), members in buffers.items():
        sizes = [-(-params[i].numel() // _ALIGN) * _ALIGN for i in members]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=device)
        offset = 0
        for index, size in zip(members, sizes, strict=True):
            p = params[index]
            result[index] = buffer[offset : offset + p.numel()].view(p.shape)
            offset += size
    return [result[index] for index in range(len(params))]
