"""The step in eager PyTorch: readable, always there, on every device, in the order of operations of docs/design.md."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels.step import codecs
from aim_kernels.step.layout import CONTROL, PHASES, ROW, STATISTIC, TENSOR_FLAGS
from aim_kernels.step.options import in_floats
from aim_kernels.step.philox import MOMENT_STREAM, WEIGHT_STREAM, normals, rounding_bits
from aim_kernels.step.states import (
    adopt_edits,
    arithmetic_dtype,
    in_memory_order,
    is_dense,
    keep_moment,
    moments_dtype,
    moments_of,
    read_moment,
    states_of,
    true_weights,
    weights_of,
)

if TYPE_CHECKING:
    from aim_kernels.step.inputs import StepInputs
    from aim_kernels.step.plan import StepPlan
    from aim_kernels.step.sharding import Exchange

ON_DEVICE, ZEROES, DEVICE, DESCRIPTION = False, False, "any", "eager PyTorch"


def unavailable() -> str:
    """Why this backend cannot run: it always can."""
    return ""


def runs_on(device: torch.device) -> bool:
    """Whether tensors on ``device`` are this backend's: all are."""
    return device.type != "meta"


#: ``aim::kSteep``: so steep that m^2 is nothing beside one rounding of v.
_STEEP = 2.0**80

_MOMENTS = ("exp_avg", "exp_avg_sq", "extra")


@dataclass
class Sums:
    """The statistics of one group, as they grow."""

    numel: float = 0.0
    under: float = 0.0
    grad_sum: float = 0.0
    grad_sq: float = 0.0
    update_sq: float = 0.0
    param_sq: float = 0.0
    nonfinite: float = 0.0


def step(plan: StepPlan, inputs: StepInputs) -> None:
    """One step over all tensors of the plan."""
    sums = update(plan, inputs, range(len(plan.params)))
    plan.clear_gradients(of_step=False)
    finish(plan, inputs, [sums if plan.exchange is None else _exchanged(plan.exchange, sums, plan.tables.rows.device)])


def update(plan: StepPlan, inputs: StepInputs, indices: Iterable[int]) -> list[Sums]:
    """A step up to its sums, of some parameters only. Returns what they measured, by group."""
    tables = plan.tables
    following = PHASES[tables.next_phase()]
    now = PHASES[tables.phase()]
    rows = tables.rows.tolist()
    sums = [Sums() for _ in plan.param_groups]
    for index in indices:
        p, number = plan.params[index], plan.group_of[index]
        group, row, state = in_floats(plan.param_groups[number]), rows[number], plan.state_of(index)
        live = (row[ROW[f"{following}_live_under"]], row[ROW[f"{following}_live_well"]])
        grad = plan.grads[index]
        undegraded = row[ROW["emitted_under"]] == row[ROW["emitted_well"]] == 1.0
        if undegraded and plan.records["flags"][index] & TENSOR_FLAGS["adopts"]:
            adopt_edits(p, state["master"])
        if grad is None:
            if "master" in state:
                draw = draw_of(tables.control.tolist(), index, ago=0)
                live = _live_of(plan, index, live)
                _emit(p, group, state, row[ROW["tau"]], live, plan.anchor_of(index), draw)
            continue
        steps = (row[ROW[f"{now}_step_under"]], row[ROW[f"{now}_step_well"]])
        noise = _noise(plan, index, row[ROW["noise"]])
        into = Sums() if plan.records["uncounted"][index] else sums[number]
        draws = tuple(draw_of(tables.control.tolist(), index, ago) for ago in (1, 0))
        multiplier, rounding = float(plan.groups["scale"][number]), Rounding(plan, index)
        anchor = plan.anchor_of(index)
        _update(p, grad, group, state, row, steps, live, anchor, noise, multiplier, into, rounding, draws)
    return sums


def finish(plan: StepPlan, inputs: StepInputs, piece_sums: list[list[Sums]]) -> None:
    """The rest of a step, for the sums of all its parts, in the order of the parameters."""
    total = [Sums() for _ in plan.param_groups]
    for piece in piece_sums:
        for sums, more in zip(total, piece, strict=True):
            for name in STATISTIC:
                setattr(sums, name, getattr(sums, name) + getattr(more, name))
    _finish(plan, PHASES[plan.tables.next_phase()], total)


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


def squares(plan: StepPlan) -> float:
    """The sum of squares of all gradients but the uncounted ones'."""
    counted = [g for g, uncounted in zip(plan.grads, plan.records["uncounted"], strict=True) if not uncounted]
    return sum(float(g.double().square().sum()) for g in counted if g is not None)


