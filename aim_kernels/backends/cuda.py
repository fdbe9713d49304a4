"""The compiled CUDA kernels (csrc/cuda). Compiled and checked on machines without a GPU; not yet run on one."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels._native import load
from aim_kernels.backends import device, pieces
from aim_kernels.step.layout import WORK_RECORD

if TYPE_CHECKING:
    from aim_kernels.backends.device import DeviceShard
    from aim_kernels.step.inputs import StepInputs
    from aim_kernels.step.plan import StepPlan

_cuda, _REASON = load("_cuda")

ON_DEVICE, ZEROES, DEVICE, DESCRIPTION = True, True, "cuda", "compiled kernels"

#: Elements of a block's chunk and threads of a block. Two such blocks fit on a multiprocessor, with 64 KiB of loads
#: under way: more than its share of memory needs to be kept busy. Before its first element a block computes what all
#: share, for one or two microseconds; a chunk takes twenty times as long. Reasoned, not yet measured.
CHUNK, THREADS = 16384, 256


@functools.cache
def _not_built() -> str:
    """Why there are no kernels in this installation; empty if there are."""
    if _cuda is not None:
        return ""
    core, _ = load("_C")
    reason = "" if core is None else str(core.build_info().get("cuda", ""))
    if reason in ("", "built"):
        reason = f"aim_kernels._cuda does not load: {_REASON}"
    return f"{reason}; with nvcc on the PATH, AIM_KERNELS_CUDA=1 pip install . builds it"


def unavailable() -> str:
    """Why this backend cannot run; empty if it can."""
    if reason := _not_built():
        return reason
    if not torch.backends.cuda.is_built():
        return "this build of PyTorch has no CUDA; install one that has"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device; look at nvidia-smi and at the driver's version"
    return ""


def runs_on(device: torch.device) -> bool:
    """Whether tensors on ``device`` are this backend's."""
    return device.type == "cuda" and torch.version.hip is None


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
    """``device.Kernels``: one call into the extension each."""

    CHUNK = CHUNK

    def update(self, shard: DeviceShard) -> None:
        _cuda.update(*_arguments(shard))

    def finish(self, shard: DeviceShard) -> None:
        _cuda.finish(*_arguments(shard))

    def emit(self, shard: DeviceShard) -> None:
        _cuda.emit(*_arguments(shard))


_SELF = _Kernels()


def _arguments(shard: DeviceShard) -> tuple[np.ndarray[Any, Any], int, int]:
    """A shard as ``aim::cuda::Work``, its device and the stream that the caller is on."""
    if shard.call is None:
        shard.call = _work_of(shard)
    return shard.call, shard.device.index or 0, _stream(shard.device)


#: Fields of ``aim::cuda::Work`` that have another name in a :class:`DeviceShard`.
_ATTRIBUTES = {"partials": "chunk_sums", "others": "peer_sums"}


def _work_of(shard: DeviceShard) -> np.ndarray[Any, Any]:
    work = np.zeros(1, WORK_RECORD)
    for name in WORK_RECORD.names or ():
        value = getattr(shard, _ATTRIBUTES.get(name, name), None)
        if isinstance(value, torch.Tensor):
            work[name] = value.data_ptr()
    work["chunk_count"], work["group_count"] = len(shard.chunks), len(shard.groups)
    work["others_count"] = 0 if shard.peer_sums is None else len(shard.peer_sums)
    work["chunk_size"], work["threads"] = shard.chunk_size, THREADS
    work["dtypes"] = sum(1 << dtype for dtype in shard.dtypes)
    work["families"] = sum(1 << family for family in shard.families)
    return work


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
