"""The demo's choice: two data sets, and four of the comparison's contestants by shorter names."""

from __future__ import annotations

from aim_kernels.experiments.compare.contestants import CONTESTANTS as COMPARED
from aim_kernels.experiments.runs import Contestant

DATA = ("digits", "watch")
#: Option of the command line to the contestants it stands for; OGM-GE is run with three values of its alpha.
METHODS: dict[str, dict[str, Contestant]] = {
    "joint": {"joint": COMPARED["joint"]},
    "ogm-ge": {f"ogm-ge {alpha:g}": Contestant("ogm-ge", ({"alpha": alpha},)) for alpha in (0.5, 1.0, 2.0)},
    "aim": {"aim": COMPARED["aim"]},
    "drop": {"drop": COMPARED["drop"]},
}
CONTESTANTS = {name: entry for named in METHODS.values() for name, entry in named.items()}
