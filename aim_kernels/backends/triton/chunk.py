"""The elements of one chunk: the arithmetic of ``csrc/common/element.h``, in its order, with loads, stores and sums.

Rules differ by scalars that the whole program shares: what a rule does not keep is masked out of its
loads and stores, which costs no memory traffic.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from aim_kernels.backends.triton.layout import (
    ANCHOR,
    BETA1,
    CENTERED,
    COUNT,
    COUNTER,
    EMA,
    EMA_DECAY,
    EXP_AVG,
    EXP_AVG_SCALE,
    EXP_AVG_SQ,
    EXP_AVG_SQ_SCALE,
    EXTRA,
    EXTRA_SCALE,
    FIRST,
    FROZEN,
    GRAD,
    GRAD_SQ,
    GRAD_SUM,
    INT8,
    LION,
    MARKS,
    MASTER,
    MOMENTUM,
    NESTEROV,
    NONFINITE,
    OFFSET,
    PACKED_BLOCK,
    PARAM,
    PARAM_SQ,
    REST,
    RMSPROP,
    SEED,
    STEP,
    STOCHASTIC,
    STOCHASTIC_WEIGHTS,
    UNCOUNTED,
    UNDER,
    UPDATE_SQ,
    WEIGHT_STORAGE,
    WIDE,
    ZERO_GRAD,
)
from aim_kernels.backends.triton.normals import MOMENT_STREAM, WEIGHT_STREAM, normals, rounding_bits
from aim_kernels.backends.triton.packing import VECTOR as PACKED_VECTOR
from aim_kernels.backends.triton.packing import (
    has_rest,
    keep_moment,
    kept_weights,
    narrow,
    read_moment,
    true_weights,
    widen,
)
from aim_kernels.backends.triton.uniforms import boundary, flag_of, kind_of, live_of, rule_of, uniforms


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to elements of TYPE; ALIGNED promises 16 bytes, which is what makes accesses that wide."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _exponents(field, start):
    """A pointer to the exponents of a chunk's moment of 8 bits."""
    return tl.load(field).to(tl.pointer_type(tl.uint8)) + start // PACKED_BLOCK


@triton.jit
def _live_weight(theta, anchor, c):
    return tl.where(c == 1, theta, anchor + (theta - anchor) * c)


@triton.jit
def _bits(x):
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True)
    elif x.dtype.primitive_bitwidth == 32:
        return x.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int64, bitcast=True)


@triton.jit
def adopt_chunk(tensor, start, size, STORAGE: tl.constexpr, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr):
    """The master takes the elements [start, start + size) whose parameter is not what a step leaves of them."""
    master = _pointer(tl.load(tensor + MASTER), ARITHMETIC, False) + start
    param = _pointer(tl.load(tensor + PARAM), STORAGE, False) + start
    lane = tl.arange(0, BLOCK)
    begin = size - size
    while begin < size:
        inside = begin + lane < size
        stored = tl.load(param + begin + lane, mask=inside, other=0)
        kept = narrow(tl.load(master + begin + lane, mask=inside, other=0), STORAGE)
        tl.store(master + begin + lane, widen(stored, ARITHMETIC), mask=inside & (_bits(stored) != _bits(kept)))
        begin += BLOCK
    # Other threads may step what this one took over.
    tl.debug_barrier()


