"""The Triton backend by Triton's own just-in-time path, which interpreting and compiling ahead of time go around: what
it refuses at a launch, and what it compiles once more. No GPU is needed (triton_just_in_time.py)."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from helpers import DTYPES, RULES

import aim_kernels as ak
from aim_kernels.backends import triton as backend

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

#: What a step may have compiled: by the first, and by the first that has something new of its own.
NEW = ("first", "scaled", "emit")
SCALED = "+grad_scale +found_inf"


class Action(NamedTuple):
    """What happened, and the kernels that were compiled and launched by it."""

    case: str
    name: str
    compiled: list[str]
    launched: list[str]


def told(folder: Path, *cases: str) -> list[Action]:
    """What triton_just_in_time.py says: in a process of its own, since Triton reads TRITON_INTERPRET once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(ak.__file__).parent.parent)}
    program = [sys.executable, str(Path(__file__).parents[1] / "support" / "triton_just_in_time.py"), *cases]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Action(*line) for line in json.loads(done.stdout)]


def compiled_once(actions: list[Action], expected: set[str]) -> None:
    """Every kernel that is needed, each once and by an action that asks for something new; every action launches."""
    counts = Counter(kernel for action in actions for kernel in action.compiled)
    again = {kernel: count for kernel, count in counts.items() if count > 1}
    assert not again, f"compiled more than once: {again}"
    assert counts.keys() == expected, counts.keys() ^ expected
    for action in actions:
        assert not action.compiled or action.name in NEW, action
        kernels = [kernel.partition(" ")[0] for kernel in action.launched]
        if action.name == "emit":
            assert set(kernels) <= {"emit_kernel"}, action
        elif action.name != "no gradient":  # then there may be no step at all
            assert kernels[0] == "update_kernel" and kernels[-1] == "finish_kernel", action


def test_every_rule_and_count_is_stepped_by_kernels_compiled_once(tmp_path: Path) -> None:
    """Moved gradients, other alignments, learning rates, strengths, live weights, GradScaler; every rule, fewer bytes,
    any number of chunks, groups and devices. Constants of a kernel are what its name here tells, and nothing else."""
    actions = told(tmp_path, "rules", "counts")
    updates = {"update float32 wide", "update float32 other wide", "update bfloat16 general int8"}
    finishes = {"finish", "finish +sums", "finish +others"}
    expected = updates | {f"{kernel} {SCALED}" for kernel in updates} | {"emit float32 wide", "emit bfloat16 int8"}
    expected |= finishes | {"finish +found_inf", "finish +found_inf +sums", "finish +found_inf +others"}
    compiled_once(actions, expected)
    assert {f"{rule} float32" for rule in RULES} <= {action.case for action in actions}
    launches = Counter(len(action.launched) for action in actions if action.case == "17 devices")
    assert launches == {34: 17, 17: 2}


@pytest.mark.slow
def test_every_way_of_storing_is_stepped_by_kernels_compiled_once(tmp_path: Path) -> None:
    """All storage types of weights and moments, of rules of both families; half of them as GradScaler has them."""
    stored = {name: ["wide", "general wide"] for name in DTYPES}
    for name in DTYPES.keys() - {"float64"}:
        stored[name] += ["general bfloat16", "general int8"]
    ways = [f"{name} {way}" for name in DTYPES for way in stored[name]]
    expected = {f"update {way}" for way in ways} | {"finish", "finish +found_inf"}
    expected |= {f"update {name} other {way} {SCALED}" for name in DTYPES for way in stored[name]}
    expected |= {f"emit {way.replace('general ', '')}" for way in ways}
    compiled_once(told(tmp_path, "storage"), expected)


@pytest.mark.slow
def test_machine_code_is_loaded_and_launched(tmp_path: Path) -> None:
    compiled_once(told(tmp_path, "whole"), {"update float32 wide", "emit float32 wide", "finish"})


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.iter_modules(backend.__path__):
        yield importlib.import_module(f"{backend.__name__}.{found.name}")


def functions() -> Iterator[Any]:
    """All kernels and what they call, as Python has them."""
    for module in modules():
        for value in vars(module).values():
            if inspect.isfunction(function := getattr(value, "fn", None)) and function.__module__ == module.__name__:
                yield function


def refusal(value: Any) -> str:
    """Why Triton would not let a kernel use a global or a default of this value; empty if it would."""
    import triton.language as tl

    if isinstance(value, ModuleType | type) or callable(getattr(value, "fn", None)):
        return ""
    if not isinstance(value, tl.constexpr):
        return "it is no tl.constexpr"
    # As Triton asks before every launch.
    return "it differs from its own copy" if value != copy.deepcopy(value) else ""


@pytest.mark.parametrize("function", list(functions()), ids=lambda function: function.__qualname__)
def test_globals_of_kernels_are_constants_that_equal_themselves(function: Any) -> None:
    used = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    given = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty}
    refused = {name: why for name, value in [*used.items(), *given.items()] if (why := refusal(value))}
    assert not refused


def test_what_triton_would_refuse_is_known() -> None:
    import numpy as np
    import triton.language as tl

    nan = float("nan")
    refused = [tl.constexpr(nan), tl.constexpr(np.float32(nan)), 2.0, nan, (1, 2), np.float64(1.0), print]
    assert all(map(refusal, refused))
    assert not any(map(refusal, [tl.constexpr(1.5), tl.constexpr(float("inf")), tl, tl.dtype]))


def test_there_are_kernels_to_look_at() -> None:
    names = {function.__qualname__ for function in functions()}
    assert {"update_kernel", "finish_kernel", "emit_kernel", "step_chunk", "uniforms", "philox"} <= names
    assert len(list(functions())) == len(names) > 40
