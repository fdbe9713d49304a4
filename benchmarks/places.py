"""What the places of states in memory are worth (aim_kernels/step/placement.py): steps with states where torch's blocks
lie and with states at places of their own, interleaved, the same bits.

    python benchmarks/places.py --numel 32 --threads 2

Prints nanoseconds per parameter, medians over rounds, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import aim_kernels as ak
from aim_kernels.step import states

CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, bfloat16 moments": (torch.float32, {"state_dtype": "bfloat16"}),
    "bfloat16, float32 masters": (torch.bfloat16, {"master": "float32"}),
    "all bfloat16": (torch.bfloat16, {"state_dtype": "bfloat16"}),
    "bfloat16 split, 8-bit moments": (torch.bfloat16, {"state_dtype": "int8", "master": "split"}),
}


def built(numel: int, dtype: torch.dtype, options: dict[str, Any], spread: Any) -> ak.AIMFusedOptimizer:
    """An optimizer with AIM's mask that has made its states, with or without places of their own."""
    own, states.spread = states.spread, spread
    try:
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter((0.02 * torch.randn(numel, generator=generator)).to(dtype))
        p.grad = (1e-3 * torch.randn(numel, generator=generator)).to(dtype)
        group = {"params": [p], "modality": "a", "depth": 0, "modulated": True}
        optimizer = ak.AIMFusedOptimizer([group], lr=1e-4, seed=7, **options)
        optimizer.set_modulation(0, step_well=0.7)
        optimizer.step()
    finally:
        states.spread = own
    return optimizer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=32, help="millions of parameters, in one tensor")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    numel = arguments.numel << 20
    for name, (dtype, options) in CASES.items():
        pair = [built(numel, dtype, options, spread) for spread in (lambda p, state: None, states.spread)]
        times: list[list[float]] = [[], []]
        for number in range(arguments.rounds + 2):
            for optimizer, taken in zip(pair, times, strict=True):
                began = time.perf_counter()
                optimizer.step()
                if number >= 2:
                    taken.append(1e9 * (time.perf_counter() - began) / numel)
        ratio = statistics.median(own / usual for usual, own in zip(*times, strict=True))
        usual, own = map(statistics.median, times)
        print(f"{name:30} as they come {usual:.3f}  places of their own {own:.3f}  ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
