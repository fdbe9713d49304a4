"""Arguments that are numbers, of functions that say so in their annotations: strings among them are refused by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
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
