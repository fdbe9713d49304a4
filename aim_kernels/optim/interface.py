"""What the parts of the optimizer ask of it, so that they need not import it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from aim_kernels.step.inputs import StepInputs, StepSources
from aim_kernels.step.plan import StepPlan
from aim_kernels.step.tables import Tables


class FusedOptimizer(Protocol):
    """``AIMFusedOptimizer``, seen from the modules of this folder. Names with an underscore are for these alone."""

    param_groups: list[dict[str, Any]]
    state: Any
    anchor: str
    backend: str
    process_group: Any
    sync_every: int
    max_grad_norm: float | None
    grad_norm: Tensor | None
    zero_grad_in_step: bool
    _plan: StepPlan | None
    _tables: Tables
    _handle: str
    _inputs: Any
    _release: Any
    _weights: Any
    _rows: Any
    _anchors: dict[Tensor, Tensor]
    _opt_called: bool
    _optimizer_load_state_dict_pre_hooks: Any
    _optimizer_load_state_dict_post_hooks: Any

    @property
    def tables(self) -> Tables: ...
    def _run(self, plan: StepPlan, inputs: StepInputs) -> None: ...
    def _sources(self) -> StepSources: ...
    def _current_plan(self) -> StepPlan | None: ...
    def _make_plan(self, grads: Sequence[Tensor | None] | None = None) -> StepPlan: ...
    def _refuse_open_step(self, call: str) -> None: ...
    def _plan_of_states(self) -> StepPlan: ...
