"""Support for parameters: which ones a step can update, and why not the others."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from aim_kernels.step.layout import DTYPES
from aim_kernels.step.sharding import is_dtensor, local_of

DTYPE_NUMBER = {getattr(torch, name): number for number, name in enumerate(DTYPES)}


def is_asleep(p: Tensor) -> bool:
    """Whether nothing is asked of a parameter now: it is frozen, or has no shape yet, and has no gradient."""
    return (not p.requires_grad or is_lazy(p)) and p.grad is None


def is_estimated(tensor: Any) -> bool:
    """Whether this is a FakeTensor: a shape without numbers, of those who estimate memory."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def has_memory(tensor: Tensor) -> bool:
    """Whether there are numbers where the tensor says: False for wrappers of other tensors, and where the storage was
    freed or cut."""
    local = local_of(tensor)
    if local.numel() == 0 or local._is_zerotensor():
        return True
    try:
        extent = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True)) + 1
        needed = (local.storage_offset() + extent) * local.element_size()
        return local.data_ptr() != 0 and local.untyped_storage().nbytes() >= needed
    except RuntimeError:
        return False


def reason_against(p: Tensor) -> str:
    """Why no step can update a parameter, as the end of a sentence that begins with its name; empty if one can."""
    if is_lazy(p):
        return "has no shape yet; run a forward pass before the first step"
    if p.is_nested:
        return "nested tensors are not supported; use a padded one"
    if p.layout != torch.strided:
        return "sparse parameters are not supported; pass torch.nn.Parameter(parameter.detach().to_dense())"
    if p.is_complex():
        return (
            "complex parameters are not supported; make torch.view_as_real(parameter).detach() the nn.Parameter, and "
            "take torch.view_as_complex of it in forward"
        )
    if p.dtype not in DTYPE_NUMBER:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NUMBER)
        return f"{p.dtype} is not supported; use one of {names}"
    if p.device.type == "meta":
        return "is on the meta device; give it memory first (module.to_empty)"
    # Empty tensors share nothing, whatever their strides (channels_last has zeros there).
    if p.numel() and any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
        return (
            "is expanded (several elements share memory); pass torch.nn.Parameter(parameter.detach().clone()), which "
            "has memory for each"
        )
    if not is_estimated(p) and not has_memory(p):
        if type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_dtensor(p):
            return (
                f"is a {type(p).__name__}, a tensor made of others, which only its own operations reach; freeze it, "
                "optimize the plain tensors in it, or use torch.optim for it"
            )
        return "has no memory (its storage was freed); give it back before the step"
    return ""


def is_idle(p: Tensor, primary: torch.device) -> bool:
    """Whether a step passes a parameter by: it is asleep, and could not be updated beside parameters on ``primary``."""
    return is_asleep(p) and (bool(reason_against(p)) or not is_beside(p, primary))


def is_beside(p: Tensor, primary: torch.device) -> bool:
    """Whether one step can reach both a parameter and ``primary``: devices of one type, and the same one if a CPU."""
    return p.device.type == primary.type and (p.device == primary or primary.type != "cpu")


def primary_device(params: Iterable[Tensor]) -> torch.device | None:
    """The device of an optimizer's tables: of the first parameter that is to be stepped, else of the first that could
    be; None if there is none."""
    possible = None
    for p in params:
        if is_lazy(p) or not reason_against(p):
            if not is_asleep(p) or is_lazy(p):
                return p.device
            possible = possible or p.device
    return possible


def numel_of(p: Tensor) -> int:
    """Number of elements; 0 for a parameter without a shape."""
    return 0 if is_lazy(p) else p.numel()
