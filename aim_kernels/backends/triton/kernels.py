"""The kernels of a step: one program moves one chunk of a tensor, one program finishes one group.

The arithmetic of an element is that of ``csrc/common/element.h``, in its order. Addresses come out of the tables as
numbers, so a launch has few arguments however many parameters there are. The kinds of update differ by scalars that the
whole program shares: what a kind does not keep is masked out of its loads and stores, which costs no memory traffic.

Compiled and interpreted on the CPU; not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from aim_kernels.backends.triton.layout import (
    ANCHOR,
    CHUNK_BEGIN,
    CHUNK_END,
    CHUNK_INDEX,
    CHUNK_TENSOR,
    CHUNK_WORDS,
    COUNT,
    COUNTER,
    DTYPE,
    EMITTED,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST,
    GRAD,
    GRAD_SQ,
    GRAD_SUM,
    GROUP,
    GROUP_WORDS,
    MASTER,
    NESTEROV,
    NONFINITE,
    NUMEL,
    PARAM,
    PARAM_SQ,
    PHASE,
    PHASE_GRAD,
    PHASE_ROWS,
    PHASE_WORDS,
    RATE,
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
    UPDATE_SQ,
)
from aim_kernels.backends.triton.normals import draw_phase, normals
from aim_kernels.backends.triton.uniforms import boundary, kind_of, live_of, uniforms

NAN = tl.constexpr(float("nan"))

# Arguments whose alignment says nothing about the tensors': a kernel compiled for either serves both.
_TABLES = ("tensors", "groups", "rows", "statistics", "control", "chunks", "spans", "partials", "following", "sums")
_TABLES = (*_TABLES, "others", "grad_scale", "found_inf")


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to elements of TYPE; ALIGNED promises 16 bytes, which is what makes accesses that wide."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _widen(x, ARITHMETIC: tl.constexpr):
    """int16 stands for bfloat16, as its bits."""
    if x.dtype == tl.int16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(ARITHMETIC)


@triton.jit
def _narrow(x, STORAGE: tl.constexpr):
    """Round to nearest even; bfloat16 as ``csrc/common/convert.h`` does it, NaN included."""
    if STORAGE == tl.int16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(x != x, bits | 0x400000, rounded) >> 16).to(tl.int16)
    else:
        return x.to(STORAGE)


@triton.jit
def _live_weight(theta, anchor, c):
    return tl.where(c == 1, theta, anchor + (theta - anchor) * c)


@triton.jit
def _is_aligned(tensor):
    """Whether every address of a tensor allows 16-byte accesses."""
    bits = tl.load(tensor + PARAM) | tl.load(tensor + GRAD) | tl.load(tensor + MASTER) | tl.load(tensor + ANCHOR)
    bits = bits | tl.load(tensor + EXP_AVG) | tl.load(tensor + EXP_AVG_SQ)
    return (bits & 15) == 0


@triton.jit
def _emit_chunk(
    tensor,
    group,
    tau,
    live_under,
    live_well,
    start,
    size,
    STORAGE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Live weights of the elements [start, start + size), from stored state."""
    _adam, momentum, first, second = kind_of(group, tl.load(tensor + EXP_AVG_SQ))
    taken = tl.load(tl.load(tensor + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)
    slope, offset = boundary(group, momentum, second, taken, tau)
    slope = slope.to(ARITHMETIC)
    offset = offset.to(ARITHMETIC)
    live_under = live_under.to(ARITHMETIC)
    live_well = live_well.to(ARITHMETIC)
    anchored = tl.load(tensor + ANCHOR) != 0
    master = _pointer(tl.load(tensor + MASTER), ARITHMETIC, False) + start
    moment = _pointer(tl.load(tensor + EXP_AVG), ARITHMETIC, False) + start
    square = _pointer(tl.load(tensor + EXP_AVG_SQ), ARITHMETIC, False) + start
    anchors = _pointer(tl.load(tensor + ANCHOR), ARITHMETIC, False) + start
    param = _pointer(tl.load(tensor + PARAM), STORAGE, False) + start
    begin = size - size
    while begin < size:
        at = begin + tl.arange(0, BLOCK)
        inside = at < size
        theta = tl.load(master + at, mask=inside, other=0)
        m = tl.load(moment + at, mask=inside & first, other=0)
        v = tl.load(square + at, mask=inside & second, other=0)
        anchor = tl.load(anchors + at, mask=inside & anchored, other=0)
        under = (m * m >= v * slope + offset) | (second == 0)
        live = _live_weight(theta, anchor, tl.where(under, live_under, live_well))
        tl.store(param + at, _narrow(live, STORAGE), mask=inside)
        begin += BLOCK


@triton.jit
def _squares(gradient, scale, size, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares in float64: for gradients whose squares leave float32's range."""
    total = tl.zeros((BLOCK,), tl.float64)
    begin = size - size
    while begin < size:
        at = begin + tl.arange(0, BLOCK)
        g = (_widen(tl.load(gradient + at, mask=at < size, other=0), ARITHMETIC) * scale).to(tl.float64)
        total += g * g
        begin += BLOCK
    return tl.sum(total, 0)


@triton.jit
def _step_chunk(
    tensor,
    group,
    row,
    statistics,
    control,
    grad_scale,
    partial,
    now,
    following,
    start,
    size,
    STORAGE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Steps the elements [start, start + size) and writes what was measured. FULL promises size == CHUNK and aligned
    addresses."""
    adam, momentum, first, second = kind_of(group, tl.load(tensor + EXP_AVG_SQ))
    nesterov = (tl.load(group.to(tl.pointer_type(tl.int32)) + NESTEROV) != 0) & momentum
    by_moment = adam | momentum
    live = tl.load(tensor + MASTER) != 0
    anchored = live & (tl.load(tensor + ANCHOR) != 0)
    taken = tl.load(tl.load(tensor + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)
    gradient, moments, boundaries, update = uniforms(
        group, row, statistics, now, following, grad_scale, adam, momentum, second, taken
    )
    scale, coupled_decay, grad_under, grad_well, sigma = gradient
    coupled = coupled_decay != 0
    routed = (grad_under != 1) | (grad_well != 1)
    noisy = sigma != 0
    scale = scale.to(ARITHMETIC)
    coupled_decay = coupled_decay.to(ARITHMETIC)
    grad_under = grad_under.to(ARITHMETIC)
    grad_well = grad_well.to(ARITHMETIC)
    sigma = sigma.to(ARITHMETIC)
    first_keep, first_add, second_keep, second_add = moments
    first_keep = first_keep.to(ARITHMETIC)
    first_add = first_add.to(ARITHMETIC)
    second_keep = second_keep.to(ARITHMETIC)
    second_add = second_add.to(ARITHMETIC)
    old_slope, old_offset, new_slope, new_offset = boundaries
    old_slope = old_slope.to(ARITHMETIC)
    old_offset = old_offset.to(ARITHMETIC)
    new_slope = new_slope.to(ARITHMETIC)
    new_offset = new_offset.to(ARITHMETIC)
    eps, mu, decay, step_under, step_well = update
    eps = eps.to(ARITHMETIC)
    mu = mu.to(ARITHMETIC)
    decay = decay.to(ARITHMETIC)
    step_under = step_under.to(ARITHMETIC)
    step_well = step_well.to(ARITHMETIC)
    live_under, live_well = live_of(row, following)
    live_under = live_under.to(ARITHMETIC)
    live_well = live_well.to(ARITHMETIC)
    seed = tl.load(control + SEED)
    counter = tl.load(control + COUNTER).to(tl.uint32)
    index = tl.load(tensor + FIRST) + start

    param = _pointer(tl.load(tensor + PARAM), STORAGE, FULL) + start
    grads = _pointer(tl.load(tensor + GRAD), STORAGE, FULL) + start
    moment = _pointer(tl.load(tensor + EXP_AVG), ARITHMETIC, FULL) + start
    square = _pointer(tl.load(tensor + EXP_AVG_SQ), ARITHMETIC, FULL) + start
    master = _pointer(tl.load(tensor + MASTER), ARITHMETIC, FULL) + start
    anchors = _pointer(tl.load(tensor + ANCHOR), ARITHMETIC, FULL) + start

    # Element i of every block into lane i: at most CHUNK / BLOCK additions before float64 takes over.
    grad_sum = tl.zeros((BLOCK,), ARITHMETIC)
    grad_sq = tl.zeros((BLOCK,), ARITHMETIC)
    update_sq = tl.zeros((BLOCK,), ARITHMETIC)
    param_sq = tl.zeros((BLOCK,), ARITHMETIC)
    # Two counts in one register: under-optimized in the lower half, not finite in the upper.
    tl.static_assert(CHUNK // BLOCK < 32768)
    counts = tl.zeros((BLOCK,), tl.int32)
    begin = size - size
    while begin < (CHUNK if FULL else size):
        at = begin + tl.arange(0, BLOCK)
        if FULL:
            inside = tl.full((BLOCK,), True, tl.int1)
            g0 = tl.load(grads + at)
        else:
            inside = at < size
            g0 = tl.load(grads + at, mask=inside, other=0)
        m = tl.load(moment + at, mask=inside & first, other=0)
        v = tl.load(square + at, mask=inside & second, other=0)
        stored = tl.load(param + at, mask=inside & (live == 0), other=0)
        true = tl.load(master + at, mask=inside & live, other=0)
        anchor = tl.load(anchors + at, mask=inside & anchored, other=0)
        theta = tl.where(live, true, _widen(stored, ARITHMETIC))

        g0 = _widen(g0, ARITHMETIC) * scale
        g = tl.where(coupled, g0 + theta * coupled_decay, g0)
        old = (m * m >= v * old_slope + old_offset) | (second == 0)
        g = tl.where(routed, g * tl.where(old, grad_under, grad_well), g)
        if noisy:
            g = g + normals(seed, counter, index + begin, BLOCK).to(ARITHMETIC) * sigma

        m = m * first_keep + g * first_add
        v = v * second_keep + (g * g) * second_add
        tl.store(moment + at, m, mask=inside & first)
        tl.store(square + at, v, mask=inside & second)
        under = (m * m >= v * new_slope + new_offset) | (second == 0)

        direction = tl.where(by_moment, tl.where(nesterov, g + m * mu, m), g)
        if adam:
            if ARITHMETIC == tl.float64:
                direction = m / (tl.sqrt(v) + eps)
            else:
                direction = tl.div_rn(m, tl.sqrt_rn(v) + eps)
        delta = direction * tl.where(under, step_under, step_well)
        theta = theta * decay - delta
        tl.store(master + at, theta, mask=inside & live)
        shown = tl.where(live, _live_weight(theta, anchor, tl.where(under, live_under, live_well)), theta)
        tl.store(param + at, _narrow(shown, STORAGE), mask=inside)

        if not FULL:
            delta = tl.where(inside, delta, 0.0)
            theta = tl.where(inside, theta, 0.0)
        grad_sum += g0
        grad_sq += g0 * g0
        update_sq += delta * delta
        param_sq += theta * theta
        counts += (under & inside).to(tl.int32) + ((g0 - g0 != 0).to(tl.int32) << 16)
        begin += BLOCK

    sum_of_grads = tl.sum(grad_sum.to(tl.float64), 0)
    squares = tl.sum(grad_sq.to(tl.float64), 0)
    if (squares - squares != 0) | ((squares == 0) & (sum_of_grads != 0)):
        squares = _squares(grads, scale, size, ARITHMETIC, BLOCK)
    tl.store(partial + COUNT, size.to(tl.float64))
    tl.store(partial + UNDER, tl.where(second, tl.sum(counts & 0xFFFF, 0).to(tl.float64), NAN))
    tl.store(partial + GRAD_SUM, sum_of_grads)
    tl.store(partial + GRAD_SQ, squares)
    tl.store(partial + UPDATE_SQ, tl.sum(update_sq.to(tl.float64), 0))
    tl.store(partial + PARAM_SQ, tl.sum(param_sq.to(tl.float64), 0))
    tl.store(partial + NONFINITE, tl.sum(counts >> 16, 0).to(tl.float64))


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
    following,
    grad_scale,
    found_inf,
    chunk_count,
    NUMBER: tl.constexpr,
    STORAGE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps 0 to 6 for one chunk of the tensors whose storage type is NUMBER. ``following`` gets the phase drawn."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    program = tl.program_id(0).to(tl.int64)
    next_phase = draw_phase(
        tl.load(control + SEED), tl.load(control + COUNTER).to(tl.uint32), tl.load(control + THRESHOLD)
    )
    if program == 0:
        tl.store(following, next_phase)
    if program >= chunk_count:
        return
    chunk = chunks + program * CHUNK_WORDS
    tensor = tensors + tl.load(chunk + CHUNK_TENSOR).to(tl.int64) * TENSOR_WORDS
    small = tensor.to(tl.pointer_type(tl.int32))
    if tl.load(small + DTYPE) != NUMBER:
        return
    number = tl.load(small + GROUP).to(tl.int64)
    group = groups + number * GROUP_WORDS
    row = rows + number * ROW_WORDS
    partial = partials + program * STATISTICS
    start = tl.load(chunk + CHUNK_INDEX).to(tl.int64) * CHUNK
    size = tl.minimum(tl.load(tensor + NUMEL) - start, CHUNK).to(tl.int32)
    if tl.load(tensor + GRAD) != 0:
        now = tl.load(control + PHASE) & 1
        line = statistics + number * STATISTICS
        if (size == CHUNK) & _is_aligned(tensor):
            _step_chunk(
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
            )
        else:
            _step_chunk(
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
            )
    else:
        _nothing_measured(partial)
        if tl.load(tensor + MASTER) != 0:
            live_under, live_well = live_of(row, next_phase)
            tau = tl.load(row + TAU)
            _emit_chunk(tensor, group, tau, live_under, live_well, start, size, STORAGE, ARITHMETIC, BLOCK)


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
):
    """The live weights that were there before: ``tau_prev`` and the emitted columns."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_WORDS
    tensor = tensors + tl.load(chunk + CHUNK_TENSOR).to(tl.int64) * TENSOR_WORDS
    small = tensor.to(tl.pointer_type(tl.int32))
    if (tl.load(small + DTYPE) != NUMBER) | (tl.load(tensor + MASTER) == 0):
        return
    number = tl.load(small + GROUP).to(tl.int64)
    row = rows + number * ROW_WORDS
    start = tl.load(chunk + CHUNK_INDEX).to(tl.int64) * CHUNK
    size = tl.minimum(tl.load(tensor + NUMEL) - start, CHUNK).to(tl.int32)
    _emit_chunk(
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
    )


@triton.jit
def _column(total, column, COLUMN: tl.constexpr):
    return tl.sum(tl.where(column == COLUMN, total, 0.0), 0)


@triton.jit
def _finish_row(group, row, numel, under, following):
    """``finish_row`` of ``csrc/common/shared.h``: the threshold moves, the columns of the emitted phase are latched."""
    g = group.to(tl.pointer_type(tl.float64))
    tau = tl.load(row + TAU)
    rate = tl.load(g + RATE)
    some = numel > 0
    moved = tau + rate * (under / tl.where(some, numel, 1.0) - tl.load(g + TARGET))
    moved = tl.where(moved < 0, 0.0, tl.where(moved > 1, 1.0, moved))
    moves = some & (rate != 0) & (under == under)
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
    following,
    sums,
    others,
    found_inf,
    others_count,
    BLOCK: tl.constexpr,
):
    """Step 7 for one group. Without ``sums`` this is home.

    Programs run in any order, so none of them reads control, which the first one moves: the phase was drawn by
    ``update_kernel`` and left in ``following``. Nor do two of them write the same row or step count.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    number = tl.program_id(0).to(tl.int64)
    span = spans + number * SPAN_WORDS
    last = tl.load(span + TENSOR_END)
    begin = tl.load(span + TENSOR_BEGIN)
    while begin < last:
        index = begin + tl.arange(0, BLOCK)
        tensor = tensors + index * TENSOR_WORDS
        stepped = tl.load(tensor + GRAD, mask=index < last, other=0) != 0
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
        next_phase = tl.load(following)
        _finish_row(groups + number * GROUP_WORDS, rows + number * ROW_WORDS, numel, _column(total, column, UNDER), next_phase)
        if numel > 0:
            tl.store(statistics + line, total, mask=known)
        if number == 0:
            tl.store(control + PHASE, next_phase)
            tl.store(control + COUNTER, tl.load(control + COUNTER) + 1)
