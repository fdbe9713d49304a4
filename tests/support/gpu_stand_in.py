"""A stand-in for the Python of a machine with a GPU (GPU_PYTHON), for the targets of the Makefile that run there.

Environment: STAND_IN_CALLS names a file that gets a line of JSON for each call: [arguments, settings of the build].
STAND_IN_FAILS and STAND_IN_HANGS are regular expressions: calls whose arguments match fail, or take a minute.
STAND_IN_MEASURES: `aim_kernels bench` is carried out, on the processor, with few elements and candidates; it is killed
while it times the second set, after the steps and before their wall times, where its arguments match.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = ("AIM_KERNELS_CUDA", "AIM_KERNELS_CUDA_ARCHS", "PYTHONPATH")


def asked(name: str, arguments: list[str]) -> bool:
    pattern = os.environ.get(name)
    return bool(pattern and re.search(pattern, " ".join(arguments)))


def measure(arguments: list[str]) -> int:
    """`python -m aim_kernels bench`, without a GPU."""
    from aim_kernels import bench
    from aim_kernels.bench import gpu, shapes

    gpu.SETS = {name: shapes.ShapeSet(name, ((16, 33), (7,)), "a few elements", rounds=2) for name in gpu.SETS}
    made, walled = gpu.peers, gpu.walled
    some = ("aim", "aim-live-triton", "torch-fused")
    gpu.peers = lambda dtype, device: [peer for peer in made(dtype, device) if peer.name in some]
    begun = []

    def timed(*given: Any) -> Any:
        begun.append(given)
        if len(begun) == 2 and asked("STAND_IN_MEASURES", arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return walled(*given)

    gpu.walled = timed
    own = arguments[arguments.index("bench") + 1 :]
    own[own.index("--device") + 1] = "cpu"
    return bench.main(own)


def main(arguments: list[str]) -> int:
    call = [arguments, {name: os.environ.get(name) for name in SETTINGS}]
    with Path(os.environ["STAND_IN_CALLS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")
    print("called with", *arguments)
    if asked("STAND_IN_HANGS", arguments):
        time.sleep(60)
    if asked("STAND_IN_FAILS", arguments):
        return 3
    if "STAND_IN_MEASURES" in os.environ and "bench" in arguments:
        return measure(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
