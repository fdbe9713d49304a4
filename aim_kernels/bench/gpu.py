"""``python -m aim_kernels bench --device cuda``: the device backends, their peers and the bandwidth of a plain copy.

As on the CPU (``bench/__init__.py``): candidates are checked against a reference first, share their arrays, and are
timed interleaved. A candidate that fails is told of in the results, and the others go on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from aim_kernels import command_line
from aim_kernels.bench import gate, gpu_report, report, shapes
from aim_kernels.bench.gpu_peers import Peer, peers
from aim_kernels.bench.gpu_report import GpuResult
from aim_kernels.bench.gpu_timing import Clock, Step, copy_bandwidth, graphed, interleaved, told
from aim_kernels.bench.shapes import Arrays, ShapeSet
from aim_kernels.bench.timing import Samples, collection_off

SETS = {
    s.name: s
    for s in (
        ShapeSet("256m", ((16384, 16384),), "one tensor of 256M", rounds=15),
        ShapeSet("vit-l16", shapes.vit_l16(), "ViT-L/16, 296 tensors, 304M", rounds=15),
        ShapeSet("resnet50", shapes.resnet50(), "ResNet-50, 161 tensors, 25.6M", rounds=25),
        ShapeSet("1000x1k", ((1024,),) * 1000, "1000 tensors of 1024", rounds=25),
    )
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

BACKENDS = ("cuda", "triton")

_COPIED = 2**30  # bytes of the copy that measures the bandwidth
_SMALL = 2**26  # parameters; sets up to here are where the host may be what is waited for
#: Two units in the last place of a bfloat16 near one: weights that were rounded to either side of a boundary.
_NARROW = 2.0**-6
#: What ``--sweep`` tries: chunks, block sizes of the CUDA kernels, and elements that a Triton program holds at a time,
#: on these sets.
SWEPT = ("256m", "resnet50")
CHUNKS, THREADS, BLOCKS = (2048, 4096, 8192, 16384, 65536), (64, 128, 256), (256, 512, 1024)


def measure(
    shape_set: ShapeSet,
    dtype: str,
    chosen: Sequence[Peer],
    device: str,
    bandwidth: float,
    rounds: int | None = None,
    modes: Sequence[str] = ("eager", "graph", "wall"),
) -> Iterator[GpuResult]:
    """Times the peers on one set. They must have been verified. What is known is given before the next is measured."""
    clock = Clock(device)
    arrays = Arrays(shape_set, device=device, dtype=DTYPES[dtype])
    rounds = rounds or shape_set.rounds
    cases: dict[tuple[str, str], Step] = {}
    failed: dict[tuple[str, str], Samples | str] = {}
    for peer in chosen:
        for mode in ("eager", "graph") if peer.graph and clock.on_device and "graph" in modes else ("eager",):
            try:
                step = peer.build(arrays, mode == "graph")
                step()
                cases[peer.name, mode] = graphed(step) if mode == "graph" else step
            except Exception as error:  # told of in the results
                failed[peer.name, mode] = told(error)
    keys = {f"{name} {mode}": (name, mode) for name, mode in cases}
    timed = interleaved(clock, {key: cases[keys[key]] for key in keys}, rounds, arrays.stir)
    samples: dict[tuple[str, str], Samples | str] = {keys[key]: value for key, value in timed.items()}
    bytes_of = {peer.name: peer.bytes for peer in chosen}

    def lines(found: dict[tuple[str, str], Samples | str]) -> Iterator[GpuResult]:
        for (name, mode), sample in found.items():
            fused = found.get(("torch-fused", mode))
            size = bytes_of[name]
            yield gpu_report.result(
                sample, size * shape_set.numel, bandwidth, fused if isinstance(fused, Samples) else None,
                set=shape_set.name, dtype=dtype, candidate=name, mode=mode, rounds=rounds, bytes_per_param=size,
            )  # fmt: skip

    yield from lines(samples | failed)
    if "wall" in modes:
        steps = 50 if shape_set.numel < _SMALL else 10
        eager = {name: step for (name, mode), step in cases.items() if mode == "eager"}
        good = {name: step for name, step in eager.items() if isinstance(samples[name, "eager"], Samples)}
        yield from lines({(name, "wall"): sample for name, sample in walled(clock, good, steps).items()})


def walled(clock: Clock, cases: dict[str, Step], steps: int, rounds: int = 5) -> dict[str, Samples | str]:
    """Wall time of a step, the host's work included: the mean of so many that follow each other, once a round."""
    samples: dict[str, Samples | str] = {}
    values: dict[str, list[float]] = {name: [] for name in cases}
    with collection_off():
        for _ in range(rounds):
            for name, step in cases.items():
                try:
                    values[name].append(clock.wall(step, steps))
                except Exception as error:  # told of in the results
                    samples[name] = told(error)
    return {name: samples.get(name) or Samples.of(values[name]) for name in cases}


