"""Environment diagnostics, of what is installed and why something is not: the report that ``python -m aim_kernels``
prints.

Every part is gathered on its own, so that whatever is missing or broken (the extension above all) becomes a line of the
report and not a traceback.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

from aim_kernels._native import load

#: Every environment variable that the library or its build reads.
VARIABLES = {
    "AIM_KERNELS_BACKEND": 'backend that `backend="auto"` stands for: cpu, cuda, triton, reference',
    "AIM_KERNELS_CUDA": "whether a build makes the CUDA kernels: auto (where nvcc is found), 0, 1 (or fail)",
    "AIM_KERNELS_CUDA_ARCHS": "compute capabilities that a build makes them for, such as 80;90",
    "AIM_KERNELS_CXXFLAGS": "compiler flags that the build adds",
    "AIM_KERNELS_DATA": "folder with downloaded wheels of data sets; without it aim-kernels in the user's cache",
    "AIM_KERNELS_ISA": "CPU instruction set of the kernels: scalar, avx2, avx512, neon",
    "AIM_KERNELS_NVCCFLAGS": "flags of nvcc that the build adds",
}

Section = dict[str, str]


def environment() -> dict[str, Section]:
    """Gather the report: title of a section -> name -> value, all of them text."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "extension": _guard("_C", _extension),
        "backends": _guard("backends", _backends),
        "variables": _variables(os.environ),
    }


def render(sections: Mapping[str, Mapping[str, str]]) -> str:
    """Lay the sections out as aligned text."""
    width = max((len(name) for section in sections.values() for name in section), default=0)
    lines = []
    for title, section in sections.items():
        lines.append(title)
        lines.extend(f"  {name:<{width}}  {value}" for name, value in section.items())
    return "\n".join(lines)


def _guard(name: str, gather: Callable[[], Section]) -> Section:
    """The section, or the error in its place."""
    try:
        return gather()
    except Exception as error:  # whatever it is, telling it is what the report is for
        return {name: f"not available: {_told(error)}"}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _versions() -> Section:
    section = {"aim_kernels": _version("aim-kernels"), "Python": platform.python_version()}
    packages = ["torch", "numpy", "triton", "matplotlib", "scikit-learn", "seglearn"]
    packages += ["lightning", "transformers", "accelerate", "tensorboard"]
    section.update((package, _version(package)) for package in packages)
    return section


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> Section:
    import torch

    section = {
        "system": platform.platform(),
        "CPU": cpu_model(),
        "cores": f"{len(usable_cores())} usable of {os.cpu_count()}",
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads, which the kernels follow)",
    }
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        section["GPU"] = ", ".join(f"{p.name} (sm_{p.major}{p.minor})" for p in properties)
        section["CUDA"] = f"{torch.version.cuda or torch.version.hip} in torch"
    else:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        section["GPU"] = f"none (torch was built {built})"
    return section


def usable_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_model() -> str:
    """Name of the processor, as the operating system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _extension() -> Section:
    _C, reason = load("_C")
    if _C is None:
        return {
            "_C": f"not built: {reason}",
            "help": "`pip install .` builds it (`make build` in a checkout); it needs a C++17 compiler and python3-dev",
        }
    section = {"_C": str(_C.__file__)}
    # The instruction sets of build_info() follow below, with what this processor makes of them.
    section.update((name, str(value)) for name, value in _C.build_info().items() if name != "isas")
    for name, compiled, supported in _C.isas():
        section[f"isa {name}"] = _isa_state(compiled, supported)
    try:
        section["active isa"] = _C.active_isa()
    except (RuntimeError, ValueError) as error:  # AIM_KERNELS_ISA asks for what cannot be had
        section["active isa"] = f"none: {error}"
    section.update(_cuda_extension())
    return section


def _cuda_extension() -> Section:
    """Whether the CUDA kernels are in this build is told by ``_C``; where and for what, if they are."""
    _cuda, _ = load("_cuda")
    if _cuda is None:
        return {}
    return {"_cuda": str(_cuda.__file__), **{f"_cuda {name}": str(v) for name, v in _cuda.build_info().items()}}


def _isa_state(compiled: bool, supported: bool) -> str:
    if not compiled:
        return "not compiled into this build"
    return "available" if supported else "compiled, but this CPU lacks it"


def _backends() -> Section:
    from aim_kernels.backends import backends

    section = {}
    for name, backend in backends().items():
        fields = backend if isinstance(backend, Mapping) else vars(backend)
        state = "available" if fields["available"] else "not available"
        reason = f": {fields['reason']}" if fields["reason"] else ""
        section[name] = f"{state}, device {fields['device']}{reason}"
    return section


def _variables(environ: Mapping[str, str]) -> Section:
    section = {name: environ.get(name, f"not set ({meaning})") for name, meaning in VARIABLES.items()}
    for name in sorted(environ):
        if name.startswith("AIM_KERNELS_") and name not in VARIABLES:
            section[name] = f"{environ[name]} (unknown: nothing reads it)"
    return section
