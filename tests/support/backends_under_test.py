"""Backends that the step tests run over: each on this machine's processor, and on a GPU where there is one.

The CUDA kernels run on a processor too: the same sources compiled against a stand-in for the CUDA runtime
(tests/native/cuda_on_cpu), blocks one after the other in shuffled order, the threads of a block as real threads. The
Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import helpers
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "build" / "native"

#: Environment variable of processes for which everything is built.
BUILT = "AIM_TESTS_ARE_BUILT"

#: Backends on the processor; the device ones with small chunks, so that small tensors have several.
EMULATED = ("cuda", "triton")
#: Backends on a GPU: `make gpu`.
ON_GPU = ("cuda@gpu", "triton@gpu")

DEVICE_BACKENDS = (*EMULATED, *(pytest.param(backend, marks=pytest.mark.gpu) for backend in ON_GPU))
BACKENDS = ("cpu", "reference", *DEVICE_BACKENDS)

CHUNK, THREADS = 1024, 64


def make(target: str) -> Path:
    """Builds a target of tests/native and returns its path; one process at a time, for tests that run side by side.

    Processes that a test has started after it built what they need do not wait for what others build.
    """
    if BUILT in os.environ:
        return NATIVE / target
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


def enter(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes a backend run, on CPU tensors or on a GPU; returns its name. Parameters that helpers.py makes from then on
    are on the device."""
    name, _, device = backend.partition("@")
    if name in ("cuda", "triton"):
        module = importlib.import_module(f"aim_kernels.backends.{name}")
        monkeypatch.setattr(module._Kernels, "CHUNK", CHUNK)
    if device:
        assert torch.cuda.is_available(), "PyTorch finds no GPU"
        monkeypatch.setattr(helpers, "DEVICE", "cuda")
    elif name == "cuda":
        monkeypatch.setattr(module, "_cuda", cuda_on_cpu())
        monkeypatch.setattr(module, "THREADS", THREADS)
        monkeypatch.setattr(module, "unavailable", lambda: "")
        monkeypatch.setattr(module, "runs_on", lambda device: True)
        monkeypatch.setattr(module, "_stream", lambda device: 0)
    return name
