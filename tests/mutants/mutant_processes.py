"""More of mutant_list.py: what only several processes show."""

from __future__ import annotations

from mutant_list import PLAN, Mutant

SHARDING = "aim_kernels/step/sharding.py"
WORLD = "test_distributed.py::test_scenario"

PROCESSES = (
    Mutant(
        "noise by the index in a part",
        SHARDING,
        "found.append(None if offset is None else total + offset)",
        "found.append(None if offset is None else total)",
        "all processes draw the numbers of the first one's elements",
        (f"{WORLD}[2-noise_goes_by_global_index]",),
    ),
    Mutant(
        "copies are counted by all who have one",
        PLAN,
        'records["uncounted"] = sharding.uncounted(self.owners)',
        "pass",
        "statistics and thresholds go by the number of processes",
        (f"{WORLD}[4-two_dimensions-chain]",),
    ),
)
