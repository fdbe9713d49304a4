"""Rules: who is held back, and how far."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from aim_kernels.aim import reliance, trials
from aim_kernels.aim.samples import Samples
from aim_kernels.aim.strengths import (
    KAPPA_MAX,
    Excess,
    Measured,
    ModulationTable,
    Scores,
    gap_excess,
    margin_excess,
    ratio_excess,
    ratios,
    roles,
    strengths,
)
from aim_kernels.aim.tables import whole_table
from aim_kernels.step.arguments import check_at_least, check_fields, check_finite, check_within

if TYPE_CHECKING:
    from aim_kernels.aim.interface import Modulator


@dataclass(frozen=True, kw_only=True)
class Rule(abc.ABC):
    """Decides who is held back, from what it measures.

    Attributes:
        confidence: standard errors of an excess (of a trial: of a difference) that count as chance.
        dead_zone: an excess (of a trial: a share of the loss) that sets no strength however certain it is.

    Raises ValueError for a negative number and one that is not finite.
    """

    name: ClassVar[str]
    #: Whether it scores blocks by a probe, so that ``probe``, ``alpha``, ``pool`` and ``targets`` mean something.
    scores_blocks: ClassVar[bool] = True
    needs_held_out: ClassVar[bool] = True
    confidence: float = 3.0
    dead_zone: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_finite("confidence", self.confidence)
        check_finite("dead_zone", self.dead_zone)

    @abc.abstractmethod
    def check(self, aim: Modulator, what: str, samples: Samples) -> Samples:
        """One batch as this rule needs it; ValueError that says what is wrong with it."""

    @abc.abstractmethod
    def measure(
        self,
        aim: Modulator,
        samples: Samples,
        held_out: Samples | None,
        train: trials.Train | None,
        restore: Sequence[Any],
    ) -> Any:
        """What :meth:`decide` needs. Afterwards model, optimizer and random states are as they were."""

    @abc.abstractmethod
    def decide(self, aim: Modulator, measured: Any, factor: float) -> tuple[ModulationTable, frozenset[str]]:
        """The table of this update, its strengths multiplied by ``factor``, and who is held back by it."""


class ScoreRule(Rule, abc.ABC):
    """A rule on scores of blocks. At every depth ``kappa = factor * tanh(alpha * max(excess - confidence * error - 1 -
    dead_zone, 0))``."""

    @abc.abstractmethod
    def excess(self, measured: Measured, held_out: Measured | None) -> Excess:
        """What becomes strengths."""

    def check(self, aim: Modulator, what: str, samples: Samples) -> Samples:
        return aim.probe.check(aim.scoring, what, samples)

    def measure(
        self,
        aim: Modulator,
        samples: Samples,
        held_out: Samples | None,
        train: trials.Train | None,
        restore: Sequence[Any],
    ) -> tuple[Measured, Measured | None]:
        with aim.measuring(samples.inputs):
            return aim.probe.measure(aim.scoring, samples, held_out, aim.history)

    def decide(
        self, aim: Modulator, measured: tuple[Measured, Measured | None], factor: float
    ) -> tuple[ModulationTable, frozenset[str]]:
        table = self.assess(aim.updates, *measured, aim.scoring.under_fraction(), alpha=aim.alpha, factor=factor)
        return table, frozenset(table.dominant)

    def assess(
        self,
        update: int,
        measured: Measured,
        held_out: Measured | None,
        under_fraction: Scores,
        *,
        alpha: float,
        factor: float = 1.0,
    ) -> ModulationTable:
        """Strengths and roles (:func:`~aim_kernels.aim.strengths.roles`) from scores."""
        excess = self.excess(measured, held_out)
        options = {"alpha": alpha, "dead_zone": self.dead_zone, "confidence": self.confidence, "factor": factor}
        kappa = strengths(excess.values, excess.errors, **options)
        dominant, weak = roles(kappa)
        return ModulationTable(
            update=update,
            rule=self.name,
            modalities=tuple(measured.scores),
            scores=measured.scores,
            ratios=ratios(measured.scores),
            held_out_scores=None if held_out is None else held_out.scores,
            held_out_ratios=None if held_out is None else ratios(held_out.scores),
            excess=excess.values,
            kappa=kappa,
            weak_kappa=strengths(excess.inverse, excess.inverse_errors, **options),
            under_fraction=under_fraction,
            dominant=dominant,
            weak=weak,
            errors=measured.errors,
            held_out_errors={} if held_out is None else held_out.errors,
            excess_errors=excess.errors,
            confidence=self.confidence,
            dead_zone=self.dead_zone,
        )


@dataclass(frozen=True, kw_only=True)
class Gap(ScoreRule):
    """The lead in training over the held-out one: :func:`~aim_kernels.aim.strengths.gap_excess`."""

    name: ClassVar[str] = "gap"

    def excess(self, measured: Measured, held_out: Measured | None) -> Excess:
        assert held_out is not None
        return gap_excess(measured, held_out)


@dataclass(frozen=True, kw_only=True)
class Ratio(ScoreRule):
    """The lead over the other modalities, confirmed or not: :func:`~aim_kernels.aim.strengths.ratios`. Chance counts
    like any other lead, unless ``confidence`` is given."""

    name: ClassVar[str] = "ratio"
    needs_held_out: ClassVar[bool] = False
    confidence: float = 0.0

    def excess(self, measured: Measured, held_out: Measured | None) -> Excess:
        return ratio_excess(measured)


@dataclass(frozen=True, kw_only=True)
class Margin(ScoreRule):
    """What a modality's own training score loses outside of it: :func:`~aim_kernels.aim.strengths.margins`."""

    name: ClassVar[str] = "margin"

    def excess(self, measured: Measured, held_out: Measured | None) -> Excess:
        assert held_out is not None
        return margin_excess(measured, held_out)


