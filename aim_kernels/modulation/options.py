"""What the options of :class:`AIM` may be, and how strengths follow a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

from aim_kernels.modulation.prototypes import POOLS

#: How many standard errors of an excess count as chance by default, by rule.
CONFIDENCE = {"gap": 3.0, "ratio": 0.0}

CHOICES: dict[str, tuple[str, ...]] = {
    "decouple": ("dominant", "all"),
    "mixing": ("alternate", "split", "weights", "features"),
    "probe": ("prototypes", "linear", "gradients"),
    "rule": ("gap", "ratio"),
    "init": ("noise", "mean"),
    "coefficients": ("chain", "straight-through", "step"),
    "pool": tuple(POOLS),
    "learn_dominant_in_aux": ("none", "under"),
    "probability": ("strength",),
    "head_from": ("average", "true", "auxiliary"),
}

_OR_CALLABLE = ("probe", "pool")


def check_choices(**options: object) -> None:
    """Raises ValueError, naming the option and what it may be."""
    for option, value in options.items():
        if callable(value) and option in _OR_CALLABLE:
            continue
        if value not in CHOICES[option]:
            names = ", ".join(repr(name) for name in CHOICES[option])
            suffix = " or a callable" if option in _OR_CALLABLE else ""
            raise ValueError(f"unknown {option} {value!r}; it is one of {names}{suffix}")


def check_finite(**numbers: float | None) -> None:
    """Raises ValueError on a number that is negative, infinite or not a number; None passes."""
    for name, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number >= 0.0):
            raise ValueError(f"{name} must be a finite number >= 0, got {number}")


def check_at_least(**counts: tuple[int, int]) -> None:
    """Raises ValueError where a count, given as ``(count, least)``, is below its least."""
    for name, (count, least) in counts.items():
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")


def factor_at(schedule: Callable[[int], float] | None, update: int) -> float:
    """What multiplies every strength in an update; ValueError where a schedule gives no factor in [0, 1]."""
    factor = 1.0 if schedule is None else float(schedule(update))
    if not 0.0 <= factor <= 1.0:
        raise ValueError(f"schedule({update}) returned {factor}; a factor lies in [0, 1]")
    return factor
