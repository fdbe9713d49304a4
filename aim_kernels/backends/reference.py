"""The step in eager PyTorch: readable, always there, on every device, in the order of operations of docs/design.md."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.backends.reference_rules import RULES, choose, draw_of, under_optimized
from aim_kernels.backends.reference_states import Rounding, keep_moments, keep_weights, moments_in, noise_of
from aim_kernels.step.layout import CONTROL, PHASES, ROW, STATISTIC, TENSOR_FLAGS
from aim_kernels.step.options import in_floats
from aim_kernels.step.states import adopt_edits, arithmetic_dtype, true_weights

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


# -- the backend: a step of all tensors, or of some at a time ----------------------------------------------------------


def step(plan: StepPlan, inputs: StepInputs) -> None:
    """One step over all tensors of the plan."""
    sums = update(plan, inputs, range(len(plan.params)))
    plan.clear_gradients(of_step=False)
    finish(plan, inputs, [sums if plan.exchange is None else _exchanged(plan.exchange, sums, plan.tables.rows.device)])


def update(plan: StepPlan, inputs: StepInputs, indices: Iterable[int]) -> list[Sums]:
    """A step up to its sums, of some parameters only. Returns what they measured, by group."""
    rows = plan.tables.rows.tolist()
    phase, following = PHASES[plan.tables.phase()], PHASES[plan.tables.next_phase()]
    sums = [Sums() for _ in plan.param_groups]
    for index in indices:
        number, state = plan.group_of[index], plan.state_of(index)
        row = rows[number]
        undegraded = _pair(row, "emitted") == (1.0, 1.0)
        if undegraded and plan.records["flags"][index] & TENSOR_FLAGS["adopts"]:
            adopt_edits(plan.params[index], state["master"])
        grad = plan.grads[index]
        if grad is not None:
            uncounted = plan.records["uncounted"][index]
            _update(plan, index, grad, row, phase, following, Sums() if uncounted else sums[number])
        elif "master" in state:
            _emit(plan, index, row[ROW["tau"]], _pair(row, f"{following}_live"), ago=0)
    return sums


def finish(plan: StepPlan, inputs: StepInputs, piece_sums: list[list[Sums]]) -> None:
    """The rest of a step, for the sums of all its parts, in the order of the parameters."""
    total = [Sums() for _ in plan.param_groups]
    for piece in piece_sums:
        for sums, more in zip(total, piece, strict=True):
            for name in STATISTIC:
                setattr(sums, name, getattr(sums, name) + getattr(more, name))
    _finish(plan, PHASES[plan.tables.next_phase()], total)


def squares(plan: StepPlan) -> float:
    """The sum of squares of all gradients but the uncounted ones'."""
    counted = [g for g, uncounted in zip(plan.grads, plan.records["uncounted"], strict=True) if not uncounted]
    return sum(float(g.double().square().sum()) for g in counted if g is not None)


def emit(plan: StepPlan) -> None:
    """Writes the live weights of all parameters that have a master."""
    rows = plan.tables.rows.tolist()
    for index in range(len(plan.params)):
        if "master" in plan.state_of(index):
            row = rows[plan.group_of[index]]
            _emit(plan, index, row[ROW["tau_prev"]], _pair(row, "emitted"), ago=1)


def _exchanged(exchange: Exchange, sums: list[Sums], device: torch.device) -> list[Sums]:
    values = [[float(getattr(s, name)) for name in STATISTIC] for s in sums]
    table = torch.tensor(values, dtype=torch.float64, device=device).view(len(sums), len(STATISTIC))
    exchange(table)
    return [Sums(*row) for row in table.tolist()]


# -- one parameter: the numbered operations of docs/design.md ----------------------------------------------------------


