"""Choices of :class:`AIM`: an object with the options of that choice, or the name of one with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from aim_kernels.step.arguments import check_choice

T = TypeVar("T")


def chosen(option: str, value: Any, names: Mapping[str, type[T]], kind: Any, or_else: str = "") -> T:
    """The object that ``value`` is, or that its name stands for.

    Raises ValueError, naming the option, for an unknown name and for a class in place of an object.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, type) and issubclass(value, kind):
        raise ValueError(f"{option} is a class; give an object of it: {option}={value.__name__}()")
    check_choice(option, value, tuple(names), f", or a {kind.__name__} object{or_else}")
    return names[value]()
