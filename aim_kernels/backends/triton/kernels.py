"""The kernels of a step: one program moves one chunk of a tensor, one program finishes one group.

Addresses come out of the tables as numbers, so a launch has few arguments however many parameters there are.

Compiled and interpreted on the CPU; not yet run on a GPU.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from aim_kernels.backends.triton.chunk import adopt_chunk, clear_chunk, emit_chunk, step_chunk
from aim_kernels.backends.triton.layout import (
    ADOPTS,
    ANCHOR,
    CHUNK_BEGIN,
    CHUNK_END,
    CHUNK_INDEX,
    CHUNK_TENSOR,
    CHUNK_WORDS,
    COUNT,
    COUNTER,
    DTYPE,
    EMA,
    EMITTED,
    EXP_AVG,
    EXP_AVG_SQ,
    EXTRA,
    GRAD,
    GROUP,
    GROUP_WORDS,
    MARKS,
    MASTER,
    MOMENT_STORAGE,
    NUMEL,
    PARAM,
    PHASE,
    PHASE_GRAD,
    PHASE_ROWS,
    PHASE_WORDS,
    RATE,
    REST,
    ROW_GRAD,
    ROW_WORDS,
    SEED,
    SPAN_WORDS,
    STATISTICS,
    STEP,
    TARGET,
    TAU,
    TAU_PREV,
    TENSOR_BEGIN,
    TENSOR_END,
    TENSOR_WORDS,
    THRESHOLD,
    UNDER,
    WEIGHT_STORAGE,
    ZERO_GRAD,
)
from aim_kernels.backends.triton.normals import draw_phase
from aim_kernels.backends.triton.uniforms import is_held, is_other, live_of

# Arguments whose alignment says nothing about the tensors': a kernel compiled for either serves both.
_TABLES = (
    *("tensors", "groups", "rows", "statistics", "control", "chunks", "spans", "partials", "phases"),
    *("sums", "others", "grad_scale", "found_inf"),
)


@triton.jit
def _needs_general_kernel(tensor):
    """Whether a tensor keeps something in fewer bytes, or asks for something beside the update."""
    small = tensor.to(tl.pointer_type(tl.int32))
    ways = tl.load(small + MOMENT_STORAGE) | tl.load(small + WEIGHT_STORAGE) | tl.load(small + ZERO_GRAD)
    return (ways != 0) | (tl.load(tensor + EMA) != 0)


@triton.jit
def _is_aligned(tensor, GENERAL: tl.constexpr):
    """Whether every address of a tensor allows 16-byte accesses."""
    bits = tl.load(tensor + PARAM) | tl.load(tensor + GRAD) | tl.load(tensor + MASTER) | tl.load(tensor + ANCHOR)
    bits = bits | tl.load(tensor + EXP_AVG) | tl.load(tensor + EXP_AVG_SQ) | tl.load(tensor + EXTRA)
    if GENERAL:
        bits = bits | tl.load(tensor + REST) | tl.load(tensor + EMA)
    return (bits & 15) == 0


@triton.jit
def _adopts(tensor, row):
    """Whether the master has to take over what was written to the parameter."""
    marked = (tl.load(tensor.to(tl.pointer_type(tl.int32)) + MARKS) & ADOPTS) != 0
    undegraded = (tl.load(row + EMITTED) == 1) & (tl.load(row + EMITTED + 1) == 1)
    return marked & undegraded & (tl.load(tensor + MASTER) != 0)


@triton.jit
def _clear_skipped(tensor, start, size, STORAGE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """What a step leaves of a chunk's gradients where it does nothing else."""
    address = tl.load(tensor + GRAD)
    if (address != 0) & (tl.load(tensor.to(tl.pointer_type(tl.int32)) + ZERO_GRAD) != 0):
        clear_chunk(address.to(tl.pointer_type(STORAGE)) + start, size, STORAGE, CHUNK, BLOCK, False)


@triton.jit
def _nothing_measured(partial):
    column = tl.arange(0, 8)
    tl.store(partial + column, tl.zeros((8,), tl.float64), mask=column < STATISTICS)


