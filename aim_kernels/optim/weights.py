"""Live and true weights: which of them a module holds, when masters come to be and when they leave."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aim_kernels.backends import select
from aim_kernels.backends.device import capturing
from aim_kernels.optim import resets, torch_compile
from aim_kernels.optim.preparation import ensure_group_states, sync_with_module
from aim_kernels.step import sharding, validation
from aim_kernels.step.inputs import StepInputs
from aim_kernels.step.layout import ROW
from aim_kernels.step.plan import StepPlan, adopts_edits
from aim_kernels.step.states import adopt_edits, keeps_master, store_weights, weights_of
from aim_kernels.step.supported import is_estimated

if TYPE_CHECKING:
    from aim_kernels.optim.interface import FusedOptimizer


class HeldWeights:
    """The weights that the module of an optimizer holds.

    Attributes:
        holds_true: the true weights are there on request, after ``eval()`` and until ``train()``.
        holds_averages: averages are, inside of ``ema_parameters()``.
        in_true_pass: true weights are, until the next step, or may be.
        known: masters, known also after their states are gone.
        leaving: groups whose masters the next step makes superfluous.
        replaces_saved: a callback puts the true weights into state dicts of the module.
    """

    def __init__(self, optimizer: FusedOptimizer, *, holds_true: bool = False, in_true_pass: bool = False) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.holds_true, self.holds_averages, self.in_true_pass = holds_true, False, in_true_pass
        self.known = resets.Masters()
        self.leaving: set[int] = set()
        self.replaces_saved = False

    @property
    def optimizer(self) -> FusedOptimizer:
        """Whose weights these are."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @torch.no_grad()
    def eval(self) -> None:
        self.refuse_averages("eval()")
        if self.holds_true:
            return
        self.optimizer._refuse_open_step("eval()")
        self.restore_astray()
        self.adopt_edits()
        masters = self.present()
        for p, master in masters:
            p.copy_(master)
        self.holds_true = True
        sharding.reshard_all(p for p, _ in masters)

    @torch.no_grad()
    def train(self) -> None:
        self.refuse_averages("train()")
        if not self.holds_true:
            return
        self.optimizer._refuse_open_step("train()")
        sync_with_module(self.optimizer)
        self.adopt_edits()
        self.emit()
        self.holds_true = False

    @contextmanager
    def true_parameters(self) -> Iterator[None]:
        was_true = self.holds_true
        self.eval()
        try:
            yield
        finally:
            if not was_true:
                self.train()

    @contextmanager
    def ema_parameters(self) -> Iterator[None]:
        self.refuse_averages("ema_parameters()")
        with self.true_parameters(), torch.no_grad():
            params = [
                p for group in self.optimizer.param_groups for p in group["params"] if group["ema_decay"] is not None
            ]
            averaged = [(p, self.optimizer.state[p]["ema"]) for p in params if "ema" in self.optimizer.state.get(p, ())]
            before = [sharding.local_of(p).detach().clone() for p, _ in averaged]
            self.holds_averages = True
            try:
                for p, ema in averaged:
                    p.copy_(ema)
                sharding.reshard_all(p for p, _ in averaged)
                with torch.enable_grad():
                    yield
            finally:
                self.holds_averages = False
                for (p, _), values in zip(averaged, before, strict=True):
                    sharding.local_of(p).copy_(values)
                sharding.reshard_all(p for p, _ in averaged)

    def refuse_passes(self) -> None:
        if self.optimizer._release is not None:
            raise RuntimeError(
                "the optimizer steps inside backward (step_in_backward), which would step in the first of two passes: "
                "call release.remove()"
            )
        self.refuse_true()

    @torch.no_grad()
    def begin_true_pass(self) -> None:
        self.restore_astray()
        self.adopt_edits()
        masters = self.present()
        for p, master in masters:
            p.copy_(master)
        self.in_true_pass = bool(masters)
        sharding.reshard_all(p for p, _ in masters)

    @torch.no_grad()
    def begin_live_pass(self) -> None:
        if self.in_true_pass:
            self.adopt_edits()
            self.emit()

    @torch.no_grad()
    def masters(self) -> dict[Tensor, Tensor]:
        self.adopt_edits()
        return dict(self.present())

    def emit(self) -> None:
        """Writes the live weights of the masters into the module."""
        self.restore_astray()
        self.in_true_pass = False
        masters = self.present()
        if not masters or any(is_estimated(p) for p, _ in masters):
            return
        sync_with_module(self.optimizer)
        for number, group in enumerate(self.optimizer.param_groups):  # whatever somebody has deleted begins anew
            states = ((p, self.optimizer.state.get(p, {})) for p in group["params"])
            params = [p for p, state in states if "master" in state and "step" in state]
            ensure_group_states(
                self.optimizer, group, params, live=self.optimizer._tables.has_live_weights(number), masters=False
            )
        plan = self.optimizer._plan_of_states()
        backend = select(self.optimizer.backend, self.optimizer.tables.rows.device)
        plan.read_hyperparameters(StepInputs(), on_device=backend.ON_DEVICE)
        backend.emit(plan)
        torch.autograd.graph.increment_version([p for p, _ in masters])
        sharding.reshard_all(p for p, _ in masters)

    def restore_astray(self) -> list[Tensor]:
        return resets.restore(self.optimizer)

    def adopt_edits(self) -> None:
        """Masters take what was written to the module since the last step while it held undegraded weights, as the next
        step's kernel would. By value, since writes through ``.data`` leave no trace; waits for no device."""
        if self.holds_averages:
            return
        tables = self.optimizer.tables
        for number, group in enumerate(self.optimizer.param_groups):
            if not any("master" in self.optimizer.state.get(p, ()) and not is_estimated(p) for p in group["params"]):
                continue
            emitted = tables.rows[number, ROW["emitted_under"] : ROW["emitted_well"] + 1]
            undegraded = None if self.holds_true else (emitted == 1.0).all()
            if undegraded is not None and undegraded.device.type == "cpu" and not undegraded:
                continue
            for p in group["params"]:
                master = self.optimizer.state.get(p, {}).get("master")
                if master is None:
                    continue
                if undegraded is None or adopts_edits(tables, number, group, p):
                    adopt_edits(p, master, undegraded)

    @torch.no_grad()
    def adopt_loaded(self, loaded: Callable[[Tensor], bool]) -> None:
        """Masters take what ``load_state_dict`` has written to their parameters, unless these are the live weights: a
        checkpoint of live weights does not become the true ones."""
        if self.holds_true or self.holds_averages:
            return  # adopted by the next train()
        masters = [(p, master) for p, master in self.present() if loaded(p) and not is_estimated(p)]
        if not masters:
            return
        here = [sharding.local_of(p).detach().clone() for p, _ in masters]
        self.emit()
        adopted = False
        for (p, master), values in zip(masters, here, strict=True):
            local = sharding.local_of(p).detach()
            if not torch.equal(local, values):
                local.copy_(values)
                adopt_edits(p, master)
                adopted = True
        if adopted:
            self.emit()

    def present(self) -> list[tuple[Tensor, Tensor]]:
        found = [
            (p, master)
            for group in self.optimizer.param_groups
            for p in group["params"]
            if (master := self.optimizer.state.get(p, {}).get("master")) is not None
        ]
        if any(getattr(master, "shape", None) != p.shape for p, master in found):
            validation.check_states(self.optimizer.param_groups, self.optimizer.state)
        return found

    def refuse_averages(self, call: str) -> None:
        if self.holds_averages:
            raise RuntimeError(
                f"the module holds averages (inside optimizer.ema_parameters()); call {call} outside of it"
            )

    def refuse_true(self) -> None:
        self.refuse_averages("step()")
        if self.holds_true and self._trains_on_live():
            raise RuntimeError(
                "the module holds the true weights (after optimizer.eval()); call optimizer.train() before step()"
            )

    def _trains_on_live(self) -> bool:
        groups = range(len(self.optimizer.param_groups))
        return bool(self.present()) or any(map(self.optimizer.tables.has_live_weights, groups))

    def drop_masters(self, plan: StepPlan, inputs: StepInputs, among: set[int] | None = None) -> None:
        """Where no phase degrades weights any more, the live weights just written are the true ones. ``among``: groups
        of which the step knew it; others wait for the next one."""
        leaving = self.leaving if among is None else self.leaving & among
        if not leaving or capturing(self.optimizer.tables.rows.device):
            return  # a graph that is captured goes on writing masters
        # A device may have skipped the step. Masters leave rarely enough to wait for its answer.
        if inputs.is_skipped():
            return
        everything = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p, stepped, number in zip(everything, plan.owners, plan.group_of, strict=True):
            group, state = self.optimizer.param_groups[number], self.optimizer.state.get(p, {})
            if number in leaving and "master" in state and not keeps_master(group, p, state):
                # A graph may have handed over a copy of either, and puts it back when all is done.
                master = plan.state[stepped]["master"]
                del state["master"]
                if "step" not in state:  # frozen: the module holds it to the bit
                    del self.optimizer.state[p]
                elif (storage := weights_of(group, p)) not in (None, "stochastic"):
                    store_weights(stepped, state, master, storage)
                if master.is_cuda:  # the step may still be under way, on any stream
                    master.record_stream(torch.cuda.current_stream(master.device))
        self.leaving = self.leaving - leaving
        self.known.note(self.optimizer.param_groups, self.optimizer.state)
        self.optimizer._plan = None

    def superfluous(self, number: int) -> bool:
        """Whether a group has masters that are of use only while something is degraded."""
        group = self.optimizer.param_groups[number]
        states = ((p, self.optimizer.state[p]) for p in group["params"] if p in self.optimizer.state)
        return any("master" in state and not keeps_master(group, p, state) for p, state in states)

    def note(self, number: int) -> None:
        """After a change of rows: masters are to be made, or dropped once the next step has written true weights."""
        live, params = self.optimizer._tables.has_live_weights(number), self.optimizer.param_groups[number]["params"]
        complete = all("master" in self.optimizer.state.get(p, ()) for p in params)
        leaves = not live and self.superfluous(number)
        if leaves or (live and not complete):
            self.optimizer._plan = None
        if leaves:
            self.leaving.add(number)
        else:
            self.leaving.discard(number)
        if self.optimizer._inputs is not None:
            self.optimizer._inputs.note_live_weights(number)


