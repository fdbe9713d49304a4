"""Types of the native module (python/bindings.cpp)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK: int

def step(
    tensors: NDArray[np.void],
    groups: NDArray[np.void],
    rows: NDArray[np.float64],
    statistics: NDArray[np.float64],
    control: NDArray[np.int64],
    threads: int,
    pool: object = None,
) -> None: ...
def update(
    tensors: NDArray[np.void],
    groups: NDArray[np.void],
    rows: NDArray[np.float64],
    statistics: NDArray[np.float64],
    control: NDArray[np.int64],
    sums: NDArray[np.float64],
    threads: int,
    pool: object = None,
) -> None: ...
def finish(
    groups: NDArray[np.void],
    sums: NDArray[np.float64],
    rows: NDArray[np.float64],
    statistics: NDArray[np.float64],
    control: NDArray[np.int64],
) -> None: ...
def emit(
    tensors: NDArray[np.void],
    groups: NDArray[np.void],
    rows: NDArray[np.float64],
    threads: int,
    pool: object = None,
) -> None: ...
def squares(tensors: NDArray[np.void], threads: int, pool: object = None) -> float: ...
def check(tensors: NDArray[np.void], groups: NDArray[np.void]) -> None: ...

class Watch:
    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        params: list[Any],
        idle: list[bool],
        strides: list[tuple[int, ...]],
        states: dict[Any, Any],
        keys: list[Any],
        names: list[list[str] | None],
        values: list[list[Any]],
        distributed: object,
        describe: Callable[..., Any],
        is_negative: Callable[..., Any],
        quick: object,
    ) -> None: ...
    def read(self, addresses: NDArray[np.uint64], odd: NDArray[np.bool_], grads: list[Any]) -> bool: ...
    def sees(self, other: Watch) -> bool: ...

def stream_runs(
    runs: NDArray[np.void], numel: int, chunk: int, add: int, threads: int, pool: object = None
) -> None: ...
def stream(
    tensors: NDArray[np.void],
    live: bool,
    nontemporal: bool,
    chunk: int,
    factor: float,
    threads: int,
    pool: object = None,
) -> None: ...
def isas() -> list[tuple[str, bool, bool]]: ...
def active_isa() -> str: ...
def philox(seed: int, counter: list[int]) -> list[int]: ...
def build_info() -> dict[str, Any]: ...
def layout() -> dict[str, Any]: ...
