"""A shard (``device.DeviceShard``) as launches of the kernels: one for each variant among its parameters, by storage
type, by rule (of the family "other", or Adam and SGD), and by what is kept in fewer bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray

from aim_kernels.backends.device import needs_general_kernel, rule_families
from aim_kernels.backends.triton.kernels import emit_kernel, finish_kernel, update_kernel
from aim_kernels.step.layout import DTYPES, FAMILIES, MOMENTS

if TYPE_CHECKING:
    from aim_kernels.backends.device import DeviceShard

#: Storage and arithmetic type. bfloat16 travels as its bits: the kernels round it themselves.
TYPES = {
    "float32": (tl.float32, tl.float32),
    "float64": (tl.float64, tl.float64),
    "bfloat16": (tl.int16, tl.float32),
    "float16": (tl.float16, tl.float32),
}

#: Elements that a program holds in registers at a time: with 128 threads, 16 bytes of storage a thread and array.
BLOCKS = {"float32": 512, "float64": 512, "bfloat16": 1024, "float16": 1024}

#: The same where something is kept in fewer bytes: four elements a thread (``packing.VECTOR``).
GENERAL_ELEMENTS = 512

#: Registers a thread of ``update_kernel`` on CUDA: what holds its values without spilling. Left alone, the assembler
#: takes half as many again, and fewer programs fit on a multiprocessor.
OTHER_REGISTERS = {"float32": 168, "float64": 255, "bfloat16": 200, "float16": 200}
REGISTERS = {"float32": 128, "float64": 168, "bfloat16": 168, "float16": 168}
GENERAL_REGISTERS = dict.fromkeys(DTYPES, 168)
GENERAL_OTHER_REGISTERS = dict.fromkeys(DTYPES, 200) | {"float64": 255}

#: Groups have few chunks or very many; lanes that find nothing cost little.
FINISH_BLOCK = 128


def options(block: int, registers: int | None = None) -> dict[str, Any]:
    """How to compile a kernel over blocks of so many elements, with at most so many registers a thread.

    Multiplications and additions stay apart, as on the CPU. A thread has four elements or more: were blocks smaller
    than the threads, some would hold an element twice and read it after their twin has written it.
    """
    limit = {} if registers is None else {"maxnreg": registers}
    return {"num_warps": max(1, min(4, block // 128)), "num_stages": 1, "enable_fp_fusion": False} | limit


def specialization(dtype: int, chunk: int, general: bool = False) -> dict[str, Any]:
    """The constants of a kernel over tensors of storage type ``dtype`` (numbered as in ``layout.DTYPES``)."""
    name = DTYPES[dtype]
    storage, arithmetic = TYPES[name]
    # A power of two that divides the chunk.
    block = min(BLOCKS[name], chunk & -chunk, *([GENERAL_ELEMENTS] if general else []))
    return {"NUMBER": dtype, "STORAGE": storage, "ARITHMETIC": arithmetic, "CHUNK": chunk, "BLOCK": block}


def registers_of(dtype: int, other: bool, general: bool) -> int:
    """Registers a thread of ``update_kernel`` on CUDA."""
    plain, rest = (OTHER_REGISTERS, GENERAL_OTHER_REGISTERS) if other else (REGISTERS, GENERAL_REGISTERS)
    return (rest if general else plain)[DTYPES[dtype]]


def limits_registers(device: torch.device) -> bool:
    """Whether the compiler for a device takes a limit of registers: NVIDIA's does."""
    return device.type == "cuda" and torch.version.hip is None


class Variant(NamedTuple):
    """Tensors that one kernel steps.

    Attributes:
        dtype: of storage, as numbered in ``layout.DTYPES``.
        other: whether the rule is of the family "other".
        general: whether something is kept in fewer bytes, or asked for beside the update.
        moments: how they are stored, as numbered in ``layout.MOMENTS``.
    """

    dtype: int
    other: bool
    general: bool
    moments: int


#: How many there are of each.
_COUNTS = (len(DTYPES), 2, 2, len(MOMENTS))


def variants_of(tensors: NDArray[np.void], groups: NDArray[np.void]) -> list[Variant]:
    """What there is among some tensor records."""
    other = rule_families(groups) == FAMILIES.index("other")
    of_the_rule = other[tensors["group"]].astype(np.int64)
    fields = (tensors["dtype"], of_the_rule, needs_general_kernel(tensors).astype(np.int64), tensors["moments"])
    found = np.unique(np.ravel_multi_index(fields, _COUNTS))
    columns = zip(*(column.tolist() for column in np.unravel_index(found, _COUNTS)), strict=True)
    return [Variant(dtype, bool(other), bool(general), moments) for dtype, other, general, moments in columns]


def _variants(shard: DeviceShard) -> list[Variant]:
    """The variants of a shard, kept in ``shard.call`` until something moves."""
    if shard.call is None:
        shard.call = variants_of(shard.plan.records[shard.indices], shard.plan.groups)
    variants: list[Variant] = shard.call
    return variants


def update(shard: DeviceShard) -> None:
    """Steps every tensor that has a gradient, emits those that have only a master, and fills ``shard.chunk_sums``."""
    limited = limits_registers(shard.device)
    # Without parameters, the phase is drawn all the same.
    for dtype, other, general, moments in _variants(shard) or [Variant(0, False, False, 0)]:
        constants = specialization(dtype, shard.chunk_size, general)
        registers = registers_of(dtype, other, general) if limited else None
        # One program where all tensors are empty: the phase is drawn all the same.
        update_kernel[(max(1, len(shard.chunks)),)](
            shard.tensors,
            shard.groups,
            shard.rows,
            shard.statistics,
            shard.control,
            shard.chunks,
            shard.chunk_sums,
            shard.phases,
            shard.grad_scale,
            shard.found_inf,
            len(shard.chunks),
            OTHER=other,
            GENERAL=general,
            MOMENTS=moments,
            **constants,
            **options(constants["BLOCK"], registers),
        )


def finish(shard: DeviceShard) -> None:
    """Adds up what the chunks measured; moves step counts and, on the primary,
    thresholds, latched columns and the phase."""
    finish_kernel[(len(shard.groups),)](
        shard.tensors,
        shard.groups,
        shard.rows,
        shard.statistics,
        shard.control,
        shard.spans,
        shard.chunk_sums,
        shard.phases,
        shard.sums,
        shard.peer_sums,
        shard.found_inf,
        0 if shard.peer_sums is None else len(shard.peer_sums),
        BLOCK=FINISH_BLOCK,
        **options(512),
    )


def emit(shard: DeviceShard) -> None:
    """Writes the live weights of all tensors that have a master."""
    stored = {(variant.dtype, variant.moments) for variant in _variants(shard)}
    for dtype, moments in sorted(stored) if len(shard.chunks) else ():
        constants = specialization(dtype, shard.chunk_size, moments != 0)
        emit_kernel[(len(shard.chunks),)](
            shard.tensors,
            shard.groups,
            shard.rows,
            shard.chunks,
            MOMENTS=moments,
            **constants,
            **options(constants["BLOCK"]),
        )
