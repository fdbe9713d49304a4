"""The compiled extensions, ``_C`` and ``_cuda``. The package works without either."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def load(name: str) -> tuple[Any, str]:
    """An extension, and an empty text; or None, and why it does not load."""
    try:
        return importlib.import_module(f"aim_kernels.{name}"), ""
    except ImportError as error:
        return None, str(error)
