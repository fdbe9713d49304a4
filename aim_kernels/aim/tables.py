"""Tables of rules that hold whole modalities back: one strength at every depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from aim_kernels.aim.strengths import ModulationTable, Scores, roles

if TYPE_CHECKING:
    from aim_kernels.aim.interface import Modulator


def whole_table(
    aim: Modulator,
    rule: str,
    kappa: Mapping[str, float],
    excess: Mapping[str, float] | None = None,
    error: Mapping[str, float] | None = None,
    *,
    scores: Scores | None = None,
    held_out_scores: Scores | None = None,
    errors: Scores | None = None,
    held_out_errors: Scores | None = None,
    losses: Mapping[str, float] | None = None,
) -> ModulationTable:
    """A table of one strength and one excess (with its error) per modality; ``scores``, if there are none, are those
    excesses. A weak modality is one that is not held back: all the stimulus there is goes to it."""

    def rows(of: Mapping[str, float]) -> Scores:
        return {m: [of[m]] * aim.depths[m] for m in aim.modalities}

    excesses = rows(excess or dict.fromkeys(aim.modalities, 1.0))
    excess_errors = rows(error or dict.fromkeys(aim.modalities, 0.0))
    dominant, weak = roles(rows(kappa))
    return ModulationTable(
        update=aim.updates,
        rule=rule,
        modalities=aim.modalities,
        scores=excesses if scores is None else scores,
        ratios=excesses,
        held_out_scores=held_out_scores,
        held_out_ratios=None,
        excess=excesses,
        kappa=rows(kappa),
        weak_kappa=rows({m: max(kappa.values()) * (not kappa[m]) for m in aim.modalities}),
        under_fraction=aim.scoring.under_fraction(),
        dominant=dominant,
        weak=weak,
        errors=excess_errors if errors is None else errors,
        held_out_errors=held_out_errors or {},
        excess_errors=excess_errors,
        trial_losses=dict(losses or {}),
    )
