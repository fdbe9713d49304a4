"""Philox4x32, standard normals and the bits that round: ``csrc/common/philox.h`` for Triton, operation by operation.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

NOISE_STREAM = tl.constexpr(0)
PHASE_STREAM = tl.constexpr(1)
MOMENT_STREAM = tl.constexpr(2)
WEIGHT_STREAM = tl.constexpr(3)

#: Rounds of Philox: for noise and phases, and for rounding.
ROUNDS = tl.constexpr(10)
ROUNDING_ROUNDS = tl.constexpr(7)

# Each is one float32 number: a literal of float64 would be rounded twice.
_LN2 = tl.constexpr(float(np.float32(0.693147181)))
_ANGLE = tl.constexpr(float(np.float32(6.28318531) / np.float32(16777216)))
_LOG3, _LOG5, _LOG7, _LOG9 = (tl.constexpr(float(np.float32(1) / np.float32(n))) for n in (3, 5, 7, 9))
_SIN3, _SIN5, _SIN7, _SIN9 = (tl.constexpr(float(np.float32(1) / np.float32(n))) for n in (-6, 120, -5040, 362880))
_COS4, _COS6, _COS8 = (tl.constexpr(float(np.float32(1) / np.float32(n))) for n in (24, -720, 40320))


@triton.jit
def philox(seed, c0, c1, c2, c3, COUNT: tl.constexpr = ROUNDS):
    """Four 32-bit words for each counter; ``seed`` int64, counters uint32, COUNT rounds."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(COUNT):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _log_fraction(n):
    """ln(n * 2^-24) for 1 <= n <= 2^24."""
    bits = n.to(tl.float32).to(tl.uint32, bitcast=True)
    exponent = (bits >> 23).to(tl.int32) - (127 + 24)
    bits = (bits & 0x7FFFFF) | 0x3F800000
    above = (bits >= 0x3FB504F3).to(tl.uint32)
    m = (bits - (above << 23)).to(tl.float32, bitcast=True)
    k = (exponent + above.to(tl.int32)).to(tl.float32)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    series = 1.0 + z * (_LOG3 + z * (_LOG5 + z * (_LOG7 + z * _LOG9)))
    return k * _LN2 + 2.0 * s * series


@triton.jit
def _circle(n):
    """cos and sin of 2 pi n 2^-24, as bits."""
    quadrant = n >> 22
    rest = n & 0x3FFFFF
    folded = rest > 0x200000
    a = tl.where(folded, 0x400000 - rest, rest).to(tl.float32) * _ANGLE
    z = a * a
    s = a * (1.0 + z * (_SIN3 + z * (_SIN5 + z * (_SIN7 + z * _SIN9))))
    c = 1.0 + z * (-0.5 + z * (_COS4 + z * (_COS6 + z * _COS8)))
    exchanged = folded != ((quadrant & 1) != 0)
    cosine = tl.where(exchanged, s, c).to(tl.uint32, bitcast=True) ^ (((quadrant + 1) >> 1 & 1) << 31)
    sine = tl.where(exchanged, c, s).to(tl.uint32, bitcast=True) ^ ((quadrant >> 1) << 31)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def _normal_pair(x0, x1):
    radius = tl.sqrt_rn(-2.0 * _log_fraction((x0 >> 8) + 1))
    cosine, sine = _circle(x1 >> 8)
    return radius * cosine, radius * sine


@triton.jit
def _normal4(seed, counter, k, zero):
    """The normals of elements 4k .. 4k + 3; ``zero`` is an unsigned zero of the shape of ``k``."""
    x0, x1, x2, x3 = philox(seed, k.to(tl.uint32), (k >> 32).to(tl.uint32), zero + counter, zero + NOISE_STREAM)
    z0, z1 = _normal_pair(x0, x1)
    z2, z3 = _normal_pair(x2, x3)
    return z0, z1, z2, z3


@triton.jit
def normals(seed, counter, first, BLOCK: tl.constexpr):
    """Standard normals of the elements ``first .. first + BLOCK - 1`` (global indices, int64) in step ``counter``.

    Four neighbours share one draw. Where the fours straddle the block's ends, they move up, and one more fills the end.
    """
    k = first >> 2
    z0, z1, z2, z3 = _normal4(seed, counter, k + tl.arange(0, BLOCK // 4), tl.zeros((BLOCK // 4,), tl.uint32))
    z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))
    shift = (first & 3).to(tl.int32)
    if shift != 0:
        e0, e1, e2, _e3 = _normal4(seed, counter, k + BLOCK // 4, counter ^ counter)
        lane = tl.arange(0, BLOCK) + shift
        end = tl.where(lane == BLOCK, e0, tl.where(lane == BLOCK + 1, e1, e2))
        z = tl.where(lane < BLOCK, tl.gather(z, tl.minimum(lane, BLOCK - 1), 0), end)
    return z


@triton.jit
def _rounding_block(seed, counter, STREAM: tl.constexpr, base, block, BLOCK: tl.constexpr):
    """``rounding_bits`` from the element 256 * ``block`` on (``block``: uint32). Sixteen elements share a draw: of 256
    neighbours, row 8 * f + 4 * h + w of 16 takes half h of word w, or where f is 1 what is left of 0xFFFF."""
    tl.static_assert(BLOCK % 256 == 0)
    draw = block * 16 + tl.arange(0, BLOCK // 16).to(tl.uint32)
    zero = tl.zeros((BLOCK // 16,), tl.uint32)
    stream = ((base >> 32).to(tl.uint32) << 8) | STREAM
    x0, x1, x2, x3 = philox(seed, draw, zero + base.to(tl.uint32), zero + counter, zero + stream, ROUNDING_ROUNDS)
    words = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (BLOCK // 256, 16, 4))
    halves = tl.join(words & 0xFFFF, words >> 16)
    both = tl.join(halves, halves ^ 0xFFFF)
    return tl.reshape(tl.permute(both, (0, 4, 3, 2, 1)), (BLOCK,))


@triton.jit
def rounding_bits(seed, counter, STREAM: tl.constexpr, base, index, BLOCK: tl.constexpr):
    """16 random bits (uint32) for each of the elements ``index .. index + BLOCK - 1`` of a parameter (int64), whose
    first element has the global index ``base``, in step ``counter``."""
    block = (index >> 8).to(tl.uint32)
    bits = _rounding_block(seed, counter, STREAM, base, block, BLOCK)
    shift = (index & 255).to(tl.int32)
    if shift != 0:
        # A part of a parameter that does not begin with such a block.
        later = _rounding_block(seed, counter, STREAM, base, block + BLOCK // 256, BLOCK)
        source = tl.arange(0, BLOCK) + shift
        bits = tl.where(
            source < BLOCK,
            tl.gather(bits, tl.minimum(source, BLOCK - 1), 0),
            tl.gather(later, tl.maximum(source - BLOCK, 0), 0),
        )
    return bits


@triton.jit
def draw_phase(seed, counter, limit):
    """The phase of the live weights that the step at hand writes (int64): 0 true, 1 auxiliary."""
    zero = counter ^ counter
    x0, _x1, _x2, _x3 = philox(seed, zero, zero, counter, zero + PHASE_STREAM)
    return (x0.to(tl.int64) < limit).to(tl.int64)
