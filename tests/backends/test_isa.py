"""The objects of a build: instructions beyond the processor's baseline stand in the dispatched units only, so that
one wheel runs everywhere. Read from the machine code, by encoding, of the objects that ``make build`` leaves."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build" / f"objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
PREFIXES = {"26", "2e", "36", "3e", "64", "65", "67"}  # segments and address size: they may precede VEX
INSTRUCTION = re.compile(r"^ *[0-9a-f]+:\t((?:[0-9a-f]{2} )+)")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 machine code; this machine has another"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed"),
]


def encoding(line: str) -> str:
    """ "VEX", "EVEX" or "" of a line of objdump: in 64-bit mode the bytes c4, c5 and 62 begin nothing else."""
    match = INSTRUCTION.match(line)
    if match is None:
        return ""
    codes = match.group(1).split()
    while codes and codes[0] in PREFIXES:
        codes.pop(0)
    return {"c4": "VEX", "c5": "VEX", "62": "EVEX"}.get(codes[0] if codes else "", "")


def disassembled(path: Path) -> dict[str, set[str]]:
    """Each function of an object, demangled, with the encodings that it uses."""
    told = subprocess.run(["objdump", "-dC", "-w", path], capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    for line in told.splitlines():
        if header := FUNCTION.match(line):
            current = found.setdefault(header.group(1), set())
        elif used := encoding(line):
            current.add(used)
    return found


@cache
def functions(name: str) -> dict[str, set[str]]:
    return disassembled(OBJECTS / name)


def units() -> list[str]:
    """Objects of the portable build, those of the CUDA kernels (whose host code nvcc's compiler makes) included."""
    return sorted(path.name for path in OBJECTS.glob("*.o"))


@pytest.fixture
def _built() -> None:
    if not OBJECTS.exists():
        pytest.skip(f"no objects of a build in {OBJECTS.relative_to(ROOT)}: make build leaves them")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("   0:\tc5 fc 58 c1          \tvaddps %ymm1,%ymm0,%ymm0", "VEX"),
        ("  10:\tc4 e2 7d 13 00       \tvcvtph2ps (%rax),%ymm0", "VEX"),
        ("  18:\t67 c5 fc 10 00       \tvmovups (%eax),%ymm0", "VEX"),
        ("  20:\t62 f1 7c 48 58 c1    \tvaddps %zmm1,%zmm0,%zmm0", "EVEX"),
        ("  30:\t0f 58 c1             \taddps  %xmm1,%xmm0", ""),
        ("  33:\t48 83 e4 c0          \tand    $0xffffffffffffffc0,%rsp", ""),
        ("  3a:\tf3 0f 6f 05 c5 c4 62 00 \tmovdqu 0x62c4c5(%rip),%xmm0", ""),
        ("0000000000000000 <aim::step(aim::Tensor const*)>:", ""),
    ],
)
def test_encodings_are_told_apart(line: str, expected: str) -> None:
    assert encoding(line) == expected


def test_a_function_with_wide_vectors_would_be_found(tmp_path: Path) -> None:
    source = tmp_path / "wide.cpp"
    source.write_text(
        "namespace common { void add(float* a) { for (int i = 0; i < 64; ++i) a[i] += 1.0f; } }\n"
        "namespace common { float one(float a) { return a + 1.0f; } }\n"
    )
    for flags, expected in ((["-mavx2"], {"VEX"}), (["-mavx512f", "-mprefer-vector-width=512"], {"VEX", "EVEX"})):
        subprocess.run(["g++", "-O3", "-c", source, "-o", tmp_path / "wide.o", *flags], check=True)
        found = disassembled(tmp_path / "wide.o")
        assert found["common::add(float*)"] == expected
    subprocess.run(["g++", "-O3", "-c", source, "-o", tmp_path / "plain.o"], check=True)
    plain = disassembled(tmp_path / "plain.o")
    assert set(plain) == {"common::add(float*)", "common::one(float)"}
    assert set().union(*plain.values()) == set()


@pytest.mark.usefixtures("_built")
def test_every_unit_has_an_object() -> None:
    sources = [path for folder in ("bench", "cpu") for path in (ROOT / "csrc" / folder).glob("*.cpp")]
    names = {f"csrc_{path.parent.name}_{path.name}.o" for path in sources if "neon" not in path.name}
    assert {*names, "python_bindings.cpp.o", "python_watch.cpp.o"} - set(units()) == set()


@pytest.mark.slow
@pytest.mark.usefixtures("_built")
def test_no_wide_instruction_outside_of_the_dispatched_units() -> None:
    dispatched = {"csrc_cpu_kernels_avx2.cpp.o", "csrc_cpu_kernels_avx512.cpp.o"}
    wide = [
        f"{unit}: {name}: {', '.join(sorted(encodings))}"
        for unit in units()
        if unit not in dispatched
        for name, encodings in functions(unit).items()
        if encodings
    ]
    assert wide == []
    assert sum(len(functions(unit)) for unit in units()) > 100  # there was something to look at


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize(("isa", "expected"), [("avx2", {"VEX"}), ("avx512", {"VEX", "EVEX"})])
def test_dispatched_units_keep_to_themselves(isa: str, expected: set[str]) -> None:
    """Their functions stand in a namespace of their own. A template of std or of a header that every unit includes
    would be merged by the linker, which might take the wide copy for everybody; code that runs at load time would run
    on every processor."""
    unit = f"csrc_cpu_kernels_{isa}.cpp.o"
    found = functions(unit)
    # objdump marks the parts that the compiler splits off.
    assert [name for name in found if f"aim::{isa}::" not in name.removesuffix("[clone .cold]")] == []
    assert set().union(*found.values()) == expected
    sections = subprocess.run(["objdump", "-h", OBJECTS / unit], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\.(?:init_array|ctors)\S*", sections) == []
    symbols = subprocess.run(["nm", "-C", OBJECTS / unit], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if re.match(r"[0-9a-f]+ [TWVuBDRG] ", line)]
    assert shared
    assert [line for line in shared if f"aim::{isa}::" not in line] == []
