"""What a wheel of this project may hold: ``python wheel_contents.py WHEEL ...`` names what is wrong, exit status 1.

For the portable wheels, which have no CUDA kernels. Needs readelf (binutils).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

#: What a CPU extension may be linked to: every Linux has them, and PyTorch brings none of them.
LIBRARIES = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++"}
SUFFIXES = {".py", ".pyi", ".so", ".typed"}


def defects(wheel: Path) -> list[str]:
    """Everything that is wrong with a wheel, one line each."""
    return list(_defects(wheel))


def _defects(wheel: Path) -> Iterator[str]:
    distribution, version, pythons, abis, platforms = wheel.stem.split("-")
    info = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
        for name in ("aim_kernels/py.typed", "aim_kernels/_C.pyi", f"{info}/licenses/LICENSE"):
            if name not in inside:
                yield f"{name} is missing"
        for name in inside:
            path = Path(name)
            if path.parts[0] == info:
                continue
            if path.parts[0] != "aim_kernels":
                yield f"{name} lies outside of the package"
            elif path.suffix not in SUFFIXES:
                yield f"{name} does not belong into a wheel"
        metadata = archive.read(f"{info}/METADATA").decode()
        for line in (f"Version: {version}", "License-Expression: MIT", "License-File: LICENSE"):
            if line not in metadata.splitlines():
                yield f"METADATA does not say {line!r}"
        told = archive.read(f"{info}/WHEEL").decode().splitlines()
        tags = {line.removeprefix("Tag: ") for line in told if line.startswith("Tag: ")}
        named = {"-".join(tag) for tag in product(pythons.split("."), abis.split("."), platforms.split("."))}
        if tags != named:
            yield f"WHEEL says {sorted(tags)}, the file's name {sorted(named)}"
        if "Root-Is-Purelib: false" not in told:
            yield "WHEEL calls it a pure wheel"
        libraries = [name for name in inside if name.endswith(".so")]
        if [name.partition(".")[0] for name in libraries] != ["aim_kernels/_C"]:
            yield f"compiled modules: expected _C alone, got {libraries}"
        interpreter = pythons.removeprefix("cp")
        with tempfile.TemporaryDirectory() as folder:
            for name in libraries:
                if f".cpython-{interpreter}-" not in name:
                    yield f"{name} is not of {pythons}"
                yield from (f"{name}: {what}" for what in _linkage(Path(archive.extract(name, folder)), platforms))


def _linkage(library: Path, platforms: str) -> Iterator[str]:
    dynamic = _readelf("-d", library)
    for needed in re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic):
        if needed.partition(".so")[0] not in LIBRARIES and not needed.startswith("ld-linux"):
            yield f"needs {needed}"
    for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*?)\]", dynamic):
        yield f"looks for libraries in {path}"
    if re.search(r"GNU_STACK.*RWE", _readelf("-l", library)):
        yield "asks for an executable stack, which newer systems refuse"
    promised = [tuple(map(int, found)) for found in re.findall(r"manylinux_(\d+)_(\d+)_", platforms)]
    newest = glibc(library)
    if promised and newest > min(promised):
        yield f"needs glibc {'.'.join(map(str, newest))}, newer than its tag says"


def glibc(library: Path) -> tuple[int, ...]:
    """The newest version of glibc's symbols that a library asks for."""
    versions = re.findall(r"GLIBC_(\d+(?:\.\d+)+)", _readelf("-V", library))
    return max((tuple(map(int, version.split("."))) for version in versions), default=(0,))


def _readelf(option: str, library: Path) -> str:
    return subprocess.run(["readelf", "-W", option, library], capture_output=True, text=True, check=True).stdout


def main(arguments: list[str]) -> int:
    wrong = [f"{path}: {what}" for path in arguments for what in defects(Path(path))]
    print("\n".join(wrong) if wrong else f"{len(arguments)} wheels, nothing wrong")
    return 1 if wrong or not arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
