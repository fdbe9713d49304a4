"""What rules, mixings and trials ask of AIM, so that they need not import it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Generator, nn

from aim_kernels.aim.inputs import Inputs, Layout
from aim_kernels.aim.strengths import ModulationTable


class Modulator(Protocol):
    """``AIM``, seen from the modules of this folder."""

    model: nn.Module
    wrapped: nn.Module
    optimizer: Any
    scoring: Any
    layout: Layout
    probe: Any
    mixing: Any
    mixing_state: Any
    decouple: Any
    alpha: float
    depths: dict[str, int]
    modalities: tuple[str, ...]
    held_back: frozenset[str]
    history: list[ModulationTable]
    updates: int
    generator: Generator

    def measuring(self, inputs: Inputs, *, refresh: bool = False) -> AbstractContextManager[None]: ...
    @property
    def degrades_weights(self) -> bool: ...
    def remember(self) -> Callable[[], None]: ...
