"""AIM's step written in PyTorch: the rivals that need no kernel of ours.

Both classes do the arithmetic of ``docs/design.md`` for one group under AdamW: old class, gradient coefficients,
moments, decay, new class, step coefficients, live weights, count, and the threshold's controller. Of the statistics
they keep only the count, so they do less than the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Hyperparameters and modulation row; pairs are (under-optimized, well-optimized)."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    grad: tuple[float, float] = (1.0, 1.0)
    step: tuple[float, float] = (1.0, 1.0)
    live: tuple[float, float] = (1.0, 1.0)
    target: float = 0.1
    rate: float = 0.1

    def modulation(self) -> dict[str, float]:
        """The row as ``set_modulation`` takes it."""
        pairs = {"grad": self.grad, "step": self.step, "live": self.live}
        return {f"{name}_{side}": pair[i] for name, pair in pairs.items() for i, side in enumerate(("under", "well"))}


class Scalars(NamedTuple):
    """What all elements share in one step, made in float64."""

    old_v: float  # under-optimized before the step: m*m >= old_v * v + old_0
    old_0: float
    new_v: float
    new_0: float
    root_scale: float  # 1 / sqrt(1 - beta2^t)
    step_under: float  # learning rate and bias correction included
    step_well: float


class _AIM:
    """What the two classes share: states, step count, threshold."""

    def __init__(
        self,
        params: list[Tensor],
        exp_avg: list[Tensor],
        exp_avg_sq: list[Tensor],
        settings: Settings,
        master: list[Tensor] | None = None,
    ) -> None:
        self.params = params
        self.settings = settings
        self.numel = sum(p.numel() for p in params)
        self.count = 0  # steps taken
        self.tau = self.tau_prev = 0.0
        self.under = 0
        states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq} | ({"master": master} if master is not None else {})
        self.state = {p: {name: tensors[i] for name, tensors in states.items()} for i, p in enumerate(params)}

    def _scalars(self) -> Scalars:
        """The constants of the step that ``count`` now names."""
        s, t = self.settings, self.count
        correction1, correction2 = 1 - s.betas[0] ** t, 1 - s.betas[1] ** t
        lr = s.lr / correction1
        return Scalars(
            *self._class_constants(self.tau_prev, t - 1),
            *self._class_constants(self.tau, t),
            correction2**-0.5,
            lr * s.step[0],
            lr * s.step[1],
        )

    def _class_constants(self, tau: float, t: int) -> tuple[float, float]:
        if t == 0:
            return 0.0, 0.0  # everything is under-optimized
        s = self.settings
        weight = 1 - s.betas[0] ** t
        square = (tau * weight) ** 2
        return square / (1 - s.betas[1] ** t), square * s.eps**2

    def _control(self, under: int) -> None:
        s = self.settings
        self.under = under
        self.tau_prev = self.tau
        self.tau = min(max(self.tau + s.rate * (under / self.numel - s.target), 0.0), 1.0)


class EagerAIM(_AIM):
    """Tuned eager PyTorch: ``out=`` variants, temporaries allocated once, ``count_nonzero``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        largest = max(p.numel() for p in self.params)
        self.device = self.params[0].device
        dtypes = (torch.float32, torch.float32, torch.bool)
        scratch = [torch.empty(largest, dtype=dtype, device=self.device) for dtype in dtypes]
        self.grads, self.lives = self._pair(self.settings.grad), self._pair(self.settings.live)
        self.temporaries = [[t[: p.numel()].view(p.shape) for t in scratch] for p in self.params]

    @torch.no_grad()
    def step(self) -> None:
        self.count += 1
        k = self._scalars()
        steps = self._pair((k.step_under, k.step_well))
        self._control(sum(self._step_one(*pair, k, steps) for pair in zip(self.params, self.temporaries, strict=True)))

    def _pair(self, values: tuple[float, float]) -> tuple[Tensor, ...]:
        return torch.tensor(values, device=self.device).unbind()

    def _step_one(self, param: Tensor, temporaries: list[Tensor], k: Scalars, steps: Sequence[Tensor]) -> int:
        s, state, (a, b, mask) = self.settings, self.state[param], temporaries
        grad, m, v, theta = param.grad, state["exp_avg"], state["exp_avg_sq"], state.get("master", param)
        beta1, beta2 = s.betas
        assert grad is not None

        if s.grad[0] == s.grad[1]:
            g = grad if s.grad[0] == 1.0 else torch.mul(grad, s.grad[0], out=a)
        else:
            torch.mul(m, m, out=a)
            torch.mul(v, k.old_v, out=b).add_(k.old_0)
            torch.ge(a, b, out=mask)
            torch.where(mask, *self.grads, out=a)
            g = torch.mul(grad, a, out=a)

        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)

        torch.mul(m, m, out=a)
        torch.mul(v, k.new_v, out=b).add_(k.new_0)
        torch.ge(a, b, out=mask)
        torch.where(mask, *steps, out=a)
        torch.sqrt(v, out=b).mul_(k.root_scale).add_(s.eps)
        torch.div(m, b, out=b)
        theta.mul_(1 - s.lr * s.weight_decay).addcmul_(a, b, value=-1)

        if "master" in state:
            torch.where(mask, *self.lives, out=a)
            torch.mul(theta, a, out=param)
        return int(torch.count_nonzero(mask))


class CompiledAIM(_AIM):
    """The same under ``torch.compile``: one graph of all tensors, static shapes, the count inside."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        states = [tuple(self.state[p].get(name) for name in ("exp_avg", "exp_avg_sq", "master")) for p in self.params]
        self.arguments = [(p.detach(), p.grad, *s) for p, s in zip(self.params, states, strict=True)]
        # A number would be compiled in as a constant, and a new one would compile again: they travel as a tensor.
        self.scalars = torch.zeros(len(Scalars._fields), device=self.params[0].device)
        torch._dynamo.reset()  # graphs of sets that are gone count against its limit of graphs per function
        self.compiled = torch.compile(partial(step_functional, self.settings), dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self) -> None:
        self.count += 1
        self.scalars.copy_(torch.tensor(self._scalars()))
        self._control(int(self.compiled(self.arguments, self.scalars)))


def step_functional(s: Settings, arguments: list[tuple[Any, ...]], scalars: Tensor) -> Tensor:
    """One step of all tensors; returns the number of under-optimized elements. Written to be compiled."""
    k = Scalars(*scalars.unbind())  # type: ignore[arg-type]
    beta1, beta2 = s.betas
    count = torch.zeros((), dtype=torch.int64, device=scalars.device)
    for param, grad, m, v, master in arguments:
        theta = param if master is None else master
        one_for_all = s.grad[0] == s.grad[1]
        g = grad * (s.grad[0] if one_for_all else torch.where(m * m >= v * k.old_v + k.old_0, *s.grad))
        m_new = m * beta1 + g * (1 - beta1)
        v_new = v * beta2 + (1 - beta2) * g * g
        under = m_new * m_new >= v_new * k.new_v + k.new_0
        direction = m_new / (v_new.sqrt() * k.root_scale + s.eps)
        theta_new = theta * (1 - s.lr * s.weight_decay) - torch.where(under, k.step_under, k.step_well) * direction
        m.copy_(m_new)
        v.copy_(v_new)
        theta.copy_(theta_new)
        if master is not None:
            param.copy_(theta_new * torch.where(under, *s.live))
        count = count + under.sum()
    return count
