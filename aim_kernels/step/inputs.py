"""What one step takes beside its plan."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
