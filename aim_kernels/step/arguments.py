"""Checks of arguments: numbers, of functions that say so in their annotations, and the few checks that options share.

Every error names the argument. ``check_real``, ``check_whole``, ``check_flag`` and ``check_number``: validation.py.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from aim_kernels.step.validation import check_flag, check_real, check_whole

P = ParamSpec("P")
T = TypeVar("T")

_CHECKS: dict[str, Callable[[str, Any], object]] = {"float": check_real, "int": check_whole, "bool": check_flag}


def numbers_checked(function: Callable[P, T]) -> Callable[P, T]:
    """Raises ValueError, naming the argument, where one is annotated as float, int or bool, perhaps beside other types
    (``float | None``), and is a string, or anything else that is none of these."""
    types = {
        name: [type_name.strip() for type_name in _annotation(parameter).split("|")]
        for name, parameter in inspect.signature(function).parameters.items()
    }
    checked = {name: names for name, names in types.items() if any(k in _CHECKS or _of_several(k) for k in names)}

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        for name in checked.keys() & given.keys():
            _check(name, given[name], checked[name])
        return function(*args, **kwargs)

    return wrapper


def _check(name: str, value: Any, types: list[str]) -> None:
    if value is None and "None" in types:
        return
    if isinstance(value, str) and "str" in types:
        return
    if any(map(_of_several, types)) and not isinstance(value, (int, float)):
        if isinstance(value, str):
            raise ValueError(f"{name}: expected numbers, got {value!r}, a string")
        for number, each in enumerate(value):
            check_real(f"{name}[{number}]", each)
        return
    for type_name in types:
        if type_name in _CHECKS:
            _CHECKS[type_name](name, value)


def _of_several(type_name: str) -> bool:
    return type_name.startswith(("Sequence[float", "tuple[float"))


def _annotation(parameter: inspect.Parameter) -> str:
    found = parameter.annotation
    return found if isinstance(found, str) else getattr(found, "__name__", str(found))


def check_fields(options: Any) -> None:
    """:func:`numbers_checked`, of a dataclass's fields: for its ``__post_init__``."""
    for field in dataclasses.fields(options):
        types = [type_name.strip() for type_name in str(field.type).split("|")]
        if any(k in _CHECKS or _of_several(k) for k in types):
            _check(field.name, getattr(options, field.name), types)


def check_choice(name: str, value: object, choices: Sequence[str], or_else: str = "") -> None:
    """Raises ValueError unless ``value`` is one of ``choices``; ``or_else``: what else the option takes."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; it is one of {', '.join(map(repr, choices))}{or_else}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises ValueError on a number below ``least``, and on NaN."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_within(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError on a number outside of ``[low, high]``, and on NaN."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def check_finite(name: str, value: float) -> None:
    """Raises ValueError on a number that is negative, infinite or NaN."""
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
