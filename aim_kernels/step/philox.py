"""Philox4x32-10 and standard normals in numpy: the readable twin of ``csrc/common/philox.h``.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). docs/design.md says which
counters are drawn for what.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NOISE_STREAM, PHASE_STREAM, MOMENT_STREAM, WEIGHT_STREAM = range(4)

#: Of noise and phases; of rounding, for which seven are the fewest without a statistical defect.
ROUNDS, ROUNDING_ROUNDS = 10, 7

_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32(
    seed: int, counter: tuple[NDArray[np.uint64] | int, ...], rounds: int = ROUNDS
) -> list[NDArray[np.uint64]]:
    """Four 32-bit words (as uint64) for every counter; ``counter`` is four arrays (or ints) of 32-bit words."""
    c0, c1, c2, c3 = (np.atleast_1d(np.asarray(word, dtype=np.uint64)) for word in counter)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(rounds):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _WORD) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def draw_phase(seed: int, counter: int, limit: int) -> int:
    """The phase after step ``counter``: 1 (auxiliary) with probability ``limit / 2**32``, else 0 (true)."""
    return int(int(philox4x32(seed, (0, 0, counter & 0xFFFFFFFF, PHASE_STREAM))[0][0]) < limit)


def normals(seed: int, counter: int, first: int, count: int) -> NDArray[np.float32]:
    """Standard normals of the elements ``first .. first + count - 1`` (global indices) in step ``counter``."""
    start, stop = first // 4, (first + count + 3) // 4
    k = np.arange(start, max(stop, start), dtype=np.uint64)
    words = philox4x32(seed, (k & _LOW, k >> _WORD, counter & 0xFFFFFFFF, NOISE_STREAM))
    fractions = [(word >> np.uint64(8)).astype(np.float64) for word in words]
    lanes = []
    for x, y in ((fractions[0], fractions[1]), (fractions[2], fractions[3])):
        radius = np.sqrt(-2.0 * np.log((x + 1.0) / 2**24))
        angle = 2.0 * np.pi * y / 2**24
        lanes += [radius * np.cos(angle), radius * np.sin(angle)]
    offset = first - 4 * start
    return np.stack(lanes, axis=1).ravel()[offset : offset + count].astype(np.float32)


def rounding_bits(seed: int, counter: int, stream: int, base: int, index: int, count: int) -> NDArray[np.int32]:
    """16 random bits for each of the elements ``index .. index + count - 1`` of a parameter, whose first element has
    the global index ``base``, in step ``counter``."""
    i = np.arange(index, index + count, dtype=np.uint64)
    draws = i // np.uint64(256) * np.uint64(16) + i % np.uint64(16)
    rows = (i % np.uint64(256) // np.uint64(16)).astype(np.int64)
    counter_words = (draws & _LOW, base & 0xFFFFFFFF, counter & 0xFFFFFFFF, stream | (base >> 32 << 8) & 0xFFFFFFFF)
    words = np.stack(philox4x32(seed, counter_words, ROUNDING_ROUNDS))[rows % 4, np.arange(count)]
    halves = (words >> (rows // 4 % 2 * 16).astype(np.uint64)) & np.uint64(0xFFFF)
    return np.where(rows < 8, halves, np.uint64(0xFFFF) - halves).astype(np.int32)
