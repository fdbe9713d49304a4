"""Every tolerance of the optimizer tests, with its reason.

The oracle carries a first-order bound of the rounding error of each element beside its value: what the documented
order of operations loses in the arithmetic type, plus what earlier steps left behind. Comparisons use that bound times
SAFETY, so a tolerance follows the data: it is a few units in the last place of the terms that were added, not of a
result that cancelled.
"""

from __future__ import annotations

from typing import Any

#: Unit roundoff (half a unit in the last place, relative) of the arithmetic type of a parameter's storage type.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-24, "float16": 2.0**-24, "float64": 2.0**-53}

#: Significand bits and least exponent of the storage types narrower than their arithmetic.
NARROW = {"bfloat16": (8, -126), "float16": (11, -14)}

#: Smallest subnormal of the arithmetic types: what an underflow may lose.
TINY = {"float32": 2.0**-149, "bfloat16": 2.0**-149, "float16": 2.0**-149, "float64": 2.0**-1074}

#: The bound is first order and the oracle rounds too (it computes float64 parameters in the same type): a factor of two
#: covers both.
SAFETY = 2.0

#: Error of one standard normal in units of its Box-Muller radius, in roundoffs: the angle reaches 2 pi and is rounded
#: (3.2 absolute), logarithm, square root, sine and cosine are good to a few roundoffs each.
NORMAL_ROUNDOFFS = 16.0

#: float32 normals: the draws have 24 bits, and nothing asks for normals of float64 parameters to be finer.
NORMAL_UNIT = 2.0**-24

#: Decisions within this many roundoffs of their terms are near ties even when the moments are exact: two constants
#: rounded, two products, one sum, one square.
CLASS_ROUNDOFFS = 6.0

#: Near ties have probability about 1e-6 a decision in lock step and 1e-5 after 20 free steps; more than this share
#: (or more than TIES_FLOOR in a short run) means that the decision itself is off.
TIES_SHARE = 1e-3
TIES_FLOOR = 2

#: Statistics are float64 sums of partial sums in the arithmetic type: at most 256 additions a lane (tiles of 4096
#: elements, 16 lanes), and a product.
SUM_ROUNDOFFS = 258.0

#: A threshold is float64 arithmetic on counts: identical but for the order of three operations, over tens of steps.
THRESHOLD = 64 * 2.0**-53

#: torch.optim in the same arithmetic, one step: the two differ in the order of about ten operations (torch divides by
#: bias corrections where the kernel multiplies), each good to half an ulp of its terms.
PEER_ULPS = 8


def peer_error(steps: int) -> float:
    """Of float32 weights of up to 2 after some steps beside torch.optim's: each step adds its own difference."""
    return steps * PEER_ULPS * UNIT["float32"] * 2.0


#: Of a mean of draws: standard errors that hundreds of comparisons exceed with a probability of 1e-6 (a normal beyond
#: six of them has 2e-9). Draws are those of a fixed seed, so a test that passes once passes always.
SIGMAS = 6.0


def rest_error(size: Any, bits: int, least: int) -> Any:
    """Of a weight of ``size`` that is kept as the nearest number of ``bits`` significand bits and the nearest to what
    that took: half a unit of the rest, which is at most half a unit of the weight; or half the smallest subnormal."""
    return size * 2.0 ** (-2 * bits) + 2.0 ** (least - bits)


#: int8 moments rounded to nearest: half of one of sixteen steps in a power of two, relative to the value.
INT8_NEAREST = 1 / 32

#: bfloat16 to nearest: half a unit of 8 significand bits.
BFLOAT16_NEAREST = 2.0**-8