def emit(plan: StepPlan) -> None:
    """Writes the live weights of all parameters that have a master."""
    rows = plan.tables.rows.tolist()
    for index, p in enumerate(plan.params):
        state = plan.state_of(index)
        if "master" in state:
            row = rows[plan.group_of[index]]
            live = (row[ROW["emitted_under"]], row[ROW["emitted_well"]])
            group = in_floats(plan.param_groups[plan.group_of[index]])
            draw = draw_of(plan.tables.control.tolist(), index, ago=1)
            live = _live_of(plan, index, live)
            _emit(p, group, state, row[ROW["tau_prev"]], live, plan.anchor_of(index), draw)


def _live_of(plan: StepPlan, index: int, live: tuple[float, float]) -> tuple[float, float]:
    """The live coefficients of a parameter without a gradient: what is frozen is well-optimized."""
    return (live[1], live[1]) if plan.records["flags"][index] & TENSOR_FLAGS["frozen"] else live


def _update(
    p: Tensor,
    grad: Tensor,
    group: dict[str, Any],
    state: dict[str, Any],
    row: list[float],
    steps: tuple[float, float],
    live: tuple[float, float],
    anchor: Tensor | None,
    noise: Tensor | None,
    multiplier: float,
    sums: Sums,
    rounding: Rounding,
    draws: tuple[Draw, ...],
) -> None:
    arithmetic = arithmetic_dtype(p.dtype)
    theta = true_weights(p, state)
    taken = float(state["step"])
    held = _is_held(row, steps)
    t = taken if held else taken + 1
    rule, lr, decay = group["rule"], group["lr"], group["weight_decay"]
    decoupled = rule in ("adamw", "lion")
    if group["decouple_lr"]:
        decay = decay / group["reference_lr"]
    m, v, w = _moments(group, state)

    # 1 and 2: the gradient, by the class that the old moments give
    g0 = grad.to(arithmetic) * multiplier
    g = g0 if decoupled or not decay else g0 + theta * decay
    grad_under, grad_well = row[ROW["grad_under"]], row[ROW["grad_well"]]
    if m is None or v is None:
        g = g * grad_under
    else:
        g = g * _choose(_under(m, v, group, taken, row[ROW["tau_prev"]], draws[0]), grad_under, grad_well, g)
    if noise is not None and not held:
        g = g + noise.to(arithmetic)

    # 3: moments; what Lion moves by is made of the old one
    beta1, beta2 = _betas(group)
    lead = _sign(m * beta1 + g * (1 - beta1)) if rule == "lion" else g
    first, second = _fading(group, taken)
    if m is not None:
        m.mul_(1.0 if held else first[0]).add_(g * first[1])
    if v is not None:
        v.mul_(1.0 if held else second[0]).add_((g * second[1]) * g)

    # 4 and 5: decoupled decay, update, by the class that the new moments give as they are stored
    rate, direction = lr, lead
    if rule in ("adamw", "adam"):
        # m_hat / (sqrt(v_hat) + eps) = m / (sqrt(v) + eps * root) * root / (1 - beta1^t)
        root = math.sqrt(1 - beta2**t) if t else 1.0
        rate = lr * (root / (1 - beta1**t)) if t else lr
        if w is not None:
            torch.maximum(w, v, out=w)
        direction = m / ((v if w is None else w).sqrt() + group["eps"] * root)
    elif rule == "sgd" and group["momentum"]:
        direction = g + m * group["momentum"] if group["nesterov"] else m
    elif rule in ("adagrad", "rmsprop"):
        rate = lr / (1 + taken * group["lr_decay"]) if rule == "adagrad" else lr
        spread = _variance(m, v) if group["centered"] else v
        direction = g / (spread.sqrt() + group["eps"])
        if w is not None:
            direction = w.mul_(1.0 if held else group["momentum"]).add_(direction)
    kept = _keep_moments(p, group, state, (m, v, w), rounding)
    under = None if m is None or v is None else _under(*kept, group, t, row[ROW["tau"]], draws[1])
    if under is None:
        delta = direction * (rate * steps[0])
    else:
        delta = direction * _choose(under, rate * steps[0], rate * steps[1], direction)
    theta.mul_(1 - lr * decay if decoupled and not held else 1.0).sub_(delta)

    # 6: what the next forward pass sees; the anchor may be the average
    if "ema" in state:
        decay = group["ema_decay"]
        state["ema"].mul_(decay).add_(theta * (1 - decay))
    if "master" in state:
        p.copy_(live_weights(theta, anchor, under, live))
    else:
        _keep_weights(p, group, state, theta, rounding)
    state["step"] += not held

    sums.numel += p.numel()
    sums.under += math.nan if under is None else float(under.sum())
    finite = torch.isfinite(g0)
    sums.nonfinite += float((~finite).sum())
    sums.grad_sum += float(g0.sum(dtype=torch.float64))
    sums.grad_sq += float(g0.double().square().sum())
    sums.update_sq += float(delta.double().square().sum())
    sums.param_sq += float(theta.double().square().sum())