@dataclass(frozen=True, kw_only=True)
class Trial(Rule):
    """A few training steps with each modality held back, undone and judged by the held-out loss:
    :mod:`~aim_kernels.aim.trials`. ``kappa`` is 1 (1 - 1e-6) at every depth, or 0.

    Attributes:
        steps: of each trial; as many batches are cut from the samples.

    Raises ValueError for fewer than one step.
    """

    name: ClassVar[str] = "trial"
    scores_blocks: ClassVar[bool] = False
    steps: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("steps", self.steps, 1)

    def check(self, aim: Modulator, what: str, samples: Samples) -> Samples:
        return samples

    def measure(
        self,
        aim: Modulator,
        samples: Samples,
        held_out: Samples | None,
        train: trials.Train | None,
        restore: Sequence[Any],
    ) -> tuple[dict[str, float], dict[str, float]]:
        return trials.measure(aim, *trials.checked(samples, held_out, train), restore, self.steps)

    def decide(
        self, aim: Modulator, measured: tuple[dict[str, float], dict[str, float]], factor: float
    ) -> tuple[ModulationTable, frozenset[str]]:
        held_back = trials.judge(aim.held_back, *measured, self.dead_zone, self.confidence)
        table = trials.table_of(aim, aim.held_back, held_back, *measured, factor)
        return replace(table, confidence=self.confidence, dead_zone=self.dead_zone), held_back


@dataclass(frozen=True, kw_only=True)
class Reliance(Rule):
    """What the loss rests on, and held-out samples do not confirm: :mod:`~aim_kernels.aim.reliance`. ``kappa`` is one
    number at every depth, 0, ``partial`` or 1 (1 - 1e-6); ``excess`` is 1 + the unconfirmed share of all reliance. A
    modality without an input keeps its strength.

    Attributes:
        confidence: standard errors of the unconfirmed share that count as chance.
        dead_zone: an unconfirmed share that is left alone.
        whole_above: an unconfirmed share above which a modality that helps nothing outside is held back wholly.
            Training settles near it: the smaller, the more is gained where the cue fails, and the more is lost where it
            holds.
        partial: the strength of others that are held back, in [0, 1].

    Raises ValueError for ``partial`` outside of [0, 1] and a negative ``whole_above``.
    """

    name: ClassVar[str] = "reliance"
    scores_blocks: ClassVar[bool] = False
    dead_zone: float = 0.05
    whole_above: float = 0.1
    partial: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("whole_above", self.whole_above)
        check_within("partial", self.partial, 0.0, 1.0)

    def check(self, aim: Modulator, what: str, samples: Samples) -> Samples:
        if samples.labels is None:
            raise ValueError(
                f"rule={self.name!r} compares losses; pass {what}labels, or, if the loss needs none, any tensor of B "
                "entries: torch.arange(B). Of a loss of pairs (contrastive) it says nothing: use rule='ratio' with "
                "probe='gradient-norm'"
            )
        if samples.size < 2:
            raise ValueError(f"rule={self.name!r} needs at least two {what}samples for a standard error")
        return samples

    def measure(
        self,
        aim: Modulator,
        samples: Samples,
        held_out: Samples | None,
        train: trials.Train | None,
        restore: Sequence[Any],
    ) -> tuple[Measured, Measured, dict[str, float]]:
        assert held_out is not None
        return reliance.measure(aim, samples, held_out)

    def decide(
        self, aim: Modulator, measured: tuple[Measured, Measured, dict[str, float]], factor: float
    ) -> tuple[ModulationTable, frozenset[str]]:
        both, losses = measured[:2], measured[2]
        found = reliance.unconfirmed(*both, self.confidence)
        # Once the head did not fit the true weights it would not again.
        wholly = all(reliance.fits(each, self.confidence) for each in (losses, *(x.trial_losses for x in aim.history)))
        strengths = reliance.judge(found, self.confidence, self.dead_zone, self.whole_above, self.partial, wholly)
        kappa = {m: factor * min(strength, KAPPA_MAX) for m, strength in strengths.items()}
        latest = aim.history[-1].kappa if aim.history else {}
        train, held_out = (reliance.rows(each, aim.depths) for each in both)
        table = whole_table(
            aim,
            self.name,
            {m: kappa[m] if m in kappa else latest.get(m, [0.0])[0] for m in aim.modalities},
            {m: 1.0 + found.shares.get(m, math.nan) for m in aim.modalities},
            {m: found.errors.get(m, 0.0) for m in aim.modalities},
            scores=train.scores,
            held_out_scores=held_out.scores,
            errors=train.errors,
            held_out_errors=held_out.errors,
            losses=losses,
        )
        table = replace(table, confidence=self.confidence, dead_zone=self.dead_zone)
        return table, frozenset(table.dominant)


#: Rules by their names.
RULES: dict[str, type[Rule]] = {cls.name: cls for cls in (Reliance, Gap, Ratio, Margin, Trial)}
