"""States of the reference backend: moments and weights in whatever type they are stored, random bits, noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.step import codecs
from aim_kernels.step.layout import CONTROL, STATISTIC
from aim_kernels.step.philox import MOMENT_STREAM, WEIGHT_STREAM, normals, rounding_bits
from aim_kernels.step.states import (
    arithmetic_dtype,
    in_memory_order,
    is_dense,
    keep_moment,
    moments_dtype,
    moments_of,
    read_moment,
    states_of,
    weights_of,
)

if TYPE_CHECKING:
    from aim_kernels.step.plan import StepPlan

_MOMENTS = ("exp_avg", "exp_avg_sq", "extra")


class Rounding:
    """The random bits of one parameter in this step."""

    def __init__(self, plan: StepPlan, index: int) -> None:
        control, record = plan.tables.control.tolist(), plan.records[index]
        self.offset, self.count = int(record["offset"]), int(record["numel"])
        self.origin = control[CONTROL["seed"]], control[CONTROL["counter"]], int(record["first"]) - self.offset
        self.device = plan.params[index].device

    def bits(self, stream: int) -> Tensor:
        """16 for every element, in memory order."""
        seed, counter, base = self.origin
        drawn = rounding_bits(seed, counter, stream, base, self.offset, self.count)
        return torch.from_numpy(drawn).to(self.device)


def moments_in(state: dict[str, Any], group: dict[str, Any]) -> tuple[Any, Any, Any]:
    """First, second and extra moment in the arithmetic type, themselves where they are stored so; None where the group
    keeps none."""
    names = moments_of(group)
    there = [names.get(field, "") for field in _MOMENTS]
    first, second, extra = (read_moment(state, name) if name in state else None for name in there)
    return first, second, extra


def keep_moments(
    p: Tensor, group: dict[str, Any], state: dict[str, Any], values: tuple[Any, Any, Any], rounding: Rounding
) -> tuple[Any, Any]:
    """Stores the moments; returns what was stored of the first and the second."""
    dtype = moments_dtype(group, p)
    if dtype == arithmetic_dtype(p.dtype):
        return values[:2]
    random = rounding.bits(MOMENT_STREAM) if group["rounding"] == "stochastic" else None
    for field, name in moments_of(group).items():
        value = values[_MOMENTS.index(field)]
        keep_moment(p, state, name, value, dtype, random)
    first, second, _ = moments_in(state, group)
    return first, second


def keep_weights(p: Tensor, group: dict[str, Any], state: dict[str, Any], theta: Tensor, rounding: Rounding) -> None:
    """The true weights of a parameter without a master, as its group keeps them."""
    flat, how = in_memory_order(theta), weights_of(group, p)
    if how == "stochastic":
        flat = codecs.to_bfloat16(flat, rounding.bits(WEIGHT_STREAM))
    stored, rest = codecs.to_storage(flat, how, p.dtype)
    p.copy_(stored.as_strided(theta.shape, theta.stride()))
    if rest is not None:
        in_memory_order(state[states_of(group, p)["rest"].name]).copy_(rest)


def noise_of(plan: StepPlan, index: int, level: float) -> Tensor | None:
    """sigma * z for the elements of a parameter, laid out in its memory order."""
    previous = plan.tables.statistics[plan.group_of[index]].tolist()
    numel = previous[STATISTIC["numel"]]
    if not level or not numel:
        return None
    mean = previous[STATISTIC["grad_sum"]] / numel
    variance = previous[STATISTIC["grad_sq"]] / numel - mean * mean
    if not variance > 0.0:  # NaN after gradients that were not finite
        return None
    sigma = level * math.sqrt(variance)
    p, control = plan.params[index], plan.tables.control.tolist()
    first = int(plan.records["first"][index])
    z = torch.from_numpy(normals(control[CONTROL["seed"]], control[CONTROL["counter"]], first, p.numel())).to(p.device)
    z = torch.as_strided(z, p.shape, p.stride()) if is_dense(p) else z.view(p.shape)
    return z.to(arithmetic_dtype(p.dtype)) * sigma
