"""Weight averaging: what is judged is a moving average of the weights, which the optimizer's own pass keeps."""

from __future__ import annotations

import contextlib
from typing import Any

from aim_kernels.methods.base import Blocks, Method
from aim_kernels.methods.losses import Loss


class WeightAveraging(Method):
    """Joint training; :meth:`evaluating` puts ``ema <- decay * ema + (1 - decay) * theta`` into the module.

    A control for methods that smooth the course of training. The average is the optimizer's ``ema_decay=``; groups that
    have none get ``decay``, before their first step. Raises ValueError for a ``decay`` outside [0, 1), and for groups
    that were stepped without an average.
    """

    def __init__(
        self, blocks: Blocks, optimizer: Any, *, decay: float = 0.999, loss: Loss | None = None, seed: int = 0
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        without = [group for group in self.optimizer.param_groups if group["ema_decay"] is None]
        if any(self.optimizer.state.get(p) for group in without for p in group["params"]):
            raise ValueError("weights were stepped before they were averaged; give the optimizer ema_decay=")
        for group in without:
            group["ema_decay"] = decay

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return self.optimizer.ema_parameters()