def _emit(
    p: Tensor,
    group: dict[str, Any],
    state: dict[str, Any],
    tau: float,
    live: tuple[float, float],
    anchor: Tensor | None,
    draw: Draw,
) -> None:
    m, v, _ = _moments(group, state)
    under = None if m is None or v is None else _under(m, v, group, float(state["step"]), tau, draw)
    p.copy_(live_weights(state["master"], anchor, under, live))


def classes_of(
    group: dict[str, Any], state: dict[str, Any], row: list[float], control: list[int], index: int
) -> Tensor | None:
    """Which elements of a parameter are under-optimized after its latest step: the class by which its live weights were
    written. None where the group keeps no optimization state.

    ``state``, ``row`` and ``control`` are the parameter's, its group's and the optimizer's; ``index`` is the
    parameter's number among all.
    """
    m, v, _ = _moments(group, state)
    if m is None or v is None:
        return None
    return _under(m, v, group, float(state["step"]), row[ROW["tau_prev"]], draw_of(control, index, ago=1))


def _moments(group: dict[str, Any], state: dict[str, Any]) -> tuple[Any, Any, Any]:
    """First, second and extra moment in the arithmetic type, themselves where they are stored so; None where the group
    keeps none."""
    names = moments_of(group)
    there = [names.get(field, "") for field in _MOMENTS]
    first, second, extra = (read_moment(state, name) if name in state else None for name in there)
    return first, second, extra


