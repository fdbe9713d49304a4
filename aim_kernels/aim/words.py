"""What a table shows when it is printed: what was decided and why, then the numbers it was decided by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

# Tables are `Any` here: strengths.ModulationTable prints itself by this module, which therefore does not import it.


def described(table: Any) -> str:
    """A sentence, one line per modality (under rules on scores per block), and what else there is to say."""
    if table.rule == "trial":
        sentence, grid, notes = _trial_sentence(table), _trial_grid(table), []
    elif table.whole:
        sentence, grid, notes = _sentence(table), _reliance_grid(table), _left_alone(table)
    else:
        sentence, grid, notes = _sentence(table), _score_grid(table), []
    return "\n".join([f"AIM update {table.update}: {sentence}", *_aligned(grid), *notes])


def _number(value: float, error: float = 0.0, digits: int = 3) -> str:
    """A number and its standard error, where that is known."""
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f} ± {error:.{digits}f}" if error > 0.0 else f"{value:.{digits}f}"


def _aligned(grid: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    for first, *rest in grid:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([f"{first:{widths[0]}}", *cells]).rstrip()


def _errors_above(table: Any, modality: str, depth: int) -> str:
    """``13.7 standard errors above 0.05; limit 3``, in the unit in which the sentence tells the excess."""
    count, limit = table.above[modality][depth], table.dead_zone if table.rule == "reliance" else 1.0 + table.dead_zone
    if math.isnan(count):
        side = "above" if table.excess[modality][depth] > 1.0 + table.dead_zone else "not above"
        return f"{side} {limit:g}; its error is not known"
    side = "above" if count >= 0.0 else "below"
    return f"{abs(count):.1f} standard errors {side} {limit:g}; limit {table.confidence:g}"


def _reason(table: Any, modality: str) -> str:
    """Why a modality is held back, or why not."""
    row = table.excess[modality]
    depth = max(range(len(row)), key=lambda d: (_least(table.kappa[modality][d]), _least(row[d])))
    if math.isnan(row[depth]):
        return "it has no input, and keeps its strength"
    error = table.error_of_excess[modality][depth]
    if table.rule == "reliance":
        what = f"{_number(row[depth] - 1.0, error, 2)} of the loss rests on it unconfirmed"
    else:
        what = f"{table.rule} {_number(row[depth], error, 2)} at depth {depth}"
    return f"{what}, {_errors_above(table, modality, depth)}"


def _least(value: float) -> float:
    """The number, with NaN below all others."""
    return -math.inf if math.isnan(value) else value


def _sentence(table: Any) -> str:
    if table.dominant:
        return "holds back " + ", ".join(f"{m} ({_reason(table, m)})" for m in table.dominant)

    def closeness(modality: str) -> tuple[float, float]:
        return max(map(_least, table.above[modality])), max(map(_least, table.excess[modality]))

    closest = max(table.modalities, key=closeness)
    return f"holds nothing back (closest is {closest}: {_reason(table, closest)})"


def _score_grid(table: Any) -> list[list[str]]:
    held_out = table.held_out
    columns = ["depth", "score", *(["held-out"] if held_out else []), table.rule, _limit(table), "kappa"]
    grid = [["modality", *columns]]
    for m in table.modalities:
        for d, kappa in enumerate(table.kappa[m]):
            scores = [_number(each.scores[m][d], each.errors[m][d]) for each in (table.measured, held_out) if each]
            excess = _number(table.excess[m][d], table.error_of_excess[m][d])
            grid.append([m, str(d), *scores, excess, _number(table.above[m][d], digits=1), _number(kappa)])
    return grid


def _limit(table: Any) -> str:
    return f"errors above {1.0 + table.dead_zone:g} (limit {table.confidence:g})"


def _reliance_grid(table: Any) -> list[list[str]]:
    """One line per modality: what the loss rests on it, in training (with the share of all: the price of holding it
    back where the cue holds) and outside."""
    measured, held_out = table.measured, table.held_out
    grid = [["modality", "training", "share", "held-out", table.rule, _limit(table), "kappa"]]
    shares = table.shares
    for m in table.modalities:
        outside = "-" if held_out is None else _number(held_out.scores[m][0], held_out.errors[m][0])
        cells = [_number(measured.scores[m][0], measured.errors[m][0]), _number(shares[m], digits=2), outside]
        cells.append(_number(table.excess[m][0], table.error_of_excess[m][0]))
        grid.append([m, *cells, _number(table.above[m][0], digits=1), _number(table.kappa[m][0])])
    return grid


def _left_alone(table: Any) -> list[str]:
    """Lines on modalities above the limit that are not held back."""
    lower = {m: table.excess[m][0] - table.confidence * table.error_of_excess[m][0] for m in table.modalities}
    over = {m: value for m, value in lower.items() if value > 1.0 + table.dead_zone}
    measured, notes = table.measured, []
    for m in over:
        if m in table.dominant:
            continue
        if measured.scores[m][0] <= table.confidence * measured.errors[m][0]:
            why = "the network does not rely on it for sure"
        elif len(over) == sum(value == value for value in lower.values()) and m == min(over, key=lambda n: over[n]):
            why = "all would be held back, and its share is the smallest"
        else:
            why = "the schedule or the guard scales its strength to nothing"
        notes.append(f"{m} is left alone: {why}")
    return notes


# -- trials ------------------------------------------------------------------------------------------------------------


def _gains(table: Any) -> dict[str, float]:
    """Standard errors by which each move lowers the held-out loss, beyond the dead zone; NaN where no error is
    known."""
    now = table.trial_losses.get("", math.nan)
    unit = max(abs(now), 1e-12)
    found = {}
    for m, loss in table.trial_losses.items():
        if m:
            error = table.error_of_excess[m][0] * unit
            found[m] = (now - loss - table.dead_zone * abs(now)) / error if error > 0.0 else math.nan
    return found


def _move(table: Any, modality: str) -> str:
    """What was tried. The excess of a modality that was free is its gain, of one that was held back its loss."""
    gain = table.trial_losses[""] - table.trial_losses[modality]
    return "let go" if (table.excess[modality][0] - 1.0) * gain < 0.0 else "held back"


def _trial_sentence(table: Any) -> str:
    held = f"holds back {', '.join(table.dominant)}" if table.dominant else "holds nothing back"
    losses, gains = table.trial_losses, _gains(table)
    made = [m for m in gains if (_move(table, m) == "held back") == any(table.kappa[m]) and losses[m] < losses[""]]
    # At most one move is made; of a strength that a schedule scales to nothing none is seen.
    best = max(made or gains, key=lambda m: (_least(gains[m]), -losses[m]), default=None)
    if best is None:
        return held
    told = f"held-out loss {losses['']:.3f} as it is, {losses[best]:.3f} with {best} {_move(table, best)}"
    gain = "of unknown error" if math.isnan(gains[best]) else f"of {gains[best]:.1f} standard errors"
    beyond = f" beyond {table.dead_zone:g} of the loss" if table.dead_zone else ""
    return f"{held} ({told}, a gain {gain}{beyond}; limit {table.confidence:g})"


def _trial_grid(table: Any) -> list[list[str]]:
    """One line per modality, and one for going on as it is."""
    gains, losses = _gains(table), table.trial_losses
    grid = [["modality", "tried", "held-out loss", "gain in errors", table.rule, _limit(table), "kappa"]]
    grid.append(["", "as it is", _number(losses.get("", math.nan)), "", "", "", ""])
    for m in table.modalities:
        cells = [_move(table, m) if m in losses else "-", _number(losses.get(m, math.nan))]
        cells += [_number(gains.get(m, math.nan), digits=1), _number(table.excess[m][0], table.error_of_excess[m][0])]
        grid.append([m, *cells, _number(table.above[m][0], digits=1), _number(table.kappa[m][0])])
    return grid
