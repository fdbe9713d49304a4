"""All bugs to plant: those of every ``mutant_*.py`` beside this file."""

from __future__ import annotations

import importlib
from pathlib import Path

from mutant_list import Mutant


def _collected() -> tuple[Mutant, ...]:
    found: dict[int, Mutant] = {}
    for path in sorted(Path(__file__).resolve().parent.glob("mutant_*.py")):
        for value in vars(importlib.import_module(path.stem)).values():
            if isinstance(value, tuple):
                found |= {id(entry): entry for entry in value if isinstance(entry, Mutant)}
    return tuple(found.values())


EVERYTHING = _collected()
