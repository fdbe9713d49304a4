"""Numbers in fewer bits, in Python integers and float64, written from docs/design.md ("Fewer bytes").

Nothing here reads the package. Numbers are float32 values held as float64; codes are whole numbers. A stored value is
``unit * rung`` of a table of all rungs, so rounding is a search in that table and not arithmetic on bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import tolerances as tol

BLOCK = 128
NEAREST = 0x8000
MOMENTS, WEIGHTS = 2, 3  # streams


@dataclass(frozen=True)
class Format:
    """8 bits: ``binades`` powers of two of 16 numbers each, the lowest linear; a sign or none."""

    binades: int
    signed: bool

    @property
    def codes(self) -> int:
        """How many magnitudes there are."""
        return 16 * self.binades


FIRST, SECOND = Format(8, True), Format(16, False)


@lru_cache(None)
def magnitudes(fmt: Format, exponent: int) -> np.ndarray:
    """The value of every code without sign, in a block of that exponent (as float32 has it, biased by 127)."""
    code = np.arange(fmt.codes)
    binade, mantissa = code // 16, code % 16
    top = exponent - 127
    # The linear binade and the one above it share a step.
    power = top - (fmt.binades - 1) + np.maximum(binade, 1)
    whole = mantissa + 16 * (binade > 0)
    return np.ldexp(whole.astype(np.float64), power - 4)


def exponent_of(x: np.ndarray, fmt: Format) -> int:
    """The exponent of a block of float32 numbers."""
    if not np.all(np.isfinite(x)):
        return 255
    greatest = np.abs(x).max(initial=0.0)
    least = fmt.binades - 1
    if greatest == 0:
        return least
    # Two powers of two below it the greatest code is too small for sure.
    for exponent in range(max(least, int(np.frexp(greatest)[1]) + 124), 255):
        if greatest <= magnitudes(fmt, exponent)[-1]:
            return exponent
    return 255


def rungs(x: np.ndarray, fmt: Format, exponent: int) -> np.ndarray:
    """Rungs of magnitudes in units of 2^-19 codes: whole numbers, since nothing finer is looked at.

    In the linear binade a float32 sum lines the magnitude up, to the nearest even of its last bits.
    """
    table = magnitudes(fmt, exponent)
    code = np.searchsorted(table, x, side="right") - 1
    step = table[np.maximum(code, 16) // 16 * 16] / 16
    inside = (x - table[code]) / step
    return code * 2**19 + np.rint(inside * 2**19).astype(np.int64)


def codes_of(x: np.ndarray, fmt: Format, exponent: int, bits: np.ndarray) -> np.ndarray:
    """Codes of one block's numbers, of which none lies beyond its greatest code."""
    if exponent == 255:
        return np.zeros(len(x), np.int64)
    found = (rungs(np.abs(x), fmt, exponent) + bits * 8) // 2**19
    if fmt.signed:
        return found + 128 * np.signbit(x)
    return np.where((x != 0) & (found == 0), 1, found)


