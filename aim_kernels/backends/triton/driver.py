"""A share (``launch.Share``) as launches of the kernels: one for each kind of tensor among its parameters, by storage
type, by rule (of the family "other", or Adam and SGD), and by what is kept in fewer bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray

from aim_kernels.backends.device import are_packed, rule_families
from aim_kernels.backends.triton.kernels import emit_kernel, finish_kernel, update_kernel
from aim_kernels.step.layout import DTYPES, FAMILIES, MOMENTS

if TYPE_CHECKING:
    from aim_kernels.backends.device import Share

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
PACKED_ELEMENTS = 512

#: Registers a thread of ``update_kernel`` on CUDA: what holds its values without spilling. Left alone, the assembler
#: takes half as many again, and fewer programs fit on a multiprocessor.
OTHER_REGISTERS = {"float32": 168, "float64": 255, "bfloat16": 200, "float16": 200}
REGISTERS = {"float32": 128, "float64": 168, "bfloat16": 168, "float16": 168}
PACKED_REGISTERS = dict.fromkeys(DTYPES, 168)
PACKED_OTHER_REGISTERS = dict.fromkeys(DTYPES, 200) | {"float64": 255}

#: Groups have few chunks or very many; lanes that find nothing cost little.
FINISH_BLOCK = 128


def options(block: int, registers: int | None = None) -> dict[str, Any]:
    """How to compile a kernel over blocks of so many elements, with at most so many registers a thread.

    Multiplications and additions stay apart, as on the CPU. A thread has four elements or more: were blocks smaller
    than the threads, some would hold an element twice and read it after their twin has written it.
    """
    limit = {} if registers is None else {"maxnreg": registers}
    return {"num_warps": max(1, min(4, block // 128)), "num_stages": 1, "enable_fp_fusion": False} | limit


def specialization(dtype: int, chunk: int, packed: bool = False) -> dict[str, Any]:
    """The constants of a kernel over tensors of storage type ``dtype`` (numbered as in ``rows.DTYPES``)."""
    name = DTYPES[dtype]
    storage, arithmetic = TYPES[name]
    # A power of two that divides the chunk.
    block = min(BLOCKS[name], chunk & -chunk, *([PACKED_ELEMENTS] if packed else []))
    return {"NUMBER": dtype, "STORAGE": storage, "ARITHMETIC": arithmetic, "CHUNK": chunk, "BLOCK": block}


def registers_of(dtype: int, other: bool, packed: bool) -> int:
    """Registers a thread of ``update_kernel`` on CUDA."""
    plain, less = (OTHER_REGISTERS, PACKED_OTHER_REGISTERS) if other else (REGISTERS, PACKED_REGISTERS)
    return (less if packed else plain)[DTYPES[dtype]]


def limits_registers(device: torch.device) -> bool:
    """Whether the compiler for a device takes a limit of registers: NVIDIA's does."""
    return device.type == "cuda" and torch.version.hip is None


class Variant(NamedTuple):
    """Tensors that one kernel steps.

    Attributes:
        dtype: of storage, as numbered in ``rows.DTYPES``.
        other: whether the rule is of the family "other".
        packed: whether something is kept in fewer bytes, or asked for beside the update.
        moments: how they are stored, as numbered in ``rows.MOMENTS``.
    """

    dtype: int
    other: bool
    packed: bool
    moments: int


#: How many there are of each.
_COUNTS = (len(DTYPES), 2, 2, len(MOMENTS))


def variants_of(tensors: NDArray[np.void], groups: NDArray[np.void]) -> list[Variant]:
    """What there is among some tensor records."""
    other = rule_families(groups) == FAMILIES.index("other")
    kinds = (tensors["dtype"], other[tensors["group"]].astype(np.int64), are_packed(tensors).astype(np.int64))
    found = np.unique(np.ravel_multi_index((*kinds, tensors["moments"]), _COUNTS))
    columns = zip(*(column.tolist() for column in np.unravel_index(found, _COUNTS)), strict=True)
    return [Variant(dtype, bool(other), bool(packed), moments) for dtype, other, packed, moments in columns]


def _variants(share: Share) -> list[Variant]:
    """Those of a share, which it holds until something moves."""
    if share.call is None:
        share.call = variants_of(share.plan.records[share.indices], share.plan.groups)
    variants: list[Variant] = share.call
    return variants


def update(share: Share) -> None:
    """Steps every tensor that has a gradient, emits those that have only a master, and fills ``share.partials``."""
    limited = limits_registers(share.device)
    # Without parameters, the phase is drawn all the same.
    for dtype, other, packed, moments in _variants(share) or [Variant(0, False, False, 0)]:
        constants = specialization(dtype, share.chunk_size, packed)
        registers = registers_of(dtype, other, packed) if limited else None
        # One program where all tensors are empty: the phase is drawn all the same.
        update_kernel[(max(1, len(share.chunks)),)](
            share.tensors,
            share.groups,
            share.rows,
            share.statistics,
            share.control,
            share.chunks,
            share.partials,
            share.phases,
            share.grad_scale,
            share.found_inf,
            len(share.chunks),
            OTHER=other,
            PACKED=packed,
            MOMENTS=moments,
            **constants,
            **options(constants["BLOCK"], registers),
        )


def finish(share: Share) -> None:
    """Adds up what the chunks measured; moves step counts and, at home, thresholds, latched columns and the phase."""
    finish_kernel[(len(share.groups),)](
        share.tensors,
        share.groups,
        share.rows,
        share.statistics,
        share.control,
        share.spans,
        share.partials,
        share.phases,
        share.sums,
        share.others,
        share.found_inf,
        0 if share.others is None else len(share.others),
        BLOCK=FINISH_BLOCK,
        **options(512),
    )


def emit(share: Share) -> None:
    """Writes the live weights of all tensors that have a master."""
    kinds = {(variant.dtype, variant.moments) for variant in _variants(share)}
    for dtype, moments in sorted(kinds) if len(share.chunks) else ():
        constants = specialization(dtype, share.chunk_size, moments != 0)
        emit_kernel[(len(share.chunks),)](
            share.tensors,
            share.groups,
            share.rows,
            share.chunks,
            MOMENTS=moments,
            **constants,
            **options(constants["BLOCK"]),
        )