@triton.jit
def emit_chunk(
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
    MOMENTS: tl.constexpr,
):
    """Live weights of the elements [start, start + size), from stored state."""
    _adam, buffer, first, second = kind_of(group, tensor)
    # What is frozen has neither moments nor a step count, and is well-optimized.
    frozen = (tl.load(tensor.to(tl.pointer_type(tl.int32)) + MARKS) & FROZEN) != 0
    first = first & (frozen == 0)
    second = second & (frozen == 0)
    live_under = tl.where(frozen, live_well, live_under)
    state = first & second
    steps = tl.load(tensor + STEP)
    taken = tl.load(steps.to(tl.pointer_type(tl.float32)), mask=steps != 0, other=0).to(tl.float64)
    c_v, c_0 = boundary(group, buffer, state, taken, tau)
    c_v = c_v.to(ARITHMETIC)
    c_0 = c_0.to(ARITHMETIC)
    live_under = live_under.to(ARITHMETIC)
    live_well = live_well.to(ARITHMETIC)
    anchored = tl.load(tensor + ANCHOR) != 0
    master = _pointer(tl.load(tensor + MASTER), ARITHMETIC, False) + start
    MOMENT: tl.constexpr = tl.uint8 if MOMENTS == INT8 else ARITHMETIC if MOMENTS == WIDE else tl.int16
    moment = _pointer(tl.load(tensor + EXP_AVG), MOMENT, False) + start
    square = _pointer(tl.load(tensor + EXP_AVG_SQ), MOMENT, False) + start
    moment_exponents = _exponents(tensor + EXP_AVG_SCALE, start)
    square_exponents = _exponents(tensor + EXP_AVG_SQ_SCALE, start)
    anchors = _pointer(tl.load(tensor + ANCHOR), ARITHMETIC, False) + start
    param = _pointer(tl.load(tensor + PARAM), STORAGE, False) + start
    lane = tl.arange(0, BLOCK)
    begin = size - size
    while begin < size:
        inside = begin + lane < size
        theta = tl.load(master + begin + lane, mask=inside, other=0)
        m = read_moment(moment, moment_exponents, begin, size, first, inside, True, ARITHMETIC)
        v = read_moment(square, square_exponents, begin, size, second, inside, False, ARITHMETIC)
        anchor = tl.load(anchors + begin + lane, mask=inside & anchored, other=0)
        under = (m * m >= v * c_v + c_0) | (state == 0)
        live = _live_weight(theta, anchor, tl.where(under, live_under, live_well))
        tl.store(param + begin + lane, narrow(live, STORAGE), mask=inside)
        begin += BLOCK


@triton.jit
def _over_root(top, below, eps, ARITHMETIC: tl.constexpr):
    """top / (sqrt(below) + eps), both correctly rounded."""
    if ARITHMETIC.is_fp64():
        return top / (tl.sqrt(below) + eps)
    else:
        return tl.div_rn(top, tl.sqrt_rn(below) + eps)


