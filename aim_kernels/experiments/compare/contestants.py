"""Contestants of a comparison: a method, the options that its tuning may choose from, and what its optimizer needs.

Every method may choose from at most :data:`BUDGET` configurations, the first of which is its default; they are judged
on the validation split of the tuning seeds, which are none of the seeds that are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aim_kernels.experiments.runs import ALONE, Contestant, contestant_of

#: Configurations that a method may choose from.
BUDGET = 3
#: Seeds of which the validation split chooses; far from those that are reported.
TUNING_SEEDS = (1000, 1001)


def _of(name: str, values: Sequence[Any], **fixed: Any) -> tuple[dict[str, Any], ...]:
    """One option at several values, the default first."""
    return tuple({**fixed, name: value} for value in values)


#: Factors on gradients nearly cancel under AdamW; on updates they act.
AS_PUBLISHED_OR_STEPS: tuple[dict[str, Any], ...] = ({}, {"apply_to": "step"}, {"apply_to": "step", "alpha": 0.3})

#: AIM by its default rule, with the modalities' own losses added.
OWN: dict[str, Any] = {"unimodal_weight": 0.3}

#: AIM by trials with own losses.
TRIAL: dict[str, Any] = {"rule": "trial", "unimodal_weight": 0.3}

#: AIM by prototypes, the joint loss alone.
GAP: dict[str, Any] = {"rule": "gap", "unimodal_weight": 0.0}

#: The auxiliary blocks keep a random share of equal size.
RANDOM_MASK: dict[str, Any] = {"measure": "random", "backend": "reference"}

CONTESTANTS: dict[str, Contestant] = {
    "joint": Contestant("joint", control=True),
    "aim": Contestant("aim", held_out=True),
    "aim (own losses)": Contestant("aim", (OWN,), held_out=True),
    "aim (trial)": Contestant("aim", ({"rule": "trial", "unimodal_weight": 0.0},), held_out=True),
    "aim (trial, own losses)": Contestant("aim", (TRIAL,), held_out=True),
    "aim (gap)": Contestant("aim", (GAP,), held_out=True),
    "aim (gap, tuned)": Contestant("aim", _of("confidence", (3.0, 1.0, 0.0), **GAP), held_out=True),
    "aim (gap, own losses)": Contestant("aim", ({"rule": "gap", "unimodal_weight": 0.3},), held_out=True),
    "aim (gap, freeze)": Contestant("aim", ({**GAP, "hold": "freeze"},), held_out=True),
    "aim (gap, split)": Contestant("aim", ({**GAP, "mixing": "split"},), held_out=True),
    "aim (gap, weights)": Contestant("aim", ({**GAP, "mixing": "weights"},), held_out=True),
    "aim (gap, features)": Contestant("aim", ({**GAP, "mixing": "features"},), held_out=True),
    "ogm": Contestant("ogm", AS_PUBLISHED_OR_STEPS),
    "ogm-ge": Contestant("ogm-ge", AS_PUBLISHED_OR_STEPS),
    "opm": Contestant("opm", _of("base", (0.5, 0.2, 0.8))),
    "agm": Contestant("agm", AS_PUBLISHED_OR_STEPS),
    "mlb": Contestant("mlb", AS_PUBLISHED_OR_STEPS),
    "cggm": Contestant("cggm", ({}, {"apply_to": "step"}, {"apply_to": "step", "rou": 0.5})),
    "pdmp": Contestant("pdmp", _of("gamma_p", (2.0, 1.5, 4.0), apply_to="step"), held_out=True),
    "amss": Contestant("amss", _of("temperature", (1.0, 0.3, 3.0))),
    "amss+": Contestant("amss+", _of("temperature", (1.0, 0.3, 3.0))),
    "inforeg": Contestant("inforeg", _of("strength", (0.95, 0.1, 0.3))),
    "mmpareto": Contestant("mmpareto"),  # gamma is a constant factor, which AdamW takes no notice of
    "pmr": Contestant("pmr", _of("alpha", (1.0, 0.3, 3.0))),
    "mla": Contestant("mla"),
    "diagnosing-relearning": Contestant(
        "diagnosing-relearning", _of("strength", (1.0, 0.3, 3.0), every=3), held_out=True
    ),
    "sam": Contestant("sam", _of("rho", (0.05, 0.01, 0.2))),
    "m-sam": Contestant("m-sam", _of("rho", (0.05, 0.01, 0.2))),
    "weight-averaging": Contestant("weight-averaging", _of("decay", (0.99, 0.95, 0.999))),
    "shapley-alternation": Contestant("shapley-alternation", _of("margin", (0.0, 0.1, 0.3))),
    "drop": Contestant("drop", control=True, held_out=True),
    "drop (trial, own losses)": Contestant("drop", (TRIAL,), control=True, held_out=True),
    "drop (gap)": Contestant("drop", (GAP,), control=True, held_out=True),
    "feature-scale": Contestant("feature-scale", control=True, held_out=True),
    "feature-scale (gap)": Contestant("feature-scale", (GAP,), control=True, held_out=True),
    "random-mask": Contestant("aim", optimizer=RANDOM_MASK, control=True, held_out=True),
    "random-mask (gap)": Contestant("aim", (GAP,), RANDOM_MASK, control=True, held_out=True),
    "random-mask (gap, freeze)": Contestant(
        "aim", ({**GAP, "hold": "freeze"},), RANDOM_MASK, control=True, held_out=True
    ),
    "no-mask": Contestant("no-mask", control=True, held_out=True),
    "no-mask (trial, own losses)": Contestant("no-mask", (TRIAL,), control=True, held_out=True),
    "no-mask (gap)": Contestant("no-mask", (GAP,), control=True, held_out=True),
    # one configuration: its validation split is no measure of anything
    "train-on-held": Contestant("train-on-held", control=True, held_out=True, trains_on_held_out=True),
    "best-subset": Contestant("best-subset", control=True, held_out=True),
    "modality-dropout": Contestant("modality-dropout", _of("probability", (0.3, 0.1, 0.5)), control=True),
    "sum-of-losses": Contestant("sum-of-losses", _of("encoder_factor", (1.0, 3.0), apply_to="step"), control=True),
    "own-losses": Contestant("sum-of-losses", ({"unimodal_weight": 0.3},), control=True),
}


def contestant(name: str) -> Contestant:
    """By name. Raises ValueError for one that is none."""
    return contestant_of(CONTESTANTS, name)


def reads_held_out(name: str) -> bool:
    """Whether it sees labelled validation samples while it trains."""
    return name in CONTESTANTS and CONTESTANTS[name].held_out


def is_control(name: str) -> bool:
    """Also of results that a version with other contestants wrote."""
    return name.startswith(ALONE) or (name in CONTESTANTS and CONTESTANTS[name].control)
