"""Numbers that all elements of a tensor share in one step: ``csrc/common/shared.h`` for Triton, operation by operation.

Everything is float64, with +, -, *, / and sqrt only; the elements' kernel rounds it once to the type it computes in.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from aim_kernels.backends.triton.layout import (
    ADAGRAD,
    ADAM,
    ADAMW,
    AMSGRAD,
    BETA1,
    BETA2,
    BY_FISHER,
    BY_GRAD,
    COUNT,
    DAMPENING,
    EPS,
    EXP_AVG,
    EXP_AVG_SQ,
    FLAG_BITS,
    FLOAT64,
    GRAD_SQ,
    GRAD_SUM,
    LION,
    LR,
    LR_DECAY,
    LR_DTYPE,
    LR_TENSOR,
    MOMENTUM,
    NOISE,
    PHASE_LIVE,
    PHASE_ROWS,
    PHASE_STEP,
    PHASE_WORDS,
    RMSPROP,
    ROW_GRAD,
    RULE,
    SCALE,
    SGD,
    TAU,
    TAU_PREV,
    WEIGHT_DECAY,
)

#: ``aim::kSteep``.
_STEEP = tl.constexpr(2.0**80)


@triton.jit
def rule_of(group):
    return tl.load(group.to(tl.pointer_type(tl.int32)) + RULE)


@triton.jit
def flag_of(group, FLAG: tl.constexpr):
    return (tl.load(group.to(tl.pointer_type(tl.int32)) + FLAG_BITS) & FLAG) != 0


@triton.jit
def kind_of(group, tensor):
    """Which moments a parameter keeps and which way it moves: (adam, buffer, first, second), int1 each.

    ``buffer`` says that the first moment is SGD's momentum buffer; ``first`` and ``second`` which moments there are.
    ``group`` and ``tensor`` are the addresses of the records.
    """
    rule = rule_of(group)
    adam = (rule == ADAMW) | (rule == ADAM)
    rms = (rule == ADAGRAD) | (rule == RMSPROP)
    buffer = (tl.load(group.to(tl.pointer_type(tl.float64)) + MOMENTUM) != 0) & (rule == SGD)
    second = adam | rms | (tl.load(tensor + EXP_AVG_SQ) != 0)
    first = adam | buffer | (rule == LION) | (second & (tl.load(tensor + EXP_AVG) != 0))
    return adam, buffer, first, second


@triton.jit
def is_other(group):
    """Whether a rule is of the family "other" (``layout.FAMILIES``)."""
    rule = rule_of(group)
    return (rule > SGD) | ((rule != SGD) & flag_of(group, AMSGRAD))


@triton.jit
def _multiply(a, a_rest, b, b_rest):
    """Dekker's product of numbers that are unevaluated sums of two."""
    a_part = 134217729.0 * a
    b_part = 134217729.0 * b
    a_upper = a_part - (a_part - a)
    b_upper = b_part - (b_part - b)
    a_lower = a - a_upper
    b_lower = b - b_upper
    product = a * b
    error = ((a_upper * b_upper - product) + a_upper * b_lower + a_lower * b_upper) + a_lower * b_lower
    error = error + (a * b_rest + a_rest * b)
    high = product + error
    return high, error - (high - product)


@triton.jit
def _powers(x, n, y, k):
    """x^n and y^k for whole n and k, by squaring in two float64 each; negative exponents count as 0. One loop for both,
    so that neither chain of products waits for the other."""
    one = tl.full((), 1.0, tl.float64)
    zero = tl.full((), 0.0, tl.float64)
    a, a_rest, x_rest = one, zero, zero
    b, b_rest, y_rest = one, zero, zero
    n = tl.maximum(n, 0.0).to(tl.int64)
    k = tl.maximum(k, 0.0).to(tl.int64)
    while (n | k) != 0:
        ax, ax_rest = _multiply(a, a_rest, x, x_rest)
        by, by_rest = _multiply(b, b_rest, y, y_rest)
        takes_x = (n & 1) != 0
        takes_y = (k & 1) != 0
        a = tl.where(takes_x, ax, a)
        a_rest = tl.where(takes_x, ax_rest, a_rest)
        b = tl.where(takes_y, by, b)
        b_rest = tl.where(takes_y, by_rest, b_rest)
        x, x_rest = _multiply(x, x_rest, x, x_rest)
        y, y_rest = _multiply(y, y_rest, y, y_rest)
        n = n >> 1
        k = k >> 1
    return a, b


