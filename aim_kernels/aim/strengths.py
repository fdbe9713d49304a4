"""From scores to strengths: pure arithmetic on small tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from aim_kernels.aim.words import described

#: One number a depth, for each modality.
Scores = dict[str, list[float]]


class Measured(NamedTuple):
    """Mean scores, and their standard errors (0 where they are not known)."""

    scores: Scores
    errors: Scores

    @classmethod
    def exactly(cls, scores: Scores) -> Measured:
        """Scores of which no errors are known."""
        return cls(scores, {m: [0.0] * len(row) for m, row in scores.items()})


class Excess(NamedTuple):
    """What becomes strengths: above 1 where a modality leads. ``inverse``: the same for those that are behind."""

    values: Scores
    errors: Scores
    inverse: Scores
    inverse_errors: Scores


#: Largest strength: below 1 also when stored as float32.
KAPPA_MAX = 1.0 - 1e-6
#: A modality whose strengths average more than this is dominant.
DOMINANT = 0.01


def at_relative_depth(values: list[float], position: float) -> float:
    """``values`` at ``position`` in [0, 1] of the encoder (0: first block, 1: last), interpolated linearly."""
    x = position * (len(values) - 1)
    low = min(int(x), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return values[low] + (x - low) * (values[high] - values[low])


def ratios(scores: Mapping[str, list[float]]) -> Scores:
    """``rho[m][d] = s[m][d] / mean_{m' != m} s[m'][d]``; the other encoders' scores are read at the same relative
    depth.

    A single block counts as its encoder's last. The paper says that imbalance is assessed at each depth; this ratio is
    our reading.
    """
    table: Scores = {}
    for modality, own in scores.items():
        others = [values for name, values in scores.items() if name != modality]
        table[modality] = []
        for depth, score in enumerate(own):
            position = depth / (len(own) - 1) if len(own) > 1 else 1.0
            mean = sum(at_relative_depth(values, position) for values in others) / len(others)
            table[modality].append(score / max(mean, 1e-12))
    return table


def margins(scores: Mapping[str, list[float]], held_out: Mapping[str, list[float]]) -> Scores:
    """``1 + g[m][d] - mean_{m' != m} g[m'][d]`` with ``g = (s_train - s_heldout) / s_train``: by how much the share of
    its own training score that the held-out samples do not confirm is larger than the others' (our own rule).

    Unlike the gap it does not compare scores of different modalities, whose features may differ in kind. Depths are
    aligned as in :func:`ratios`.
    """
    lost = {m: [(a - b) / max(a, 1e-12) for a, b in zip(row, held_out[m], strict=True)] for m, row in scores.items()}
    table: Scores = {}
    for modality, own in lost.items():
        others = [values for name, values in lost.items() if name != modality]
        table[modality] = []
        for depth, share in enumerate(own):
            position = depth / (len(own) - 1) if len(own) > 1 else 1.0
            mean = sum(at_relative_depth(values, position) for values in others) / len(others)
            table[modality].append(1.0 + share - mean)
    return table


def relative_errors(measured: Measured) -> Scores:
    """Standard error of ``rho`` over ``rho``. The scores of different modalities count as independent; those of the
    same samples mostly rise and fall together, which makes the true error smaller."""
    scores, errors = measured
    table: Scores = {}
    for modality, own in scores.items():
        others = [name for name in scores if name != modality]
        table[modality] = []
        for depth, score in enumerate(own):
            position = depth / (len(own) - 1) if len(own) > 1 else 1.0
            mean = sum(at_relative_depth(scores[name], position) for name in others)
            square = sum(at_relative_depth(errors[name], position) ** 2 for name in others)
            here = errors[modality][depth] / max(score, 1e-12)
            table[modality].append(math.sqrt(here**2 + square / max(mean, 1e-12) ** 2))
    return table


def margin_errors(measured: Measured, held_out: Measured) -> Scores:
    """Standard errors of :func:`margins`, by the same assumption."""

    def relative(table: Measured, modality: str, depth: int) -> float:
        return table.errors[modality][depth] / max(table.scores[modality][depth], 1e-12)

    lost = {
        m: [
            held_out.scores[m][d] / max(score, 1e-12) * math.hypot(relative(measured, m, d), relative(held_out, m, d))
            for d, score in enumerate(row)
        ]
        for m, row in measured.scores.items()
    }
    table: Scores = {}
    for modality, own in lost.items():
        others = [values for name, values in lost.items() if name != modality]
        table[modality] = []
        for depth, error in enumerate(own):
            position = depth / (len(own) - 1) if len(own) > 1 else 1.0
            square = sum(at_relative_depth(values, position) ** 2 for values in others) / len(others) ** 2
            table[modality].append(math.sqrt(error**2 + square))
    return table


class Guard:
    """A brake on all strengths: what the held-out joint loss says of them (our own).

    The factor begins at 1. An update that finds a higher loss than the one before, where somebody was held back since,
    halves it (below 0.01: 0); any other adds 0.1 up to 1.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self.loss: float | None = None

    def update(self, loss: float, active: bool) -> float:
        """The factor after an update that found this loss; ``active``: whether somebody was held back since the last
        one."""
        if self.loss is not None and active and not loss <= self.loss:  # NaN too
            self.factor = self.factor / 2 if self.factor >= 0.02 else 0.0
        else:
            self.factor = min(self.factor + 0.1, 1.0)
        self.loss = loss
        return self.factor


