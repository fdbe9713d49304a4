"""Every command of the project, by what is typed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from aim_kernels import bench
from aim_kernels.experiments import compare, demo, precision

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    """A program of benchmarks/, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release, pictures = script("release"), script("pictures")
#: What is typed before the options, to the function that takes them.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo.main,
    "bench": bench.main,
    "compare": compare.main,
    "precision": precision.main,
    "release.py": release.main,
    "pictures.py": pictures.main,
}
