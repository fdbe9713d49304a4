"""Hooks on a model's blocks, which copies of the model do not take along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class BlockHook:
    """A hook on a block's forward pass. Copied or pickled it becomes one that does nothing: a copy of AIM installs its
    own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """What the function returns: None, or another output of the block."""
        return self._function(*args)

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Any:
    return _nothing


def _nothing(*_args: Any) -> None:
    """A hook that does nothing."""
