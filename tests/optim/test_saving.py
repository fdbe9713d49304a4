"""ak.save: a crash while a checkpoint is written loses nothing that was saved before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Gradients, assign, build, parameters_of, same_bits, set_row

import aim_kernels as ak


def stepped() -> ak.AIMFusedOptimizer:
    optimizer = build("adamw")
    set_row(optimizer, 0, "all")
    gradients = Gradients(parameters_of(optimizer))
    for _ in range(2):
        assign(parameters_of(optimizer), gradients())
        optimizer.step()
    return optimizer


def test_what_is_saved_is_what_torch_loads(tmp_path: Path) -> None:
    optimizer, path = stepped(), tmp_path / "run.pt"
    for _ in range(2):  # over a file that is there as well
        ak.save(optimizer.state_dict(), path)
        same_bits(torch.load(path, weights_only=True), optimizer.state_dict())
    assert os.listdir(tmp_path) == ["run.pt"]
    usual = tmp_path / "usual"
    usual.touch()
    assert path.stat().st_mode == usual.stat().st_mode


class Spoiled:
    def __reduce__(self) -> object:
        raise RuntimeError("in the middle of pickling")


def test_an_error_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    ak.save({"epoch": 1}, path)
    with pytest.raises(RuntimeError, match="middle of pickling"):
        ak.save({"weights": torch.ones(100000), "spoiled": Spoiled()}, path)
    assert torch.load(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["run.pt"]


KILLED = """
import os, signal, sys, torch
import aim_kernels as ak
path = sys.argv[1]
ak.save({"epoch": 1}, path)
written = torch.serialization._save
def half(*args, **kwargs):
    written(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
torch.serialization._save = half
ak.save({"epoch": 2, "weights": torch.ones(1000)}, path)
"""


def test_a_killed_process_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    environment = os.environ | {"PYTHONPATH": str(Path(ak.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, path], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(path) == {"epoch": 1}


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ak.save({}, tmp_path / "nowhere" / "run.pt")
