"""``AIMZeroRedundancyOptimizer``: torch's ``ZeroRedundancyOptimizer`` around ``AIMFusedOptimizer``.

Every process keeps the states of some parameters, steps those, and sends them to the others. What torch's class knows
nothing of is added: thresholds and statistics of whole groups, live and true weights, and a checkpoint that has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from aim_kernels.optim.groups import Members, check, check_ordered, listed
from aim_kernels.optim.optimizer import AIMFusedOptimizer
from aim_kernels.step.options import DEFAULT_RULE, WHOLE, neutral
from aim_kernels.step.sharding import number_parameters
from aim_kernels.step.tables import KEYS, Tables


class AIMZeroRedundancyOptimizer(ZeroRedundancyOptimizer):
    """``AIMFusedOptimizer`` with its states spread over the processes of a group, whose modules are equal (DDP).

    Args:
        params: as of :class:`AIMFusedOptimizer`.
        process_group: None means all processes.
        parameters_as_bucket_view: as of ``ZeroRedundancyOptimizer``.
        options: those of :class:`AIMFusedOptimizer`.

    It is used as one: strengths, rows, ``eval``, ``train``, ``statistics`` and :class:`~aim_kernels.AIM` are there. All
    processes make the same calls. A checkpoint is what ``state_dict()`` returns after ``consolidate_state_dict(to)``,
    on rank ``to``; every rank loads it. ``overlap_with_ddp`` is not supported.
    """

    optim: AIMFusedOptimizer

    def __init__(
        self,
        params: Iterable[Any],
        process_group: Any = None,
        parameters_as_bucket_view: bool = False,
        **options: Any,
    ) -> None:
        group = torch.distributed.group.WORLD if process_group is None else process_group
        own = {option.name: options.pop(option.name) for option in WHOLE if option.name in options}
        make: Any = functools.partial(AIMFusedOptimizer, process_group=group, **own)
        check_ordered(params)
        members = list(params)
        dicts = [entry for entry in members if isinstance(entry, dict)]
        for entry in dicts:
            listed(entry)
            _refuse_names(entry["params"])
        _refuse_names(members)
        before = [dict(entry) for entry in dicts]
        for entry in dicts:
            _fill_in_neutral(entry, options)
        grouped = chain.from_iterable(entry["params"] if isinstance(entry, dict) else [entry] for entry in members)
        number_parameters(grouped)
        self._members = Members()
        try:
            super().__init__(members, make, group, parameters_as_bucket_view, **options)
        except Exception:
            # torch has written options into them that may be what is wrong.
            for entry, own in zip(dicts, before, strict=True):
                entry.clear()
                entry.update(own)
            raise
        # Also where this process has no parameters: what it exchanges must be where the others' is.
        self.optim.tables.to(self._default_device)  # type: ignore[attr-defined]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, on all processes."""
        listed(param_group)
        _refuse_names(param_group["params"])
        if self.initialized:
            # Here, since torch adds it to the groups of all processes before the optimizer of this one sees its part.
            full = self.optim._completed(param_group, len(self.param_groups))
            check(self.optim, self.param_groups, self._members, full)
            _fill_in_neutral(param_group, self.defaults)
        super().add_param_group(param_group)
        if self.initialized:
            number_parameters(chain.from_iterable(group["params"] for group in self.param_groups))

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        """One step of all parameters; ``zero_grad_in_step`` also clears the gradients of those that others step."""
        loss = super().step(closure, **kwargs)
        if self.optim.zero_grad_in_step:
            mine = {p for group in self.optim.param_groups for p in group["params"]}
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            left = [p.grad for p in params if p not in mine and p.grad is not None]
            if left:
                torch._foreach_zero_(left)
        return loss

    # -- what AIMFusedOptimizer has ----------------------------------------------------------------------------------

    def set_strength(self, modality: str, depth: int, kappa: float | Tensor, coefficients: str = "chain") -> None:
        """:meth:`AIMFusedOptimizer.set_strength`."""
        self.optim.set_strength(modality, depth, kappa, coefficients)

    def set_modulation(self, group: int | tuple[str, int], **columns: float | Tensor) -> None:
        """:meth:`AIMFusedOptimizer.set_modulation`."""
        self.optim.set_modulation(group, **columns)

    def set_phase_rows(
        self, group: int, *, true: dict[str, Any] | None = None, aux: dict[str, Any] | None = None
    ) -> None:
        """:meth:`AIMFusedOptimizer.set_phase_rows`."""
        self.optim.set_phase_rows(group, true=true, aux=aux)

    def set_phases(self, probability: float) -> None:
        """:meth:`AIMFusedOptimizer.set_phases`."""
        self.optim.set_phases(probability)

    @property
    def phase(self) -> str:
        """:attr:`AIMFusedOptimizer.phase`."""
        return self.optim.phase

    @property
    def max_grad_norm(self) -> float | None:
        """``max_grad_norm`` of :class:`AIMFusedOptimizer`; may be set between steps."""
        return self.optim.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self.optim.max_grad_norm = value

    @property
    def zero_grad_in_step(self) -> bool:
        """``zero_grad_in_step`` of :class:`AIMFusedOptimizer`; may be set between steps."""
        return self.optim.zero_grad_in_step

    @zero_grad_in_step.setter
    def zero_grad_in_step(self, value: bool) -> None:
        self.optim.zero_grad_in_step = value

    @property
    def grad_norm(self) -> Tensor | None:
        """:attr:`AIMFusedOptimizer.grad_norm`, of the gradients of all processes' parameters."""
        return self.optim.grad_norm

    @property
    def holds_true_weights(self) -> bool:
        """:attr:`AIMFusedOptimizer.holds_true_weights`."""
        return self.optim.holds_true_weights

    @property
    def tables(self) -> Tables:
        """Rows, statistics and control, which are equal on all processes."""
        return self.optim.tables

    def modulation(self) -> list[dict[str, Any]]:
        """:meth:`AIMFusedOptimizer.modulation`."""
        return self.optim.modulation()

    def statistics(self) -> list[dict[str, Any]]:
        """:meth:`AIMFusedOptimizer.statistics`, of whole groups."""
        rows = self.optim.statistics()
        for row, group in zip(rows, self.param_groups, strict=True):
            row["numel"] = sum(p.numel() for p in group["params"])
        return rows

    def eval(self) -> None:
        """Puts the true weights into the module, on all processes."""
        self.optim.eval()
        self._sync_params()  # type: ignore[attr-defined]

    def train(self) -> None:
        """Puts the live weights back, on all processes."""
        self.optim.train()
        self._sync_params()  # type: ignore[attr-defined]

    def adopt_loaded(self, loaded: Callable[[Tensor], bool] = lambda _p: True) -> None:
        """:meth:`AIMFusedOptimizer.adopt_loaded`; every process takes what is its own."""
        self.optim.adopt_loaded(loaded)

    @property
    def replaces_saved_weights(self) -> bool:
        """:attr:`AIMFusedOptimizer.replaces_saved_weights`."""
        return self.optim.replaces_saved_weights

    @contextmanager
    def true_parameters(self) -> Iterator[None]:
        """The true weights inside, what was there before after."""
        was_true = self.optim._weights.holds_true
        self.eval()
        try:
            yield
        finally:
            if not was_true:
                self.train()

    @contextmanager
    def ema_parameters(self) -> Iterator[None]:
        """:meth:`AIMFusedOptimizer.ema_parameters`, on all processes."""
        try:
            with self.optim.ema_parameters():
                self._sync_params()  # type: ignore[attr-defined]
                yield
        finally:
            self._sync_params()  # type: ignore[attr-defined]

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The consolidated states, with rows, statistics and control as :meth:`AIMFusedOptimizer.state_dict` has them.

        Raises:
            RuntimeError: nothing was consolidated to this rank.
        """
        state_dict: dict[str, Any] = super().state_dict()
        local: dict[str, Any] = self._all_state_dicts[0]  # type: ignore[attr-defined]
        # Tables are equal on all ranks.
        for group, saved in zip(state_dict["param_groups"], local["param_groups"], strict=True):
            group.update({name: saved[name] for name in KEYS})
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of :class:`AIMFusedOptimizer`; every rank takes what is its own."""
        saved_groups = state_dict["param_groups"]
        if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the checkpoint has other param groups, or groups of other sizes, than the optimizer")
        pairs = zip(self.param_groups, saved_groups, strict=True)
        key_of = {p: key for group, saved in pairs for p, key in zip(group["params"], saved["params"], strict=True)}
        groups = [
            {**saved, "params": [key_of[p] for p in local["params"]]}
            for saved, local in zip(saved_groups, self.optim.param_groups, strict=True)
        ]
        for group in groups:
            group.pop("param_names", None)  # they are of all processes' parameters
        elsewhere = set(key_of.values()).difference(*(group["params"] for group in groups))
        state = {key: value for key, value in state_dict["state"].items() if key not in elsewhere}
        self.optim.load_state_dict({"state": state, "param_groups": groups})
        self._sync_param_groups(self.optim.param_groups, self.param_groups)  # type: ignore[attr-defined]
        self._sync_params()  # type: ignore[attr-defined]


def _refuse_names(params: list[Any]) -> None:
    if any(isinstance(entry, tuple) for entry in params):
        raise TypeError(
            "params: ZeroRedundancyOptimizer takes no names, pass parameters() instead of named_parameters()"
        )


def _fill_in_neutral(param_group: dict[str, Any], given: dict[str, Any]) -> None:
    """Sets the options that were given for all groups, and that this one's rule does not know, to their defaults:
    torch's class would write them into the group."""
    for name, default in neutral(param_group.get("rule", given.get("rule", DEFAULT_RULE))).items():
        if name in given:
            param_group.setdefault(name, default)