def _keep_moments(
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
    first, second, _ = _moments(group, state)
    return first, second


def _keep_weights(p: Tensor, group: dict[str, Any], state: dict[str, Any], theta: Tensor, rounding: Rounding) -> None:
    """The true weights of a parameter without a master, as its group keeps them."""
    flat, how = in_memory_order(theta), weights_of(group, p)
    if how == "stochastic":
        flat = codecs.to_bfloat16(flat, rounding.bits(WEIGHT_STREAM))
    stored, rest = codecs.to_storage(flat, how, p.dtype)
    p.copy_(stored.as_strided(theta.shape, theta.stride()))
    if rest is not None:
        in_memory_order(state[states_of(group, p)["rest"].name]).copy_(rest)


def _betas(group: dict[str, Any]) -> tuple[float, float]:
    """Decay rates of the moments."""
    beta1, beta2 = group["betas"]
    if group["rule"] == "rmsprop":
        beta2 = group["alpha"]
        beta1 = beta2 if group["centered"] else beta1
    return beta1, beta2


def _is_held(row: list[float], steps: tuple[float, float]) -> bool:
    """Whether a block stays as it is: nothing of its gradient gets through and no update is applied."""
    return row[ROW["grad_under"]] == row[ROW["grad_well"]] == steps[0] == steps[1] == 0.0


def _fading(group: dict[str, Any], taken: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """What is kept of either moment, and what is added of the gradient and of its square."""
    beta1, beta2 = _betas(group)
    first = beta2 if group["rule"] == "lion" else beta1
    second = (1.0, 1.0) if group["rule"] == "adagrad" else (beta2, 1 - beta2)
    if group["rule"] == "sgd" and group["momentum"]:
        return (group["momentum"], 1 - group["dampening"]) if taken else (0.0, 1.0), second
    return (first, 1 - first), second


#: Where the classes of measure "random" come from: seed, number of the step, number of the parameter.
Draw = tuple[int, int, int]


def draw_of(control: list[int], index: int, ago: int) -> Draw:
    """Of the step at hand (``ago=0``), or of the one before it, whose class the next gradient goes by."""
    return control[CONTROL["seed"]], (control[CONTROL["counter"]] - ago) % 2**64, index


def _under(m: Tensor, v: Tensor, group: dict[str, Any], t: float, tau: float, draw: Draw) -> Tensor:
    """The class of moments that are ``t`` steps old; for "snr" m_hat^2 >= tau^2 (v_hat + eps^2), without the
    divisions."""
    if t < 1:
        return torch.ones_like(m, dtype=torch.bool)
    if group["measure"] == "random":
        drawn = np.random.default_rng(draw).random(tuple(m.shape)) < group["under_optimized"][1]
        return torch.from_numpy(np.asarray(drawn)).to(m.device)
    beta1, beta2 = _betas(group)
    if group["rule"] == "sgd" and group["momentum"]:
        mu = group["momentum"]
        earlier = t - 1 if mu == 1 else (1 - mu ** (t - 1)) / (1 - mu)
        weight = mu ** (t - 1) + (1 - group["dampening"]) * earlier
    else:
        weight = 1 - (beta2 if group["rule"] == "lion" else beta1) ** t
    second_weight = t if group["rule"] == "adagrad" else 1 - beta2**t
    if group["measure"] in ("fisher", "grad"):
        c = math.inf if tau == 1 else tau / (1 - tau)
        for _ in range(4):
            c = c * c
        if group["measure"] == "grad":
            return m * m >= v * 0.0 + _limited(c * (weight * weight), v)
        return m * m >= v * -_STEEP + _limited(c * second_weight * _STEEP, v)
    squared = tau * tau * weight * weight
    return m * m >= v * (squared / second_weight) + squared * group["eps"] ** 2


def _limited(number: float, like: Tensor) -> Tensor:
    """A number in the type of a tensor, infinite where it is too large for it."""
    return torch.tensor(number, dtype=torch.float64, device=like.device).to(like)


def _variance(m: Tensor, v: Tensor) -> Tensor:
    spread = v - m * m  # negative by rounding only
    # Where both squares overflow, that of a finite mean counts for nothing.
    return torch.where(spread.isnan(), v + (m - m), spread.clamp(min=0))


def _sign(x: Tensor) -> Tensor:
    # torch.sign makes a zero of NaN, and so hides it.
    return torch.where(x.isnan(), x, x.sign())


def _choose(under: Tensor, if_under: float, if_well: float, like: Tensor) -> Tensor:
    # Filled tensors: torch.where on two numbers would compute in the default dtype.
    return torch.where(under, torch.full_like(like, if_under), torch.full_like(like, if_well))


def live_weights(theta: Tensor, anchor: Tensor | None, under: Tensor | None, live: tuple[float, float]) -> Tensor:
    """Degraded weights, in the arithmetic type: ``anchor + (theta - anchor) * c``, ``theta`` itself if c is 1."""
    c = torch.full_like(theta, live[0]) if under is None else _choose(under, live[0], live[1], theta)
    degraded = theta * c if anchor is None else anchor + (theta - anchor) * c
    return torch.where(c == 1, theta, degraded)


def _noise(plan: StepPlan, index: int, level: float) -> Tensor | None:
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


def _exchanged(exchange: Exchange, sums: list[Sums], device: torch.device) -> list[Sums]:
    values = [[float(getattr(s, name)) for name in STATISTIC] for s in sums]
    table = torch.tensor(values, dtype=torch.float64, device=device).view(len(sums), len(STATISTIC))
    exchange(table)
    return [Sums(*row) for row in table.tolist()]


def _finish(plan: StepPlan, following: str, sums: list[Sums]) -> None:
    """7: thresholds, latched gradient columns, statistics, phase."""
    tables = plan.tables
    for number, (group, total) in enumerate(zip(plan.param_groups, sums, strict=True)):
        row = tables.rows[number].tolist()
        how, target = in_floats(group)["under_optimized"]
        tau = row[ROW["tau"]]
        changed = {
            "tau_prev": tau,
            "grad_under": row[ROW[f"{following}_grad_under"]],
            "grad_well": row[ROW[f"{following}_grad_well"]],
            "emitted_under": row[ROW[f"{following}_live_under"]],
            "emitted_well": row[ROW[f"{following}_live_well"]],
        }
        if total.numel:
            now = PHASES[tables.phase()]
            held = _is_held(row, (row[ROW[f"{now}_step_under"]], row[ROW[f"{now}_step_well"]]))
            if how == "fraction" and not math.isnan(total.under) and not held:
                changed["tau"] = min(
                    max(tau + float(group["threshold_rate"]) * (total.under / total.numel - target), 0.0), 1.0
                )
            tables.statistics[number] = torch.tensor(
                [float(getattr(total, name)) for name in STATISTIC],
                dtype=torch.float64,
                device=tables.statistics.device,
            )
        tables.set_columns(number, **changed)
    tables.control[CONTROL["phase"]] = PHASES.index(following)
    tables.control[CONTROL["counter"]] += 1
