"""Who is compared: a method, the options that its tuning may choose from, and what its optimizer needs.

Every method may choose from at most :data:`BUDGET` configurations, the first of which is its default; they are judged
on the validation split of the tuning seeds, which are none of the seeds that are reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Configurations that a method may choose from.
BUDGET = 3
#: Seeds of which the validation split chooses; far from those that are reported.
TUNING_SEEDS = (1000, 1001)
#: "alone:audio": the audio encoder trained by itself.
ALONE = "alone:"


@dataclass(frozen=True)
class Contestant:
    """A method of the registry by the name that the tables show.

    Attributes:
        grid: options, the default first.
        optimizer: options of the optimizer that differ from the common ones.
        control: what every method has to beat, rather than a method.
    """

    method: str
    grid: tuple[dict[str, Any], ...] = ({},)
    optimizer: dict[str, Any] = field(default_factory=dict)
    control: bool = False


CONTESTANTS: dict[str, Contestant] = {
    "joint": Contestant("joint", control=True),
}


def contestant(name: str) -> Contestant:
    """By name. Raises ValueError for one that is none."""
    if name.startswith(ALONE):
        return Contestant("joint", control=True)
    if name not in CONTESTANTS:
        raise ValueError(f"unknown contestant {name!r}; it is one of {', '.join(CONTESTANTS)}")
    return CONTESTANTS[name]