@contextmanager
def configured(chunk: int, threads: int) -> Iterator[None]:
    """The CUDA kernels with another chunk and block size."""
    from aim_kernels.backends import cuda

    before = cuda._Kernels.CHUNK, cuda.THREADS
    cuda._Kernels.CHUNK, cuda.THREADS = chunk, threads
    try:
        yield
    finally:
        cuda._Kernels.CHUNK, cuda.THREADS = before


@contextmanager
def configured_triton(chunk: int, block: int) -> Iterator[int]:
    """The Triton kernels with another chunk and number of elements a program holds; gives its threads."""
    from aim_kernels.backends import triton
    from aim_kernels.backends.triton import driver

    before = triton._Kernels.CHUNK, driver.BLOCKS["float32"]
    triton._Kernels.CHUNK, driver.BLOCKS["float32"] = chunk, block
    try:
        yield 32 * int(driver.options(block)["num_warps"])
    finally:
        triton._Kernels.CHUNK, driver.BLOCKS["float32"] = before


def sweep(
    names: Sequence[str], chosen: Sequence[Peer], device: str, bandwidth: float, rounds: int
) -> Iterator[GpuResult]:
    """The step by chunk and block size, on these sets, of those among the peers that are "aim" and "aim-triton"."""
    by_name = {peer.name: peer for peer in chosen}

    def time_one(peer: Peer, name: str) -> Iterator[GpuResult]:
        return measure(SETS[name], "float32", [peer], device, bandwidth, rounds, modes=("eager",))

    for name in names:
        for chunk in CHUNKS:
            for threads in THREADS if "aim" in by_name else ():
                with configured(chunk, threads):
                    for line in time_one(by_name["aim"], name):
                        yield gpu_report.configured(line, chunk, threads)
            for block in BLOCKS if "aim-triton" in by_name else ():
                with configured_triton(chunk, block) as threads:
                    for line in time_one(replace(by_name["aim-triton"], name=f"aim-triton-block{block}"), name):
                        yield gpu_report.configured(line, chunk, threads)


def verified(chosen: Iterable[Peer], dtype: str, device: str) -> Iterator[tuple[Peer, str]]:
    """Every peer with why it must not be timed; empty if it may."""
    for peer in chosen:
        try:
            gate_of(peer, dtype, device)
        except Exception as error:  # a peer that cannot run is told of, too
            yield peer, told(error)
        else:
            yield peer, ""