def encode(x: np.ndarray, fmt: Format, random: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Codes (uint8) of float32 numbers and exponents of their blocks; ``random``: 16 bits each, None to nearest."""
    bits = np.full(len(x), NEAREST) if random is None else np.asarray(random, np.int64)
    codes, exponents = np.zeros(len(x), np.int64), []
    for begin in range(0, len(x), BLOCK):
        part = slice(begin, begin + BLOCK)
        exponents.append(exponent_of(x[part], fmt))
        codes[part] = codes_of(x[part], fmt, exponents[-1], bits[part])
    return codes.astype(np.uint8), np.array(exponents, np.uint8)


def decode(codes: np.ndarray, exponents: np.ndarray, fmt: Format) -> np.ndarray:
    """The numbers of codes."""
    values = np.empty(len(codes))
    for number, exponent in enumerate(exponents.tolist()):
        part = slice(number * BLOCK, (number + 1) * BLOCK)
        code = codes[part].astype(np.int64)
        if exponent == 255:
            values[part] = np.nan
            continue
        values[part] = magnitudes(fmt, exponent)[code % fmt.codes]
        if fmt.signed:
            values[part] = np.copysign(values[part], np.where(code >= 128, -1.0, 1.0))
    return values


def bfloat16(x: np.ndarray, random: np.ndarray | None = None) -> np.ndarray:
    """float32 numbers as bfloat16 has them: to nearest even, or the upper neighbour (in magnitude) where the part that
    is cut off, in 2^-16 of the step, and the random bits add up to one step."""
    with np.errstate(all="ignore"):
        size = np.abs(x)
        power = np.maximum(np.frexp(size)[1] - 1, -126)
        step = np.ldexp(1.0, power - 7)
        lower = np.floor(size / step)
        if random is None:
            kept = np.rint(size / step) * step
        else:
            cut = (size / step - lower) * 2**16  # whole: float32 has 16 bits more
            kept = (lower + (cut + random >= 2**16)) * step
        kept = np.where(kept >= 2.0**128, np.inf, kept)
    return np.where(np.isfinite(x), np.copysign(kept, x), x)


def split_bits(bits: int) -> tuple[int, int]:
    """The halves of one float32, of its 32 bits: bfloat16 bits and a signed remainder."""
    if bits & 0x7FFFFFFF > 0x7F800000:
        bits |= 0x400000
        return bits >> 16, bits & 0xFFFF if bits & 0xFFFF < 0x8000 else (bits & 0xFFFF) - 0x10000
    upper = (bits + 0x8000) >> 16
    return upper & 0xFFFF, bits - (upper << 16)


@lru_cache(1 << 14)  # sixteen elements share a draw
def philox(seed: int, counter: tuple[int, int, int, int], rounds: int) -> tuple[int, ...]:
    """Philox4x32 of one counter."""
    x, key = list(counter), [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(rounds):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [
            second >> 32 ^ x[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ x[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(x)


def draw(seed: int, counter: int, stream: int, base: int, number: int) -> tuple[int, ...]:
    """The words of one draw of the parameter that begins at the global index ``base``."""
    counter_words = (
        number & 0xFFFFFFFF,
        base & 0xFFFFFFFF,
        counter & 0xFFFFFFFF,
        (stream + 256 * (base >> 32)) & 0xFFFFFFFF,
    )
    return philox(seed, counter_words, 7)


def rounding_bits(seed: int, counter: int, stream: int, base: int, index: int) -> int:
    """The 16 bits of its element ``index``."""
    row = index % 256 // 16
    word = draw(seed, counter, stream, base, 16 * (index // 256) + index % 16)[row % 4]
    half = word >> 16 if row // 4 % 2 else word & 0xFFFF
    return 0xFFFF - half if row >= 8 else half


def all_rounding_bits(seed: int, counter: int, stream: int, base: int, index: int, count: int) -> np.ndarray:
    """The same of consecutive elements."""
    first, last = index // 256, (index + count - 1) // 256
    rows: list[np.ndarray] = []
    for sixteen in range(first, last + 1):
        words = np.array([draw(seed, counter, stream, base, 16 * sixteen + lane) for lane in range(16)], np.int64).T
        halves = [*(words & 0xFFFF), *(words >> 16)]
        rows += [*halves, *(0xFFFF - half for half in halves)]
    return np.concatenate([*rows, np.zeros(0, np.int64)])[index - 256 * first :][:count]


# -- what may be stored of a number that is known within an error ------------------------------------------------------


def between(found: np.ndarray, low: np.ndarray, high: np.ndarray, where: str) -> None:
    """Asserts that every element lies between two, NaN where those are."""
    ok = ((low <= found) & (found <= high)) | (np.isnan(found) & (np.isnan(low) | np.isnan(high)))
    bad = np.flatnonzero(~ok)
    if len(bad):
        i = bad[0]
        raise AssertionError(
            f"{where}: {len(bad)} of {len(found)} stored as nothing that rounding allows; [{i}] is {found[i]!r}, not "
            f"in [{low[i]!r}, {high[i]!r}]"
        )


def check_bfloat16(found: np.ndarray, x: np.ndarray, error: np.ndarray, bits: np.ndarray | None, where: str) -> None:
    """Rounding with given bits keeps the order of numbers: what is stored lies between what the ends round to."""
    reach = np.where(np.isfinite(x), tol.SAFETY * error, 0.0)
    between(found, bfloat16(x - reach, bits), bfloat16(x + reach, bits), where)


def check_int8(
    found: np.ndarray,
    exponents: np.ndarray,
    fmt: Format,
    x: np.ndarray,
    error: np.ndarray,
    bits: np.ndarray,
    where: str,
) -> None:
    """The same with the exponents that were stored, each of which one of the ends asks for, or lies between."""
    reach = np.broadcast_to(tol.SAFETY * error, x.shape)
    for number, exponent in enumerate(exponents.tolist()):
        part = slice(number * BLOCK, (number + 1) * BLOCK)
        low, high = x[part] - reach[part], x[part] + reach[part]
        if not fmt.signed:
            low = np.maximum(low, 0.0)
        least = exponent_of(np.where(low * high <= 0, 0.0, np.minimum(np.abs(low), np.abs(high))), fmt)
        most = exponent_of(np.maximum(np.abs(low), np.abs(high)), fmt)
        assert least <= exponent <= most, f"{where}: block {number} has the exponent {exponent}, not {least} to {most}"
        if exponent == 255:
            assert np.isnan(found[part]).all(), f"{where}: block {number} is not NaN"
            continue
        top = magnitudes(fmt, exponent)[-1]
        ends = [
            decode(codes_of(np.clip(end, -top, top), fmt, exponent, bits[part]), np.array([exponent]), fmt)
            for end in (low, high)
        ]
        between(found[part], *ends, f"{where}, block {number}")
