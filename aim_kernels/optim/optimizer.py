"""``AIMFusedOptimizer``: a ``torch.optim.Optimizer`` whose step also computes AIM's mask and live weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from aim_kernels.backends import check_name, select
from aim_kernels.backends.device import capturing
from aim_kernels.optim import checkpoint, groups, preparation, snapshot, torch_compile
from aim_kernels.optim.clipping import clipped
from aim_kernels.optim.modulation import Modulated
from aim_kernels.optim.weights import HeldWeights, LiveWeights
from aim_kernels.step import options, sharding, validation
from aim_kernels.step.arrangement import arrange_all
from aim_kernels.step.inputs import StepInputs, StepSources
from aim_kernels.step.plan import StepPlan
from aim_kernels.step.states import master_of
from aim_kernels.step.supported import is_estimated, reason_against
from aim_kernels.step.tables import KEYS, Tables

#: Options that ``optimizer.defaults`` must not have under a rule: schedulers that cycle the momentum (OneCycleLR,
#: CyclicLR) look for "betas" there, then for "momentum", and cycle what they find.
_HIDDEN_DEFAULTS = {"sgd": ["betas"], "rmsprop": ["betas"], "adagrad": ["betas", "momentum"]}


class AIMFusedOptimizer(LiveWeights, Modulated):
    r"""AdamW, Adam, SGD, Adagrad, RMSprop or Lion with adaptive intra-network modulation, in one pass over memory.

    With no strength set it is its base rule (torch.optim's formulae, within a few ulp). Per element and step, with
    :math:`\hat m, \hat v` the bias-corrected moments that the rule keeps anyway (our reading of the
    paper's "optimization state")::

        under = m_hat^2 >= tau^2 * (v_hat + eps^2)             the element is under-optimized
        theta -= lr * (step_under if under else step_well) * direction
        live   = anchor + (theta - anchor) * (live_under if under else live_well)

    ``tau`` is a threshold per group; docs/design.md gives every formula in order.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or groups (``block_param_groups`` makes those of blocks). Any
            option below, but those from ``anchor`` on, may be set per group. One that a group's rule does not know is
            refused; one of the constructor's is for those groups whose rule knows it, and refused if there is none.
        lr: learning rate, a number or a one-element tensor.
        rule: "adamw", "adam", "sgd", "adagrad", "rmsprop" (torch.optim's) or "lion" (arXiv 2302.06675, Algorithm 2).
            All take the defaults of this signature; the class of a rule (``ak.RMSprop``) has those of torch.optim.
        betas: decay rates of the moments; of "lion", of the direction and of the moment. Under "sgd", "adagrad" and
            "rmsprop" only ``modulated`` groups use them, for their optimization state.
        eps: added to the denominator; also the floor of the signal-to-noise ratio.
        weight_decay: None means the rule's default in torch.optim (1e-2 for "adamw", else 0). Decoupled for "adamw".
        momentum, dampening, nesterov: of "sgd", as in ``torch.optim.SGD``; "rmsprop" has a momentum, too.
        amsgrad: of "adamw" and "adam": divides by the root of the greatest second moment so far.
        alpha, centered: of "rmsprop", as in ``torch.optim.RMSprop``.
        lr_decay, initial_accumulator_value: of "adagrad", as in ``torch.optim.Adagrad``.
        decouple_lr: of "adamw" and "lion": a step decays the weights by ``weight_decay * lr / reference_lr``, where
            ``reference_lr`` is the group's learning rate when the group was made, so that the decay follows a schedule
            but not the size of the learning rate (Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2: eta_t).
        maximize: ascend instead of descending.
        state_dtype: how moments are stored: None (float32; float64 for float64 parameters), "bfloat16" (2 bytes an
            element) or "int8" (1 byte, and 1 for every 128 elements: docs/design.md, "Fewer bytes"; parameters of
            fewer than 4096 elements keep float32). The arithmetic is float32 all the same.
        rounding: of stored moments in fewer bits: "stochastic" (up or down by chance, right on average) or "nearest".
        master: what 16-bit parameters do for their true weights: None (rounded to nearest in every step, as torch.optim
            does: small steps are lost, take it as experimental), "stochastic" (rounded up or down by chance; bfloat16),
            "kahan" (what rounding took is kept in 16 bits more), "split" (16 bits that with a bfloat16 parameter are
            the float32 weights, exactly), "float32" (those in full beside it).
            While a group's live weights are degraded its parameters have float32 ones whatever is chosen.
        ema_decay: keeps a moving average of the true weights, ``ema = ema_decay * ema + (1 - ema_decay) * theta``
            (state "ema", float32, begun with the first weights); ``ema_parameters()`` puts it into the module.
        under_optimized: ("fraction", q) steers ``tau`` until a share q of the group is under-optimized;
            ("absolute", tau) holds it.
        threshold_rate: step size of that controller.
        measure: what makes an element under-optimized: "snr" (above), "fisher" (``v_hat >= c``), "grad" (``m_hat^2 >=
            c``), both with ``c = (tau / (1 - tau))^16``, so that the same controller reaches thresholds of any size;
            "random" (a control, on ``backend="reference"`` only: a share q of the elements, drawn anew in every step).
            All but "snr" are for ablation: they take a starved block, whose gradients are small, for converged.
        anchor: what a degraded weight is withdrawn to: "zero", or "init", the weights at construction (one more copy of
            the ``modulated`` parameters; others are always withdrawn to zero), or "ema", the moving average of the
            weights, this step's included (``ema_decay`` of the ``modulated`` groups).
        backend: "auto", "cpu", "cuda", "triton" or "reference"; "auto" lets the parameters' device decide, and reads
            the environment variable AIM_KERNELS_BACKEND.
        seed: of the noise and of the phase draws.
        process_group: where every process of it has a part of the parameters only, each another one
            (``ZeroRedundancyOptimizer``); thresholds and statistics then are those of all. DTensor parameters find
            their mesh by themselves, and equal copies (DDP) need nothing. Left behind by pickle and deepcopy: assign
            ``optimizer.process_group`` before the next step.
        sync_every: thresholds and statistics move in every n-th step only, the first among them, and hold in between;
            with DTensors or a process group, so many steps share one all-reduce (``max_grad_norm`` needs one in each).
        keep_masters: keeps ``master`` states of all ``modulated`` parameters at all times, so that a checkpoint has
            the same states whether or not something is degraded when it is taken, as
            ``torch.distributed.checkpoint.load`` wants it.
        fused_scaling: lets ``GradScaler.step`` hand over its scale and its finding of infinities, so that gradients are
            divided, and a step skipped whole, inside the kernel. ``grad`` itself then stays scaled.
        max_grad_norm: clips all gradients together by their L2 norm, as ``torch.nn.utils.clip_grad_norm_`` does, but
            inside the step: one read of the gradients for the norm, none more for the factor. ``grad`` itself stays as
            it is; statistics are of clipped gradients. May be set between steps.
        zero_grad_in_step: leaves gradients as zeros, in the pass that reads them, so that ``zero_grad()`` is not
            needed. Also where ``fused_scaling`` skips a step; without it, ``GradScaler`` skips it by itself, and the
            gradients with it.
        fused, foreach, capturable, differentiable: of torch.optim, which frameworks pass: taken where they ask for what
            is so anyway, refused where not.

    Attributes:
        grad_norm: norm of the gradients in the latest step, before clipping, as a 0-dim tensor; None without
            ``max_grad_norm``. Inside of a function that is compiled it is that of the step before.

    Raises:
        ValueError, TypeError: options or parameters that a step cannot work with, by name.
    """

    # Options of the optimizer as a whole, as ``options.WHOLE`` has them.
    anchor: str
    backend: str
    keep_masters: bool
    max_grad_norm: float | None
    process_group: Any
    sync_every: int
    zero_grad_in_step: bool
    _seed: int
    _step_supports_amp_scaling: bool

    # In the constructor: of the groups that the tables are to have.
    _rows: list[tuple[dict[str, Any], float, bool]] | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rule: str = "adamw",
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        amsgrad: bool = False,
        alpha: float = 0.99,
        centered: bool = False,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        decouple_lr: bool = False,
        maximize: bool = False,
        state_dtype: str | None = None,
        rounding: str = "stochastic",
        master: str | None = None,
        ema_decay: float | None = None,
        under_optimized: tuple[str, float] = ("fraction", 0.1),
        measure: str = "snr",
        threshold_rate: float = 0.1,
        anchor: str = "zero",
        backend: str = "auto",
        seed: int = 0,
        fused_scaling: bool = False,
        max_grad_norm: float | None = None,
        process_group: Any = None,
        sync_every: int = 1,
        keep_masters: bool = False,
        zero_grad_in_step: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        given = options.given_in(locals())
        whole = options.whole_values(given)
        check_name(backend)
        for option in options.WHOLE:
            setattr(self, option.attribute or option.name, whole[option.name])
        self.grad_norm: Tensor | None = None
        self._plan: StepPlan | None = None
        self._weights = HeldWeights(self)
        self._release: Any = None  # gradient_release.Release, or None
        # Of parameters that have no state yet: torch.distributed.checkpoint makes states only where there are none.
        self._anchors: dict[Tensor, Tensor] = {}
        # Whose states and tables graphs will read and write as long as they live.
        self._captured: list[tuple[StepPlan, Any]] = []
        self._tables = Tables(torch.device("cpu"), self._seed)
        self._handle = torch_compile.register(self)
        self._inputs: torch_compile.GraphInputs | None = None
        groups.check_ordered(params)
        if not isinstance(params, Tensor):
            params = list(params)
            own = [self._rule_of(group, n, rule) for n, group in enumerate(params) if isinstance(group, dict)]
            options.check_known_by_any(given, own or [rule])
        self._hidden_defaults: dict[str, Any] = {}
        self._members = groups.Members()
        self._rows = []
        super().__init__(params, options.group_defaults(given))
        if self._members.device is not None:
            self._tables.to(self._members.device)
        self._tables.add_groups(self._rows)
        self._rows = None
        self._hidden_defaults = {name: self.defaults.pop(name) for name in _HIDDEN_DEFAULTS.get(rule, ())}
        if backend != "auto":
            select(backend, self.tables.rows.device)

    @torch_compile.outside_graphs
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, at any time; its row starts neutral. As in torch.optim the dict itself becomes the group."""
        self._refuse_open_step("add_param_group()")
        if self._rows is None:
            self._follow_groups()
        groups.listed(param_group)
        complete = self._completed(param_group, len(self.param_groups))
        groups.check(self, self.param_groups, self._members, complete)
        param_group.update(complete)
        others, self.param_groups = self.param_groups, []  # what torch would look for in each of them was looked for
        try:
            super().add_param_group(param_group)
        finally:
            added, self.param_groups = self.param_groups, others
        self.param_groups += added

        had_device = self._members.device is not None
        self._members.add(param_group, self.process_group)
        row = (param_group, *self._begin_row(complete))
        if self._rows is not None:
            self._rows.append(row)
        else:
            if not had_device and self._members.device is not None:
                self._tables.to(self._members.device)
            self._tables.add_groups([row])
        if self.anchor == "init" and complete["modulated"]:
            for p in complete["params"]:
                if not reason_against(p):
                    self._anchors[p] = master_of(p)
        self._plan = self._inputs = None
        if self._release is not None:
            self._release.watch()

    def _completed(self, param_group: dict[str, Any], number: int) -> dict[str, Any]:
        """The group with all options, in a dict of its own."""
        defaults = {**self.defaults, **self._hidden_defaults}
        rule = self._rule_of(param_group, number, defaults["rule"])
        return groups.completed({**param_group, "rule": rule}, defaults, number)

    def _rule_of(self, param_group: dict[str, Any], number: int, rule: str) -> Any:
        """The rule of a group, where ``rule`` is that of groups without a word on it."""
        return param_group.get("rule", rule)

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
        if closure is not None and self._release is not None:
            raise RuntimeError(
                "step(closure) cannot be used after step_in_backward: call backward() and then optimizer.step()"
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if torch.compiler.is_compiling():
                torch_compile.trace_step(self)
            else:
                if "_opt_called" not in self.__dict__:
                    self._opt_called = True
                if self._release is None:
                    self._step()
                else:
                    self._release.close()
        return loss

    # LR schedulers wrap step() to see whether it was called, which no graph can trace; this one tells them by itself.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _step(self) -> None:
        plan = self._ready_plan()
        if plan is not None:
            # GradScaler sets both for the time of a step.
            self._run(plan, StepInputs(getattr(self, "grad_scale", None), getattr(self, "found_inf", None)))

    def _run(self, plan: StepPlan, inputs: StepInputs) -> None:
        backend = select(self.backend, self._tables.rows.device)
        if not backend.ON_DEVICE and inputs.is_skipped():
            plan.clear_gradients(of_step=False)
            plan.forget_gradients()
            return
        if self.grad_norm is not None:
            self.grad_norm = None
        if self.max_grad_norm is not None:
            validation.check_number("max_grad_norm", self.max_grad_norm, 0.0)
            inputs, self.grad_norm = clipped(inputs, plan, backend, float(self.max_grad_norm))
        plan.read_hyperparameters(inputs, on_device=backend.ON_DEVICE)
        if plan.waves is None:
            backend.step(plan, inputs)
        else:
            backend.finish(plan, inputs, [backend.update(plan, inputs, wave) for wave in plan.waves])
        if inputs.found_inf is None or not backend.ON_DEVICE:
            self._weights.in_true_pass = False  # a device may have skipped the step
        if capturing(self._tables.rows.device):
            self._captured.append((plan, plan.launch))
        plan.bump_versions()
        plan.clear_gradients(of_step=backend.ZEROES)
        plan.forget_gradients()
        self._weights.drop_masters(plan, inputs)

    def _ready_plan(self) -> StepPlan | None:
        """A plan that has read this step's gradients; None where there are none."""
        if torch._C._len_torch_dispatch_stack():
            validation.check_estimated(self.param_groups)
        plan = self._current_plan()
        if plan is None:
            groups.set_listed(self)
        self._weights.refuse_true()
        if plan is None:
            none = all(p.grad is None for group in self.param_groups for p in group["params"])
            if none and self.process_group is None:  # of which others may have gradients, and wait for this process
                return None
            if capturing(self._tables.rows.device):
                raise RuntimeError(
                    "optimizer.step() cannot be captured before it has run with these parameters, gradients and "
                    "strengths: run one step outside of torch.cuda.graph, on a side stream"
                )
            if any(is_estimated(p.grad) for group in self.param_groups for p in group["params"]):
                preparation.estimate(self)
                return None
            preparation.sync_with_module(self)
            validation.check_gradients(self.param_groups)
            only_states = sharding.makes_states_only(self._sources())
            preparation.ensure_states(self)
            if only_states:
                return None
            plan = self._make_plan()
        return plan if plan.has_gradients() or self.process_group is not None else None

    def _sources(self) -> StepSources:
        return StepSources(
            self.param_groups,
            self.state,
            self._tables,
            self.process_group,
            self.sync_every,
            self.zero_grad_in_step,
            self.anchor == "ema",
        )

    def _current_plan(self) -> StepPlan | None:
        """The plan of the step before, with this step's gradients; None if anything that it was made of has changed."""
        plan = self._plan
        return plan if plan is not None and plan.is_of(self._sources()) and plan.read() else None

    def _make_plan(self, grads: Sequence[Tensor | None] | None = None) -> StepPlan:
        """A plan for states that are there and gradients that were checked: ``grads``, one a parameter, or those that
        the parameters hold."""
        plan = self._plan = self._plan_of_states()
        plan.take(grads)
        return plan

    def _plan_of_states(self) -> StepPlan:
        sources = self._sources()
        arrange_all(sources)
        return StepPlan(sources)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @torch_compile.outside_graphs
    def state_dict(self) -> dict[str, Any]:
        """torch.optim's, plus ``master`` states (the true weights) and each group's row, statistics and control."""
        self._refuse_open_step("state_dict()")
        self._weights.restore_astray()
        with torch.no_grad():
            self._weights.adopt_edits()
        # The hooks see it complete, so they wait until the tables are there.
        hooks = self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_post_hooks = type(hooks)()
        try:
            made = checkpoint.complete(super().state_dict(), self)
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        for hook in hooks.values():
            changed = hook(self, made)
            made = made if changed is None else changed
        return made

    @torch_compile.outside_graphs
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, or of the same rule in torch.optim; values keep their bits and dtype.

        Parameters are matched by name if both sides have names (``named_parameters()``), else by position. What others
        keep in states and groups is loaded as it is.

        Where live weights exist, the module receives those that belong to the loaded state, so a resumed run
        continues bit for bit. Load the module first.

        Raises:
            ValueError: other groups or names, another rule, states of another shape, or some that are missing. Nothing
                was changed.
        """
        self._refuse_open_step("load_state_dict()")
        self._weights.refuse_averages("load_state_dict()")
        self._weights.restore_astray()
        checkpoint.load(self, state_dict)
        self._reset()
        if self._weights.holds_true:
            self._weights.holds_true = False
            self.eval()
        else:
            self._weights.emit()

    def snapshot(self) -> Callable[[], None]:
        """Keeps all that steps change but weights and gradients: states, rows, options of groups. Takes a copy of all
        states.

        Returns:
            What goes back to it, if called: values return into the tensors in which they were. Weights have to be back
            before.

        Raises:
            RuntimeError: backward has stepped some parameters already, or the module holds averages.
        """
        return snapshot.snapshot_of(self)

    def _refuse_open_step(self, call: str) -> None:
        """What needs all parameters of one age cannot be done between backward() and step() of ``step_in_backward``."""
        if self._release is not None and self._release.is_open:
            raise RuntimeError(
                "backward() has stepped some parameters already (step_in_backward); call optimizer.step(), which "
                f"closes the step, before {call}"
            )

    def _reset(self) -> None:
        """Forgets what is derived from states and tables."""
        self._plan = None
        self._weights.leaving = set()
        inputs, self._inputs = self._inputs, None  # they take it in one go
        for number in range(len(self.param_groups)):
            self._weights.note(number)
        self._weights.known.note(self.param_groups, self.state)
        if inputs is not None:
            self._inputs = inputs
            inputs.gather()

    def __repr__(self) -> str:
        whole = "".join(f"{o.name}: {getattr(self, o.attribute or o.name)}\n" for o in options.WHOLE)
        lines = super().__repr__().removesuffix(")").splitlines(keepends=True)
        return f"{''.join(line for line in lines if line.partition(':')[0].strip() not in KEYS)}{whole})"

    def __getstate__(self) -> dict[str, Any]:
        kept = [option.attribute or option.name for option in options.WHOLE]
        kept += ["_tables", "_anchors", "_hidden_defaults"]
        group = None if self.process_group is None else sharding.Absent.PROCESS_GROUP
        held = {"holds_true": self._weights.holds_true, "in_true_pass": self._weights.in_true_pass}
        values = {name: self.__dict__[name] for name in kept}
        return {**super().__getstate__(), **values, "process_group": group, "_weights": held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.grad_norm, self._release = None, None
        self._members = groups.Members()
        super().__setstate__(state)
        self._weights = HeldWeights(self, **state["_weights"])
        for group in self.param_groups:
            group.update(dict.fromkeys(KEYS))
        self._captured = []  # graphs are of the original
        self._handle, self._inputs = torch_compile.register(self), None
        self._reset()
