"""Time and memory of training with steps in backward (``step_in_backward``) beside the plain loop.

    python benchmarks/release.py --width 1024 --blocks 12 --batch 64 --rounds 15

A stack of residual blocks of two linear layers (4 times as wide inside, as in a transformer). Each loop runs in a
process of its own, in turns; the table has the median time of an iteration, with the 20th and 80th percentile, the most
bytes of gradients that existed at once, and the peak of resident memory above that before the first forward pass.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

import aim_kernels as ak
from aim_kernels import command_line
from aim_kernels.step.layout import RULES

KINDS = ("plain", "released")


class Block(nn.Module):
    """x + W2 gelu(W1 norm(x))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.inside(x)
        return out


def measure(released: bool, arguments: argparse.Namespace) -> dict[str, float | list[float]]:
    """Trains for a while; seconds by iteration and bytes."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    model = nn.Sequential(*[Block(arguments.width) for _ in range(arguments.blocks)])
    optimizer = ak.AIMFusedOptimizer(model.parameters(), rule=arguments.rule, state_dtype=arguments.state_dtype)
    alive = most = 0

    def count(p: torch.Tensor) -> None:
        nonlocal alive, most
        assert p.grad is not None
        alive += p.grad.nbytes
        most = max(most, alive)

    def freed(p: torch.Tensor) -> None:
        nonlocal alive
        alive = 0 if p.grad is None else alive

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    if released:
        ak.step_in_backward(optimizer, model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(freed)
    x = torch.randn(arguments.batch, arguments.width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(arguments.rounds + 2):
        begin = time.perf_counter()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        alive = 0
        times.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"times": times[2:], "gradients": most / 2**20, "peak": peak / 2**10}


def parser() -> command_line.Parser:
    """The command line's options."""
    p = command_line.Parser("python benchmarks/release.py", (__doc__ or "").split("\n", maxsplit=1)[0])
    whole = command_line.whole
    p.add_argument("--width", type=whole(1, 65_536), default=1024, help="features (default: 1024)")
    p.add_argument("--blocks", type=whole(1, 10_000), default=12, help="residual blocks (default: 12)")
    p.add_argument("--batch", type=whole(1, 2**20), default=64, help="rows of input (default: 64)")
    p.add_argument(
        "--rounds",
        type=whole(2, command_line.MOST_ROUNDS),
        default=15,
        help="iterations of a process, after two of warm-up (default: 15)",
    )
    p.add_argument("--turns", type=whole(1, 1000), default=3, help="processes of each kind (default: 3)")
    p.add_argument("--threads", type=whole(1, command_line.MOST_THREADS), default=torch.get_num_threads())
    p.add_argument("--rule", choices=RULES, default="adamw")
    p.add_argument("--state-dtype", choices=("bfloat16", "int8"))
    p.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    return p


def judged(p: command_line.Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, or SystemExit(2)."""
    arguments = p.parse_args(argv)
    try:
        ak.AIMFusedOptimizer(nn.Linear(1, 1).parameters(), rule=arguments.rule, state_dtype=arguments.state_dtype)
    except ValueError as error:
        p.error(f"--rule {arguments.rule}, --state-dtype {arguments.state_dtype}: {error}")
    # Weights, gradients and two moments of float32; what a block keeps of its rows for backward.
    weights, kept = 8 * arguments.width**2 * arguments.blocks, 10 * arguments.width * arguments.batch * arguments.blocks
    p.refuse_beyond_memory("--width (or --blocks, or --batch)", 16.0 * weights + 4.0 * kept)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 2 for a wrong argument, 130 where it was interrupted."""
    p = parser()
    arguments = judged(p, argv)
    return command_line.run(p.prog, lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    if arguments.only:
        print(json.dumps(measure(arguments.only == "released", arguments)))
        return 0
    chosen = {name.replace("_", "-"): value for name, value in vars(arguments).items() if value is not None}
    settings = [f"--{name}={value}" for name, value in chosen.items()]
    found: dict[str, list[dict[str, object]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.turns):
        for kind in KINDS:
            command = [sys.executable, __file__, *settings, "--only", kind]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[kind].append(json.loads(told))
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.blocks} blocks of {arguments.width}")
    print(f"{'':10s} {'ms':>8s} {'20 %':>8s} {'80 %':>8s} {'gradients MiB':>14s} {'peak MiB':>9s}")
    for kind in KINDS:
        times = sorted(1e3 * t for run in found[kind] for t in run["times"])  # type: ignore[attr-defined]
        fifths = statistics.quantiles(times, n=5)
        last = found[kind][-1]
        print(
            f"{kind:10s} {statistics.median(times):8.1f} {fifths[0]:8.1f} {fifths[-1]:8.1f} "
            f"{last['gradients']:14.1f} {last['peak']:9.0f}"
        )
    return 0


if __name__ == "__main__":
    command_line.leave("python benchmarks/release.py", main)