@triton.jit
def _age(group, buffer, t):
    """(weight, rest) of moments that are ``t`` >= 1 steps old: the total weight of the gradients in the first one, and
    of their squares in the second (1 - beta2^t; Adagrad: t)."""
    g = group.to(tl.pointer_type(tl.float64))
    mu = tl.load(g + MOMENTUM)
    beta1 = tl.load(g + BETA1)
    beta2 = tl.load(g + BETA2)
    rule = rule_of(group)
    last, squared = _powers(
        tl.where(buffer, mu, tl.where(rule == LION, beta2, beta1)), tl.where(buffer, t - 1, t), beta2, t
    )
    squared = tl.where(rule == ADAGRAD, 1 - t, squared)
    unfading = mu == 1
    earlier = tl.where(unfading, t - 1, (1 - last) / (1 - tl.where(unfading, 0.0, mu)))
    weight = tl.where(buffer, last + (1 - tl.load(g + DAMPENING)) * earlier, 1 - last)
    return weight, 1 - squared


@triton.jit
def _boundary(group, state, t, tau, weight, rest):
    """(c_v, c_0): under-optimized where m^2 >= c_v * v + c_0. At t = 0, or without state, that is all."""
    eps = tl.load(group.to(tl.pointer_type(tl.float64)) + EPS)
    squared = tau * tau * weight * weight
    c_v = squared / rest
    c_0 = squared * eps * eps
    fisher = flag_of(group, BY_FISHER)
    if fisher | flag_of(group, BY_GRAD):
        left = 1 - tau
        c = tl.where(left == 0, float("inf"), tau / tl.where(left == 0, 1.0, left))
        c = c * c
        c = c * c
        c = c * c
        c = c * c
        c_v = tl.where(fisher, -_STEEP, 0.0).to(tl.float64)
        c_0 = tl.where(fisher, c * rest * _STEEP, c * (weight * weight))
    classed = state & (t >= 1)
    return tl.where(classed, c_v, 0.0), tl.where(classed, c_0, 0.0)


@triton.jit
def boundary(group, buffer, state, t, tau):
    """The class boundary of moments that are ``t`` steps old; ``state`` says whether there are both."""
    weight, rest = _age(group, buffer, tl.maximum(t, 1.0))
    return _boundary(group, state, t, tau, weight, rest)


@triton.jit
def _learning_rate(group):
    lr = tl.load(group.to(tl.pointer_type(tl.float64)) + LR)
    address = tl.load(group + LR_TENSOR)
    if address != 0:
        if tl.load(group.to(tl.pointer_type(tl.int32)) + LR_DTYPE) == FLOAT64:
            lr = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return lr


@triton.jit
def _standard_deviation(statistics):
    numel = tl.load(statistics + COUNT)
    known = numel > 0
    n = tl.where(known, numel, 1.0)
    mean = tl.load(statistics + GRAD_SUM) / n
    variance = tl.load(statistics + GRAD_SQ) / n - mean * mean
    good = known & (variance > 0)
    return tl.where(good, tl.sqrt(tl.where(good, variance, 0.0)), 0.0)


@triton.jit
def is_held(row, now):
    """Whether a group stays as it is in phase ``now``: nothing of its gradient gets through, no update is applied."""
    step = row + PHASE_ROWS + now * PHASE_WORDS + PHASE_STEP
    grads = (tl.load(row + ROW_GRAD) == 0) & (tl.load(row + ROW_GRAD + 1) == 0)
    return grads & (tl.load(step) == 0) & (tl.load(step + 1) == 0)


