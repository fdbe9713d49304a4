"""Hooks on a model that trains on live weights: what must not be done with those is said, and weights that are loaded
are kept."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from aim_kernels.aim.interface import Modulator

REMEDY = "call optimizer.eval() before and optimizer.train() after, or use Method.evaluating() or a callback"

_MEASURING: ContextVar[bool] = ContextVar("measuring", default=False)


@contextlib.contextmanager
def measuring_live() -> Iterator[None]:
    """Live weights are evaluated inside on purpose, which is not warned of."""
    token = _MEASURING.set(True)
    try:
        yield
    finally:
        _MEASURING.reset(token)


class LiveWatch:
    """Warns once each where a model with live (degraded) weights is evaluated, saved, or averaged by a copy of it, and
    hands weights that ``load_state_dict`` writes to the optimizer, which would put its own over them.

    Hooks hold no reference to AIM; one on a copy of the model looks for averages alone.
    """

    def __init__(self, aim: Modulator) -> None:
        self._aim: weakref.ref[Modulator] = weakref.ref(aim)
        self.said: set[str] = set()
        model = aim.model
        self.handles = [
            model.register_forward_pre_hook(_Hook(self.evaluated, _Copied(self._aim))),
        ]
        # Also of parts of the model, which people load and save by themselves.
        for module in model.modules():
            self.handles += [
                module.register_state_dict_pre_hook(_Hook(self.saved)),
                module.register_load_state_dict_pre_hook(_Hook(self.loading)),
                module.register_load_state_dict_post_hook(_Hook(self.loaded)),
            ]
        self._loading: weakref.ref[nn.Module] | None = None

    def evaluated(self, model: nn.Module, _args: Any) -> None:
        if not torch.compiler.is_compiling() and not model.training and not _MEASURING.get() and self._live():
            self.warn("evaluated", "the model is evaluated with live weights, in which a modality may be degraded")

    def saved(self, _model: nn.Module, *_args: Any) -> None:
        aim = self._aim()
        if self._live() and aim is not None and not aim.optimizer.replaces_saved_weights:
            self.warn("saved", "the model's state_dict has live weights, in which a modality may be degraded")

    def loading(self, module: nn.Module, _state_dict: Any, prefix: str, *_args: Any) -> None:
        if not prefix:  # the module of which load_state_dict was called
            self._loading = weakref.ref(module)

    def loaded(self, module: nn.Module, _incompatible: Any) -> None:
        aim = self._aim()
        if aim is None or self._loading is None or self._loading() is not module:
            return
        self._loading = None
        inside = set(map(id, module.parameters()))
        aim.optimizer.adopt_loaded(lambda p: id(p) in inside)

    def warn(self, kind: str, what: str) -> None:
        """Says it once."""
        if kind not in self.said:
            self.said.add(kind)
            warnings.warn(f"{what}: {REMEDY}", stacklevel=5)

    def _live(self) -> bool:
        aim = self._aim()
        return aim is not None and not aim.optimizer.holds_true_weights and aim.degrades_weights


class _Hook:
    """A hook that a copy of its model replaces by another, or by one that does nothing."""

    def __init__(self, function: Any, copied: Any = None) -> None:
        self._function, self._copied = function, copied

    def __call__(self, *args: Any) -> None:
        self._function(*args)

    def __deepcopy__(self, _memo: Any) -> _Hook:
        return _Hook(_nothing if self._copied is None else self._copied.begun())

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


class _Copied:
    """On a copy of the model: whether it averages live weights (AveragedModel, an EMA of one's own)."""

    def __init__(self, aim: weakref.ref[Modulator], *, of_live_weights: bool = False) -> None:
        self._aim = aim
        self._of_live_weights = of_live_weights
        self._said = False

    def begun(self) -> _Copied:
        """A new one for another copy."""
        aim = self._aim()
        live = aim is not None and aim.degrades_weights and not aim.optimizer.holds_true_weights
        return _Copied(self._aim, of_live_weights=live)

    def __deepcopy__(self, _memo: Any) -> _Copied:
        return self.begun()

    def __reduce__(self) -> Any:
        return _nothing_of, ()

    def __call__(self, model: nn.Module, _args: Any) -> None:
        if self._said or torch.compiler.is_compiling() or model.training:
            return
        aim = self._aim()
        weights = list(model.parameters())
        # Averages are written in place, without gradients; a copy that is trained has some.
        written = any(p._version > 1 for p in weights) and all(p.grad is None for p in weights)
        if self._of_live_weights and not any(p._version > 1 for p in weights):
            self._said = True
            warnings.warn(
                "this copy of the model was taken while it held live weights, in which a modality may be degraded; "
                "copy it inside optimizer.true_parameters()",
                stacklevel=4,
            )
            return
        if written and aim is not None and aim.degrades_weights and not aim.optimizer.holds_true_weights:
            self._said = True
            warnings.warn(
                "a copy of the model has been written to while the model trained on live weights, in which a modality "
                "may be degraded; if it averages them, use ema_decay= and optimizer.ema_parameters(), or average "
                "inside optimizer.true_parameters()",
                stacklevel=4,
            )


def _nothing(*_args: Any) -> None:
    """A hook that does nothing."""


def _nothing_of() -> Any:
    return _nothing
