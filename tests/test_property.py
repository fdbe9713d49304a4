"""Hypothesis over sizes, layouts, dtypes, missing gradients, groups and rows, against the oracle."""

from __future__ import annotations

from typing import Any

from helpers import (
    DTYPES,
    GRADIENT_LAYOUTS,
    PARAMETER_LAYOUTS,
    ROWS,
    RULES,
    Gradients,
    Twin,
    build,
    parameters_of,
    set_row,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPE = st.lists(st.integers(0, 5) | st.sampled_from([8, 17]), max_size=4).map(tuple)
GROUP = st.lists(SHAPE, min_size=1, max_size=4)
COLUMN = st.sampled_from([0.0, 0.25, 0.9, 1.0, 1.7])
NAMES = ("grad_under", "grad_well", "step_under", "step_well", "live_under", "live_well")


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.lists(GROUP, min_size=1, max_size=3))
    count = sum(map(len, groups))
    steps = draw(st.integers(2, 5))
    return {
        "rule": draw(st.sampled_from(sorted(RULES))),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "groups": groups,
        "kinds": draw(st.lists(st.sampled_from(PARAMETER_LAYOUTS), min_size=1, max_size=3)),
        "grad_kinds": draw(st.lists(st.sampled_from(GRADIENT_LAYOUTS), min_size=1, max_size=3)),
        "missing": draw(
            st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=steps, max_size=steps)
        ),
        "rows": draw(st.lists(st.sampled_from(sorted(ROWS)), min_size=len(groups), max_size=len(groups))),
        "later": draw(st.none() | st.fixed_dictionaries(dict.fromkeys(NAMES, COLUMN))),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])),
        "backend": draw(st.sampled_from(["cpu", "cpu", "reference"])),
    }


@settings(max_examples=120, deadline=None, derandomize=True)
@given(schedules())
def test_any_schedule(case: dict[str, Any]) -> None:
    optimizer = build(
        case["rule"],
        case["groups"],
        case["dtype"],
        case["kinds"],
        seed=case["seed"],
        weight_decay=case["weight_decay"],
        backend=case["backend"],
    )
    for index, row in enumerate(case["rows"]):
        set_row(optimizer, index, row)
    made = Twin(optimizer, RULES[case["rule"]]["rule"])
    gradients = Gradients(parameters_of(optimizer), kinds=case["grad_kinds"])
    for number, missing in enumerate(case["missing"]):
        if number == 1 and case["later"] is not None:
            optimizer.set_modulation(0, **case["later"])
        made.step([None if gone else grad for gone, grad in zip(missing, gradients(), strict=True)])
    made.finish()
