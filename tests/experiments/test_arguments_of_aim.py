"""Options of contestants: results record plain numbers and words, methods take objects."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from aim_kernels.aim import Alternate, Gap, Trial
from aim_kernels.experiments.arguments import arguments_of
from aim_kernels.experiments.compare.contestants import CONTESTANTS

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("recorded", "arguments"),
    [
        ({}, {}),
        ({"rule": "gap", "unimodal_weight": 0.0}, {"rule": "gap", "unimodal_weight": 0.0}),
        ({"rule": "gap", "confidence": 1.0}, {"rule": Gap(confidence=1.0)}),
        ({"rule": "trial", "confidence": 0.0}, {"rule": Trial(confidence=0.0)}),
        ({"rule": "gap", "hold": "freeze"}, {"rule": "gap", "mixing": Alternate(hold="freeze")}),
        ({"mixing": "split"}, {"mixing": "split"}),
    ],
)
def test_recorded_options_become_objects(recorded: dict[str, Any], arguments: dict[str, Any]) -> None:
    before = json.dumps(recorded)
    assert arguments_of(recorded) == arguments
    assert json.dumps(recorded) == before


def test_what_belongs_to_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence belongs to a rule"):
        arguments_of({"confidence": 1.0})
    with pytest.raises(ValueError, match="hold belongs to mixing='alternate'"):
        arguments_of({"mixing": "split", "hold": "freeze"})


def test_contestants_are_recorded_as_before() -> None:
    """The options of every recorded line of AIM and its controls are those of a contestant of today."""
    with (RESULTS / "compare" / "results.csv").open() as file:
        lines = {(row["contestant"], int(row["choice"]), row["options"]) for row in csv.DictReader(file)}
    checked = [(name, choice, options) for name, choice, options in lines if "gap" in name or name == "aim"]
    assert len(checked) >= 9
    for name, choice, options in checked:
        assert CONTESTANTS[name].options(choice) == options
        arguments_of(json.loads(options))
