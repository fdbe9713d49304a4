"""The C++ core as a program of its own under sanitizers, and what its object code may contain."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from backends_under_test import make

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_core_under_address_and_undefined_behaviour_sanitizers() -> None:
    """tests/native/test_core.cpp: instruction sets agree to the bit, guards hold, refusals change nothing."""
    for tool in ("make", "g++"):
        assert shutil.which(tool), f"{tool} is needed: apt-get install {tool}"
    ran = subprocess.run([str(make("test_core"))], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    cases, failures = map(int, re.fullmatch(r"(\d+) cases, (\d+) failures\n", ran.stdout).groups())
    assert cases > 500
    assert failures == 0


def test_core_under_the_thread_sanitizer() -> None:
    """tests/native/test_threads.cpp: new threads, a lent pool, two steps at once; the bits of one thread."""
    ran = subprocess.run([str(make("test_threads"))], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert re.fullmatch(r"\d{2} cases, 0 failures\n", ran.stdout), ran.stdout


def _objects(pattern: str) -> list[Path]:
    """Object files of the installed build; `pip install -e .` and `setup.py build_ext` leave them under build/."""
    return sorted((ROOT / "build").glob(f"objects-*/{pattern}"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX is x86-64's")
def test_baseline_objects_contain_no_avx_instruction() -> None:
    """Only the dispatched units may use registers or encodings that an older processor lacks."""
    if not shutil.which("objdump"):
        pytest.skip("objdump (binutils) is not installed")
    objects = _objects("*.o")
    if not objects:
        pytest.skip("the extension was built elsewhere; its objects are not under build/")
    dispatched = {"avx2", "avx512"}
    seen = set()
    for path in objects:
        isa = re.search(r"kernels_(\w+)\.cpp", path.name)
        code = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
        ).stdout
        uses_avx = re.search(r"%[yz]mm\d|\tv[a-z]+[sp][sd]\b|\tvzero", code) is not None
        expected = isa is not None and isa.group(1) in dispatched
        assert uses_avx == expected, f"{path.name}: AVX instructions {'missing' if expected else 'found'}"
        seen.add(isa.group(1) if isa else "common")
        if isa and isa.group(1) == "avx2":
            assert "%zmm" not in code
    assert {"common", "scalar", "avx2", "avx512"} <= seen


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX is x86-64's")
def test_dispatched_objects_share_no_function_with_others() -> None:
    """A function that AVX units and baseline units both define (an inline one of the standard library, say) would be
    merged by the linker, which may keep the AVX copy: every symbol they define must lie in their own namespace."""
    if not shutil.which("nm"):
        pytest.skip("nm (binutils) is not installed")
    objects = [path for isa in ("avx2", "avx512") for path in _objects(f"*kernels_{isa}.cpp.o")]
    if not objects:
        pytest.skip("the extension was built elsewhere; its objects are not under build/")
    for path in objects:
        isa = re.search(r"kernels_(\w+)\.cpp", path.name).group(1)
        listing = subprocess.run(
            ["nm", "--defined-only", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout
        for line in listing.splitlines():
            symbol_type, name = line.split(maxsplit=2)[1:]
            if symbol_type in "TWVBDRu":
                assert f"aim::{isa}::" in name, f"{path.name} defines {name}"
