"""More of scenarios.py, for tests of the worlds themselves: no world has them, they are run by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from scenarios import scenario


@scenario()
def agrees(_: Path) -> None:
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == dist.get_world_size()
    print(f"agreed among {dist.get_world_size()}")


@scenario()
def leaves_traces(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    os.environ["LEFT_BEHIND"] = "1"
    (folder / f"process{dist.get_rank()}").write_text(f"{os.getpid()} {torch.randint(1 << 30, ())}")


@scenario()
def finds_no_traces(folder: Path) -> None:
    assert torch.get_default_dtype() == torch.float32 and torch.get_num_threads() == 1
    assert "LEFT_BEHIND" not in os.environ
    (folder / f"process{dist.get_rank()}").write_text(f"{os.getpid()} {torch.randint(1 << 30, ())}")


@scenario()
def fails_on_the_last(_: Path) -> None:
    print(f"rank {dist.get_rank()} is here")
    assert dist.get_rank() < dist.get_world_size() - 1, "on purpose"
    dist.barrier()


@scenario()
def fails_on_all(_: Path) -> None:
    raise KeyError(f"of rank {dist.get_rank()}")


@scenario()
def dies_on_the_last(_: Path) -> None:
    print(f"rank {dist.get_rank()} is here")
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(7)
    dist.barrier()


@scenario()
def hangs_on_the_last(_: Path) -> None:
    print(f"rank {dist.get_rank()} is here")
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(600)
