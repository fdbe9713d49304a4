"""Inputs of ``python/watch.cpp``, by which a plan looks for changes before every step."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels._native import load
from aim_kernels.step.sharding import local_of
from aim_kernels.step.supported import DTYPE_NUMBER

# The reference backend works without the extension; its plans are then built anew for every step.
_C, _ = load("_C")


def watch_over(
    param_groups: list[dict[str, Any]],
    params: list[Tensor],
    idle: list[bool],
    strides: list[tuple[int, ...]],
    states: dict[Any, Any],
    known: dict[Tensor, dict[str, Tensor]],
) -> Any:
    """A watch over groups, parameters and states as they are now; None without the extension.

    Args:
        params: of all groups, in order. ``idle``: those that are only watched for a gradient.
        strides: of a gradient that can be read as it is, by parameter.
        known: those states, by parameter and name, that a step reads or writes. Others may change.
    """
    if _C is None:
        return None
    keys, names, values = [], [], []
    for owner, state in states.items():
        own = known.get(owner)
        keys.append(owner)
        names.append(None if own is None else list(state))
        values.append([] if own is None else [own.get(name) for name in state])
    module = sys.modules.get("torch.distributed.tensor")
    dtensor = None if module is None else module.DTensor
    means = (dtensor, _described, Tensor.is_neg, _quick())
    return _C.Watch(param_groups, list(param_groups), params, idle, strides, states, keys, names, values, *means)


#: What ``python/watch.cpp`` calls of torch's C interface, in its order.
_FUNCTIONS = (
    *(f"get_{name}" for name in "layout dtype dim sizes strides data_ptr storage_offset storage_size".split()),
    "dtype_element_size",
    "delete_tensor_object",
)


def _described(tensor: Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...], int, int]:
    """Address, type, shape and strides of what is here of a tensor; the bytes from there to the end of its storage, and
    those of an element."""
    local = local_of(tensor)
    size = local.element_size()
    bytes_in_all = 0 if local._is_zerotensor() else local.untyped_storage().nbytes()
    room = bytes_in_all - int(local.storage_offset()) * size
    return local.data_ptr(), _dtype_numbers()[local.dtype], tuple(local.shape), local.stride(), room, size


@functools.cache
def _library() -> Any:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


@functools.cache
def _dtype_numbers() -> dict[torch.dtype, int]:
    """Types as torch's C interface numbers them; any numbers if there is none."""
    names = {"float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool"}
    names |= {"complex64", "complex128"}
    numbers = {}
    for fallback, dtype in enumerate(v for v in vars(torch).values() if isinstance(v, torch.dtype)):
        numbers[dtype] = -1 - fallback
        name = str(dtype).removeprefix("torch.")
        if name in names:
            with contextlib.suppress(OSError, AttributeError):
                numbers[dtype] = int(getattr(_library(), f"aoti_torch_dtype_{name}")())
    return numbers


@functools.cache
def _quick() -> Any:
    """What lets the binding look at tensors without calling their methods, ``Watch``'s argument; None if this torch has
    it not, or answers in another way than its methods."""
    try:
        found = [getattr(_library(), f"aoti_torch_{name}") for name in _FUNCTIONS]
        keep = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor
        pointer = next(vars(base)["_cdata"] for base in Tensor.__mro__ if "_cdata" in vars(base))
    except (OSError, AttributeError, StopIteration):
        return None
    table = (ctypes.c_void_p * len(found))(*(ctypes.cast(function, ctypes.c_void_p) for function in found))
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    _KEPT.append(table)
    quick = (Tensor, pointer, keep, make(ctypes.addressof(table), _CAPSULE, None))
    return quick if _agrees(quick) else None


#: What a capsule points to, and its name, of which it keeps the very pointer.
_KEPT: list[Any] = []
_CAPSULE = b"aim.tensor_functions"


def _agrees(quick: Any) -> bool:
    """Whether quick looks see what the tensors' methods say."""
    samples = [torch.zeros(6, 4, dtype=dtype, device="cpu").t()[1:] for dtype in DTYPE_NUMBER]
    samples.append(torch.zeros((), dtype=torch.float32, device="cpu"))

    def wrong(_: Tensor) -> Any:
        raise AssertionError("looked at by its methods")

    keys = [object() for _ in samples]
    states = {key: {"value": value} for key, value in zip(keys, samples, strict=True)}
    names, values = [list(state) for state in states.values()], [list(state.values()) for state in states.values()]
    nothing: Any = (np.zeros(0, np.uint64), np.zeros(0, bool), [])
    try:
        nobody: Any = ([], [], [], [], [], states, keys, names, values, None)
        quickly = _C.Watch(*nobody, wrong, Tensor.is_neg, quick)
        slowly = _C.Watch(*nobody, _described, Tensor.is_neg, None)
    except AssertionError:
        return False
    return bool(quickly.sees(slowly) and quickly.read(*nothing))
