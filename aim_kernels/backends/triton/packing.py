"""Numbers in fewer bits, between memory and blocks of elements: ``csrc/common/packing.h`` for Triton, operation by
operation, with the loads and stores of ``csrc/cpu/codec.h``.

How a moment is stored shows in the type that its pointer points to: int16 is a bfloat16, as its bits, and uint8 a code.
Blocks of codes have a multiple of 128 elements.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from aim_kernels.backends.triton.layout import KAHAN, PACKED_BLOCK, SPLIT, STOCHASTIC_WEIGHTS

# Elements that a thread holds of a block (``driver.GENERAL_ELEMENTS``): more would not fit in its registers.
VECTOR = tl.constexpr(4)

# From float32's mantissa to that of a code.
SHIFT = tl.constexpr(19)


@triton.jit
def widen(x, ARITHMETIC: tl.constexpr):
    """int16 stands for bfloat16, as its bits."""
    if x.dtype.is_int():
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(ARITHMETIC)


@triton.jit
def narrow(x, STORAGE: tl.constexpr):
    """Round to nearest even; bfloat16 as ``csrc/common/convert.h`` does it, NaN included."""
    if STORAGE.is_int():
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(x != x, bits | 0x400000, rounded) >> 16).to(tl.int16)
    else:
        return x.to(STORAGE)


@triton.jit
def _narrow_at_random(x, random):
    """The bits of a bfloat16 (int16): up with the probability of what is cut off (``random``: 16 bits, uint32)."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = tl.where((bits & 0x7FFFFFFF) == 0x7F800000, bits, bits + random)
    return (tl.where(x != x, bits | 0x400000, rounded) >> 16).to(tl.int16)


# -- moments -----------------------------------------------------------------------------------------------------------
#
# SIGNED: the format of first moments and buffers, with a sign and 8 binades; otherwise that of second moments, with 16
# binades. Both have 4 bits of mantissa.


@triton.jit
def _spread(x, BLOCK: tl.constexpr):
    """A number for each 128 elements as one for each element."""
    ROWS: tl.constexpr = BLOCK // PACKED_BLOCK
    return tl.reshape(tl.broadcast_to(tl.expand_dims(x, 1), (ROWS, PACKED_BLOCK)), (BLOCK,))


@triton.jit
def _lowest(exponent, SIGNED: tl.constexpr):
    """The bits (uint32) of the lowest number that is not in the linear binade."""
    BINADES: tl.constexpr = 8 if SIGNED else 16
    return (exponent - (BINADES - 2)).to(tl.uint32) << 23


