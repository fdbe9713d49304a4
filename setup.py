"""Builds ``aim_kernels._C`` with ninja: parallel, incremental, without torch. Metadata stand in pyproject.toml.

``MAX_JOBS`` bounds the compiler processes, ``CXX`` chooses the compiler, ``AIM_KERNELS_CXXFLAGS`` adds flags
(sanitizers).
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Rounding is part of the contract: no contraction into FMA, no fast-math. Processor-specific instructions are
# confined to the kernels_<isa>.cpp units and chosen at run time, so one build serves every processor.
CXXFLAGS = "-std=c++17 -O3 -fPIC -DNDEBUG -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra".split()
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    # GCC 12 warns inside its own headers (undefined pass-through operands of AVX-512 intrinsics).
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 "
    "-Wno-maybe-uninitialized -Wno-uninitialized".split(),
    "neon": [],
}
ISAS_OF = {
    "x86_64": ["scalar", "avx2", "avx512"],
    "aarch64": ["scalar", "neon"],
    "arm64": ["scalar", "neon"],
}


def sources() -> dict[Path, list[str]]:
    """Every C++ source of this machine's build, with the flags that only it gets."""
    found: dict[Path, list[str]] = {ROOT / "python" / "bindings.cpp": []}
    isas = ISAS_OF.get(platform.machine(), ["scalar"])
    for path in sorted((ROOT / "csrc").glob("cpu/*.cpp")):
        prefix, _, isa = path.stem.rpartition("_")
        if prefix != "kernels":
            found[path] = []
        elif isa in isas:
            found[path] = ISA_FLAGS[isa]
    return found


def escaped(text: object) -> str:
    """A path or flag as ninja reads it."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes build.ninja for the extension and runs it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not build_temp: an editable install gets a temporary one, and would compile everything again.
        work = ROOT / "build" / f"objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", ROOT / "csrc" / "include", pybind11.get_include(), sysconfig.get_path("include")]
        flags = [*CXXFLAGS, *(f"-I{path}" for path in includes), *os.environ.get("AIM_KERNELS_CXXFLAGS", "").split()]
        link = ["-shared", "-Wl,-s"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"flags = {' '.join(escaped(flag) for flag in flags)}",
            "rule compile",
            "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            f"  command = $cxx $in -o $out {' '.join(link)} {os.environ.get('AIM_KERNELS_CXXFLAGS', '')} -pthread",
            "  description = link $out",
        ]
        objects = []
        for path, extra in sources().items():
            name = work / (path.relative_to(ROOT).as_posix().replace("/", "_") + ".o")
            lines += [f"build {escaped(name)}: compile {escaped(path)}", f"  extra = {' '.join(extra)}"]
            objects.append(escaped(name))
        lines += [f"build {escaped(output)}: link {' '.join(objects)}", f"default {escaped(output)}", ""]
        (work / "build.ninja").write_text("\n".join(lines))
        ninja = shutil.which(
            "ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        )
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([*command, "-C", str(work), *(["-j", jobs] if jobs else [])], check=True)
        # The stubs live beside the binding and are installed beside the module.
        shutil.copyfile(ROOT / "python" / "_C.pyi", output.parent / "_C.pyi")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        shutil.copyfile(ROOT / "python" / "_C.pyi", ROOT / "aim_kernels" / "_C.pyi")


setup(ext_modules=[Extension("aim_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