@triton.jit
def uniforms(group, row, statistics, now, following, grad_scale, adam, buffer, state, taken):
    """The numbers of ``aim::Uniforms`` for a parameter that took ``taken`` steps, in these tuples: gradient
    (multiplier, coupled decay, under, well, sigma), moments (keep and add of either), boundaries (old c_v, old c_0,
    new c_v, new c_0), update (eps, momentum, decay, step under, step well). Lion leads with the betas of its group.

    ``group`` points to the group's record as int64, ``row`` and ``statistics`` to its lines; ``now`` and ``following``
    are phases.
    """
    g = group.to(tl.pointer_type(tl.float64))
    now_row = row + PHASE_ROWS + now * PHASE_WORDS
    held = is_held(row, now)
    t = tl.where(held, taken, taken + 1)
    lr = _learning_rate(group)
    weight_decay = tl.load(g + WEIGHT_DECAY)
    rule = rule_of(group)
    decoupled = (rule == ADAMW) | (rule == LION)
    multiplier = tl.load(g + SCALE)
    if grad_scale is not None:
        multiplier = multiplier * (1.0 / tl.load(grad_scale).to(tl.float64))
    noise = tl.load(row + NOISE)
    sigma = tl.where((noise != 0) & (held == 0), noise * _standard_deviation(statistics), 0.0)
    grad_under = tl.load(row + ROW_GRAD)
    grad_well = tl.load(row + ROW_GRAD + 1)
    routed = (grad_under != 1) | (grad_well != 1)
    gradient = (multiplier, tl.where(decoupled, 0.0, weight_decay), grad_under, grad_well, sigma)

    mu = tl.load(g + MOMENTUM)
    beta1 = tl.load(g + BETA1)
    beta2 = tl.load(g + BETA2)
    later = t > 1
    keep = tl.where(rule == LION, beta2, beta1)
    adagrad = rule == ADAGRAD
    moments = (
        tl.where(held, 1.0, tl.where(buffer, tl.where(later, mu, 0.0), keep)),
        tl.where(buffer, tl.where(later, 1 - tl.load(g + DAMPENING), 1.0), 1 - keep),
        tl.where(held | adagrad, 1.0, beta2),
        tl.where(adagrad, 1.0, 1 - beta2),
    )

    weight, rest = _age(group, buffer, tl.maximum(t, 1.0))
    old_c_v = tl.full((), 0.0, tl.float64)
    old_c_0 = tl.full((), 0.0, tl.float64)
    if routed:  # or nobody asks
        old_c_v, old_c_0 = boundary(group, buffer, state, taken, tl.load(row + TAU_PREV))
    new_c_v, new_c_0 = _boundary(group, state, t, tl.load(row + TAU), weight, rest)
    boundaries = (old_c_v, old_c_0, new_c_v, new_c_0)

    # m_hat / (sqrt(v_hat) + eps) = m / (sqrt(v) + eps * root) * root / weight
    root = tl.sqrt(rest)
    lr_t = tl.where(adagrad, lr / (1 + taken * tl.load(g + LR_DECAY)), lr)
    rate = tl.where(adam, lr * (root / weight), lr_t)
    eps = tl.load(g + EPS)
    update = (
        tl.where(adam, eps * root, eps),
        tl.where(held, 1.0, mu),
        tl.where(decoupled & (held == 0), 1 - lr * weight_decay, 1.0),
        rate * tl.load(now_row + PHASE_STEP),
        rate * tl.load(now_row + PHASE_STEP + 1),
    )
    return gradient, moments, boundaries, update


@triton.jit
def live_of(row, phase):
    """Live coefficients (under, well) of a phase."""
    columns = row + PHASE_ROWS + phase * PHASE_WORDS + PHASE_LIVE
    return tl.load(columns), tl.load(columns + 1)
