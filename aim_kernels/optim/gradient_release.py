"""``step_in_backward``: every parameter is stepped, and its gradient freed, as soon as backward has completed it, so
that gradients never exist all at once.

A step then begins with its first gradient and ends with ``optimizer.step()``. In between rows, hyperparameters and the
phase stand still, whatever is set; what the parameters measured is added up in their order, so that the result is that
of ``loss.backward(); optimizer.step()``, bit for bit on a CPU.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from aim_kernels.backends import select
from aim_kernels.backends.device import capturing
from aim_kernels.optim import reentrant
from aim_kernels.optim.modulation import unwrapped
from aim_kernels.optim.optimizer import AIMFusedOptimizer
from aim_kernels.optim.preparation import ensure_group_states, ensure_states, sync_with_module
from aim_kernels.step import sharding, validation
from aim_kernels.step.arrangement import arrange
from aim_kernels.step.inputs import StepInputs
from aim_kernels.step.plan import StepPlan

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


def step_in_backward(optimizer: Any, model: nn.Module) -> Release:
    """Makes ``backward()`` step the parameters of ``model`` that ``optimizer`` has; ``optimizer.step()`` closes it.

    The training loop stays as it is. Learning rates, betas, rows and the phase are those at the first gradient of a
    step; what is set between ``backward()`` and ``step()`` holds from the next step on. Parameters of the optimizer
    that are not in the model, or that are given a gradient by hand, are stepped by ``step()``.

    A weight that may get its gradient in parts, since it can be reached from a reentrant activation checkpoint and from
    another one or what is around them, is refused by ``backward()`` before anything is changed. Pass
    ``use_reentrant=False`` to ``torch.utils.checkpoint``.

    If ``backward()`` fails after it has stepped some parameters, they stay stepped, and the next ``optimizer.step()``
    closes a step of those alone.

    Returns:
        A handle, for gradient accumulation (:meth:`Release.accumulate`) and to undo it (:meth:`Release.remove`).

    Raises:
        TypeError: no ``AIMFusedOptimizer``, or no module.
        ValueError: a model that shares gradients between processes (DDP, FSDP), DTensor parameters, or an option that
            needs all gradients at once: ``max_grad_norm``, ``fused_scaling``, ``process_group``, ``sync_every``.
        RuntimeError: it was called for this optimizer before.
    """
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, AIMFusedOptimizer):
        raise TypeError(f"optimizer: expected an AIMFusedOptimizer, got {type(optimizer).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if optimizer._release is not None:
        raise RuntimeError("step_in_backward was called for this optimizer before; call remove() of its handle first")
    _refuse_wrapped(model)
    _refuse_options(optimizer)
    made = Release(optimizer, model)
    if not made.watch():
        raise ValueError("model: none of the optimizer's parameters is in it; pass the module that they are of")
    optimizer._release = made
    return made


def _refuse_wrapped(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrappers: list[Any] = [nn.parallel.DistributedDataParallel]
    wrappers += [] if fsdp is None else [fsdp.FullyShardedDataParallel]
    for module in model.modules():
        if isinstance(module, tuple(wrappers)):
            raise ValueError(
                f"model: {type(module).__name__} averages gradients after the hooks that step_in_backward steps in; "
                "train without it, or without step_in_backward"
            )


def _refuse_options(optimizer: AIMFusedOptimizer) -> None:
    """Options may be set between steps, so this is asked before each."""
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            "max_grad_norm needs the norm of all gradients before the first step; set it to None, or train without "
            "step_in_backward"
        )
    if optimizer._step_supports_amp_scaling:
        raise ValueError(
            "fused_scaling: GradScaler hands over its scale in step(), when the gradients are gone; use bfloat16 "
            "without a GradScaler, or train without step_in_backward"
        )
    if optimizer.process_group is not None or sharding.any_dtensor(optimizer.param_groups):
        raise ValueError(
            "process_group, DTensor parameters: step_in_backward works in one process only; train without it"
        )
    if optimizer.sync_every != 1:
        raise ValueError("sync_every: step_in_backward works with 1 only, since every step has its own sums")


class _OpenStep:
    """A step between its first gradient and ``optimizer.step()``.

    Attributes:
        plan: a view whose tables and options stand still.
        piece_sums: what each stepped parameter measured, by its number.
        leaving: groups whose masters this step makes superfluous.
        began: on CUDA, when the view's tables were in place: backward may go on in other streams.
    """

    def __init__(self, optimizer: AIMFusedOptimizer, plan: StepPlan, backend: Any) -> None:
        self.plan, self.backend = plan, backend
        self.piece_sums: dict[int, Any] = {}
        self.leaving = set(optimizer._weights.leaving)
        self.began: torch.cuda.Event | None = None
        if (device := plan.tables.rows.device).type == "cuda":
            self.began = torch.cuda.Event()
            self.began.record(torch.cuda.current_stream(device))

    def take(self, optimizer: AIMFusedOptimizer, index: int) -> None:
        """Steps one parameter by the gradient that it holds."""
        plan, grad = self.plan, self.plan.owners[index].grad
        assert grad is not None
        if self.began is not None:
            torch.cuda.current_stream(grad.device).wait_event(self.began)
        if not plan.records["step"][index]:
            # Of groups with live weights only what was frozen until now: others have states since the step began.
            group, p = plan.param_groups[plan.group_of[index]], plan.owners[index]
            ensure_group_states(optimizer, group, [p], live=False)
            arrange(group, p, optimizer.state[p])
        plan.take_one(index, grad)
        try:
            self.piece_sums[index] = self.backend.update(plan, StepInputs(), [index])
        finally:
            plan.forget_one(index)
        plan.bump_versions_of([index])
        if grad.is_cuda:
            grad.record_stream(torch.cuda.current_stream(grad.device))

    def emit_rest(self) -> None:
        """Live weights of parameters that got no gradient."""
        rest = [index for index in np.flatnonzero(self.plan.records["master"]).tolist() if index not in self.piece_sums]
        if rest:
            self.backend.update(self.plan, StepInputs(), rest)
            self.plan.bump_versions_of(rest)

    def finish(self, optimizer: AIMFusedOptimizer) -> None:
        """Thresholds, statistics, phase; what was set since the step began is kept for the next."""
        kept, moved = optimizer.tables, self.plan.tables
        pairs = [(kept.rows, moved.rows), (kept.control, moved.control)]
        set_since = [own != other for own, other in pairs]
        self.backend.finish(self.plan, StepInputs(), [self.piece_sums[index] for index in sorted(self.piece_sums)])
        for (own, other), is_set in zip(pairs, set_since, strict=True):
            own.copy_(torch.where(is_set, own, other))


class Release:
    """What ``step_in_backward`` returns."""

    def __init__(self, optimizer: AIMFusedOptimizer, model: nn.Module) -> None:
        # Neither is kept alive by the hooks on the other's parameters.
        self._optimizer, self._model = weakref.ref(optimizer), weakref.ref(model)
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._names: dict[Tensor, str] = {}
        self._forward: RemovableHandle | None = None
        # How often the model as a whole was in a reentrant checkpoint since the latest step, and what then stands
        # before its gradients.
        self._inside = 0
        self._barriers: list[RemovableHandle] = []
        self._accumulating = 0
        self._open: _OpenStep | None = None
        # Backward runs in a thread for each device.
        self._lock = threading.RLock()
        # The latest plan, its view, and the numbers of its parameters.
        self._plan: StepPlan | None = None
        self._view: StepPlan | None = None
        self._numbers: dict[Tensor, int] = {}

    @property
    def is_open(self) -> bool:
        """Whether backward has stepped a parameter since the latest ``optimizer.step()``."""
        return self._open is not None and bool(self._open.piece_sums)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Gradients of a ``backward()`` inside only add up, and nothing is stepped: the next ``backward()`` outside, or
        ``optimizer.step()``, steps with their sum."""
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1
            self._forget_passes()

    def forget(self) -> None:
        """Gives up a step that backward has begun, where the weights before it are back."""
        self._open = self._plan = self._view = None
        self._forget_passes()

    def remove(self) -> None:
        """Undoes ``step_in_backward``.

        Raises:
            RuntimeError: between ``backward()`` and ``step()``.
        """
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._release is self:
            optimizer._refuse_open_step("remove()")
            optimizer._release = None
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        if self._forward is not None:
            self._forward.remove()
        self._forget_passes()
        self._plan = self._view = None

    def watch(self) -> int:
        """Looks for parameters of the optimizer in the model; returns how many there are."""
        optimizer, model = self._optimizer(), self._model()
        if optimizer is None or model is None:
            return 0
        ours = {p for group in optimizer.param_groups for p in group["params"]}
        self._names = {p: name for name, p in model.named_parameters() if p in ours}
        here = weakref.ref(self)

        def completed(p: Tensor) -> None:
            if (release := here()) is not None:
                release._completed(p)

        if self._names and self._forward is None:
            self._forward = model.register_forward_hook(_Forward(self), with_kwargs=True)
        for p in self._names:
            if p.requires_grad and p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(completed)
        return len(self._names)

    # -- in forward ---------------------------------------------------------------------------------------------------

    def _passed(self, given: Any, returned: Any) -> None:
        """After a forward pass of the model: looks for weights whose gradient will come in parts."""
        if not torch.is_grad_enabled():
            # As a checkpoint runs what it is to run again: without a graph, on what needs one.
            self._inside += any(x.requires_grad for x in reentrant.tensors_in(given))
            if self._inside == 2:
                self._barriers = [
                    p.register_hook(lambda _grad, p=p: self._refuse_parts(p)) for p in self._names if p.requires_grad
                ]
            return
        outputs = [x for x in reentrant.tensors_in(returned) if x.grad_fn is not None]
        p = reentrant.given_in_parts(outputs, self._names)
        if p is not None:
            for output in outputs:
                output.register_hook(lambda _grad: self._refuse_parts(p))

    def _refuse_parts(self, p: Tensor) -> None:
        if not self._accumulating and p in self._names:
            raise RuntimeError(
                f"{self._names[p]}: a reentrant checkpoint can reach it, and so can another or what is around them: "
                "backward() may give it its gradient in parts, of which the first would be stepped without the others. "
                "Pass use_reentrant=False to torch.utils.checkpoint; nothing was changed"
            )

    def _forget_passes(self) -> None:
        self._inside = 0
        for barrier in self._barriers:
            barrier.remove()
        self._barriers = []

    # -- in backward --------------------------------------------------------------------------------------------------

    def _completed(self, p: Tensor) -> None:
        with self._lock:
            self._take(p)

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or self._accumulating or p.grad is None:
            return
        if self._open is not None and self._numbers.get(p) in self._open.piece_sums:
            p.grad = None
            raise RuntimeError(
                f"{self._names[p]}: backward() has stepped it already, and gives it another gradient before "
                "optimizer.step(); that one was dropped. Call optimizer.step() after each backward(), or put all "
                "but the last into `with release.accumulate():`; if it was one backward() with reentrant checkpoints, "
                "pass use_reentrant=False to torch.utils.checkpoint"
            )
        if self._open is None:
            self._open = self._begin(optimizer)
        index = self._numbers.get(p)
        if index is None:  # no longer the optimizer's
            self._open = self._open if self._open.piece_sums else None
            return
        grad = p.grad
        if grad.layout != torch.strided or grad.dtype != p.dtype or grad.shape != p.shape or grad.device != p.device:
            validation.check_gradients(optimizer.param_groups)
        try:
            self._open.take(optimizer, index)
        finally:
            if not self._open.piece_sums:
                self._open = None
        p.grad = None

    def _begin(self, optimizer: AIMFusedOptimizer) -> _OpenStep:
        _refuse_options(optimizer)
        if capturing(optimizer.tables.rows.device):
            raise RuntimeError("step_in_backward cannot be captured in a CUDA graph; call remove() of its handle first")
        optimizer._weights.refuse_true()
        plan = optimizer._current_plan()
        if plan is None:
            sync_with_module(optimizer)
            validation.check_gradients(optimizer.param_groups)
            ensure_states(optimizer, lambda p: False)  # of live weights; others' are made when their gradient comes
            plan = optimizer._make_plan()
        if plan.waves is not None:
            raise RuntimeError(
                f"{plan.name_of(plan.waves[1][0])}: shares memory, or a state, with another parameter, and backward() "
                "may still read what it would write (step_in_backward); make them one parameter, or call remove() of "
                "the handle"
            )
        backend = select(optimizer.backend, optimizer.tables.rows.device)
        plan.read_hyperparameters(StepInputs(), on_device=backend.ON_DEVICE)
        plan.forget_gradients()
        return _OpenStep(optimizer, self._view_of(plan, optimizer), backend)

    def _view_of(self, plan: StepPlan, optimizer: AIMFusedOptimizer) -> StepPlan:
        """The plan with tables that stand still, at the same addresses from step to step."""
        tables = optimizer.tables
        if self._view is None or self._plan is not plan:
            still = copy.copy(tables)
            still.rows, still.control = tables.rows.clone(), tables.control.clone()
            self._plan, self._view = plan, plan.view(still)
            self._numbers = {p: index for index, p in enumerate(plan.owners)}
        else:
            self._view.tables.rows.copy_(tables.rows)
            self._view.tables.control.copy_(tables.control)
        self._view.freeze_hyperparameters(plan)
        return self._view

    # -- optimizer.step() ---------------------------------------------------------------------------------------------

    def close(self) -> None:
        """What ``optimizer.step()`` does: steps what has a gradient still, and closes the step."""
        optimizer, open_step = self._optimizer(), self._open
        assert optimizer is not None
        self._forget_passes()
        if open_step is None:
            optimizer._step()
            self._free(self._names)
            return
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "grad_scale, found_inf: backward() has stepped by the gradients as they were (step_in_backward); use "
                "bfloat16 without a GradScaler"
            )
        owners, stepped = open_step.plan.owners, open_step.piece_sums
        left = {index: p for index, p in enumerate(owners) if p.grad is not None and index not in stepped}
        grads = [p.grad if index in left else None for index, p in enumerate(owners)]
        validation.check_gradients(optimizer.param_groups, grads)
        for index, p in left.items():
            open_step.take(optimizer, index)
            if optimizer.zero_grad_in_step and p.grad is not None:
                p.grad.zero_()
            self._free([p])  # at once: what is stepped must not be found again where a later one raises
        open_step.emit_rest()
        open_step.finish(optimizer)
        self._open = None
        optimizer._weights.drop_masters(open_step.plan, StepInputs(), open_step.leaving)

    def _free(self, params: Any) -> None:
        for p in params:
            if p in self._names:
                p.grad = None


class _Forward:
    """The hook on a model's forward pass. Copies of the model have one that does nothing."""

    def __init__(self, release: Release) -> None:
        self._release = weakref.ref(release)

    def __call__(self, _model: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        release = self._release()
        if release is not None and not torch.compiler.is_compiling():
            release._passed((args, kwargs), returned)

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Any:
    return _nothing


def _nothing(*_args: Any) -> None:
    """A hook that does nothing."""
