"""Numbers in fewer bits, in eager PyTorch: the readable twin of ``csrc/common/packing.h``, bit for bit.

docs/design.md ("Fewer bytes") says what is stored. ``random`` is 16 random bits an element, as int32 in the shape of
the numbers; None rounds to nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aim_kernels.step.layout import PACKED_BLOCK

_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000


class Format(NamedTuple):
    """Eight bits relative to the exponent of a block: ``binades`` powers of two of ``1 << MANTISSA`` numbers each, the
    lowest of them linear down to zero."""

    binades: int
    signed: bool

    @property
    def most(self) -> int:
        """The greatest code, without sign."""
        return (self.binades << MANTISSA) - 1


MANTISSA = 4
_SHIFT = 23 - MANTISSA  # from the mantissa of float32

FIRST, SECOND = Format(8, True), Format(16, False)

#: Random bits that round to nearest.
_NEAREST = 0x8000


def blocks_of(numel: int) -> int:
    """How many exponents so many elements have."""
    return -(-numel // PACKED_BLOCK)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def encode(x: Tensor, fmt: Format, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and exponents (uint8) of float32 numbers ``[n]``. A block with something that is not finite gets the
    exponent 255 and codes of zero, and is NaN when read."""
    pad = -len(x) % PACKED_BLOCK
    bits = torch.nn.functional.pad(_bits(x), (0, pad)).view(-1, PACKED_BLOCK)
    magnitude = bits & _MAGNITUDE
    greatest = magnitude.amax(1) if len(bits) else magnitude.new_zeros(0)
    # One more where the greatest lies above the greatest code.
    exponent = ((greatest.clamp(max=_INFINITY) + (1 << _SHIFT) - 1) >> 23).clamp(min=fmt.binades - 1)
    lowest = ((exponent - (fmt.binades - 2)) << 23)[:, None]
    linear = _bits(_floats(magnitude) + _floats(lowest)) - lowest
    rung = torch.where(magnitude < lowest, linear, magnitude - lowest + 0x800000)
    if random is None:
        drawn = torch.full_like(bits, _NEAREST)
    else:
        drawn = torch.nn.functional.pad(random, (0, pad)).view(-1, PACKED_BLOCK)
    code = (rung + (drawn << (_SHIFT - 16))) >> _SHIFT
    code = code | ((bits >> 24) & 0x80) if fmt.signed else torch.where(magnitude != 0, code.clamp(min=1), code)
    code = torch.where((exponent == 255)[:, None], 0, code)
    return code.view(-1)[: len(x)].to(torch.uint8), exponent.to(torch.uint8)


def decode(codes: Tensor, exponents: Tensor, fmt: Format) -> Tensor:
    """The float32 numbers ``[n]`` of codes ``[n]`` and their blocks' exponents."""
    code = torch.nn.functional.pad(codes.to(torch.int32), (0, -len(codes) % PACKED_BLOCK)).view(-1, PACKED_BLOCK)
    lowest = ((exponents.to(torch.int32) - (fmt.binades - 2)) << 23)[:, None]
    rung = (code & fmt.most) << _SHIFT
    linear = rung < 0x800000
    above = _floats(rung + lowest - torch.where(linear, 0, 0x800000))
    value = above - torch.where(linear, _floats(lowest), 0.0)
    if fmt.signed:
        value = torch.where(code & 0x80 != 0, -value, value)
    value = torch.where((exponents == 255)[:, None], torch.nan, value)
    return value.view(-1)[: len(codes)]


def to_bfloat16(x: Tensor, random: Tensor | None = None) -> Tensor:
    """Nearest, or either neighbour with the probability that makes the mean exact; NaN and infinities stay."""
    if random is None:
        return x.to(torch.bfloat16)
    # Nothing is carried out of the zeros of an infinity.
    kept = _floats((_bits(x) + torch.where(x.isnan(), 0, random)) & ~0xFFFF)
    return torch.where(x.isnan(), x, kept).to(torch.bfloat16)


def split_bf16(theta: Tensor) -> tuple[Tensor, Tensor]:
    """float32 weights as the nearest bfloat16 (away from zero where two are as near) and the 16 bits (int16) that make
    them whole again."""
    bits = _bits(theta).to(torch.int64)  # whose sums do not wrap around
    nan = (bits & _MAGNITUDE) > _INFINITY
    bits = torch.where(nan, bits | 0x400000, bits)
    upper = torch.where(nan, bits, bits + 0x8000) >> 16
    lower = bits - (upper << 16)
    lower = torch.where(nan & (lower >= 0x8000), lower - 0x10000, lower)
    return _halves(upper).view(torch.bfloat16), lower.to(torch.int16)


def join_bf16(upper: Tensor, lower: Tensor) -> Tensor:
    """The float32 weights of :func:`split_bf16`."""
    high = upper.contiguous().view(torch.int16).to(torch.int64)
    low = lower.contiguous().to(torch.int64)
    low = torch.where(upper.isnan(), low & 0xFFFF, low)
    # Where somebody has set a weight to zero, what belonged to what it was would make a NaN of it.
    low = torch.where((high & 0x7FFF == 0) & (low < 0), 0, low)
    bits = (high << 16) + low
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _halves(x: Tensor) -> Tensor:
    """The lower 16 bits as int16."""
    x = x & 0xFFFF
    return torch.where(x >= 0x8000, x - 0x10000, x).to(torch.int16)


def compensated(theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest numbers of a 16-bit type, and what that took, in the same type."""
    kept = theta.to(dtype)
    lost = torch.where(kept.isfinite(), theta - kept.float(), 0.0)
    return kept, lost.to(dtype)


def to_storage(theta: Tensor, storage: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """float32 weights as a parameter of ``dtype`` keeps them by ``master=storage``: what goes into the parameter (to be
    rounded to nearest where it is not of its type), and what it lacks; None where nothing is kept of that."""
    if storage == "split":
        return split_bf16(theta)
    return compensated(theta, dtype) if storage == "kahan" else (theta, None)
