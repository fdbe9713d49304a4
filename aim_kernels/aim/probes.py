"""Probes: one score per block, from samples or from the latest gradients."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aim_kernels.aim.inputs import Inputs
from aim_kernels.aim.options import chosen
from aim_kernels.aim.prototypes import INITS, RidgeReadout, fit_prototypes, prototype_score
from aim_kernels.aim.samples import Samples, bins
from aim_kernels.aim.scoring import Judge, Scoring
from aim_kernels.aim.strengths import Measured, ModulationTable, Scores
from aim_kernels.step.arguments import check_at_least, check_choice, check_fields, check_finite

#: A probe of one's own: ``probe(model, inputs, labels)`` returns one row of non-negative scores per modality.
ProbeFunction = Callable[[nn.Module, Any, Any], Any]


class Probe(abc.ABC):
    """Scores all blocks; higher is better, and none is negative."""

    name: ClassVar[str]
    #: Whether it reads the blocks' outputs, so that ``pool`` and ``targets`` mean something, and labels are needed.
    reads_features: ClassVar[bool] = False
    #: Whether held-out samples have scores of their own.
    has_held_out: ClassVar[bool] = True

    def check(self, scoring: Scoring, what: str, samples: Samples) -> Samples:
        """The samples, their labels as this probe needs them; ValueError for what it cannot take."""
        return samples

    @abc.abstractmethod
    def measure(
        self, scoring: Scoring, samples: Samples, held_out: Samples | None, history: Sequence[ModulationTable]
    ) -> tuple[Measured, Measured | None]:
        """Scores on ``samples`` and on ``held_out``, means over ranks; of a modality without input, those of the latest
        table that has any."""


class SampleProbe(Probe):
    """A probe that scores samples."""

    def measure(
        self, scoring: Scoring, samples: Samples, held_out: Samples | None, history: Sequence[ModulationTable]
    ) -> tuple[Measured, Measured | None]:
        missing = [
            modality
            for number, modality in enumerate(scoring.modalities)
            if samples.inputs[number] is None or (held_out is not None and held_out.inputs[number] is None)
        ]
        before, before_outside = _previous(history, missing, held_out is not None)
        found, outside = self.score(scoring, samples, held_out, missing)

        def whole(now: Measured, earlier: Measured) -> Measured:
            parts = zip(now, earlier, strict=True)
            return scoring.averaged(
                Measured(*({m: (b if m in missing else a)[m] for m in scoring.modalities} for a, b in parts))
            )

        train = whole(found, before)
        return train, None if outside is None else whole(outside, before_outside)

    @abc.abstractmethod
    def score(
        self, scoring: Scoring, samples: Samples, held_out: Samples | None, missing: Sequence[str]
    ) -> tuple[Measured, Measured | None]:
        """Scores of this rank, of all modalities but ``missing`` at least."""


class FeatureProbe(SampleProbe, abc.ABC):
    """A probe of the blocks' features: fitted on training samples, scored there and on held-out ones."""

    reads_features: ClassVar[bool] = True

    def check(self, scoring: Scoring, what: str, samples: Samples) -> Samples:
        if samples.labels is None:
            raise ValueError(
                f"probe={self.name!r} needs {what}labels; pass them, or use probe='gradient-norm' or a callable"
            )
        if scoring.num_classes < 2:
            raise ValueError(
                f"probe={self.name!r} scores classes; give AIM num_classes=, or a rule that needs none (labels and "
                "held_out for 'reliance'), or a callable probe"
            )
        return Samples(samples.inputs, scoring.check_labels(what, samples.labels))

    def score(
        self, scoring: Scoring, samples: Samples, held_out: Samples | None, missing: Sequence[str]
    ) -> tuple[Measured, Measured | None]:
        gone = [number for number, modality in enumerate(scoring.modalities) if modality in missing]
        inputs = samples.inputs.without(gone)
        classes, means, edges = scoring.classes(samples.labels)
        judges, first = self.fit(scoring, inputs, classes, means)
        found = scoring.mean_scores(judges, inputs.take(slice(first, None), len(classes)), classes[first:])
        if held_out is None:
            return found, None
        labels = held_out.labels if edges is None else bins(held_out.labels, edges)
        return found, scoring.mean_scores(judges, held_out.inputs.without(gone), labels)

    @abc.abstractmethod
    def fit(
        self, scoring: Scoring, inputs: Inputs, classes: Tensor, means: Tensor | None
    ) -> tuple[Mapping[str, Sequence[Judge]], int]:
        """A judge per block of each modality with an input, and the number of the first sample that is scored by them.
        ``means``: of the bins of real labels."""


