"""What a table says when it is printed, what is drawn of decisions, and trials that cannot tell anything."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aim_helpers import CLASSES, DOMINANT_A, batch, build, fixed, train
from torch import nn

from aim_kernels.aim import AIM, Gap, Margin, Ratio, Reliance, Trial
from aim_kernels.aim.plots import ABOVE, decision_panels, modulation_panels, plot_modulation, shown
from aim_kernels.aim.strengths import ModulationTable, Scores

pytestmark = pytest.mark.usefixtures("one_thread")


def table_of(rule: str, excess: dict[str, float], error: float, kappa: dict[str, float], **fields: Any) -> Any:
    """A table of two depths per modality, alike."""

    def rows(values: dict[str, float]) -> Scores:
        return {m: [value] * 2 for m, value in values.items()}

    values: dict[str, Any] = {
        "update": 3, "rule": rule, "modalities": tuple(excess), "scores": rows(excess), "ratios": rows(excess),
        "held_out_scores": None, "held_out_ratios": None, "excess": rows(excess), "kappa": rows(kappa),
        "weak_kappa": rows(kappa), "under_fraction": rows(excess), "dominant": tuple(m for m in kappa if kappa[m]),
        "weak": (), "excess_errors": rows(dict.fromkeys(excess, error)), "confidence": 3.0,
    }  # fmt: skip
    return ModulationTable(**values | {k: rows(v) if k.endswith("scores") else v for k, v in fields.items()})


def reliance(
    grey: float, colour: float, *, error: float = 0.03, held: float = 0.0, scores: Any = None, **errors: Any
) -> ModulationTable:
    return table_of(
        "reliance", {"grey": 1.0 + grey, "colour": 1.0 + colour}, error, {"grey": 0.0, "colour": held},
        scores=scores or {"grey": 0.5, "colour": 1.5}, held_out_scores={"grey": 0.45, "colour": 0.1}, dead_zone=0.05,
        **errors,
    )  # fmt: skip


def stepper(model: nn.Module, optimizer: Any, loss: Callable[..., Any] = nn.functional.cross_entropy) -> Any:
    def step(inputs: Any, labels: Any) -> None:
        optimizer.zero_grad()
        loss(model(*inputs), labels).backward()
        optimizer.step()

    return step


# -- what a decision was made by ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Reliance, Gap, Ratio, Margin, Trial])
def test_tables_keep_what_they_were_decided_by(rule: Any) -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, rule=rule(confidence=2.5, dead_zone=0.125))
    table = aim.update(*batch(), held_out=batch(seed=1), train=stepper(model, optimizer))
    assert (table.confidence, table.dead_zone) == (2.5, 0.125)
    saved = json.loads(json.dumps(table.to_dict()))
    assert repr(ModulationTable.from_dict(saved)) == repr(table)
    for name in ("confidence", "dead_zone", "excess_errors"):
        del saved[name]
    older = ModulationTable.from_dict(saved)
    assert (older.confidence, older.dead_zone, older.kappa) == (0.0, 0.0, table.kappa)
    assert "error is not known" in repr(older) or rule is Trial


def test_standard_errors_above_the_dead_zone() -> None:
    table = reliance(0.02, 0.41, held=1.0)
    assert table.above["colour"] == pytest.approx([12.0, 12.0]) and table.above["grey"] == pytest.approx([-1.0, -1.0])
    assert all(map(math.isnan, reliance(0.02, 0.41, error=0.0).above["colour"]))
    assert table.shares == {"grey": 0.25, "colour": 0.75}
    assert reliance(0.1, 0.1, scores={"grey": -0.5, "colour": 1.5}).shares == {"grey": 0.0, "colour": 1.0}
    missing = reliance(math.nan, 0.1, scores={"grey": math.nan, "colour": 1.5}).shares
    assert math.isnan(missing["grey"]) and missing["colour"] == 1.0


# -- in words ----------------------------------------------------------------------------------------------------------


def test_reliance_in_words() -> None:
    first, header, grey, colour = repr(reliance(0.02, 0.41, held=0.9)).splitlines()
    assert first == (
        "AIM update 3: holds back colour (0.41 ± 0.03 of the loss rests on it unconfirmed, 12.0 standard errors above "
        "0.05; limit 3)"
    )
    assert header.split("  ")[0] == "modality" and "errors above 1.05 (limit 3)" in header
    assert grey.split() == ["grey", "0.500", "0.25", "0.450", "1.020", "±", "0.030", "-1.0", "0.000"]
    assert colour.split() == ["colour", "1.500", "0.75", "0.100", "1.410", "±", "0.030", "12.0", "0.900"]


def test_reliance_that_holds_nothing_back() -> None:
    first = repr(reliance(0.02, 0.08)).splitlines()[0]
    assert first.startswith("AIM update 3: holds nothing back (closest is colour: 0.08 ± 0.03 of the loss")
    assert "1.0 standard errors above 0.05; limit 3)" in first


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (reliance(0.0, 0.4, errors={"grey": [0.1] * 2, "colour": [0.6] * 2}), "does not rely on it for sure"),
        (reliance(0.0, 0.4), "the schedule or the guard"),
        (reliance(0.5, 0.4), "its share is the smallest"),
    ],
)
def test_why_a_modality_above_the_limit_is_left_alone(table: ModulationTable, why: str) -> None:
    (line,) = [line for line in repr(table).splitlines() if line.startswith("colour is left alone")]
    assert why in line
    assert "left alone" not in repr(reliance(0.02, 0.41, held=1.0))


def test_a_modality_without_an_input() -> None:
    table = reliance(0.02, math.nan, held=1.0)
    assert repr(table).splitlines()[0].endswith("holds back colour (it has no input, and keeps its strength)")
    assert repr(table).splitlines()[3].split()[-3:] == ["-", "-", "1.000"]


TRIALS = {"": 2.0, "a": 2.2, "b": 1.5}


def test_trials_in_words() -> None:
    """Errors are 0.05 of the loss as it is."""
    table = table_of("trial", {"a": 0.9, "b": 1.25}, 0.05, {"a": 0.0, "b": 1.0}, trial_losses=TRIALS)
    first, _, as_it_is, a, b = repr(table).splitlines()
    assert first == (
        "AIM update 3: holds back b (held-out loss 2.000 as it is, 1.500 with b held back, a gain of 5.0 standard "
        "errors; limit 3)"
    )
    assert as_it_is.split() == ["as", "it", "is", "2.000"]
    assert a.split() == ["a", "held", "back", "2.200", "-2.0", "0.900", "±", "0.050", "-2.0", "0.000"]
    assert b.split() == ["b", "held", "back", "1.500", "5.0", "1.250", "±", "0.050", "5.0", "1.000"]


def test_trials_that_let_go_and_that_change_nothing() -> None:
    """The excess of a modality that was held back is what it loses when it is let go."""
    losses = {"": 2.0, "b": 1.5}
    gone = table_of("trial", {"a": math.nan, "b": 0.75}, 0.05, {"a": 0.0, "b": 0.0}, trial_losses=losses)
    assert "holds nothing back (held-out loss 2.000 as it is, 1.500 with b let go, a gain of 5.0" in repr(gone)
    assert repr(gone).splitlines()[3].split()[:3] == ["a", "-", "-"]
    stays = table_of("trial", {"a": math.nan, "b": 0.75}, 0.1, {"a": 0.0, "b": 1.0}, trial_losses=losses)
    assert "holds back b (held-out loss 2.000 as it is, 1.500 with b let go, a gain of 2.5" in repr(stays)
    within = table_of("trial", {"a": 0.9, "b": 1.25}, 0.05, {"a": 0.0, "b": 0.0}, trial_losses=TRIALS, dead_zone=0.15)
    assert "a gain of 2.0 standard errors beyond 0.15 of the loss; limit 3" in repr(within)


def test_scores_in_words() -> None:
    table = table_of("gap", {"a": 2.0, "b": 0.5}, 0.1, {"a": 0.9, "b": 0.0}, held_out_scores={"a": 0.4, "b": 0.4})
    first, header, *rows = repr(table).splitlines()
    assert first == (
        "AIM update 3: holds back a (gap 2.00 ± 0.10 at depth 0, 10.0 standard errors above 1; limit 3)"
    )  # fmt: skip
    assert header.split()[:5] == ["modality", "depth", "score", "held-out", "gap"]
    assert [row.split()[:2] for row in rows] == [["a", "0"], ["a", "1"], ["b", "0"], ["b", "1"]]


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_decisions_are_lines_beside_their_limit() -> None:
    history = [reliance(0.02, 0.41, held=0.9), reliance(0.0, 0.08)]
    panels = decision_panels(history)
    assert shown(history) == panels
    assert panels[ABOVE]["colour"] == pytest.approx([12.0, 1.0]) and panels["limit"]["grey"] == [3.0, 3.0]
    assert panels["strength kappa"]["colour"] == [0.9, 0.0]
    assert panels["reliance in training"]["colour"] == [1.5, 1.5]
    assert panels["reliance held out"]["colour"] == [0.1, 0.1]
    figure = plot_modulation(history)
    drawn = [[list(line.get_ydata()) for line in axis.lines] for axis in figure.axes]
    assert len(drawn) == 4 and drawn[1] == [panels[ABOVE]["colour"], [3.0, 3.0]]
    assert drawn[3][:2] == [[1.5, 1.5], [0.1, 0.1]]
    assert [len(axis.patches) for axis in figure.axes] == [0, 1, 0, 1], "shaded where it was held back"


def test_trials_are_lines_and_other_rules_heat_maps() -> None:
    trial = [table_of("trial", {"a": 0.9, "b": 1.25}, 0.05, {"a": 0.0, "b": 1.0}, trial_losses=TRIALS)]
    assert [len(axis.lines) for axis in plot_modulation(trial).axes] == [2, 2]
    gap = [table_of("gap", {"a": 2.0, "b": 0.5}, 0.1, {"a": 0.9, "b": 0.0})]
    for history in (gap, [*trial, *gap]):
        assert shown(history) == modulation_panels(history)
        assert sum(bool(axis.images) for axis in plot_modulation(history).axes) == 6


# -- trials that cannot tell -------------------------------------------------------------------------------------------


def state_of(model: nn.Module, optimizer: Any, aim: AIM) -> Any:
    return copy.deepcopy([[*model.state_dict().values()], optimizer.tables.rows, optimizer.tables.steps, aim.history])


@pytest.mark.parametrize("kind", ["nothing", "backward only", "another optimizer's step"])
def test_a_train_that_never_steps_is_refused(kind: str) -> None:
    model, optimizer = build()
    other = build(1)
    aim = AIM(model, optimizer, CLASSES, rule="trial")
    train(model, optimizer, 3)

    def step(inputs: Any, labels: Any) -> None:
        if kind == "another optimizer's step":
            stepper(*other)(inputs, labels)
        elif kind == "backward only":
            nn.functional.cross_entropy(model(*inputs), labels).backward()

    before = state_of(model, optimizer, aim)
    with pytest.raises(RuntimeError, match=r"train= was called 16 times and never stepped .* optimizer.step\(\)"):
        aim.update(*batch(), held_out=batch(seed=1), train=step)
    after = state_of(model, optimizer, aim)
    assert all(map(torch.equal, before[0], after[0])) and torch.equal(before[1], after[1]) and before[2:] == after[2:]


def test_steps_that_are_not_counted_are_seen_by_the_weights() -> None:
    """A graph that is replayed steps without Python."""
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, rule="trial")

    def step(inputs: Any, labels: Any) -> None:
        stepper(model, optimizer)(inputs, labels)
        optimizer.tables.steps -= 1

    assert aim.update(*batch(), held_out=batch(seed=1), train=step).rule == "trial"


@pytest.mark.parametrize(
    ("count", "steps", "told"),
    [
        (24, 16, "24 samples into 16 batches of about 1.5: each arm has 16 steps"),
        (5, 16, "5 samples into 5 batches of about 1: each arm has 5 steps.*pass 16 times the batch size"),
        (16, 2, None),
        (15, 2, "into 2 batches of about 7.5"),
    ],
)
def test_small_batches_are_warned_of_once(count: int, steps: int, told: str | None) -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, rule=Trial(steps=steps))
    for update in range(2):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            aim.update(*batch(count), held_out=batch(seed=1), train=stepper(model, optimizer))
        assert len(seen) == (told is not None and update == 0)
        if seen:
            assert seen[0].filename == __file__
            with pytest.raises(UserWarning, match=told):
                raise seen[0].message if isinstance(seen[0].message, Warning) else AssertionError


# -- one class ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["reliance", "trial"])
def test_regression_has_no_classes(rule: str) -> None:
    model, optimizer = build()

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs[:, 0], targets)

    aim = AIM(model, optimizer, 1, rule=rule, loss=loss)
    (inputs, labels), (others, classes) = batch(), batch(seed=1)
    table = aim.update(
        inputs, labels.float(), held_out=(others, classes.float()), train=stepper(model, optimizer, loss)
    )
    assert table.rule == rule


def test_classes_are_needed_where_features_are_read() -> None:
    model, optimizer = build()
    for options in ({}, {"rule": "gap"}, {"rule": "ratio", "probe": "linear"}):
        with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
            AIM(model, optimizer, 1, **options)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        AIM(model, optimizer, 0, rule="reliance")
    for probe in ("gradient-norm", DOMINANT_A, fixed((0.1, 0.1), (0.2, 0.2, 0.2))):
        AIM(model, optimizer, 1, rule="ratio", probe=probe)