@triton.jit(do_not_specialize=("chunk_count",), do_not_specialize_on_alignment=_TABLES)
def update_kernel(
    tensors,
    groups,
    rows,
    statistics,
    control,
    chunks,
    partials,
    phases,
    grad_scale,
    found_inf,
    chunk_count,
    NUMBER: tl.constexpr,
    STORAGE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHER: tl.constexpr,
    GENERAL: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Steps 0 to 6 for one chunk of the tensors whose storage type is NUMBER, whose rule is of the family "other"
    (OTHER) or not, and that keep something in fewer bytes, with moments stored as MOMENTS, or ask for something beside
    the update (GENERAL), or neither. ``phases`` gets this step's phase and the one drawn."""
    if not GENERAL and found_inf is not None and tl.load(found_inf) != 0:
        return
    program = tl.program_id(0).to(tl.int64)
    next_phase = draw_phase(
        tl.load(control + SEED), tl.load(control + COUNTER).to(tl.uint32), tl.load(control + THRESHOLD)
    )
    if program == 0:
        tl.store(phases, tl.load(control + PHASE))
        tl.store(phases + 1, next_phase)
    if program >= chunk_count:
        return
    chunk = chunks + program * CHUNK_WORDS
    tensor = tensors + tl.load(chunk + CHUNK_TENSOR).to(tl.int64) * TENSOR_WORDS
    small = tensor.to(tl.pointer_type(tl.int32))
    if tl.load(small + DTYPE) != NUMBER:
        return
    number = tl.load(small + GROUP).to(tl.int64)
    group = groups + number * GROUP_WORDS
    if is_other(group) != OTHER:
        return
    if (_needs_general_kernel(tensor) != GENERAL) | (tl.load(small + MOMENT_STORAGE) != MOMENTS):
        return
    row = rows + number * ROW_WORDS
    partial = partials + program * STATISTICS
    start = tl.load(chunk + CHUNK_INDEX).to(tl.int64) * CHUNK
    size = tl.minimum(tl.load(tensor + NUMEL) - start, CHUNK).to(tl.int32)
    if GENERAL and found_inf is not None and tl.load(found_inf) != 0:
        _clear_skipped(tensor, start, size, STORAGE, CHUNK, BLOCK)
        return
    if _adopts(tensor, row):
        adopt_chunk(tensor, start, size, STORAGE, ARITHMETIC, BLOCK)
    if tl.load(tensor + GRAD) != 0:
        now = tl.load(control + PHASE) & 1
        line = statistics + number * STATISTICS
        if (size == CHUNK) & _is_aligned(tensor, GENERAL):
            step_chunk(
                tensor,
                group,
                row,
                line,
                control,
                grad_scale,
                partial,
                now,
                next_phase,
                start,
                size,
                STORAGE,
                ARITHMETIC,
                CHUNK,
                BLOCK,
                True,
                OTHER,
                GENERAL,
                MOMENTS,
            )
        else:
            step_chunk(
                tensor,
                group,
                row,
                line,
                control,
                grad_scale,
                partial,
                now,
                next_phase,
                start,
                size,
                STORAGE,
                ARITHMETIC,
                CHUNK,
                BLOCK,
                False,
                OTHER,
                GENERAL,
                MOMENTS,
            )
    else:
        _nothing_measured(partial)
        if tl.load(tensor + MASTER) != 0:
            live_under, live_well = live_of(row, next_phase)
            tau = tl.load(row + TAU)
            emit_chunk(tensor, group, tau, live_under, live_well, start, size, STORAGE, ARITHMETIC, BLOCK, MOMENTS)


@triton.jit(do_not_specialize_on_alignment=_TABLES)
def emit_kernel(
    tensors,
    groups,
    rows,
    chunks,
    NUMBER: tl.constexpr,
    STORAGE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """The live weights that were there before: ``tau_prev`` and the emitted columns."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_WORDS
    tensor = tensors + tl.load(chunk + CHUNK_TENSOR).to(tl.int64) * TENSOR_WORDS
    small = tensor.to(tl.pointer_type(tl.int32))
    if (tl.load(small + DTYPE) != NUMBER) | (tl.load(small + MOMENT_STORAGE) != MOMENTS):
        return
    if tl.load(tensor + MASTER) == 0:
        return
    number = tl.load(small + GROUP).to(tl.int64)
    row = rows + number * ROW_WORDS
    start = tl.load(chunk + CHUNK_INDEX).to(tl.int64) * CHUNK
    size = tl.minimum(tl.load(tensor + NUMEL) - start, CHUNK).to(tl.int32)
    emit_chunk(
        tensor,
        groups + number * GROUP_WORDS,
        tl.load(row + TAU_PREV),
        tl.load(row + EMITTED),
        tl.load(row + EMITTED + 1),
        start,
        size,
        STORAGE,
        ARITHMETIC,
        BLOCK,
        MOMENTS,
    )


@triton.jit
def _column(total, column, COLUMN: tl.constexpr):
    return tl.sum(tl.where(column == COLUMN, total, 0.0), 0)


@triton.jit
def _finish_row(group, row, numel, under, held, following):
    """``finish_row`` of ``csrc/common/shared.h``: the threshold moves, unless the block was held, the columns of the
    emitted phase are latched."""
    g = group.to(tl.pointer_type(tl.float64))
    tau = tl.load(row + TAU)
    rate = tl.load(g + RATE)
    some = numel > 0
    moved = tau + rate * (under / tl.where(some, numel, 1.0) - tl.load(g + TARGET))
    moved = tl.where(moved < 0, 0.0, tl.where(moved > 1, 1.0, moved))
    moves = some & (rate != 0) & (under == under) & (held == 0)
    phase = row + PHASE_ROWS + following * PHASE_WORDS
    grad_under = tl.load(phase + PHASE_GRAD)
    grad_well = tl.load(phase + PHASE_GRAD + 1)
    live_under, live_well = live_of(row, following)
    tl.store(row + TAU_PREV, tau)
    tl.store(row + TAU, tl.where(moves, moved, tau))
    tl.store(row + ROW_GRAD, grad_under)
    tl.store(row + ROW_GRAD + 1, grad_well)
    tl.store(row + EMITTED, live_under)
    tl.store(row + EMITTED + 1, live_well)


@triton.jit(do_not_specialize=("others_count",), do_not_specialize_on_alignment=_TABLES)
def finish_kernel(
    tensors,
    groups,
    rows,
    statistics,
    control,
    spans,
    partials,
    phases,
    sums,
    others,
    found_inf,
    others_count,
    BLOCK: tl.constexpr,
):
    """Step 7 for one group. Without ``sums`` this is the primary device.

    Programs run in any order, so none of them reads control, which the first one moves: the phase was drawn by
    ``update_kernel`` and left in ``phases``, behind this step's. Nor do two of them write the same row or step count.
    """
    if found_inf is not None and tl.load(found_inf) != 0:
        return
    number = tl.program_id(0).to(tl.int64)
    span = spans + number * SPAN_WORDS
    row = rows + number * ROW_WORDS
    held = is_held(row, tl.load(phases))
    last = tl.load(span + TENSOR_END)
    begin = tl.load(span + TENSOR_BEGIN)
    while begin < last:
        index = begin + tl.arange(0, BLOCK)
        tensor = tensors + index * TENSOR_WORDS
        stepped = (tl.load(tensor + GRAD, mask=index < last, other=0) != 0) & (held == 0)
        steps = tl.load(tensor + STEP, mask=stepped, other=0).to(tl.pointer_type(tl.float32))
        tl.store(steps, tl.load(steps, mask=stepped, other=0) + 1, mask=stepped)
        begin += BLOCK

    column = tl.arange(0, 8)
    known = column < STATISTICS
    last = tl.load(span + CHUNK_END)
    # Chunk i into lane i % BLOCK, then over the lanes: an order that does not depend on when programs ran.
    lanes = tl.zeros((BLOCK, 8), tl.float64)
    begin = tl.load(span + CHUNK_BEGIN)
    while begin < last:
        index = begin + tl.arange(0, BLOCK)
        at = partials + index[:, None] * STATISTICS + column[None, :]
        lanes += tl.load(at, mask=(index < last)[:, None] & known[None, :], other=0)
        begin += BLOCK
    total = tl.sum(lanes, 0)
    line = number * STATISTICS + column
    if sums is not None:
        tl.store(sums + line, total, mask=known)
    else:
        if others is not None:
            stride = tl.num_programs(0).to(tl.int64) * STATISTICS
            other = stride - stride
            while other < others_count * stride:
                total += tl.load(others + other + line, mask=known, other=0)
                other += stride
        numel = _column(total, column, COUNT)
        next_phase = tl.load(phases + 1)
        _finish_row(groups + number * GROUP_WORDS, row, numel, _column(total, column, UNDER), held, next_phase)
        if numel > 0:
            tl.store(statistics + line, total, mask=known)
        if number == 0:
            tl.store(control + PHASE, next_phase)
            tl.store(control + COUNTER, tl.load(control + COUNTER) + 1)
