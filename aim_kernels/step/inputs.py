"""What a plan is made of, and what one step takes beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from aim_kernels.step.tables import Tables


class StepSources(NamedTuple):
    """What a plan is made of: an optimizer's, or what stands for them in one step of a compiled graph.

    Attributes:
        param_groups, state: torch.optim's.
        tables: rows, statistics and control.
        process_group, sync_every: across which processes sums are added up, and how often.
        zero_grad: whether the step leaves gradients as zeros.
        follows_average: whether degraded weights are withdrawn to the moving average.
    """

    param_groups: list[dict[str, Any]]
    state: dict[Any, Any]
    tables: Tables
    process_group: Any = None
    sync_every: int = 1
    zero_grad: bool = False
    follows_average: bool = False


class StepInputs(NamedTuple):
    """Factors and flags of one step.

    Attributes:
        grad_scale: what gradients are divided by, of one element (``GradScaler``'s; on devices that of clipping joins
            it). None: 1.
        found_inf: of one element; if it is not zero, the step is skipped. None: it is not.
        clip_factor: what gradients are multiplied by, if the host knows it.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip_factor: float = 1.0

    def is_skipped(self) -> bool:
        """Whether ``found_inf`` says so; waits for its device."""
        return self.found_inf is not None and bool(self.found_inf)
