"""Pickles of arrays, read without running what they name.

A pickle is a program: ``pickle.load`` calls every function that the file names. Here it can call none. Numbers,
strings, lists, tuples, sets and dictionaries are read as they are; of NumPy's arrays, types and scalars the pickle only
fills stand-ins of this module, from which arrays are built with every size checked. Any other name is refused.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


class _Kind:
    """Stands for a ``numpy.dtype``: a plain number, bool, string, bytes or object."""

    def __init__(self, spec: Any = None, *_: Any) -> None:
        if not isinstance(spec, str):
            raise pickle.UnpicklingError(f"a type of array elements that is not plain: {spec!r}")
        self.kind = np.dtype(spec)
        if self.kind.kind not in "biufcSUO" or self.kind.subdtype is not None:
            raise pickle.UnpicklingError(f"array elements of the type {spec!r}")

    def __setstate__(self, state: Any) -> None:
        order, shape, names = state[1], state[2], state[3]
        if shape is not None or names is not None:
            raise pickle.UnpicklingError("array elements with fields")
        size = state[5]
        if self.kind.kind in "SU" and isinstance(size, int) and size >= 0:
            self.kind = np.dtype(f"{self.kind.kind}{size // (4 if self.kind.kind == 'U' else 1)}")
        if order in ("<", ">"):
            self.kind = self.kind.newbyteorder(order)


class _Array:
    """Stands for a ``numpy.ndarray``."""

    value: NDArray[Any] | None = None  # a pickle may leave it at that

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.value = _filled(content, kind, shape, "F" if fortran else "C")


def _filled(content: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    if not isinstance(kind, _Kind) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array without a type or an order")
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise pickle.UnpicklingError(f"an array of the shape {shape!r}")
    if kind.kind.hasobject:
        if not isinstance(content, list):
            raise pickle.UnpicklingError("an array of objects that is not a list")
        flat = np.empty(len(content), dtype=object)
        for k, part in enumerate(content):
            flat[k] = part
        return flat.reshape(sizes, order=order)
    if isinstance(content, str):
        content = content.encode("latin-1")  # bytes as Python 2 wrote them
    if kind.kind.itemsize == 0:
        return np.zeros(sizes, kind.kind)
    return np.frombuffer(content, dtype=kind.kind).reshape(sizes, order=order)


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> NDArray[Any]:
    """Protocol 5; the order "K" is that of ``axes``, the shape then that of before they were exchanged."""
    return _filled(content, kind, shape, "C").transpose(axes) if order == "K" else _filled(content, kind, shape, order)


def _scalar(kind: Any, content: Any = b"") -> Any:
    if isinstance(kind, _Kind) and kind.kind.hasobject:
        raise pickle.UnpicklingError("a scalar that is an object")
    return _filled(content, kind, (1,), "C")[0]


def _bytes(text: Any, encoding: Any = "") -> bytes:
    """``_codecs.encode`` as the older protocols use it for bytes, and for nothing else."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"an encoding {encoding!r}")
    return text.encode("latin-1")


def _empty() -> bytes:
    """``bytes()`` as the older protocols name it, and with no argument: a number would be a size."""
    return b""


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _bytes,
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, "bytes"): _empty for module in ("builtins", "__builtin__")},
    **{(module, "set"): set for module in ("builtins", "__builtin__")},
    **{(module, "frozenset"): frozenset for module in ("builtins", "__builtin__")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}; only NumPy arrays and plain containers are read, since a pickle could run "
                "anything. If you trust the file, load it yourself and save the arrays with numpy.savez"
            )
        return found


def load(file: BinaryIO) -> Any:
    """What a pickle holds: plain containers, with stand-ins for arrays that :func:`array` and :func:`item` open.

    Raises pickle.UnpicklingError for a name that is not allowed, and what the unpickler raises for broken files.
    """
    return _Unpickler(file, encoding="latin1").load()


def item(path: Path, value: Any, key: str) -> Any:
    """``value[key]``; raises ValueError, with what is there, unless ``value`` is a dictionary that has it."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a dictionary with {key!r}, got {type(value).__name__}")
    if key not in value:
        raise ValueError(f"{path}: expected the key {key!r} among {', '.join(map(str, value))}")
    return value[key]


def array(path: Path, value: Any) -> NDArray[Any]:
    """The array that ``value`` is or that its nested lists make.

    Raises ValueError for something else, and for lists of arrays of different shapes.
    """
    opened = _opened(value)
    try:
        made = np.asarray(opened)
    except ValueError as error:
        raise ValueError(f"{path}: expected an array, or lists of equal lengths: {error}") from None
    if made.dtype == object and isinstance(value, list):
        raise ValueError(f"{path}: expected an array, got a list of {type(value[0]).__name__ if value else 'nothing'}")
    return made


def _opened(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without content")
        value = value.value
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    return [_opened(part) for part in value] if isinstance(value, (list, tuple)) else value
