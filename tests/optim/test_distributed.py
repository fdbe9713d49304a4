"""Several processes do what one does: the scenarios of scenarios*.py, in worlds of 2 and 4."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import scenarios
import scenarios_flattened  # noqa: F401
import scenarios_modules  # noqa: F401  registers its scenarios
import scenarios_packed  # noqa: F401
import scenarios_zero  # noqa: F401
import worlds
from backends_under_test import BUILT, cuda_on_cpu


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_world(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One start of the processes serves all scenarios; the output says which one failed, on which rank."""
    cuda_on_cpu()
    monkeypatch.setenv(BUILT, "1")
    for rank, said in enumerate(worlds.run(size, tmp_path)):
        passed = [line.split(" (")[0].removeprefix("passed ") for line in said.splitlines() if line[:7] == "passed "]
        wanted = [name for name in scenarios.of_world(size) if os.environ.get("AIM_SCENARIO", "") in name]
        assert wanted == passed, f"rank {rank}: {said}"


def test_a_world_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it said is shown."""
    monkeypatch.setattr(worlds, "LIFETIME", 1)
    monkeypatch.setattr(worlds, "COMMAND", ["-c", "import time; print('here', flush=True); time.sleep(600)"])
    with pytest.raises(AssertionError, match=r"(?s)rank 0, exit -9.*here"):
        worlds.run(1, tmp_path)
