"""The list of planted bugs fits the sources: it could not rot unseen. `make mutants` plants them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutant_list import Mutant
from planted import EVERYTHING
from worlds import scenarios

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("mutant", EVERYTHING, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_it_can_be_planted(mutant: Mutant) -> None:
    assert (TESTS.parent / mutant.file).read_text().count(mutant.old) == 1, "its text must stand there exactly once"
    assert mutant.new != mutant.old
    for test in mutant.tests:
        name, _, function = test.partition("::")
        (path,) = TESTS.glob(f"*/{name}")
        text = path.read_text()
        assert not function or re.search(rf"^def {function.partition('[')[0]}\(", text, re.MULTILINE), f"no test {test}"
        if function.startswith("test_scenario["):
            size, _, scenario = function[len("test_scenario[") : -1].partition("-")
            assert int(size) in scenarios()[scenario][0], f"no scenario {scenario} in a world of {size}"


def test_names_are_unique_and_there_are_many() -> None:
    assert len({mutant.name for mutant in EVERYTHING}) == len(EVERYTHING) >= 80
