"""Checks of the options of :class:`AIM`, and schedules of strengths."""

from __future__ import annotations

import math
from collections.abc import Callable

from aim_kernels.aim.prototypes import POOLS

#: How many standard errors of an excess count as chance by default, by rule.
CONFIDENCE = {"gap": 3.0, "ratio": 0.0, "margin": 3.0, "trial": 3.0}

CHOICES: dict[str, tuple[str, ...]] = {
    "decouple": ("dominant", "all"),
    "mixing": ("alternate", "split", "weights", "features"),
    "probe": ("prototypes", "linear", "gradient-norm", "gradients"),
    "rule": ("gap", "ratio", "margin", "trial"),
    "targets": ("classes", "quantiles"),
    "schedule": ("constant", "linear-out", "cosine-out"),
    "init": ("noise", "mean"),
    "coefficients": ("chain", "straight-through", "step"),
    "pool": tuple(POOLS),
    "learn_dominant_in_aux": ("none", "under"),
    "hold": ("fade", "freeze"),
    "probability": ("strength",),
    "head_from": ("average", "true", "auxiliary"),
}

_OR_CALLABLE = ("probe", "pool", "schedule")

#: What multiplies every strength, by the number of the update.
Schedule = Callable[[int], float]


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


def schedule_of(schedule: str | Schedule, total_updates: int | None, warmup_updates: int) -> Schedule:
    """The factor of every update.

    It rises linearly from 0 in update 0 to 1 in update ``warmup_updates``. From there on "constant" stays at 1,
    "linear-out" and "cosine-out" fall to 0 in the last update, ``total_updates - 1``, and stay there; a callable
    multiplies what the warm-up gives.

    Raises ValueError: a schedule that ends without ``total_updates``, or one that ends before its warm-up does.
    """
    if schedule in ("linear-out", "cosine-out"):
        if total_updates is None:
            raise ValueError(f"schedule={schedule!r} ends with training; give total_updates, the number of updates")
        if total_updates < warmup_updates + 2:
            raise ValueError(
                f"total_updates must be at least warmup_updates + 2, got {total_updates} and {warmup_updates}"
            )

    def factor(update: int) -> float:
        value = min(update / warmup_updates, 1.0) if warmup_updates else 1.0
        if callable(schedule):
            given = float(schedule(update))
            if not 0.0 <= given <= 1.0:
                raise ValueError(f"schedule({update}) returned {given}; a factor lies in [0, 1]")
            return value * given
        if total_updates is None or schedule == "constant":
            return value
        way = min(max(update - warmup_updates, 0) / (total_updates - 1 - warmup_updates), 1.0)
        return value * (1.0 - way if schedule == "linear-out" else 0.5 * (1.0 + math.cos(math.pi * way)))

    return factor