@dataclass(frozen=True, kw_only=True)
class Prototypes(FeatureProbe):
    """Distances to learnt inputs of every class, propagated to each depth: see
    :func:`~aim_kernels.aim.prototypes.fit_prototypes`.

    Attributes:
        steps: Adam steps that fit the prototypes.
        lr: their learning rate, in standard deviations of the input.
        init: "noise", or "mean", the class means of the batch.

    Raises ValueError for a negative number and an unknown ``init``.
    """

    name: ClassVar[str] = "prototypes"
    steps: int = 30
    lr: float = 0.1
    init: str = "noise"

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least("steps", self.steps, 0)
        check_finite("lr", self.lr)
        check_choice("init", self.init, INITS)

    def fit(
        self, scoring: Scoring, inputs: Inputs, classes: Tensor, means: Tensor | None
    ) -> tuple[Mapping[str, Sequence[Judge]], int]:
        prototypes = fit_prototypes(
            scoring.model,
            inputs,
            classes,
            scoring.num_classes,
            steps=self.steps,
            lr=self.lr,
            init=self.init,
            loss=scoring.loss,
            generator=scoring.generator,
            targets=means,
            batch_size=scoring.batch_size,
        )
        with torch.no_grad():
            fitted = scoring.features_of_all(prototypes, scoring.num_classes)
        return {m: [_prototype_judge(p) for p in row] for m, row in fitted.items()}, 0


@dataclass(frozen=True, kw_only=True)
class LinearReadout(FeatureProbe):
    """Ridge regression on one-hot labels, fitted on the first half of the batch and scored on the other."""

    name: ClassVar[str] = "linear"

    def fit(
        self, scoring: Scoring, inputs: Inputs, classes: Tensor, means: Tensor | None
    ) -> tuple[Mapping[str, Sequence[Judge]], int]:
        half = max(len(classes) // 2, 1)
        with torch.no_grad():
            fitted = scoring.features(inputs.take(slice(half), len(classes)))
        judges = {
            m: [RidgeReadout(z, classes[:half], scoring.num_classes).score for z in row] for m, row in fitted.items()
        }
        # Never score what it was fitted on, if there is anything else.
        return judges, half if len(classes) > half else 0


@dataclass(frozen=True, kw_only=True)
class GradientNorm(Probe):
    """Root mean square gradient of a block in the optimizer's latest step; needs no samples, and tells no errors."""

    name: ClassVar[str] = "gradient-norm"
    has_held_out: ClassVar[bool] = False

    def measure(
        self, scoring: Scoring, samples: Samples, held_out: Samples | None, history: Sequence[ModulationTable]
    ) -> tuple[Measured, Measured | None]:
        return scoring.averaged(Measured.exactly(scoring.gradient_scores())), None


@dataclass(frozen=True, kw_only=True)
class CustomProbe(SampleProbe):
    """``function(model, inputs, labels)`` returns one row of scores per modality, shallow to deep; tells no errors."""

    name: ClassVar[str] = "custom"
    function: ProbeFunction

    def score(
        self, scoring: Scoring, samples: Samples, held_out: Samples | None, missing: Sequence[str]
    ) -> tuple[Measured, Measured | None]:
        found = Measured.exactly(self.scores(scoring, samples))
        return found, None if held_out is None else Measured.exactly(self.scores(scoring, held_out))

    def scores(self, scoring: Scoring, samples: Samples) -> Scores:
        """The function's rows. Raises ValueError for rows of other lengths than the blocks, and negative scores."""
        table = self.function(scoring.model, samples.inputs.given(), samples.labels)
        rows = table.tolist() if hasattr(table, "tolist") else [list(row) for row in table]
        if [len(row) for row in rows] != [scoring.depths[m] for m in scoring.modalities]:
            raise ValueError(
                f"the probe returned rows of lengths {[len(row) for row in rows]}; "
                f"the blocks are {dict(scoring.depths)}"
            )
        scores = {m: [float(value) for value in row] for m, row in zip(scoring.modalities, rows, strict=True)}
        for modality, row in scores.items():
            if any(value < 0.0 for value in row):
                raise ValueError(
                    f"the probe returned a negative score for {modality!r}: {row}; strengths are ratios of scores >= 0"
                )
        return scores


#: Probes by their names.
PROBES: dict[str, type[Probe]] = {cls.name: cls for cls in (Prototypes, LinearReadout, GradientNorm)}


def as_probe(probe: Any) -> Probe:
    """A probe of what :class:`AIM` takes for one: an object, a name, or a callable."""
    if callable(probe) and not isinstance(probe, (Probe, type)):
        return CustomProbe(function=probe)
    return chosen("probe", probe, PROBES, Probe, " or a callable")


def _prototype_judge(prototypes: Tensor) -> Judge:
    return lambda features, labels: prototype_score(features, prototypes, labels)


def _previous(history: Sequence[ModulationTable], missing: Sequence[str], both: bool) -> tuple[Measured, Measured]:
    """The latest scores in training and outside of it, for modalities that now have no input."""
    scored = (table for table in reversed(history) if table.rule not in ("trial", "reliance"))
    latest = next(scored, None) if missing else None
    if missing and (latest is None or (both and latest.held_out_scores is None)):
        raise ValueError(
            f"the input of {missing[0]!r} is None, and there is no earlier update whose "
            f"{'scores' if latest is None else 'held-out scores'} it could keep; give it once"
        )
    if latest is None:
        return Measured({}, {}), Measured({}, {})
    return latest.measured, latest.held_out or Measured({}, {})
