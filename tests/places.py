"""Where the step tests run: every backend on this machine's processor, and on a GPU where there is one.

The CUDA kernels run on a processor too: the same sources compiled against a stand-in for the CUDA runtime
(tests/native/cuda_on_cpu), blocks one after the other in shuffled order, the threads of a block as real threads. The
Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "build" / "native"

#: Names of backends; the device ones with small chunks, so that small tensors have several.
PLACES = ("cpu", "reference", "cuda")
DEVICE_PLACES = ("cuda",)

CHUNK, THREADS = 1024, 64


def make(target: str) -> Path:
    """Builds a target of tests/native and returns its path; one process at a time, for tests that run side by side."""
    NATIVE.mkdir(parents=True, exist_ok=True)
    with (NATIVE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["make", "-C", str(ROOT / "tests" / "native"), "-j2", f"BUILD={NATIVE}"]
        command += [f"PYTHON={sys.executable}", str(NATIVE / target)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-4000:]
    return NATIVE / target


@functools.cache
def cuda_on_cpu() -> ModuleType:
    """``aim_kernels._cuda``, with the processor as its device."""
    path = make("cuda_on_cpu.so")
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def enter(place: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes a backend run on CPU tensors; returns its name."""
    if place == "cuda":
        from aim_kernels.backends import cuda

        monkeypatch.setattr(cuda, "_cuda", cuda_on_cpu())
        monkeypatch.setattr(cuda, "THREADS", THREADS)
        monkeypatch.setattr(cuda._Kernels, "CHUNK", CHUNK)
        monkeypatch.setattr(cuda, "unavailable", lambda: "")
        monkeypatch.setattr(cuda, "runs_on", lambda device: True)
        monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    elif place == "triton":
        from aim_kernels.backends import triton

        monkeypatch.setattr(triton._Kernels, "CHUNK", CHUNK)
    return place
