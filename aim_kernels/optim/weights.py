"""Live and true weights: which of them a module holds, when masters come to be and when they leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.backends.device import capturing
from aim_kernels.optim import resets, torch_compile
from aim_kernels.optim.modulation import Modulated
from aim_kernels.step import sharding, validation
from aim_kernels.step.inputs import StepInputs
from aim_kernels.step.layout import ROW
from aim_kernels.step.plan import StepPlan, adopts_edits
from aim_kernels.step.states import adopt_edits, keeps_master, store_weights, weights_of
from aim_kernels.step.supported import is_estimated


class LiveWeights(Modulated):
    """An optimizer that keeps the true weights (``master`` states) while the module trains on degraded ones."""

    backend: str
    _plan: StepPlan | None
    _inputs: torch_compile.GraphInputs | None
    _holds_true_weights: bool
    _holds_averages: bool
    _in_true_pass: bool  # true weights are in the module until the next step, or may be
    _release: Any  # gradient_release.Release, or None
    _known_masters: resets.Masters
    _leaving: set[int]  # groups whose masters the next step makes superfluous

    if TYPE_CHECKING:  # optimizer.py has them

        def _sync_with_module(self) -> None: ...
        def _emit(self) -> None: ...

    @torch_compile.outside_graphs
    @torch.no_grad()
    def eval(self) -> None:
        """Puts the true weights into the module (validation, checkpoint, export). Exact and idempotent."""
        self._refuse_averages("eval()")
        if self._holds_true_weights:
            return
        self._refuse_open_step("eval()")
        self._restore_astray()
        self._adopt_edits()
        masters = self._masters()
        for p, master in masters:
            p.copy_(master)
        self._holds_true_weights = True
        sharding.reshard_all(p for p, _ in masters)

    @torch_compile.outside_graphs
    @torch.no_grad()
    def train(self) -> None:
        """Puts the live weights back, to the bit. True weights that were changed meanwhile are kept as the new ones.

        Does nothing where they are there already: training loops call it before every batch.
        """
        self._refuse_averages("train()")
        if not self._holds_true_weights:
            return
        self._refuse_open_step("train()")
        self._sync_with_module()
        self._adopt_edits()
        self._emit()
        self._holds_true_weights = False

    @property
    def holds_true_weights(self) -> bool:
        """Whether the module holds the true weights on request: after ``eval()``, until ``train()``."""
        return self._holds_true_weights

    @contextmanager
    def true_parameters(self) -> Iterator[None]:
        """The true weights inside, what was there before after."""
        was_true = self._holds_true_weights
        self.eval()
        try:
            yield
        finally:
            if not was_true:
                self.train()

    @contextmanager
    def ema_parameters(self) -> Iterator[None]:
        """The moving averages of the weights inside (``ema_decay``), to the bit what was there before after.

        Parameters that have none, of groups without ``ema_decay`` or before their first step, have their true weights.
        """
        self._refuse_averages("ema_parameters()")
        with self.true_parameters(), torch.no_grad():
            params = [p for group in self.param_groups for p in group["params"] if group["ema_decay"] is not None]
            averaged = [(p, self.state[p]["ema"]) for p in params if "ema" in self.state.get(p, ())]
            before = [sharding.local_of(p).detach().clone() for p, _ in averaged]
            self._holds_averages = True
            try:
                for p, ema in averaged:
                    p.copy_(ema)
                sharding.reshard_all(p for p, _ in averaged)
                with torch.enable_grad():
                    yield
            finally:
                self._holds_averages = False
                for (p, _), values in zip(averaged, before, strict=True):
                    sharding.local_of(p).copy_(values)
                sharding.reshard_all(p for p, _ in averaged)

    @torch.no_grad()
    def masters(self) -> dict[Tensor, Tensor]:
        """The true weights of the parameters that have masters, what was written to the module since the last step
        included."""
        self._adopt_edits()
        return dict(self._masters())

    def refuse_passes(self) -> None:
        """Raises RuntimeError where two passes before a step cannot be had: what ``step()`` refuses, and steps inside
        backward."""
        if self._release is not None:
            raise RuntimeError(
                "the optimizer steps inside backward (step_in_backward), which would step in the first of two passes: "
                "call release.remove()"
            )
        self._refuse_true_weights()

    @torch_compile.outside_graphs
    @torch.no_grad()
    def begin_true_pass(self) -> None:
        """Puts the true weights into the module for another forward pass before ``step()``.

        The step reads the masters and writes the next live weights over them, so nothing is to be put back.
        """
        self._restore_astray()
        self._adopt_edits()
        masters = self._masters()
        for p, master in masters:
            p.copy_(master)
        self._in_true_pass = bool(masters)
        sharding.reshard_all(p for p, _ in masters)

    @torch_compile.outside_graphs
    @torch.no_grad()
    def begin_live_pass(self) -> None:
        """Puts the live weights back after a true pass that no step has followed: batches are accumulated, or the step
        was skipped."""
        if self._in_true_pass:
            self._adopt_edits()
            self._emit()

    def _restore_astray(self) -> list[Tensor]:
        return resets.restore(self)  # type: ignore[arg-type]

    def _adopt_edits(self) -> None:
        """Masters take what was written to the module since the last step while it held undegraded weights, as the next
        step's kernel would. By value, since writes through ``.data`` leave no trace; waits for no device."""
        if self._holds_averages:
            return
        tables = self.tables
        for number, group in enumerate(self.param_groups):
            if not any("master" in self.state.get(p, ()) and not is_estimated(p) for p in group["params"]):
                continue
            emitted = tables.rows[number, ROW["emitted_under"] : ROW["emitted_well"] + 1]
            undegraded = None if self._holds_true_weights else (emitted == 1.0).all()
            if undegraded is not None and undegraded.device.type == "cpu" and not undegraded:
                continue
            for p in group["params"]:
                master = self.state.get(p, {}).get("master")
                if master is None:
                    continue
                if undegraded is None or adopts_edits(tables, number, group, p):
                    adopt_edits(p, master, undegraded)

    def _masters(self) -> list[tuple[Tensor, Tensor]]:
        found = [
            (p, master)
            for group in self.param_groups
            for p in group["params"]
            if (master := self.state.get(p, {}).get("master")) is not None
        ]
        if any(getattr(master, "shape", None) != p.shape for p, master in found):
            validation.check_states(self.param_groups, self.state)
        return found

    # -- masters ------------------------------------------------------------------------------------------------------

    def _refuse_open_step(self, call: str) -> None:
        """What needs all parameters of one age cannot be done between backward() and step() of ``step_in_backward``."""
        if self._release is not None and self._release.is_open:
            raise RuntimeError(
                "backward() has stepped some parameters already (step_in_backward); call optimizer.step(), which "
                f"closes the step, before {call}"
            )

    def _refuse_averages(self, call: str) -> None:
        if self._holds_averages:
            raise RuntimeError(
                f"the module holds averages (inside optimizer.ema_parameters()); call {call} outside of it"
            )

    def _refuse_true_weights(self) -> None:
        self._refuse_averages("step()")
        if self._holds_true_weights and self._trains_on_live_weights():
            raise RuntimeError(
                "the module holds the true weights (after optimizer.eval()); call optimizer.train() before step()"
            )

    def _trains_on_live_weights(self) -> bool:
        groups = range(len(self.param_groups))
        return bool(self._masters()) or any(map(self.tables.has_live_weights, groups))

    def _drop_masters(self, plan: StepPlan, inputs: StepInputs, among: set[int] | None = None) -> None:
        """Where no phase degrades weights any more, the live weights just written are the true ones. ``among``: groups
        of which the step knew it; others wait for the next one."""
        leaving = self._leaving if among is None else self._leaving & among
        if not leaving or capturing(self.tables.rows.device):
            return  # a graph that is captured goes on writing masters
        # A device may have skipped the step. Masters leave rarely enough to wait for its answer.
        if inputs.is_skipped():
            return
        everything = [p for group in self.param_groups for p in group["params"]]
        for p, stepped, number in zip(everything, plan.owners, plan.group_of, strict=True):
            group, state = self.param_groups[number], self.state.get(p, {})
            if number in leaving and "master" in state and not keeps_master(group, p, state):
                # A graph may have handed over a copy of either, and puts it back when all is done.
                master = plan.state[stepped]["master"]
                del state["master"]
                if "step" not in state:  # frozen: the module holds it to the bit
                    del self.state[p]
                elif (storage := weights_of(group, p)) not in (None, "stochastic"):
                    store_weights(stepped, state, master, storage)
                if master.is_cuda:  # the step may still be under way, on any stream
                    master.record_stream(torch.cuda.current_stream(master.device))
        self._leaving = self._leaving - leaving
        self._known_masters.note(self.param_groups, self.state)
        self._plan = None

    def _superfluous_masters(self, number: int) -> bool:
        """Whether a group has masters that are of use only while something is degraded."""
        group = self.param_groups[number]
        states = ((p, self.state[p]) for p in group["params"] if p in self.state)
        return any("master" in state and not keeps_master(group, p, state) for p, state in states)

    def _note_live_weights(self, number: int) -> None:
        """After a change of rows: masters are to be made, or dropped once the next step has written true weights."""
        live, params = self._tables.has_live_weights(number), self.param_groups[number]["params"]
        complete = all("master" in self.state.get(p, ()) for p in params)
        leaves = not live and self._superfluous_masters(number)
        if leaves or (live and not complete):
            self._plan = None
        if leaves:
            self._leaving.add(number)
        else:
            self._leaving.discard(number)
        if self._inputs is not None:
            self._inputs.note_live_weights(number)
