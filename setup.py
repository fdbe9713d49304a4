"""Builds ``aim_kernels._C``, and ``aim_kernels._cuda`` where nvcc is found, with ninja: parallel, incremental, without
torch and without a GPU. Metadata stand in pyproject.toml.

``MAX_JOBS`` bounds the compiler processes, ``CXX`` chooses the compiler, ``AIM_KERNELS_CXXFLAGS`` adds flags
(sanitizers). ``AIM_KERNELS_CUDA`` says whether there are to be CUDA kernels: ``auto`` (the default: where nvcc is found
and works), ``0`` (no), ``1`` (or fail). ``NVCC`` and ``CUDA_HOME`` name the compiler or its folder,
``AIM_KERNELS_CUDA_ARCHS`` the architectures ("80;90", or "native": those of this machine's devices),
``AIM_KERNELS_NVCCFLAGS`` adds flags.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_EXTENSION = "aim_kernels._cuda"

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


# No contraction here either; division and square root are IEEE's by nvcc's defaults. -Xptxas -v tells registers and
# spills, which a test reads.
NVCCFLAGS = "-std=c++17 -O3 -fmad=false -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra".split()
CUDA_ARCHS = "80;90"


def find_nvcc() -> Path | None:
    """The nvcc that is named, or the first that is found; pip's packages (the extra cuda-build) come last but one."""
    if named := os.environ.get("NVCC"):
        return Path(named)
    if home := os.environ.get("CUDA_HOME"):
        return Path(home) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        return Path(found)
    folders = [*sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"), reverse=True)]
    candidates = [folder / "nvcc" for folder in [*folders, Path("/usr/local/cuda/bin")]]
    return next((path for path in candidates if path.exists()), None)


def nvcc_version(nvcc: Path) -> str:
    """The release of a compiler that runs; raises OSError or subprocess.CalledProcessError for one that does not."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release [\d.]+, V([\d.]+)", told)
    return match.group(1) if match else "unknown"


def cuda_wish() -> str:
    """AIM_KERNELS_CUDA, checked."""
    wish = os.environ.get("AIM_KERNELS_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"AIM_KERNELS_CUDA={wish!r}: expected auto, 0 or 1")
    return wish


def choose_nvcc() -> tuple[Path | None, str]:
    """The compiler of the CUDA kernels and its version, or None and why there are to be none."""
    wish = cuda_wish()
    if wish == "0":
        return None, "not built, as AIM_KERNELS_CUDA=0 asked"
    nvcc = find_nvcc()
    reason = "not built: no nvcc was found (NVCC, CUDA_HOME, PATH, pip install 'aim-kernels[cuda-build]')"
    if nvcc is not None:
        try:
            return nvcc, nvcc_version(nvcc)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = f"not built: {nvcc} does not run ({type(error).__name__})"
    if wish == "1":
        raise SystemExit(f"AIM_KERNELS_CUDA=1, but {reason}")
    return None, reason


def native_architectures() -> list[str]:
    """Those of this machine's devices, as the driver's tool tells them, or PyTorch where it is installed."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {major + minor for major, minor in re.findall(r"^\s*(\d+)\.(\d+)\s*$", told, re.MULTILINE)}
    except (OSError, subprocess.CalledProcessError):
        found = set()
    if not found:
        try:
            import torch

            capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
            found = {f"{major}{minor}" for major, minor in capabilities}
        except ImportError:
            pass
    if not found:
        raise SystemExit("AIM_KERNELS_CUDA_ARCHS='native', but neither nvidia-smi nor PyTorch finds a device")
    return sorted(found, key=int)


def architectures() -> list[str]:
    """Flags for nvcc: machine code for each architecture, and PTX of the newest for those to come.

    80 to 90 are assembled from one PTX, that of the oldest of them: what nvcc makes for a later one is the same but for
    its name (a test compares them), and the compiler proper, which takes as long as an assembly, runs once.
    """
    wish = os.environ.get("AIM_KERNELS_CUDA_ARCHS", CUDA_ARCHS)
    numbers = native_architectures() if wish == "native" else wish.split(";")
    if not all(number.isdigit() for number in numbers):
        raise SystemExit(f"AIM_KERNELS_CUDA_ARCHS={wish!r}: expected numbers such as {CUDA_ARCHS}, or native")
    alike = [number for number in numbers if 80 <= int(number) <= 90]
    virtual = {number: min(alike, key=int) if number in alike else number for number in numbers}
    flags = [f"-gencode=arch=compute_{virtual[number]},code=sm_{number}" for number in numbers]
    newest = virtual[max(numbers, key=int)]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def sources() -> dict[Path, list[str]]:
    """Every C++ source of this machine's build, with the flags that only it gets."""
    found: dict[Path, list[str]] = {ROOT / "python" / name: [] for name in ("bindings.cpp", "watch.cpp")}
    isas = ISAS_OF.get(platform.machine(), ["scalar"])
    for path in sorted([*(ROOT / "csrc").glob("cpu/*.cpp"), *(ROOT / "csrc").glob("bench/*.cpp")]):
        prefix, _, isa = path.stem.rpartition("_")
        if prefix != "kernels":
            found[path] = []
        elif isa in isas:
            found[path] = ISA_FLAGS[isa]
    return found


def escaped(text: object) -> str:
    """A path or flag as ninja reads it."""
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quoted(text: str) -> str:
    """A string as a macro's value on a command line in ninja."""
    plain = re.sub(r"['\"\\\n]", "", text)
    return escaped(f"'\"{plain}\"'")


class Linked(NamedTuple):
    """An extension: its name, its units with their rules ("compile", "nvcc") and flags of their own, its libraries."""

    name: str
    units: dict[Path, tuple[str, list[str]]]
    libraries: str


class NinjaBuild(build_ext):
    """Writes build.ninja for the extensions and runs it."""

    def run(self) -> None:
        self.nvcc, self.cuda = choose_nvcc()
        if self.nvcc is None:
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA_EXTENSION]
        super().run()

    def build_extensions(self) -> None:
        """All in one run of ninja, so that none waits for another. Where the CUDA kernels do not compile and need not,
        the core is built alone, and says so."""
        if self.nvcc is not None:
            try:
                self.ninja([self.core(), self.kernels()])
                return
            except subprocess.CalledProcessError:
                if cuda_wish() == "1":
                    raise
                self.cuda = (
                    f"not built: {self.nvcc} could not compile the kernels (AIM_KERNELS_CUDA=1 shows its errors)"
                )
                self.nvcc = None
                self.extensions = [ext for ext in self.extensions if ext.name != CUDA_EXTENSION]
        self.ninja([self.core()])

    def core(self) -> Linked:
        told = quoted("built" if self.nvcc else self.cuda)
        own = {ROOT / "python" / "bindings.cpp": [f"-DAIM_CUDA_BUILD={told}"]}
        units = {path: ("compile", own.get(path, extra)) for path, extra in sources().items()}
        return Linked("aim_kernels._C", units, os.environ.get("AIM_KERNELS_CXXFLAGS", ""))

    def kernels(self) -> Linked:
        archs = architectures()
        told = ", ".join(re.findall(r",code=(\w+)", " ".join(archs)))
        macros = [
            "-DAIM_CUDA_MODULE=_cuda",
            f"-DAIM_NVCC_VERSION={quoted(self.cuda)}",
            f"-DAIM_CUDA_ARCHS={quoted(told)}",
        ]
        units = {ROOT / "python" / "bindings_cuda.cpp": ("compile", macros)}
        extra = [*NVCCFLAGS, *archs, *os.environ.get("AIM_KERNELS_NVCCFLAGS", "").split()]
        # The longest first: the last one would be compiled alone.
        units |= dict.fromkeys(sorted((ROOT / "csrc").glob("cuda/*.cu"), reverse=True), ("nvcc", extra))
        return Linked(CUDA_EXTENSION, units, f"{escaped(self.cudart())} -ldl -lrt")

    def cudart(self) -> Path:
        """The static runtime of the compiler: no version of it that has to be found on the user's machine."""
        assert self.nvcc is not None
        # nvcc may be a script or a link: it knows its own folder.
        dry = subprocess.run([self.nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
        match = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
        top = Path(match.group(1).strip()) if match else self.nvcc.resolve().parent.parent
        places = [top / folder / "libcudart_static.a" for folder in ("lib64", "lib", "targets/x86_64-linux/lib")]
        found = next((path for path in places if path.exists()), None)
        if found is None:
            print(f"no libcudart_static.a beside {self.nvcc}", file=sys.stderr)
            raise subprocess.CalledProcessError(1, "nvcc")
        return found

    def ninja(self, extensions: list[Linked]) -> None:
        """Compiles every unit of the extensions and links them."""
        import pybind11

        # Not build_temp: an editable install gets a temporary one, and would compile everything again.
        work = ROOT / "build" / f"objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", ROOT / "csrc" / "include", pybind11.get_include(), sysconfig.get_path("include")]
        flags = [f"-I{escaped(path)}" for path in includes]
        flags += [*map(escaped, CXXFLAGS), *os.environ.get("AIM_KERNELS_CXXFLAGS", "").split()]
        link = ["-shared", "-Wl,-s"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"nvcc = {escaped(self.nvcc or 'nvcc')}",
            f"flags = {' '.join(flags)}",
            f"includes = -I{escaped(ROOT / 'csrc')} -I{escaped(ROOT / 'csrc' / 'include')}",
            "rule compile",
            "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule nvcc",
            "  command = $nvcc -ccbin $cxx $includes $extra -MD -MF $out.d -c $in -o $out > $out.ptxas.txt 2>&1 || "
            "{ cat $out.ptxas.txt; exit 1; }",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
            "rule link",
            f"  command = $cxx $in -o $out {' '.join(link)} $libraries -pthread",
            "  description = link $out",
        ]
        # ninja begins with what stands first, and nvcc takes longest.
        for ext in reversed(extensions):
            objects = []
            for path, (rule, extra) in ext.units.items():
                made = work / (path.relative_to(ROOT).as_posix().replace("/", "_") + ".o")
                lines += [f"build {escaped(made)}: {rule} {escaped(path)}", f"  extra = {' '.join(extra)}"]
                objects.append(escaped(made))
            output = self.output(ext.name)
            output.parent.mkdir(parents=True, exist_ok=True)
            lines += [f"build {escaped(output)}: link {' '.join(objects)}", f"  libraries = {ext.libraries}"]
        script = work / "build.ninja"
        script.write_text("\n".join([*lines, ""]))
        found = shutil.which(
            "ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        )
        command = [found] if found else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([*command, "-C", str(work), *(["-j", jobs] if jobs else [])], check=True)
        for ext in extensions:
            # The stubs live beside the binding and are installed beside the module.
            stubs = ext.name.rpartition(".")[2] + ".pyi"
            shutil.copyfile(ROOT / "python" / stubs, self.output(ext.name).parent / stubs)

    def output(self, name: str) -> Path:
        """Where an extension is linked to."""
        return Path(self.get_ext_fullpath(name)).resolve()

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            stubs = ext.name.rpartition(".")[2] + ".pyi"
            shutil.copyfile(ROOT / "python" / stubs, ROOT / "aim_kernels" / stubs)


setup(
    ext_modules=[Extension("aim_kernels._C", sources=[]), Extension(CUDA_EXTENSION, sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