@triton.jit
def _value(code, exponent, SIGNED: tl.constexpr):
    """The numbers of codes (uint32), by the exponents (int32) of their blocks."""
    lowest = _lowest(exponent, SIGNED)
    rung = (code & (0x7F if SIGNED else 0xFF)) << SHIFT
    linear = rung < 0x800000
    above = (rung + lowest - tl.where(linear, 0, 0x800000).to(tl.uint32)).to(tl.float32, bitcast=True)
    value = above - tl.where(linear, lowest.to(tl.float32, bitcast=True), 0.0)
    bits = value.to(tl.uint32, bitcast=True)
    if SIGNED:
        bits = bits | ((code & 0x80) << 24)
    nan = tl.full(code.shape, 0x7FC00000, tl.uint32)
    return tl.where(exponent == 255, nan, bits).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(x, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The exponents (int32) that blocks of 128 elements store: one more where the greatest lies above the greatest
    code. 255: something in the block is not finite."""
    LEAST: tl.constexpr = 7 if SIGNED else 15
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    greatest = tl.max(tl.reshape(magnitude, (BLOCK // PACKED_BLOCK, PACKED_BLOCK)), 1)
    return tl.maximum((tl.minimum(greatest, 0x7F800000) + 0x7FFFF) >> 23, LEAST)


@triton.jit
def _code(x, exponent, random, SIGNED: tl.constexpr):
    """The codes (uint32) of numbers, by the exponents of their blocks and 16 random bits."""
    lowest = _lowest(exponent, SIGNED)
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # A sum lines up what lies in the linear binade: its step is that of the binade above.
    linear = magnitude.to(tl.float32, bitcast=True) + lowest.to(tl.float32, bitcast=True)
    rung = tl.where(magnitude < lowest, linear.to(tl.uint32, bitcast=True), magnitude + 0x800000) - lowest
    code = (rung + (random << (SHIFT - 16)).to(tl.uint32)) >> SHIFT
    with_sign = code | ((bits >> 24) & 0x80)
    without = tl.where((code == 0) & (magnitude != 0), 1, code).to(tl.uint32)
    return tl.where(exponent == 255, 0, with_sign if SIGNED else without).to(tl.uint32)


@triton.jit
def _read_exponents(exponents, begin, size, kept, BLOCK: tl.constexpr):
    """The exponents (int32) of a block's elements. Neighbours that lie in one thread share a load."""
    LANES: tl.constexpr = BLOCK // VECTOR
    first = begin + tl.arange(0, LANES) * VECTOR
    exponent = tl.load(exponents + first // PACKED_BLOCK, mask=kept & (first < size), other=0).to(tl.int32)
    return tl.reshape(tl.broadcast_to(tl.expand_dims(exponent, 1), (LANES, VECTOR)), (BLOCK,))


@triton.jit
def read_moment(values, exponents, begin, size, kept, inside, SIGNED: tl.constexpr, ARITHMETIC: tl.constexpr):
    """The elements [begin, begin + BLOCK) of a moment of ``size`` elements, in the arithmetic type; ``kept`` says
    whether there is such a moment, ``inside`` which of the elements there are."""
    BLOCK: tl.constexpr = inside.shape[0]
    stored = tl.load(values + begin + tl.arange(0, BLOCK), mask=inside & kept, other=0)
    if stored.dtype == tl.uint8:
        return _value(stored.to(tl.uint32), _read_exponents(exponents, begin, size, kept, BLOCK), SIGNED)
    else:
        return widen(stored, ARITHMETIC)


@triton.jit
def keep_moment(x, values, exponents, begin, size, kept, inside, random, stochastic, SIGNED: tl.constexpr):
    """Stores the elements [begin, begin + BLOCK) of a moment, and returns what will be read again. ``random``: 16 bits
    an element, by which they are rounded where ``stochastic``, as codes always are."""
    BLOCK: tl.constexpr = inside.shape[0]
    to = values + begin + tl.arange(0, BLOCK)
    if values.dtype.element_ty == tl.uint8:
        # What is behind the last element must not be the greatest.
        x = tl.where(inside, x, 0.0)
        exponent = _exponent(x, SIGNED, BLOCK)
        row = tl.arange(0, BLOCK // PACKED_BLOCK)
        there = kept & (begin + row * PACKED_BLOCK < size)
        tl.store(exponents + begin // PACKED_BLOCK + row, exponent.to(tl.uint8), mask=there)
        spread = _spread(exponent, BLOCK)
        code = _code(x, spread, random, SIGNED)
        tl.store(to, code.to(tl.uint8), mask=inside & kept)
        return _value(code, spread, SIGNED)
    elif values.dtype.element_ty == tl.int16:
        bits = tl.where(stochastic, _narrow_at_random(x, random), narrow(x, tl.int16))
        tl.store(to, bits, mask=inside & kept)
        return widen(bits, tl.float32)
    else:
        tl.store(to, x, mask=inside & kept)
        return x


# -- weights of 16 bits ------------------------------------------------------------------------------------------------


@triton.jit
def _join_bf16(upper, lower):
    """The float32 numbers of two halves (int16)."""
    high = upper.to(tl.uint32) << 16
    low = lower.to(tl.int32).to(tl.uint32, bitcast=True)
    # The lower half of a NaN, which was not rounded, has no sign.
    nan = (high & 0x7FFFFFFF) > 0x7F800000
    # Of a weight that somebody has set to zero: it would make a NaN.
    stale = ((high & 0x7FFFFFFF) == 0) & ((low & 0x8000) != 0)
    return (high + tl.where(stale, 0, tl.where(nan, low & 0xFFFF, low))).to(tl.float32, bitcast=True)


@triton.jit
def _split_bf16(x):
    """The halves (int16) of float32 numbers: the nearest bfloat16, and what is to be added to its bits."""
    bits = x.to(tl.uint32, bitcast=True)
    nan = x != x
    bits = tl.where(nan, bits | 0x400000, bits)
    upper = tl.where(nan, bits, bits + 0x8000) >> 16
    return upper.to(tl.int16), (bits - (upper << 16)).to(tl.int16)


@triton.jit
def has_rest(weights):
    """Whether a parameter that keeps its true weights like that has 16 bits beside it for every element."""
    return (weights == SPLIT) | (weights == KAHAN)


@triton.jit
def true_weights(stored, rest, weights, ARITHMETIC: tl.constexpr):
    """What parameters and what they lack stand for. ``weights``: as numbered in ``layout.WEIGHTS``."""
    theta = widen(stored, ARITHMETIC)
    if stored.dtype.is_int():
        theta = tl.where(weights == SPLIT, _join_bf16(stored, rest), theta)
    return tl.where(weights == KAHAN, widen(stored, ARITHMETIC) + widen(rest, ARITHMETIC), theta)


@triton.jit
def kept_weights(theta, random, weights, STORAGE: tl.constexpr):
    """(parameter, rest) as they are stored; ``random``: 16 bits an element, for weights that are rounded so."""
    stored = narrow(theta, STORAGE)
    kept = widen(stored, tl.float32)
    # What overflowed has no rest.
    rest = narrow(tl.where(kept - kept == 0, theta - kept, 0.0), STORAGE)
    if STORAGE.is_int():
        upper, lower = _split_bf16(theta)
        at_random = tl.where(weights == STOCHASTIC_WEIGHTS, _narrow_at_random(theta, random), stored)
        stored = tl.where(weights == SPLIT, upper, at_random)
        rest = tl.where(weights == SPLIT, lower, rest)
    return stored, rest
