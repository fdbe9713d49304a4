"""``python -m aim_kernels bench``: this machine's table of the kernels, their peers and the memory floor.

A run first checks every candidate against a reference and stops at the first element that differs. It then times all
candidates and the plain memory streams of the same bytes, interleaved, in this process and on the same arrays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from aim_kernels import command_line
from aim_kernels.bench import floor, report, timing
from aim_kernels.bench.gate import WrongResultError, verify
from aim_kernels.bench.peers import CANDIDATES, Candidate, state_bytes
from aim_kernels.bench.shapes import SETS, Arrays, ShapeSet


def measure(
    shape_set: ShapeSet, candidates: Sequence[Candidate], rounds: int | None = None, gap: float = 0.0
) -> list[report.Result]:
    """Time the candidates and their floors on one set. They must have been verified."""
    arrays = Arrays(shape_set)
    chosen = [c for c in candidates if not c.skips(shape_set)]
    rounds = rounds or shape_set.rounds
    cases: dict[str, Callable[[], Any]] = {}
    states: dict[str, float] = {}
    for candidate in chosen:
        step, state = candidate.build(arrays)
        step()
        cases[candidate.name] = step
        states[candidate.name] = state_bytes(state, arrays.params)
    floors = floor.streams(arrays, {c.reads_and_writes for c in chosen})
    samples = timing.interleaved(cases | floors, rounds, shape_set.repeats, arrays.stir, gap)

    best = floor.best(samples)
    fused = samples["torch-fused"].median if "torch-fused" in samples else float("nan")
    shared = report.circumstances() | {"set": shape_set.name, "rounds": rounds}
    lines = [(c.name, samples[c.name], c.reads_and_writes, states[c.name]) for c in chosen]
    lines += [(name, sample, size, 0.0) for size, (name, sample) in best.items()]
    return [
        report.Result(
            **shared,
            candidate=name,
            median_ns_per_param=sample.median / arrays.numel,
            p20=sample.quantile(0.2) / arrays.numel,
            p80=sample.quantile(0.8) / arrays.numel,
            step_ms=sample.median / 1e6,
            bytes_per_param=size,
            state_bytes_per_param=state,
            ratio_to_floor=sample.median / best[size][1].median,
            ratio_to_torch_fused=sample.median / fused,
        )
        for name, sample, size, state in lines
    ]


PROG = "python -m aim_kernels bench"
#: What each mode uses of the options; the others are refused, since nobody would see that they did nothing.
USED = {
    "bytes": ("bytes", "numel", "rounds", "threads", "out"),
    "memory": ("memory", "out"),
    "": ("sets", "candidates", "rounds", "threads", "gap", "out"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 1 where a candidate computes something else than it claims, or a file cannot be
    written, 2 for a wrong argument, 130 where it was interrupted."""
    if command_line.given(argv, "--device"):
        from aim_kernels.bench import gpu

        return gpu.main(argv)
    p = parser()
    arguments = p.parse_args(argv)
    mode = "memory" if arguments.memory else "bytes" if arguments.bytes else ""
    if arguments.memory and arguments.bytes:
        p.refuse("--bytes", "is another table than --memory; give one of them")
    p.refuse_unused(arguments, f"with --{mode}" if mode else "without --bytes", USED[mode])
    if mode == "bytes":
        from aim_kernels.bench import packed

        command_line.filled(arguments, numel=packed.MILLIONS)
        p.refuse_beyond_memory("--numel", packed.bytes_of(arguments.numel << 20))
    return command_line.run(PROG, lambda: _main(mode, arguments), "Tables that were complete are printed above.")


def _main(mode: str, arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    if mode == "memory":
        from aim_kernels.bench import memory

        return memory.main(arguments)
    if mode == "bytes":
        from aim_kernels.bench import packed

        return packed.main(arguments)
    command_line.filled(arguments, sets=list(SETS), candidates=list(CANDIDATES), gap=0.0)
    if arguments.out is not None:
        report.check_columns(arguments.out / "results.csv")
    candidates = [CANDIDATES[name] for name in arguments.candidates]
    try:
        verify(candidates)
    except WrongResultError as error:
        print(f"no times: {error}", file=sys.stderr)
        return 1
    shared = report.circumstances()
    title = report.title_of(shared)
    print(f"{title}; all candidates verified, {shared['commit']}", flush=True)
    results: list[report.Result] = []
    for name in arguments.sets:
        shape_set = SETS[name]
        for reason in filter(None, (c.skips(shape_set) for c in candidates)):
            print(reason)
        lines = measure(shape_set, candidates, arguments.rounds, arguments.gap / 1e3)
        report.print_table(f"{name}: {shape_set.note}", lines)
        sys.stdout.flush()
        results += lines
        if arguments.out is not None:  # at once: a run that is cut off has not been for nothing
            report.append_csv(command_line.make_folder(arguments.out) / "results.csv", lines)
    print("\ntargets:")
    report.print_targets(results)
    if arguments.out is not None:
        if not report.plot(arguments.out / "results.png", results, title):
            print("no chart: matplotlib is not installed")
        print(f"written to {arguments.out}")
    return 0


def parser() -> command_line.Parser:
    """The options of ``python -m aim_kernels bench``. None stands for the default, so that :func:`main` can tell."""
    p = command_line.Parser(PROG, (__doc__ or "").partition("\n\n")[0])
    p.add_argument("--device", help="time the device backends there instead: `bench --device cuda --help`")
    p.add_argument("--sets", nargs="+", action=command_line.Distinct, choices=SETS, metavar="SET", help=", ".join(SETS))
    p.add_argument(
        "--candidates",
        nargs="+",
        action=command_line.Distinct,
        choices=CANDIDATES,
        metavar="NAME",
        help=", ".join(f"{c.name} ({c.title})" for c in CANDIDATES.values()),
    )
    p.add_argument("--bytes", action="store_true", help="time the configurations that keep fewer bytes instead")
    p.add_argument("--memory", action="store_true", help="measure what optimizers keep, and peak at, instead")
    p.add_argument(
        "--numel",
        type=command_line.whole(1, 4096),
        help="of --bytes: millions (2^20) of elements (default: 32)",
    )
    p.add_argument(
        "--rounds",
        type=command_line.whole(1, command_line.MOST_ROUNDS),
        help="samples of every candidate (default: by set)",
    )
    p.add_argument(
        "--threads", type=command_line.whole(1, command_line.MOST_THREADS), help="default: torch.get_num_threads()"
    )
    p.add_argument(
        "--gap",
        type=command_line.real(0.0, command_line.MOST_GAP),
        help="idle milliseconds before every sample (default: 0)",
    )
    p.add_argument("--out", type=command_line.folder, help="folder for results.csv (appended to) and results.png")
    return p