def strength(excess: float, alpha: float, dead_zone: float) -> float:
    """``tanh(alpha * max(excess - 1 - dead_zone, 0))``, at most :data:`KAPPA_MAX`; 0 where ``excess`` is not a
    number."""
    if math.isnan(excess):
        return 0.0
    return min(math.tanh(alpha * max(excess - 1.0 - dead_zone, 0.0)), KAPPA_MAX)


@dataclass(frozen=True)
class ModulationTable:
    """What one :meth:`AIM.update` found and set. Every table maps a modality to one number a depth, shallow to deep.

    ``excess`` is what became a strength: the ratio, under the gap rule the training ratio over the held-out ratio, or
    the margin. Under the trial rule it is by how much holding this modality back improves the held-out loss (see
    ``trials.table_of``), and ``trial_losses`` are those losses: as it is (""), and by the modality that changed.
    Under reliance ``trial_losses`` are training losses by the weights they were measured with (``reliance.fits``),
    while somebody is held back.
    ``kappa`` holds back a dominant modality; ``weak_kappa`` is the same on the inverse excess (of a margin: on ``2 -
    excess``; under trials it is that of whoever is held back), and acts where ``decouple="all"``.
    ``under_fraction`` is the optimizer's count at its latest step (NaN before the first). ``errors``,
    ``held_out_errors``, ``excess_errors``: standard errors, 0 where the probe tells none. ``confidence`` and
    ``dead_zone`` are the rule's, 0 in tables of earlier versions. ``print(table)`` says what was decided, and why.
    """

    update: int
    rule: str
    modalities: tuple[str, ...]
    scores: Scores
    ratios: Scores
    held_out_scores: Scores | None
    held_out_ratios: Scores | None
    excess: Scores
    kappa: Scores
    weak_kappa: Scores
    under_fraction: Scores
    dominant: tuple[str, ...]
    weak: tuple[str, ...]
    errors: Scores = field(default_factory=dict)
    held_out_errors: Scores = field(default_factory=dict)
    excess_errors: Scores = field(default_factory=dict)
    trial_losses: dict[str, float] = field(default_factory=dict)
    confidence: float = 0.0
    dead_zone: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether the rule holds whole modalities back: all depths are alike."""
        return self.rule in ("reliance", "trial")

    @property
    def error_of_excess(self) -> Scores:
        """``excess_errors``, 0 where none are known."""
        return _with_errors(self.excess, self.excess_errors).errors

    @property
    def above(self) -> Scores:
        """Standard errors by which ``excess`` lies above ``1 + dead_zone``; NaN where no error is known. The rule asks
        for more than ``confidence`` of them."""
        threshold = 1.0 + self.dead_zone
        return {
            m: [
                (x - threshold) / error if error > 0.0 else math.nan
                for x, error in zip(row, self.error_of_excess[m], strict=True)
            ]
            for m, row in self.excess.items()
        }

    @property
    def shares(self) -> dict[str, float]:
        """Each modality's share of all training scores, of the last block: under the reliance rule the share of the
        loss on samples like the training ones that rests on it. NaN where it has none."""
        last = {m: row[-1] for m, row in self.scores.items()}
        total = sum(max(value, 0.0) for value in last.values() if not math.isnan(value))
        return {m: max(value, 0.0) / total if total > 0.0 and value == value else math.nan for m, value in last.items()}

    @property
    def measured(self) -> Measured:
        """Training scores with their errors."""
        return _with_errors(self.scores, self.errors)

    @property
    def held_out(self) -> Measured | None:
        """Held-out scores with their errors, where there were any."""
        return None if self.held_out_scores is None else _with_errors(self.held_out_scores, self.held_out_errors)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for files and state dictionaries."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModulationTable:
        """Inverse of :meth:`to_dict`, also after a round trip through JSON."""
        fields: dict[str, Any] = dict(data)
        for name in ("modalities", "dominant", "weak"):
            fields[name] = tuple(fields[name])
        return cls(**fields)

    def __repr__(self) -> str:
        return described(self)


def _with_errors(scores: Scores, errors: Scores) -> Measured:
    """Tables of earlier versions have no errors."""
    return Measured(scores, {m: errors.get(m, [0.0] * len(row)) for m, row in scores.items()})


def roles(kappa: Scores) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Who is dominant: whose strengths average more than 0.01 over depths (of all modalities at once only the one whose
    average is the greatest); and who is weak: everybody else, where somebody is dominant."""
    means = {m: sum(row) / len(row) for m, row in kappa.items()}
    dominant = tuple(m for m, mean in means.items() if mean > DOMINANT)
    if len(dominant) == len(means):  # all held at once, nobody would learn
        dominant = (max(means, key=lambda m: means[m]),)
    return dominant, tuple(m for m in means if dominant and m not in dominant)


