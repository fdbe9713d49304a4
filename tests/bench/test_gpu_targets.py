"""The targets of the Makefile for a machine with a GPU, without one: what they run, and that no part of them takes the
others along. A stand-in takes the place of Python there (gpu_stand_in.py)."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"

#: Every part of a target, by words of its command.
PARTS = {
    "gpu-first": (
        r"^setup\.py",
        r"aim_kernels$",
        r"pytest.*cuda@gpu",
        r"pytest.*triton@gpu",
        r"bench.*--backends cuda",
        r"bench.*--backends triton",
    ),
    "gpu-test": (r"^setup\.py", r"pytest.* -n 8 "),
    "gpu-bench": (
        r"^setup\.py",
        r"--backends cuda --dtypes bfloat16",
        r"--backends triton --dtypes bfloat16",
        r"--backends cuda --dtypes float32",
        r"--backends triton --dtypes float32",
    ),
    "gpu-sweep": (r"^setup\.py", r"--backends cuda.*--sweep", r"--backends triton.*--sweep"),
    "gpu-sanitizer": (r"^setup\.py", r"pytest.*test_compute_sanitizer"),
}


class Made:
    """What came of a target.

    Attributes:
        status: of make; text: what it printed; last: its last line; calls: the arguments of each call of Python;
        settings: environment variables of each; folder: of the results.
    """

    def __init__(self, folder: Path, target: str, *variables: str, **settings: str) -> None:
        self.folder = folder / "results"
        told = folder / "calls"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "AIM_KERNELS_CUDA"))}
        environment = {**clean, "STAND_IN_CALLS": str(told), **settings}
        python = f"GPU_PYTHON={sys.executable} {TESTS / 'support' / 'gpu_stand_in.py'}"
        command = ["make", "--no-print-directory", target, python, f"GPU_OUT={self.folder}", *variables]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        self.status, self.text = done.returncode, done.stdout + done.stderr
        self.last = done.stdout.splitlines()[-1] if done.stdout else ""
        lines: list[Any] = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
        self.calls = [" ".join(arguments) for arguments, _ in lines]
        self.settings = [settings for _, settings in lines]


def commands(target: str) -> str:
    """What a target would run."""
    return subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", PARTS)
def test_a_target_runs_its_parts_and_names_its_folder(target: str, tmp_path: Path) -> None:
    made = Made(tmp_path, target)
    assert made.status == 0, made.text
    assert len(made.calls) == len(PARTS[target])
    for pattern, call in zip(PARTS[target], made.calls, strict=True):
        assert re.search(pattern, call), call
    assert made.last == f"{target}: results in {made.folder}"
    assert (made.folder / f"{target}.log").read_text().splitlines()[-1] == made.last
    for settings in made.settings:
        assert settings == {"AIM_KERNELS_CUDA": "1", "AIM_KERNELS_CUDA_ARCHS": "native", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("target", "pattern"),
    [
        pytest.param(target, pattern, id=f"{target}-{number}")
        for target, patterns in PARTS.items()
        for number, pattern in enumerate(patterns)
    ],
)
def test_a_part_that_fails_takes_no_other_along(target: str, pattern: str, tmp_path: Path) -> None:
    made = Made(tmp_path, target, STAND_IN_FAILS=pattern)
    assert made.status != 0
    for part in PARTS[target]:
        assert any(re.search(part, call) for call in made.calls), f"{part} was not run"
    assert made.text.count("FAILED") == 2, made.text  # where it happens, and at the end
    assert made.last == f"{target}: results in {made.folder}"


def test_all_of_them_run_whatever_fails(tmp_path: Path) -> None:
    made = Made(tmp_path, "gpu", STAND_IN_FAILS="oracle")
    assert made.status != 0
    assert made.last == f"gpu: failed: gpu-first; results in {made.folder}"
    for target in ("gpu-first", "gpu-test", "gpu-bench"):
        assert f"{target}: results in {made.folder}" in made.text
        for part in PARTS[target]:
            assert any(re.search(part, call) for call in made.calls), f"{part} was not run"


def test_all_of_them_succeed(tmp_path: Path) -> None:
    made = Made(tmp_path, "gpu")
    assert made.status == 0 and made.last == f"gpu: results in {made.folder}"


def test_without_nvcc_the_rest_is_built_and_the_target_fails(tmp_path: Path) -> None:
    made = Made(tmp_path, "gpu-test", STAND_IN_FAILS=r"setup\.py")
    assert [settings["AIM_KERNELS_CUDA"] for settings in made.settings] == ["1", "0", "1"]
    assert made.status != 0 and "build FAILED" in made.text


def test_architectures_that_are_asked_for_are_built(tmp_path: Path) -> None:
    made = Made(tmp_path, "gpu-test", AIM_KERNELS_CUDA_ARCHS="80")
    assert {settings["AIM_KERNELS_CUDA_ARCHS"] for settings in made.settings} == {"80"}


def test_a_part_that_hangs_is_cut_off_and_said_so(tmp_path: Path) -> None:
    began = time.monotonic()
    made = Made(tmp_path, "gpu-first", "GPU_LIMIT=4", STAND_IN_HANGS="cuda@gpu")
    assert time.monotonic() - began < 30
    assert made.status != 0 and "oracle, cuda CUT OFF" in made.text
    assert made.text.count("NOT BEGUN") == 3, made.text
    assert made.last == f"gpu-first: results in {made.folder}"


def test_a_target_takes_less_than_four_minutes() -> None:
    """Ten seconds pass before what does not heed its end is killed."""
    for target in PARTS:
        limit = re.search(rf"gpu_parts\.sh {target} (\d+) ", commands(target))
        assert limit and int(limit[1]) + 10 < 240


def test_a_part_is_ended_in_good_order(tmp_path: Path) -> None:
    """pytest tells what it has found until then; also where the shell was started in the background."""
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('ended in good order')"
    script = f"trap '' INT; bash {ROOT / 'benchmarks' / 'gpu_parts.sh'} x 9 {tmp_path} --part a 2 {sys.executable} -c"
    done = subprocess.run(["bash", "-c", f'{script} "$0"', code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ended in good order" in done.stdout and "a CUT OFF" in done.stdout


@pytest.mark.slow
def test_figures_are_written_as_they_come(tmp_path: Path) -> None:
    """The process of the CUDA kernels is killed in its second set: what it had measured is there, and Triton is timed
    all the same. The page shows both."""
    made = Made(tmp_path, "gpu-first", STAND_IN_MEASURES="--backends cuda")
    assert made.status != 0, made.text
    assert "figures, cuda FAILED" in made.text and "figures, triton done" in made.text
    (table,) = made.folder.glob("*.csv")
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    found = [(row["candidate"], row["set"], row["mode"]) for row in rows]
    assert not any(row["error"] for row in rows)
    both = ("eager", "wall")
    ours = [("256m", mode) for mode in both] + [("resnet50", "eager")]
    assert [(name, mode) for candidate, name, mode in found if candidate == "aim"] == ours
    theirs = [(name, mode) for name in ("256m", "resnet50", "1000x1k") for mode in both]
    assert [(name, mode) for candidate, name, mode in found if candidate == "aim-live-triton"] == theirs
    page = table.with_suffix(".md").read_text(encoding="utf-8")
    assert page.count("| aim | ") == 3 and page.count("| aim-live-triton | ") == 6
    assert page.count("| torch-fused | ") == 6


def test_every_file_with_tests_for_a_gpu_is_named() -> None:
    imported = r"^from backends_under_test import .*\b(ON_GPU|DEVICE_BACKENDS|BACKENDS)\b"
    marked = re.compile(rf"mark\.gpu\b|{imported}", re.MULTILINE)
    having = {path.name for path in TESTS.glob("*/test_*.py") if marked.search(path.read_text(encoding="utf-8"))}
    assert having - {Path(__file__).name} == set(re.findall(r"tests/\w+/(test_\w+\.py) ", commands("gpu-test") + " "))


def test_tests_are_not_ended_by_a_failure_nor_by_a_warning() -> None:
    told = commands("gpu-test")
    assert "--maxfail" not in told and " -x" not in told and "-W default" in told and "-m gpu" in told
    assert "--deselect tests/backends/test_gpu.py::test_compute_sanitizer" in told
    assert "def test_compute_sanitizer(" in (TESTS / "backends" / "test_gpu.py").read_text(encoding="utf-8")


def test_a_warning_of_a_version_yet_to_come_fails_nothing(tmp_path: Path) -> None:
    """Here it does: pyproject.toml makes errors of those raised inside the package."""
    (tmp_path / "test_it.py").write_text(
        "import warnings\ndef test_it():\n    warnings.warn_explicit('x', DeprecationWarning, 'x', 1, 'aim_kernels')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    for options, status in (([], 1), (["-W", "default"], 0)):
        done = subprocess.run([*command, *options, str(tmp_path)], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout


def test_the_cases_of_the_oracle_are_there() -> None:
    cases = re.findall(r'"(tests/backends/test_device_step\.py::[^"]+)"', commands("gpu-first"))
    assert [re.search(r"\[(\w+)@gpu", case)[1] for case in cases] == ["cuda", "triton"]  # type: ignore[index]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and all(case in done.stdout for case in cases), done.stdout + done.stderr
