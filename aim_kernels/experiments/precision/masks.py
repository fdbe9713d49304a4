"""Whether stored moments tell under-optimized elements as float32 moments of the same gradients do."""

from __future__ import annotations

import math

import torch

from aim_kernels.optim.optimizer import AIMFusedOptimizer
from aim_kernels.step.layout import ROW
from aim_kernels.step.states import read_moment


class Shadow:
    """float32 moments of the gradients that an optimizer sees, to compare classes with. For AdamW, rows of ones."""

    def __init__(self, optimizer: AIMFusedOptimizer) -> None:
        self.optimizer = optimizer
        self.moments = {
            p: (torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32))
            for group in optimizer.param_groups
            for p in group["params"]
        }

    @torch.no_grad()
    def see(self) -> None:
        """Before a step."""
        for group in self.optimizer.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m, v = self.moments[p]
                g = p.grad.float()
                m.mul_(beta1).add_(g * (1 - beta1))
                v.mul_(beta2).add_((1 - beta2) * g * g)

    @torch.no_grad()
    def compare(self) -> tuple[int, int, int, int]:
        """Of stored moments of fewer bits or more: elements, of equal class, under in both, under in either."""
        counts = [0, 0, 0, 0]
        for number, group in enumerate(self.optimizer.param_groups):
            beta1, beta2 = group["betas"]
            tau = float(self.optimizer.tables.rows[number, ROW["tau_prev"]])
            for p in group["params"]:
                state = self.optimizer.state[p]
                t = float(state["step"])
                slope = tau**2 * (1 - beta1**t) ** 2 / (1 - beta2**t)
                stored = (read_moment(state, "exp_avg"), read_moment(state, "exp_avg_sq"))
                a, b = (m * m >= v * slope for m, v in (stored, self.moments[p]))
                counts[0] += a.numel()
                counts[1] += int((a == b).sum())
                counts[2] += int((a & b).sum())
                counts[3] += int((a | b).sum())
        return counts[0], counts[1], counts[2], counts[3]


class Watcher:
    """Adds up what shadows find, every so many steps."""

    every = 10

    def __init__(self, optimizer: AIMFusedOptimizer, wanted: bool) -> None:
        self.shadow = Shadow(optimizer) if wanted else None
        self.totals = [0, 0, 0, 0]

    def step(self, optimizer: AIMFusedOptimizer, number: int) -> None:
        """A step of the optimizer, watched."""
        if self.shadow is None:
            optimizer.step()
            return
        self.shadow.see()
        optimizer.step()
        if number % self.every == self.every - 1:
            self.totals = [a + b for a, b in zip(self.totals, self.shadow.compare(), strict=True)]

    @property
    def agreement(self) -> float:
        """NaN where nothing was compared."""
        return self.totals[1] / self.totals[0] if self.totals[0] else math.nan

    @property
    def jaccard(self) -> float:
        """The same."""
        return self.totals[2] / self.totals[3] if self.totals[3] else math.nan