def ratio_excess(measured: Measured) -> Excess:
    """The ratio ``rho``; inverse ``1 / rho``."""
    relative = relative_errors(measured)
    rho = ratios(measured.scores)
    return _with_inverse(rho, {m: [x * e for x, e in zip(row, relative[m], strict=True)] for m, row in rho.items()})


def gap_excess(measured: Measured, held_out: Measured) -> Excess:
    """``rho_train / rho_heldout``, large where a lead in training is not confirmed by the held-out samples; inverse: 1
    over it."""
    rho, outside = ratios(measured.scores), ratios(held_out.scores)
    excess = {m: [a / max(b, 1e-12) for a, b in zip(rho[m], outside[m], strict=True)] for m in rho}
    relative, relative_outside = relative_errors(measured), relative_errors(held_out)
    errors = {
        m: [x * math.hypot(a, b) for x, a, b in zip(excess[m], relative[m], relative_outside[m], strict=True)]
        for m in rho
    }
    return _with_inverse(excess, errors)


def margin_excess(measured: Measured, held_out: Measured) -> Excess:
    """:func:`margins`; inverse ``2 - excess``."""
    excess, errors = margins(measured.scores, held_out.scores), margin_errors(measured, held_out)
    return Excess(excess, errors, {m: [2.0 - x for x in row] for m, row in excess.items()}, errors)


def _with_inverse(excess: Scores, errors: Scores) -> Excess:
    inverse = {m: [1.0 / max(x, 1e-12) for x in row] for m, row in excess.items()}
    return Excess(
        excess, errors, inverse, {m: [e * y * y for e, y in zip(errors[m], inverse[m], strict=True)] for m in errors}
    )


def strengths(
    excess: Scores, errors: Scores, *, alpha: float, dead_zone: float, confidence: float, factor: float = 1.0
) -> Scores:
    """``factor * strength(excess - confidence * error)``: a lead counts as far as it is not chance."""
    return {
        m: [factor * strength(x - confidence * e, alpha, dead_zone) for x, e in zip(row, errors[m], strict=True)]
        for m, row in excess.items()
    }
