"""The rules in eager PyTorch, one function each, and the class of an element: the tables of docs/design.md.

A rule takes the moments ``m``, ``v`` and ``w`` (None if its group keeps none), the gradient ``g``, the number of steps
``taken`` so far and whether the block is held. It updates the moments, and returns the direction of the step and its
rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels.step.layout import CONTROL

#: ``aim::kSteep``: so steep that m^2 is nothing beside one rounding of v.
_STEEP = 2.0**80
#: Where the classes of measure "random" come from: seed, number of the step, number of the parameter.
Draw = tuple[int, int, int]


def _adam(group: dict[str, Any], m: Any, v: Any, w: Any, g: Tensor, taken: float, held: bool) -> tuple[Tensor, float]:
    """adamw and adam: ``m_hat / (sqrt(v_hat) + eps)``, as ``m / (sqrt(v) + eps * root)`` times ``root / (1 - beta1^t)``
    with ``root = sqrt(1 - beta2^t)``."""
    beta1, beta2 = group["betas"]
    _move(m, g, beta1, held)
    _move_square(v, g, beta2, held)
    if w is not None:  # amsgrad
        torch.maximum(w, v, out=w)
        v = w
    t = taken if held else taken + 1
    root = math.sqrt(1 - beta2**t) if t else 1.0
    rate = group["lr"] * (root / (1 - beta1**t)) if t else group["lr"]
    return m / (v.sqrt() + group["eps"] * root), rate


def _sgd(group: dict[str, Any], m: Any, v: Any, w: Any, g: Tensor, taken: float, held: bool) -> tuple[Tensor, float]:
    """The gradient, or the momentum buffer, which is the gradient in the first step."""
    beta1, beta2 = group["betas"]
    mu = group["momentum"]
    _move_square(v, g, beta2, held)
    if not mu:
        _move(m, g, beta1, held)
        return g, group["lr"]
    keep, share = (mu, 1 - group["dampening"]) if taken else (0.0, 1.0)
    m.mul_(1.0 if held else keep).add_(g * share)
    return g + m * mu if group["nesterov"] else m, group["lr"]


def _adagrad(
    group: dict[str, Any], m: Any, v: Any, w: Any, g: Tensor, taken: float, held: bool
) -> tuple[Tensor, float]:
    """The gradient over the root of the sum of all squares."""
    _move(m, g, group["betas"][0], held)
    v.add_(g * g)
    return g / (v.sqrt() + group["eps"]), group["lr"] / (1 + taken * group["lr_decay"])


def _rmsprop(
    group: dict[str, Any], m: Any, v: Any, w: Any, g: Tensor, taken: float, held: bool
) -> tuple[Tensor, float]:
    """The gradient over the root of the mean square, or of the variance (centered); or a buffer of such (momentum)."""
    beta1, alpha = _betas(group)
    _move(m, g, beta1, held)
    _move_square(v, g, alpha, held)
    direction = g / ((_variance(m, v) if group["centered"] else v).sqrt() + group["eps"])
    if w is not None:
        direction = w.mul_(1.0 if held else group["momentum"]).add_(direction)
    return direction, group["lr"]


def _lion(group: dict[str, Any], m: Any, v: Any, w: Any, g: Tensor, taken: float, held: bool) -> tuple[Tensor, float]:
    """The sign of the old moment, moved on by beta1; what is kept moves on by beta2."""
    beta1, beta2 = group["betas"]
    direction = _sign(m * beta1 + g * (1 - beta1))
    _move(m, g, beta2, held)
    _move_square(v, g, beta2, held)
    return direction, group["lr"]


RULES: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "adamw": _adam,
    "adam": _adam,
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "lion": _lion,
}


def _move(m: Tensor | None, g: Tensor, beta: float, held: bool) -> None:
    """``m = beta * m + (1 - beta) * g``; a held block keeps all of what it has. Nothing where there is no moment."""
    if m is not None:
        m.mul_(1.0 if held else beta).add_(g * (1 - beta))


def _move_square(v: Tensor | None, g: Tensor, beta: float, held: bool) -> None:
    """``v = beta * v + ((1 - beta) * g) * g``, likewise."""
    if v is not None:
        v.mul_(1.0 if held else beta).add_((g * (1 - beta)) * g)


def _variance(m: Tensor, v: Tensor) -> Tensor:
    spread = v - m * m  # negative by rounding only
    # Where both squares overflow, that of a finite mean counts for nothing.
    return torch.where(spread.isnan(), v + (m - m), spread.clamp(min=0))


def _sign(x: Tensor) -> Tensor:
    # torch.sign makes a zero of NaN, and so hides it.
    return torch.where(x.isnan(), x, x.sign())


def _betas(group: dict[str, Any]) -> tuple[float, float]:
    """Decay rates of the moments."""
    beta1, beta2 = group["betas"]
    if group["rule"] == "lion":
        return beta2, beta2
    if group["rule"] == "rmsprop":
        return group["alpha"] if group["centered"] else beta1, group["alpha"]
    return beta1, beta2


def _weights(group: dict[str, Any], t: float) -> tuple[float, float]:
    """``b`` and ``bc2``: the weights of all gradients, and of their squares, in moments that are ``t`` steps old."""
    beta1, beta2 = _betas(group)
    first, second = 1 - beta1**t, t if group["rule"] == "adagrad" else 1 - beta2**t
    if group["rule"] == "sgd" and group["momentum"]:
        mu = group["momentum"]
        earlier = t - 1 if mu == 1 else (1 - mu ** (t - 1)) / (1 - mu)
        first = mu ** (t - 1) + (1 - group["dampening"]) * earlier
    return first, second


# -- classes -----------------------------------------------------------------------------------------------------------


def draw_of(control: list[int], index: int, ago: int) -> Draw:
    """Of the step at hand (``ago=0``), or of the one before it, whose class the next gradient goes by."""
    return control[CONTROL["seed"]], (control[CONTROL["counter"]] - ago) % 2**64, index


def under_optimized(m: Any, v: Any, group: dict[str, Any], t: float, tau: float, draw: Draw) -> Tensor | None:
    """The class of moments that are ``t`` steps old, ``m^2 >= c_v v + c_0``: for "snr" ``m_hat^2 >= tau^2 (v_hat +
    eps^2)``, without the divisions. None without both moments."""
    if m is None or v is None:
        return None
    if t < 1:
        return torch.ones_like(m, dtype=torch.bool)
    if group["measure"] == "random":
        drawn = np.random.default_rng(draw).random(tuple(m.shape)) < group["under_optimized"][1]
        return torch.from_numpy(np.asarray(drawn)).to(m.device)
    b, bc2 = _weights(group, t)
    if group["measure"] == "snr":
        squared = tau * tau * b * b
        return m * m >= v * (squared / bc2) + squared * group["eps"] ** 2
    c = math.inf if tau == 1 else tau / (1 - tau)
    for _ in range(4):
        c = c * c
    if group["measure"] == "grad":
        return m * m >= v * 0.0 + _limited(c * (b * b), v)
    return m * m >= v * -_STEEP + _limited(c * bc2 * _STEEP, v)  # "fisher"


def _limited(number: float, like: Tensor) -> Tensor:
    """A number in the type of a tensor, infinite where it is too large for it."""
    return torch.tensor(number, dtype=torch.float64, device=like.device).to(like)


def choose(under: Any, if_under: float, if_well: float, like: Tensor) -> Any:
    """A coefficient by the class of each element; without classes there is only one."""
    if under is None:
        return if_under
    # Filled tensors: torch.where on two numbers would compute in the default dtype.
    return torch.where(under, torch.full_like(like, if_under), torch.full_like(like, if_well))
