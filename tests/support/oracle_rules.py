"""The rules of the oracle in float64: moments, their weights, directions, decay, each with its rounding bound.

Written from the table of rules in docs/design.md. What one parameter holds is a ``Leaf``; ``oracle.py`` puts it through
a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import tolerances as tol

#: Rules whose weight decay multiplies the weights; the others add it to the gradient.
DECOUPLED = ("adamw", "lion")


@dataclass
class Hyper:
    """Hyperparameters of a group, as a user gives them."""

    rule: str
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    amsgrad: bool = False
    lr_decay: float = 0.0
    initial: float = 0.0  # initial_accumulator_value
    alpha: float = 0.99
    centered: bool = False
    decouple_lr: bool = False
    reference_lr: float = 0.0
    maximize: bool = False
    modulated: bool = False
    target: float = 0.1
    rate: float = 0.1
    ema_decay: float | None = None
    measure: str = "snr"

    @property
    def keeps_first(self) -> bool:
        """Whether the group keeps a first moment."""
        always = self.rule in ("adamw", "adam", "lion") or (self.rule == "sgd" and self.momentum)
        return bool(always or (self.rule == "rmsprop" and self.centered) or self.modulated)

    @property
    def keeps_second(self) -> bool:
        return self.rule not in ("sgd", "lion") or self.modulated

    @property
    def classes(self) -> bool:
        """Whether the group keeps optimization state: both moments."""
        return self.keeps_first and self.keeps_second

    @property
    def coupled_decay(self) -> float:
        return 0.0 if self.rule in DECOUPLED else self.weight_decay

    @property
    def decay(self) -> float:
        """What a step multiplies the weights by."""
        if self.rule not in DECOUPLED:
            return 1.0
        return 1.0 - self.lr * (self.weight_decay / self.reference_lr if self.decouple_lr else self.weight_decay)


@dataclass
class Leaf:
    """One parameter: ``theta`` true weights, ``live`` what the module holds (None: the true weights themselves)."""

    theta: np.ndarray
    dtype: str
    first: int
    t: int = 0
    m: np.ndarray | None = None
    v: np.ndarray | None = None
    w: np.ndarray | None = None  # AMSGrad's maximum, RMSprop's momentum buffer
    live: np.ndarray | None = None
    anchor: np.ndarray | float = 0.0
    e_theta: np.ndarray | float = 0.0
    e_m: np.ndarray | float = 0.0
    e_v: np.ndarray | float = 0.0
    e_w: np.ndarray | float = 0.0
    e_live: np.ndarray | float = 0.0
    follows: bool = False  # the anchor is the moving average
    under: np.ndarray | None = None  # class of the latest decision
    tie: np.ndarray | None = None
    # Fewer bytes: how moments are stored ("bfloat16", "int8"; None: as they are) and rounded, what is done for the true
    # weights (the group's ``master``), and the moving average of them.
    stored: str | None = None
    stochastic: bool = False
    weights: str | None = None
    ema: np.ndarray | None = None
    e_ema: np.ndarray | float = 0.0


@dataclass
class Direction:
    """What a rule moves against, its error bound, and the learning rate that multiplies it."""

    value: np.ndarray
    error: np.ndarray
    rate: float
    tie: np.ndarray | None = None  # where a sign lies within the error of its argument


def first_decay(hyper: Hyper) -> tuple[float, float]:
    """What a step multiplies the old first moment and the gradient by."""
    if hyper.rule == "sgd" and hyper.momentum:
        return hyper.momentum, 1.0 - hyper.dampening
    keep = hyper.beta1
    if hyper.rule == "lion":
        keep = hyper.beta2
    elif hyper.rule == "rmsprop" and hyper.centered:
        keep = hyper.alpha
    return keep, 1.0 - keep


def first_weight(hyper: Hyper, t: int) -> float:
    """Total weight ``b`` of the gradients in the first moment after ``t`` steps."""
    keep, take = first_decay(hyper)
    if hyper.rule == "sgd" and hyper.momentum:
        return keep ** (t - 1) + take * math.fsum(keep**k for k in range(t - 1))
    return 1.0 - keep**t


def second_weight(hyper: Hyper, t: int) -> float:
    """Total weight ``bc2`` of the squares in the second moment after ``t`` steps."""
    if hyper.rule == "adagrad":
        return float(t)
    return 1.0 - (hyper.alpha if hyper.rule == "rmsprop" else hyper.beta2) ** t


def first_moment(
    hyper: Hyper, leaf: Leaf, g: np.ndarray, e_g: np.ndarray, unit: float, tiny: float
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """New first moment and its error bound; None where the rule keeps none."""
    if not hyper.keeps_first:
        return None, None
    if hyper.rule == "sgd" and hyper.momentum and leaf.t == 1:
        return g, e_g
    keep, take = first_decay(hyper)
    old = np.zeros_like(g) if leaf.m is None else leaf.m
    value = keep * old + take * g
    error = (
        keep * leaf.e_m
        + take * e_g
        + 2 * unit * (np.abs(keep * old) + np.abs(take * g))
        + unit * np.abs(value)
        + 2 * tiny
    )
    return value, error


def second_moment(
    hyper: Hyper, leaf: Leaf, g: np.ndarray, e_g: np.ndarray, unit: float, tiny: float
) -> tuple[np.ndarray, np.ndarray]:
    """New second moment and its error bound."""
    old = np.full_like(g, hyper.initial if hyper.rule == "adagrad" else 0.0) if leaf.v is None else leaf.v
    e_square = (2 * np.abs(g) + e_g) * e_g
    if hyper.rule == "adagrad":
        value = old + g * g
        return value, leaf.e_v + e_square + unit * (2 * old + 3 * g * g) + 3 * tiny
    keep = hyper.alpha if hyper.rule == "rmsprop" else hyper.beta2
    square = (1 - keep) * g * g
    error = keep * leaf.e_v + (1 - keep) * e_square + unit * (3 * keep * old + 5 * square) + 3 * tiny
    return keep * old + square, error


def hold(hyper: Hyper, leaf: Leaf) -> None:
    """A step in which a block stays as it is: moments that are not there yet begin."""
    if hyper.keeps_first and leaf.m is None:
        leaf.m = np.zeros_like(leaf.theta)
    if hyper.keeps_second and leaf.v is None:
        leaf.v = np.full_like(leaf.theta, hyper.initial if hyper.rule == "adagrad" else 0.0)
    if (hyper.amsgrad or (hyper.rule == "rmsprop" and hyper.momentum)) and leaf.w is None:
        leaf.w = np.zeros_like(leaf.theta)


def larger(
    a: np.ndarray, e_a: np.ndarray | float, b: np.ndarray, e_b: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """``max(a, b)``: the error is that of the larger, or of either where they are close."""
    value = np.maximum(a, b)
    return value, np.maximum(np.maximum(a + e_a, b + e_b) - value, value - np.maximum(a - e_a, b - e_b))


def over_root(
    top: np.ndarray,
    e_top: np.ndarray | float,
    square: np.ndarray,
    e_square: np.ndarray | float,
    floor: float,
    unit: float,
) -> tuple[np.ndarray, np.ndarray]:
    """``top / (sqrt(max(square, 0)) + floor)``.

    Near zero a root is anything but linear in its error, so the quotient is taken at both ends of what the square may
    be: SAFETY times its error away, and divided by SAFETY, since comparisons multiply by it.
    """
    reach = tol.SAFETY * e_square
    below, low, high = (np.sqrt(np.maximum(x, 0.0)) + floor for x in (square, square - reach, square + reach))
    value = top / below
    size = np.abs(value)
    spread = np.maximum(np.abs(top) / low - size, size - np.abs(top) / high) / tol.SAFETY
    return value, e_top / low + spread + 5 * unit * size


def direction(
    hyper: Hyper, leaf: Leaf, m_old: np.ndarray | None, e_m_old: np.ndarray | float, g: np.ndarray, e_g: np.ndarray
) -> Direction:
    """From the new moments (Lion: from the old one); moves the third moment on."""
    unit, tiny = tol.UNIT[leaf.dtype], tol.TINY[leaf.dtype]
    if hyper.rule == "sgd":
        if not hyper.momentum:
            return Direction(g, e_g, hyper.lr)
        if not hyper.nesterov:
            return Direction(leaf.m, leaf.e_m, hyper.lr)
        mu = hyper.momentum
        value = g + mu * leaf.m
        error = e_g + mu * leaf.e_m + 3 * unit * np.abs(mu * leaf.m) + unit * np.abs(value)
        return Direction(value, error, hyper.lr)
    if hyper.rule == "lion":
        return sign_of_mean(hyper, np.zeros_like(g) if m_old is None else m_old, e_m_old, g, e_g, unit, tiny)
    if hyper.rule == "adagrad":
        value, error = over_root(g, e_g, leaf.v, leaf.e_v, hyper.eps, unit)
        return Direction(value, error, hyper.lr / (1.0 + (leaf.t - 1) * hyper.lr_decay))
    if hyper.rule == "rmsprop":
        variance, e_variance = leaf.v, leaf.e_v
        if hyper.centered:
            square = leaf.m * leaf.m
            variance = leaf.v - square
            # Rounding of the square, of the difference, and an underflow of either.
            e_variance = (
                leaf.e_v + (2 * np.abs(leaf.m) + leaf.e_m) * leaf.e_m + unit * (square + np.abs(variance)) + 2 * tiny
            )
        value, error = over_root(g, e_g, variance, e_variance, hyper.eps, unit)
        if hyper.momentum:
            kept = hyper.momentum * (np.zeros_like(g) if leaf.w is None else leaf.w)
            value = kept + value
            error = hyper.momentum * leaf.e_w + error + 2 * unit * np.abs(kept) + unit * np.abs(value) + 2 * tiny
            leaf.w, leaf.e_w = value, error
        return Direction(value, error, hyper.lr)
    scale = math.sqrt(second_weight(hyper, leaf.t))
    second, e_second = leaf.v, leaf.e_v
    if hyper.amsgrad:
        old = np.zeros_like(g) if leaf.w is None else leaf.w
        second, e_second = leaf.w, leaf.e_w = larger(old, leaf.e_w, leaf.v, leaf.e_v)
    value, error = over_root(leaf.m, leaf.e_m, second, e_second, hyper.eps * scale, unit)
    return Direction(value, error, hyper.lr * scale / first_weight(hyper, leaf.t))


def sign_of_mean(
    hyper: Hyper,
    m: np.ndarray,
    e_m: np.ndarray | float,
    g: np.ndarray,
    e_g: np.ndarray,
    unit: float,
    tiny: float,
) -> Direction:
    """Lion's direction. Where the mean of momentum and gradient lies within its own error the sign is open."""
    kept, taken = hyper.beta1 * m, (1.0 - hyper.beta1) * g
    mean = kept + taken
    error = (
        hyper.beta1 * e_m
        + (1.0 - hyper.beta1) * e_g
        + 2 * unit * (np.abs(kept) + np.abs(taken))
        + unit * np.abs(mean)
        + 2 * tiny
    )
    # Nothing is rounded in a sum of zeros.
    zero = (kept == 0) & (taken == 0) & (np.broadcast_to(e_m, g.shape) == 0) & (e_g == 0)
    tie = (np.abs(mean) <= tol.SAFETY * error) & np.isfinite(mean) & ~zero
    return Direction(np.sign(mean), np.zeros_like(g), hyper.lr, tie)