def _update(plan: StepPlan, index: int, grad: Tensor, row: list[float], phase: str, following: str, sums: Sums) -> None:
    """Operations 0 to 6, and what 7 adds up."""
    p, state, number = plan.params[index], plan.state_of(index), plan.group_of[index]
    group, control = in_floats(plan.param_groups[number]), plan.tables.control.tolist()
    arithmetic, rounding = arithmetic_dtype(p.dtype), Rounding(plan, index)
    theta, moments = true_weights(p, state), moments_in(state, group)
    decoupled, decay = group["rule"] in ("adamw", "lion"), group["weight_decay"]
    if group["decouple_lr"]:
        decay = decay / group["reference_lr"]

    # 0: the coefficients of this phase
    grads, steps, live = _pair(row, "grad"), _pair(row, f"{phase}_step"), _pair(row, f"{following}_live")
    held = _is_held(row, phase)
    taken = float(state["step"])
    t = taken if held else taken + 1

    # 1: the gradient
    g0 = grad.to(arithmetic) * float(plan.groups["scale"][number])
    g = g0 if decoupled or not decay else g0 + theta * decay

    # 2: by the class that the old moments give, and noise
    old = under_optimized(moments[0], moments[1], group, taken, row[ROW["tau_prev"]], draw_of(control, index, ago=1))
    g = g * choose(old, *grads, g)
    noise = noise_of(plan, index, row[ROW["noise"]])
    if noise is not None and not held:
        g = g + noise.to(arithmetic)

    # 3: moments, and what the rule makes of them; the class is that of the new ones as they are stored
    direction, rate = RULES[group["rule"]](group, *moments, g, taken, held)
    m, v = keep_moments(p, group, state, moments, rounding)
    under = under_optimized(m, v, group, t, row[ROW["tau"]], draw_of(control, index, ago=0))

    # 4 and 5: decoupled decay, update
    delta = direction * choose(under, rate * steps[0], rate * steps[1], direction)
    theta.mul_(1 - group["lr"] * decay if decoupled and not held else 1.0).sub_(delta)

    # 6: what the next forward pass sees; the anchor may be the average
    if "ema" in state:
        state["ema"].mul_(group["ema_decay"]).add_(theta * (1 - group["ema_decay"]))
    if "master" in state:
        p.copy_(live_weights(theta, plan.anchor_of(index), under, live))
    else:
        keep_weights(p, group, state, theta, rounding)
    state["step"] += not held

    # 7 is of all parameters of the group: see _finish
    sums.numel += p.numel()
    sums.under += math.nan if under is None else float(under.sum())
    sums.nonfinite += float((~torch.isfinite(g0)).sum())
    sums.grad_sum += float(g0.sum(dtype=torch.float64))
    sums.grad_sq += float(g0.double().square().sum())
    sums.update_sq += float(delta.double().square().sum())
    sums.param_sq += float(theta.double().square().sum())


def _finish(plan: StepPlan, following: str, sums: list[Sums]) -> None:
    """Operation 7: thresholds, latched gradient columns, statistics, phase."""
    tables = plan.tables
    for number, (group, total) in enumerate(zip(plan.param_groups, sums, strict=True)):
        row = tables.rows[number].tolist()
        how, target = in_floats(group)["under_optimized"]
        tau = row[ROW["tau"]]
        (grad_under, grad_well), (live_under, live_well) = (
            _pair(row, f"{following}_grad"),
            _pair(row, f"{following}_live"),
        )
        changed = {
            "tau_prev": tau,
            "grad_under": grad_under,
            "grad_well": grad_well,
            "emitted_under": live_under,
            "emitted_well": live_well,
        }
        if total.numel:
            held = _is_held(row, PHASES[tables.phase()])
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


def _emit(plan: StepPlan, index: int, tau: float, live: tuple[float, float], ago: int) -> None:
    """Operation 6 alone, from the moments that are there; what is frozen is well-optimized."""
    p, state = plan.params[index], plan.state_of(index)
    if plan.records["flags"][index] & TENSOR_FLAGS["frozen"]:
        live = live[1], live[1]
    group = in_floats(plan.param_groups[plan.group_of[index]])
    m, v, _ = moments_in(state, group)
    draw = draw_of(plan.tables.control.tolist(), index, ago)
    under = under_optimized(m, v, group, float(state.get("step", 0)), tau, draw)
    p.copy_(live_weights(state["master"], plan.anchor_of(index), under, live))


def live_weights(theta: Tensor, anchor: Tensor | None, under: Tensor | None, live: tuple[float, float]) -> Tensor:
    """Degraded weights, in the arithmetic type: ``anchor + (theta - anchor) * c``, ``theta`` itself if c is 1."""
    c = torch.full_like(theta, live[0]) if under is None else choose(under, *live, theta)
    degraded = theta * c if anchor is None else anchor + (theta - anchor) * c
    return torch.where(c == 1, theta, degraded)


def _pair(row: list[float], columns: str) -> tuple[float, float]:
    """The two columns of a row that are for under- and for well-optimized elements."""
    return row[ROW[f"{columns}_under"]], row[ROW[f"{columns}_well"]]


def _is_held(row: list[float], phase: str) -> bool:
    """Whether a block stays as it is: nothing of its gradient gets through and no update is applied."""
    return _pair(row, "grad") == _pair(row, f"{phase}_step") == (0.0, 0.0)


def classes_of(
    group: dict[str, Any], state: dict[str, Any], row: list[float], control: list[int], index: int
) -> Tensor | None:
    """Which elements of a parameter are under-optimized after its latest step: the class by which its live weights were
    written. None where the group keeps no optimization state.

    ``state``, ``row`` and ``control`` are the parameter's, its group's and the optimizer's; ``index`` is the
    parameter's number among all.
    """
    m, v, _ = moments_in(state, group)
    return under_optimized(
        m, v, group, float(state.get("step", 0)), row[ROW["tau_prev"]], draw_of(control, index, ago=1)
    )