class LiveWeights:
    """The methods of an optimizer that keeps the true weights (``master`` states) while the module trains on degraded
    ones."""

    _weights: HeldWeights

    @torch_compile.outside_graphs
    def eval(self) -> None:
        """Puts the true weights into the module (validation, checkpoint, export). Exact and idempotent."""
        self._weights.eval()

    @torch_compile.outside_graphs
    def train(self) -> None:
        """Puts the live weights back, to the bit. True weights that were changed meanwhile are kept as the new ones.

        Does nothing where they are there already: training loops call it before every batch.
        """
        self._weights.train()

    @property
    def holds_true_weights(self) -> bool:
        """Whether the module holds the true weights on request: after ``eval()``, until ``train()``."""
        return self._weights.holds_true

    @contextmanager
    def true_parameters(self) -> Iterator[None]:
        """The true weights inside, what was there before after."""
        with self._weights.true_parameters():
            yield

    @contextmanager
    def ema_parameters(self) -> Iterator[None]:
        """The moving averages of the weights inside (``ema_decay``), to the bit what was there before after.

        Parameters that have none, of groups without ``ema_decay`` or before their first step, have their true weights.
        """
        with self._weights.ema_parameters():
            yield

    def refuse_passes(self) -> None:
        """Raises RuntimeError where two passes before a step cannot be had: what ``step()`` refuses, and steps inside
        backward."""
        self._weights.refuse_passes()

    @torch_compile.outside_graphs
    def begin_true_pass(self) -> None:
        """Puts the true weights into the module for another forward pass before ``step()``.

        The step reads the masters and writes the next live weights over them, so nothing is to be put back.
        """
        self._weights.begin_true_pass()

    @torch_compile.outside_graphs
    def begin_live_pass(self) -> None:
        """Puts the live weights back after a true pass that no step has followed: batches are accumulated, or the step
        was skipped."""
        self._weights.begin_live_pass()

    @torch_compile.outside_graphs
    def adopt_loaded(self, loaded: Callable[[Tensor], bool] = lambda _p: True) -> None:
        """Takes weights that were written into the module (``load_state_dict``) for the true ones, of parameters that
        ``loaded`` names. :class:`AIM` calls it; call it where something else degrades weights. Waits for the device.
        """
        self._weights.adopt_loaded(loaded)

    @property
    def replaces_saved_weights(self) -> bool:
        """Whether a callback puts the true weights into state dicts of the module."""
        return self._weights.replaces_saved

    @replaces_saved_weights.setter
    def replaces_saved_weights(self, value: bool) -> None:
        self._weights.replaces_saved = value

    def masters(self) -> dict[Tensor, Tensor]:
        """The true weights of the parameters that have masters, what was written to the module since the last step
        included."""
        return self._weights.masters()
