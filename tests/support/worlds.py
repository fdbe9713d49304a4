"""Process groups for tests: starts the processes of a world, and is what each of them runs.

``python worlds.py RANK SIZE STORE FOLDER`` runs every scenario of ``scenarios.py`` whose world this is, in order, and
says after each that it passed. A process that fails stops; the others then fail at their next collective, within
``PATIENCE``.
"""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

#: Of a collective, and of a whole world, in seconds.
PATIENCE, LIFETIME = 60, 300

#: What a process runs, before its arguments.
COMMAND = [__file__]


def start(command: list[str], folder: Path, count: int) -> list[tuple[subprocess.Popen[bytes], Path]]:
    started = []
    for rank in range(count):
        output = folder / f"rank{rank}.txt"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with output.open("wb") as file:
            started.append(
                (
                    subprocess.Popen(
                        [part.replace("RANK", str(rank)) for part in command],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    ),
                    output,
                )
            )
    return started


def run(size: int, folder: Path) -> list[str]:
    """Runs the scenarios of a world; what each process said. Raises AssertionError with everything they said where one
    fails or does not come to an end."""
    store = tempfile.mktemp(dir=folder)
    processes = start([sys.executable, *COMMAND, "RANK", str(size), store, str(folder)], folder, size)
    deadline = time.monotonic() + LIFETIME
    try:
        for process, _ in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()
    said = [output.read_text(errors="replace") for _, output in processes]
    codes = [process.returncode for process, _ in processes]
    everything = "\n".join(f"--- rank {rank}, exit {codes[rank]}\n{text}" for rank, text in enumerate(said))
    assert not any(codes), everything
    return said


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
    )
    scenarios = importlib.import_module("scenarios")
    for more in ("scenarios_modules", "scenarios_packed", "scenarios_zero", "scenarios_flattened"):
        importlib.import_module(more)
    only = os.environ.get("AIM_SCENARIO", "")
    for name, scenario in scenarios.of_world(size).items():
        if only and only not in name:
            continue
        torch.manual_seed(0)
        began = time.monotonic()
        try:
            scenario(Path(sys.argv[4]))
            dist.barrier()
        except BaseException:
            traceback.print_exc()
            print(f"FAILED {name}", flush=True)
            os._exit(1)  # the others learn of it by their patience, not by a wait of ours
        print(f"passed {name} ({time.monotonic() - began:.1f} s)", flush=True)
    gc.collect()  # a process group that outlives its end now and then aborts the exit
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