@triton.jit
def _squares(gradient, multiplier, size, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares in float64: for gradients whose squares leave float32's range."""
    total = tl.zeros((BLOCK,), tl.float64)
    lane = tl.arange(0, BLOCK)
    begin = size - size
    while begin < size:
        g = (widen(tl.load(gradient + begin + lane, mask=begin + lane < size, other=0), ARITHMETIC) * multiplier).to(
            tl.float64
        )
        total += g * g
        begin += BLOCK
    return tl.sum(total, 0)


@triton.jit
def clear_chunk(grads, size, STORAGE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Leaves ``size`` gradients as zeros; FULL promises size == CHUNK."""
    lane = tl.arange(0, BLOCK)
    begin = size - size
    while begin < (CHUNK if FULL else size):
        if FULL:
            tl.store(grads + begin + lane, tl.zeros((BLOCK,), STORAGE))
        else:
            tl.store(grads + begin + lane, tl.zeros((BLOCK,), STORAGE), mask=begin + lane < size)
        begin += BLOCK


@triton.jit
def _gathered(x, VECTOR: tl.constexpr):
    return tl.sum(tl.reshape(x, (x.shape[0] // VECTOR, VECTOR)), 1)


@triton.jit
def step_chunk(
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
    OTHER: tl.constexpr,
    GENERAL: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Steps the elements [start, start + size) and writes what was measured. FULL promises size == CHUNK and aligned
    addresses; OTHER that the rule is of the family "other", without it that it is not; without GENERAL nothing is
    stored in fewer bytes, or beside the update. MOMENTS is how moments are stored (``layout.MOMENTS``)."""
    MOMENT: tl.constexpr = tl.uint8 if MOMENTS == INT8 else ARITHMETIC if MOMENTS == WIDE else tl.int16
    adam, buffer, first, second = kind_of(group, tensor)
    state = first & second
    nesterov = (tl.load(group.to(tl.pointer_type(tl.int32)) + NESTEROV) != 0) & buffer
    by_moment = adam | buffer
    live = tl.load(tensor + MASTER) != 0
    anchored = live & (tl.load(tensor + ANCHOR) != 0)
    taken = tl.load(tl.load(tensor + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)
    gradient, moments, boundaries, update = uniforms(
        group, row, statistics, now, following, grad_scale, adam, buffer, state, taken
    )
    multiplier, coupled_decay, grad_under, grad_well, sigma = gradient
    coupled = coupled_decay != 0
    routed = (grad_under != 1) | (grad_well != 1)
    noisy = sigma != 0
    multiplier = multiplier.to(ARITHMETIC)
    coupled_decay = coupled_decay.to(ARITHMETIC)
    grad_under = grad_under.to(ARITHMETIC)
    grad_well = grad_well.to(ARITHMETIC)
    sigma = sigma.to(ARITHMETIC)
    first_keep, first_add, second_keep, second_add = moments
    first_keep = first_keep.to(ARITHMETIC)
    first_add = first_add.to(ARITHMETIC)
    second_keep = second_keep.to(ARITHMETIC)
    second_add = second_add.to(ARITHMETIC)
    old_c_v, old_c_0, new_c_v, new_c_0 = boundaries
    old_c_v = old_c_v.to(ARITHMETIC)
    old_c_0 = old_c_0.to(ARITHMETIC)
    new_c_v = new_c_v.to(ARITHMETIC)
    new_c_0 = new_c_0.to(ARITHMETIC)
    eps, mu, decay, step_under, step_well = update
    eps = eps.to(ARITHMETIC)
    mu = mu.to(ARITHMETIC)
    decay = decay.to(ARITHMETIC)
    step_under = step_under.to(ARITHMETIC)
    step_well = step_well.to(ARITHMETIC)
    if OTHER:
        g64 = group.to(tl.pointer_type(tl.float64))
        lead_keep = tl.load(g64 + BETA1).to(ARITHMETIC)
        lead_add = (1 - tl.load(g64 + BETA1)).to(ARITHMETIC)
        lion = rule_of(group) == LION
        amsgrad = adam
        centered = flag_of(group, CENTERED)
        extra = amsgrad | ((rule_of(group) == RMSPROP) & (tl.load(g64 + MOMENTUM) != 0))
        extras = _pointer(tl.load(tensor + EXTRA), MOMENT, FULL) + start
        extra_exponents = _exponents(tensor + EXTRA_SCALE, start)
    live_under, live_well = live_of(row, following)
    live_under = live_under.to(ARITHMETIC)
    live_well = live_well.to(ARITHMETIC)
    seed = tl.load(control + SEED)
    counter = tl.load(control + COUNTER).to(tl.uint32)
    index = tl.load(tensor + FIRST) + start

    param = _pointer(tl.load(tensor + PARAM), STORAGE, FULL) + start
    grads = _pointer(tl.load(tensor + GRAD), STORAGE, FULL) + start
    moment = _pointer(tl.load(tensor + EXP_AVG), MOMENT, FULL) + start
    square = _pointer(tl.load(tensor + EXP_AVG_SQ), MOMENT, FULL) + start
    moment_exponents = _exponents(tensor + EXP_AVG_SCALE, start)
    square_exponents = _exponents(tensor + EXP_AVG_SQ_SCALE, start)
    master = _pointer(tl.load(tensor + MASTER), ARITHMETIC, FULL) + start
    anchors = _pointer(tl.load(tensor + ANCHOR), ARITHMETIC, FULL) + start
    stochastic = False
    if GENERAL:
        tl.static_assert((CHUNK | BLOCK) & 127 == 0)
        small = tensor.to(tl.pointer_type(tl.int32))
        stochastic = tl.load(small + STOCHASTIC) != 0
        weights = tl.load(small + WEIGHT_STORAGE)
        whole = tl.load(tensor + OFFSET) + start  # index in the whole parameter
        base = index - whole
        rests = _pointer(tl.load(tensor + REST), STORAGE, FULL) + start
        averages = _pointer(tl.load(tensor + EMA), ARITHMETIC, FULL) + start
        averaged = tl.load(tensor + EMA) != 0
        follows = anchored & (tl.load(tensor + ANCHOR) == tl.load(tensor + EMA))
        ema_keep = tl.load(group.to(tl.pointer_type(tl.float64)) + EMA_DECAY)
        ema_add = (1 - ema_keep).to(ARITHMETIC)
        ema_keep = ema_keep.to(ARITHMETIC)

    # Neighbours that lie in one thread, then over the blocks: at most VECTOR + CHUNK / BLOCK additions before float64
    # takes over.
    VECTOR: tl.constexpr = PACKED_VECTOR if GENERAL else 128 // STORAGE.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // VECTOR
    grad_sum = tl.zeros((LANES,), ARITHMETIC)
    grad_sq = tl.zeros((LANES,), ARITHMETIC)
    update_sq = tl.zeros((LANES,), ARITHMETIC)
    param_sq = tl.zeros((LANES,), ARITHMETIC)
    # Two counts in one register: under-optimized in the lower half, not finite in the upper.
    tl.static_assert(CHUNK // LANES < 32768)
    counts = tl.zeros((LANES,), tl.int32)
    lane = tl.arange(0, BLOCK)
    begin = size - size
    while begin < (CHUNK if FULL else size):
        # Before the loads, whose values would fill the registers meanwhile.
        z = tl.zeros((BLOCK,), ARITHMETIC)
        if noisy:
            z = normals(seed, counter, index + begin, BLOCK).to(ARITHMETIC) * sigma
        if FULL:
            inside = tl.full((BLOCK,), True, tl.int1)
            g0 = tl.load(grads + begin + lane)
        else:
            inside = begin + lane < size
            g0 = tl.load(grads + begin + lane, mask=inside, other=0)
        m = read_moment(moment, moment_exponents, begin, size, first, inside, True, ARITHMETIC)
        v = read_moment(square, square_exponents, begin, size, second, inside, False, ARITHMETIC)
        theta = tl.load(master + begin + lane, mask=inside & live, other=0)
        stored = tl.load(param + begin + lane, mask=inside & (live == 0), other=0)
        if GENERAL and STORAGE.primitive_bitwidth == 16:
            beside = inside & (live == 0) & has_rest(weights)
            rest = tl.load(rests + begin + lane, mask=beside, other=0)
            theta = tl.where(live, theta, true_weights(stored, rest, weights, ARITHMETIC))
        else:
            theta = tl.where(live, theta, widen(stored, ARITHMETIC))
        anchor = tl.load(anchors + begin + lane, mask=inside & anchored, other=0)

        g0 = widen(g0, ARITHMETIC) * multiplier
        g = tl.where(coupled, g0 + theta * coupled_decay, g0)
        old = (m * m >= v * old_c_v + old_c_0) | (state == 0)
        g = tl.where(routed, g * tl.where(old, grad_under, grad_well), g)
        g = tl.where(noisy, g + z, g)

        if OTHER:
            lead = m * lead_keep + g * lead_add
        m = m * first_keep + g * first_add
        v = v * second_keep + (second_add * g) * g
        random = tl.zeros((BLOCK,), tl.uint32)
        if MOMENTS != WIDE and stochastic:
            random = rounding_bits(seed, counter, MOMENT_STREAM, base, whole + begin, BLOCK)
        kept = keep_moment(m, moment, moment_exponents, begin, size, first, inside, random, stochastic, True)
        kept_sq = keep_moment(v, square, square_exponents, begin, size, second, inside, random, stochastic, False)
        under = (kept * kept >= kept_sq * new_c_v + new_c_0) | (state == 0)

        if OTHER:
            if MOMENTS != INT8 or amsgrad:
                w = read_moment(extras, extra_exponents, begin, size, extra, inside, False, ARITHMETIC)
            else:
                w = read_moment(extras, extra_exponents, begin, size, extra, inside, True, ARITHMETIC)
            spread = v - m * m
            w = tl.where(amsgrad, tl.where(w > v, w, v), w)
            # Where both squares overflow, that of a finite mean counts for nothing.
            spread = tl.where(spread != spread, v + (m - m), tl.where(spread < 0, 0.0, spread))
            below = tl.where(amsgrad, w, tl.where(centered, spread, v))
            direction = _over_root(tl.where(adam, m, g), below, eps, ARITHMETIC)
            w = tl.where(amsgrad, w, w * mu + direction)
            direction = tl.where(extra & (amsgrad == 0), w, direction)
            direction = tl.where(lion, tl.where(lead > 0, 1.0, tl.where(lead < 0, -1.0, lead)), direction)
            if MOMENTS != INT8 or amsgrad:
                keep_moment(w, extras, extra_exponents, begin, size, extra, inside, random, stochastic, False)
            else:
                keep_moment(w, extras, extra_exponents, begin, size, extra, inside, random, stochastic, True)
        else:
            direction = tl.where(by_moment, tl.where(nesterov, g + m * mu, m), g)
            if adam:
                direction = _over_root(m, v, eps, ARITHMETIC)
        delta = direction * tl.where(under, step_under, step_well)
        theta = theta * decay - delta
        tl.store(master + begin + lane, theta, mask=inside & live)
        if GENERAL:
            average = tl.load(averages + begin + lane, mask=inside & averaged, other=0)
            average = average * ema_keep + theta * ema_add
            tl.store(averages + begin + lane, average, mask=inside & averaged)
            anchor = tl.where(follows, average, anchor)
        shown = tl.where(live, _live_weight(theta, anchor, tl.where(under, live_under, live_well)), theta)
        if GENERAL and STORAGE.primitive_bitwidth == 16:
            random = tl.zeros((BLOCK,), tl.uint32)
            if weights == STOCHASTIC_WEIGHTS:
                random = rounding_bits(seed, counter, WEIGHT_STREAM, base, whole + begin, BLOCK)
            shown, rest = kept_weights(shown, random, weights, STORAGE)
            tl.store(param + begin + lane, shown, mask=inside)
            tl.store(rests + begin + lane, rest, mask=beside)
        else:
            tl.store(param + begin + lane, narrow(shown, STORAGE), mask=inside)

        if not FULL:
            delta = tl.where(inside, delta, 0.0)
            theta = tl.where(inside, theta, 0.0)
        grad_sum += _gathered(g0, VECTOR)
        grad_sq += _gathered(g0 * g0, VECTOR)
        update_sq += _gathered(delta * delta, VECTOR)
        param_sq += _gathered(theta * theta, VECTOR)
        counts += _gathered((under & inside).to(tl.int32) + ((g0 - g0 != 0).to(tl.int32) << 16), VECTOR)
        begin += BLOCK

    sum_of_grads = tl.sum(grad_sum.to(tl.float64), 0)
    squares = tl.sum(grad_sq.to(tl.float64), 0)
    if (squares - squares != 0) | ((squares == 0) & (sum_of_grads != 0)):
        squares = _squares(grads, multiplier, size, ARITHMETIC, BLOCK)
    if GENERAL and tl.load(small + ZERO_GRAD) != 0:
        # Other threads may have loaded what this one clears.
        tl.debug_barrier()
        clear_chunk(grads, size, STORAGE, CHUNK, BLOCK, FULL)
    # Where another process counts the tensor, its sums are zero: by a choice, since a zero stored over them might come
    # from another thread, and first.
    counted = tl.load(tensor.to(tl.pointer_type(tl.int32)) + UNCOUNTED) == 0
    under = tl.where(state, tl.sum(counts & 0xFFFF, 0).to(tl.float64), float("nan"))
    tl.store(partial + COUNT, tl.where(counted, size.to(tl.float64), 0.0))
    tl.store(partial + UNDER, tl.where(counted, under, 0.0))
    tl.store(partial + GRAD_SUM, tl.where(counted, sum_of_grads, 0.0))
    tl.store(partial + GRAD_SQ, tl.where(counted, squares, 0.0))
    tl.store(partial + UPDATE_SQ, tl.where(counted, tl.sum(update_sq.to(tl.float64), 0), 0.0))
    tl.store(partial + PARAM_SQ, tl.where(counted, tl.sum(param_sq.to(tl.float64), 0), 0.0))
    tl.store(partial + NONFINITE, tl.where(counted, tl.sum(counts >> 16, 0).to(tl.float64), 0.0))
