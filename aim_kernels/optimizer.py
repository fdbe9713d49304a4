"""``AIMFusedOptimizer``: a ``torch.optim.Optimizer`` whose step also computes AIM's mask and live weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor

from aim_kernels import checkpoint, checks
from aim_kernels.backends import check_name, select
from aim_kernels.launch import capturing
from aim_kernels.modulated import Modulated
from aim_kernels.plan import StepPlan
from aim_kernels.states import master_of, moment_names, zeros_like_all
from aim_kernels.tables import Tables

#: Weight decay of torch.optim where the user gives none.
_DEFAULT_DECAY = {"adamw": 1e-2, "adam": 0.0, "sgd": 0.0}

#: What a block's param group says of itself (``block_param_groups``); plain groups keep these.
_BLOCK_KEYS = {"modality": None, "depth": None, "modulated": False, "module": None}


class AIMFusedOptimizer(Modulated):
    r"""AdamW, Adam or SGD with adaptive intra-network modulation, in one pass over memory.

    With no strength set it is its base rule (torch.optim's formulae, within a few ulp). Per element and step, with
    :math:`\hat m, \hat v` the bias-corrected moments that the rule keeps anyway (spec section 2, our reading of the
    paper's "optimization state")::

        under = m_hat^2 >= tau^2 * (v_hat + eps^2)             the element is under-optimized
        theta -= lr * (step_under if under else step_well) * direction
        live   = anchor + (theta - anchor) * (live_under if under else live_well)

    ``tau`` is a threshold per group; docs/design.md gives every formula in order.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or groups (``block_param_groups`` makes those of blocks). Any
            option below, but ``anchor``, ``backend`` and ``seed``, may be set per group.
        lr: learning rate, a number or a one-element tensor.
        rule: "adamw", "adam" or "sgd".
        betas: decay rates of the moments. Under "sgd" only ``modulated`` groups use them, for their optimization state.
        eps: added to the denominator; also the floor of the signal-to-noise ratio.
        weight_decay: None means the rule's default in torch.optim (1e-2 for "adamw", else 0). Decoupled for "adamw".
        momentum, dampening, nesterov: of "sgd", as in ``torch.optim.SGD``.
        maximize: ascend instead of descending.
        under_optimized: ("fraction", q) steers ``tau`` until a share q of the group is under-optimized;
            ("absolute", tau) holds it.
        threshold_rate: step size of that controller.
        anchor: what a degraded weight is withdrawn to: "zero", or "init", the weights at construction (one more copy of
            the ``modulated`` parameters; others are always withdrawn to zero).
        backend: "auto", "cpu", "cuda", "triton" or "reference"; "auto" lets the parameters' device decide, and reads
            the environment variable AIM_KERNELS_BACKEND.
        seed: of the noise and of the phase draws.
        fused_scaling: lets ``GradScaler.step`` hand over its scale and its finding of infinities, so that gradients are
            divided, and a step skipped whole, inside the kernel. ``grad`` itself then stays scaled.

    Raises:
        ValueError, TypeError: options or parameters that a step cannot work with, by name.
    """

    tables: Tables  # rows, statistics, control: made with the first group

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rule: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        under_optimized: tuple[str, float] = ("fraction", 0.1),
        threshold_rate: float = 0.1,
        anchor: str = "zero",
        backend: str = "auto",
        seed: int = 0,
        fused_scaling: bool = False,
    ) -> None:
        if anchor not in ("zero", "init"):
            raise ValueError(f"anchor: expected 'zero' or 'init', got {anchor!r}")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2^63), got {seed!r}")
        check_name(backend)
        self.anchor = anchor
        self.backend = backend
        self._seed = seed
        self._step_supports_amp_scaling = bool(fused_scaling)  # GradScaler's question
        self._plan: StepPlan | None = None
        self._holds_true_weights = False
        self._leaving: set[int] = set()  # groups whose masters the next step makes superfluous
        # Whose states and tables graphs will read and write as long as they live.
        self._captured: list[tuple[StepPlan, Any]] = []
        defaults = {
            "lr": lr,
            "rule": rule,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "maximize": maximize,
            "under_optimized": under_optimized,
            "threshold_rate": threshold_rate,
            **_BLOCK_KEYS,
        }
        checks.check_ordered(params)
        super().__init__(params, defaults)
        if backend != "auto":
            select(backend, self.tables.rows.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, at any time; its row starts neutral."""
        group = dict(param_group)
        params = group["params"]
        checks.check_ordered(params)
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        number = len(self.param_groups)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        names = [entry[0] if isinstance(entry, tuple) else None for entry in group["params"]]
        preview = [*self.param_groups, {"params": tensors, "param_names": names}]
        full = {**self.defaults, **group}
        if full["weight_decay"] is None:
            full["weight_decay"] = group["weight_decay"] = _DEFAULT_DECAY.get(full["rule"], 0.0)
        checks.check_hyperparameters(full, number)
        first = next((t for t in tensors if isinstance(t, Tensor)), None)
        device = self.tables.rows.device if number else first.device if first is not None else None
        checks.check_parameters(preview, number, tensors, device)
        super().add_param_group(group)

        if not hasattr(self, "tables"):
            self.tables = Tables(tensors[0].device if tensors else torch.device("cpu"), self._seed)
        kind, value = full["under_optimized"]
        self.tables.add_group(float(value) if kind == "absolute" else 0.0)
        if self.anchor == "init" and full["modulated"]:
            for p in tensors:
                self.state[p]["anchor"] = master_of(p)
        self._plan = None

    # -- the step ----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimization step over all parameters that have gradients.

        Args:
            closure: reevaluates the model and returns the loss; run with gradients enabled.

        Raises:
            RuntimeError: a gradient that cannot be used, by the parameter's name, or true weights in a module that
                trains on live ones (after ``eval()``). Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        plan = self._ready_plan()
        if plan is None:
            return
        backend = select(self.backend, self.tables.rows.device)
        # GradScaler sets both for the time of a step.
        plan.grad_scale, plan.found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not backend.ON_DEVICE and plan.found_inf is not None and float(plan.found_inf):
            return
        plan.read_hyperparameters(on_device=backend.ON_DEVICE)
        backend.step(plan)
        if capturing(self.tables.rows.device):
            self._captured.append((plan, plan.launch))
        plan.bump_versions()
        plan.forget_gradients()
        self._drop_masters(plan)

    def _ready_plan(self) -> StepPlan | None:
        """A plan that has read this step's gradients; None where there are none."""
        if self._holds_true_weights and self._trains_on_live_weights():
            raise RuntimeError(
                "the module holds the true weights (after optimizer.eval()); call optimizer.train() before step()"
            )
        plan = self._plan
        if plan is None or not plan.is_of(self) or not plan.read():
            if all(p.grad is None for group in self.param_groups for p in group["params"]):
                return None
            if capturing(self.tables.rows.device):
                raise RuntimeError(
                    "optimizer.step() cannot be captured before it has run with these parameters, gradients and "
                    "strengths: run one step outside of torch.cuda.graph, on a side stream"
                )
            self._check_before_building()
            checks.check_gradients(self.param_groups)
            self._make_state()
            plan = self._plan = StepPlan(self)
            plan.take()
        return plan if plan.has_gradients() else None

    def _make_state(self) -> None:
        """States of parameters that meet their first gradient, and masters where live weights are to exist."""
        for number, group in enumerate(self.param_groups):
            live = self.tables.has_live_weights(number)
            stepped = [p for p in group["params"] if live or p.grad is not None]
            fresh = [p for p in stepped if "step" not in self.state[p]]
            for device in {p.device for p in fresh}:
                there = [p for p in fresh if p.device == device]
                for p, step in zip(there, torch.zeros(len(there), dtype=torch.float32, device=device), strict=True):
                    self.state[p]["step"] = step
            for name in moment_names(group):
                missing = [p for p in stepped if name not in self.state[p]]
                for p, moment in zip(missing, zeros_like_all(missing), strict=True):
                    self.state[p][name] = moment
            for p in group["params"]:
                if live and "master" not in self.state[p]:
                    self.state[p]["master"] = master_of(p)

    def _check_before_building(self) -> None:
        """What may have changed behind the optimizer's back since it was last looked at."""
        first = next((p for group in self.param_groups for p in group["params"]), None)
        if first is not None and first.device != self.tables.rows.device:  # the module was moved
            self.tables.to(first.device)
        for number, group in enumerate(self.param_groups):
            checks.check_parameters(self.param_groups, number, group["params"], self.tables.rows.device)
        checks.check_states(self.param_groups, self.state)

    def _trains_on_live_weights(self) -> bool:
        groups = range(len(self.param_groups))
        return bool(self._masters()) or any(self.tables.has_live_weights(number) for number in groups)

    def _drop_masters(self, plan: StepPlan) -> None:
        """Where no phase degrades weights any more, the live weights just written are the true ones."""
        if self._leaving and capturing(self.tables.rows.device):
            return  # the graph goes on writing masters
        # A device may have skipped the step. Masters leave rarely enough to wait for its answer.
        if self._leaving and plan.found_inf is not None and float(plan.found_inf):
            return
        for number in self._leaving:
            for p in self.param_groups[number]["params"]:
                master = self.state[p].pop("master", None)
                if master is not None and master.is_cuda:  # the step may still be under way, on any stream
                    master.record_stream(torch.cuda.current_stream(master.device))
        if self._leaving:
            self._leaving.clear()
            self._plan = None

    def _note_live_weights(self, number: int) -> None:
        """After a change of rows: masters are to be made, or dropped once the next step has written true weights."""
        live = self.tables.has_live_weights(number)
        has_masters = any("master" in self.state.get(p, ()) for p in self.param_groups[number]["params"])
        if live != has_masters:
            self._plan = None
        if has_masters and not live:
            self._leaving.add(number)
        else:
            self._leaving.discard(number)

    # -- live and true weights ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the true weights into the module (validation, checkpoint, export). Exact and idempotent."""
        if self._holds_true_weights:
            return
        self._holds_true_weights = True
        for p, master in self._masters():
            p.copy_(master)

    @torch.no_grad()
    def train(self) -> None:
        """Puts the live weights back, to the bit. True weights that were changed meanwhile are kept as the new ones.

        Does nothing where they are there already: training loops call it before every batch.
        """
        if not self._holds_true_weights:
            return
        for p, master in self._masters():
            # By value, since writes through .data leave no trace.
            if not torch.equal(p, master.to(p.dtype)):
                master.copy_(p)
        self._holds_true_weights = False
        self._emit()

    def _emit(self) -> None:
        """Writes the live weights of the masters into the module."""
        masters = self._masters()
        if not masters:
            return
        self._check_before_building()
        plan = StepPlan(self)
        backend = select(self.backend, self.tables.rows.device)
        plan.read_hyperparameters(on_device=backend.ON_DEVICE)
        backend.emit(plan)
        torch.autograd.graph.increment_version([p for p, _ in masters])

    @property
    def holds_true_weights(self) -> bool:
        """Whether the module holds the true weights on request: after ``eval()``, until ``train()``."""
        return self._holds_true_weights

    @contextmanager
    def true_parameters(self) -> Iterator[None]:
        """The true weights inside, what was there before after."""
        held = self._holds_true_weights
        self.eval()
        try:
            yield
        finally:
            if not held:
                self.train()

    def _masters(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (p, self.state[p]["master"])
            for group in self.param_groups
            for p in group["params"]
            if "master" in self.state.get(p, ())
        ]

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's, plus ``master`` states (the true weights) and each group's row, statistics and control."""
        return checkpoint.with_tables(super().state_dict(), self.tables)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, or of the same rule in torch.optim; values keep their bits and dtype.

        Where live weights exist, the module receives those that belong to the loaded state, so a resumed run
        continues bit for bit. Load the module first.

        Raises:
            ValueError: other groups, another rule, or states of another shape. Nothing was changed.
        """
        checkpoint.load(self, state_dict)
        self._reset()
        if self._holds_true_weights:
            self._holds_true_weights = False
            self.eval()
        else:
            self._emit()

    def _reset(self) -> None:
        """Forgets what is derived from states and tables."""
        self._plan = None
        self._leaving = set()
        for number in range(len(self.param_groups)):
            self._note_live_weights(number)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("tables", "anchor", "backend", "_seed", "_holds_true_weights", "_step_supports_amp_scaling")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._captured = []  # graphs are of the original
        self._reset()
