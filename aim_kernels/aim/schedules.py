"""Schedules: the factor on every strength, by the number of the update."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aim_kernels.aim.options import chosen
from aim_kernels.step.arguments import check_at_least, check_fields


@dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """A factor in [0, 1] per update. It rises linearly from 0 in update 0 to 1 in update ``warmup_updates``, times
    :meth:`after_warmup`.

    Raises ValueError for a negative ``warmup_updates``.
    """

    warmup_updates: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least("warmup_updates", self.warmup_updates, 0)

    def __call__(self, update: int) -> float:
        """The factor of an update, counted from 0."""
        rise = min(update / self.warmup_updates, 1.0) if self.warmup_updates else 1.0
        return rise * self.after_warmup(update)

    @abc.abstractmethod
    def after_warmup(self, update: int) -> float:
        """The factor without the warm-up."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """1 in every update after the warm-up."""

    def after_warmup(self, update: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Ending(Schedule, abc.ABC):
    """From 1 at the end of the warm-up to 0 in the last update, ``total_updates - 1``, and 0 from there on.

    Raises ValueError for a schedule that ends before its warm-up does.
    """

    total_updates: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_updates < self.warmup_updates + 2:
            raise ValueError(
                f"total_updates must be at least warmup_updates + 2, got {self.total_updates} and {self.warmup_updates}"
            )

    def after_warmup(self, update: int) -> float:
        return self.falling(
            min(max(update - self.warmup_updates, 0) / (self.total_updates - 1 - self.warmup_updates), 1.0)
        )

    @abc.abstractmethod
    def falling(self, way: float) -> float:
        """The factor after this share of the updates, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class LinearOut(Ending):
    """``1 - way``: see :class:`Ending`."""

    def falling(self, way: float) -> float:
        return 1.0 - way


@dataclass(frozen=True, kw_only=True)
class CosineOut(Ending):
    """``(1 + cos(pi * way)) / 2``: see :class:`Ending`."""

    def falling(self, way: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * way))


@dataclass(frozen=True, kw_only=True)
class CustomSchedule(Schedule):
    """``function(update) -> factor``; each factor outside of [0, 1] raises ValueError."""

    function: Callable[[int], float] = field()

    def after_warmup(self, update: int) -> float:
        given = float(self.function(update))
        if not 0.0 <= given <= 1.0:
            raise ValueError(f"schedule({update}) returned {given}; a factor lies in [0, 1]")
        return given


#: Schedules that a name stands for.
SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant}


def as_schedule(schedule: Any) -> Schedule:
    """A schedule of what :class:`AIM` takes for one: an object, a name, or a callable.

    Raises ValueError for an unknown name, and for one that needs ``total_updates``.
    """
    ending: dict[object, str] = {"linear-out": "LinearOut", "cosine-out": "CosineOut"}
    if isinstance(schedule, str) and schedule in ending:
        raise ValueError(
            f"schedule={schedule!r} ends with training; give {ending[schedule]}(total_updates=...), the "
            "number of updates"
        )
    if callable(schedule) and not isinstance(schedule, (Schedule, type)):
        return CustomSchedule(function=schedule)
    return chosen("schedule", schedule, SCHEDULES, Schedule, " or a callable")