def gate_of(peer: Peer, dtype: str, device: str) -> None:
    """Raises where a peer computes something else than it claims, on a small copy."""
    if dtype == "float32":
        if peer.settings is not None or peer.name.startswith("torch"):
            gate.verify([peer.as_candidate()], device)
        else:
            peer.build(Arrays(gate.SMALL, device=device), False)()
        return
    # 16-bit parameters: the true weights and moments are float32 on both sides, so only what is stored is coarse.
    mine, reference = (Arrays(gate.SMALL, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    step, expected = peer.build(mine, False), peer.reference(reference)
    for number in range(gate.STEPS):
        step()
        if expected is not None:
            expected()
            gate.compare(peer.name, number, mine, reference, arrays=("exp_avg", "exp_avg_sq", "master"))
            for p, q in zip(mine.params, reference.params, strict=True):
                torch.testing.assert_close(p.detach(), q.detach(), rtol=_NARROW, atol=_NARROW)
        mine.stir()
        reference.stir()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 1 where one of this library's candidates failed or a file cannot be written, 2
    for a wrong argument, 130 where it was interrupted."""
    p = parser()
    arguments = p.parse_args(argv)
    if not arguments.device.startswith(("cpu", "cuda")):
        p.refuse("--device", f"{arguments.device!r} is not timed here; use cpu, cuda or cuda:1")
    if arguments.sweep and ("float32" not in arguments.dtypes or not set(SWEPT) & set(arguments.sets)):
        p.refuse("--sweep", f"is of {' and '.join(SWEPT)} in float32; name one of these in --sets and --dtypes")
    return command_line.run(p.prog, lambda: _main(arguments), "Tables that were complete are printed above.")


def _main(arguments: argparse.Namespace) -> int:
    device, began = arguments.device, time.monotonic()
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # events, streams and graphs are of the current one
    title = gpu_report.device_name(device)
    if arguments.out is not None:
        report.check_columns(gpu_report.stem_of(arguments.out, title).with_suffix(".csv"), GpuResult)
    bandwidth = copy_bandwidth(Clock(device), device, _COPIED if device != "cpu" else 2**22)
    print(f"{title}: copy {bandwidth / 1e9:.0f} GB/s, read and written", flush=True)
    record = gpu_report.Record(arguments.out, title, bandwidth)

    def keep(heading: str, lines: Iterable[GpuResult]) -> None:
        """Every line is written as it comes, and a set printed: a run that is cut off has not been for nothing."""
        found = [record.add(line) for line in lines]
        if heading:
            gpu_report.print_table(f"{heading} ({time.monotonic() - began:.0f} s)", found)
        record.show()
        if device != "cpu":
            torch.cuda.empty_cache()

    good: dict[str, list[Peer]] = {}
    for dtype in arguments.dtypes:
        gated = list(verified(of_backends(peers(dtype, device), arguments.backends), dtype, device))
        good[dtype] = [peer for peer, reason in gated if not reason]
        for peer, reason in gated:
            if reason:
                print(f"{peer.name} ({dtype}) is not timed: {reason}", flush=True)
        keep("", [gpu_report.failure(peer.name, dtype, reason) for peer, reason in gated if reason])
        for name in arguments.sets:
            chosen = [peer for peer in good[dtype] if len(SETS[name].shapes) <= peer.most_tensors]
            lines = attempt(measure(SETS[name], dtype, chosen, device, bandwidth, arguments.rounds), name, dtype)
            keep(f"{name}, {dtype}: {SETS[name].note}", lines)
    print("\ntargets:")
    gpu_report.print_targets(record.everything())
    if arguments.sweep:
        swept = [name for name in SWEPT if name in arguments.sets]
        rounds = arguments.rounds or 7
        lines = attempt(sweep(swept, good.get("float32", []), device, bandwidth, rounds), "sweep", "float32")
        keep("chunk and block size", lines)
    if arguments.out is not None:
        print(f"\nwritten to {arguments.out}")
    return int(any(line.error and gpu_report.is_ours(line.candidate) for line in record.lines))


def of_backends(everybody: Iterable[Peer], backends: Sequence[str]) -> list[Peer]:
    """This library's candidates of these backends, and those they are compared with: torch's fused step, and the other
    peers with the CUDA kernels."""

    def is_chosen(peer: Peer) -> bool:
        backend = "triton" if gpu_report.is_ours(peer.name) and peer.name.endswith("-triton") else "cuda"
        return backend in backends or peer.name == "torch-fused"

    return [peer for peer in everybody if is_chosen(peer)]


def attempt(lines: Iterable[GpuResult], name: str, dtype: str) -> Iterator[GpuResult]:
    """What there is of them; an error that ends them is one more line."""
    try:
        yield from lines
    except Exception as error:  # such as no memory for the set
        yield replace(gpu_report.failure("aim", dtype, told(error)), set=name)


def parser() -> command_line.Parser:
    """The options of ``python -m aim_kernels bench --device ...``."""
    p = command_line.Parser("python -m aim_kernels bench", (__doc__ or "").partition("\n\n")[0])
    distinct = command_line.Distinct
    p.add_argument("--device", type=command_line.device, default="cuda", help="cuda, cuda:1, ...; cpu is a dry run")
    p.add_argument(
        "--sets", nargs="+", action=distinct, choices=SETS, default=list(SETS), metavar="SET", help=", ".join(SETS)
    )
    p.add_argument(
        "--dtypes", nargs="+", action=distinct, choices=DTYPES, default=list(DTYPES), help="of the parameters"
    )
    p.add_argument(
        "--backends",
        nargs="+",
        action=distinct,
        choices=BACKENDS,
        default=BACKENDS,
        help="whose kernels are timed (default: all); one that breaks the process takes those of the same run along",
    )
    p.add_argument(
        "--rounds",
        type=command_line.whole(1, command_line.MOST_ROUNDS),
        help="samples of every candidate (default: by set)",
    )
    p.add_argument("--sweep", action="store_true", help="also time the kernels by chunk and block size")
    p.add_argument("--out", type=command_line.folder, help="folder for gpu-<device>.csv (appended to), .md and .png")
    return p


if __name__ == "__main__":
    sys.exit(main())
