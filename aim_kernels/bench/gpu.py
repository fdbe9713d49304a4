"""``python -m aim_kernels bench --device cuda``: the device backends, their peers and the bandwidth of a plain copy.

As on the CPU (``bench/__init__.py``): candidates are checked against a reference first, share their arrays, and are
timed interleaved. A candidate that fails is told of in the results, and the others go on.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aim_kernels.bench import gate, gpu_report, shapes
from aim_kernels.bench.gpu_peers import Peer, peers
from aim_kernels.bench.gpu_report import GpuResult
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

_COPIED = 2**30  # bytes of the copy that measures the bandwidth
_WALL_STEPS = 50
#: What ``--sweep`` tries.
CHUNKS, THREADS = (2048, 4096, 8192, 16384, 65536), (64, 128, 256)


class Clock:
    """Nanoseconds of a call on a device: events on the stream there, the wall clock on a CPU (for dry runs).

    Before every sample the caches are written full, outside of what is timed.
    """

    def __init__(self, device: str) -> None:
        self.on_device = device != "cpu"
        size = 0
        if self.on_device:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush = torch.zeros(size, dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], Any]) -> float:
        self.flush.zero_()
        if not self.on_device:
            before = time.perf_counter_ns()
            call()
            return float(time.perf_counter_ns() - before)
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e6

    def wall(self, call: Callable[[], Any], steps: int) -> float:
        """Mean over steps that follow each other, the host's work included."""
        self.wait()
        before = time.perf_counter_ns()
        for _ in range(steps):
            call()
        self.wait()
        return (time.perf_counter_ns() - before) / steps

    def wait(self) -> None:
        if self.on_device:
            torch.cuda.synchronize()


def interleaved(
    clock: Clock, cases: Mapping[str, Callable[[], Any]], rounds: int, between_rounds: Callable[[], Any]
) -> dict[str, Samples | str]:
    """Every case once a round, in an order drawn anew each round. A case that raises is left out from then on; its
    error stands in the place of its samples."""
    shuffled, alive = random.Random(0), list(cases)
    values: dict[str, list[float]] = {name: [] for name in cases}
    errors: dict[str, str] = {}
    with collection_off():
        for number in range(-2, rounds):
            between_rounds()
            shuffled.shuffle(alive)
            for name in list(alive):
                try:
                    sample = clock.sample(cases[name])
                except Exception as error:  # whatever it is, the others go on
                    errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                    alive.remove(name)
                    continue
                if number >= 0:
                    values[name].append(sample)
    return {name: errors[name] if name in errors else Samples.of(values[name]) for name in cases}


def graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def copy_bandwidth(clock: Clock, device: str, rounds: int = 15) -> float:
    """Bytes a second, read and written, of the best plain copy: this library's kernel or torch's."""
    size = _COPIED if clock.on_device else 2**22
    source, target = (torch.empty(size // 4, device=device).normal_() for _ in range(2))
    cases: dict[str, Callable[[], Any]] = {"torch": lambda: target.copy_(source)}
    if clock.on_device:
        from aim_kernels import _cuda

        stream = torch.cuda.current_stream().cuda_stream
        number = torch.device(device).index or 0
        cases["ours"] = lambda: _cuda.copy_bytes(source.data_ptr(), target.data_ptr(), size, number, stream)
    samples = interleaved(clock, cases, rounds, lambda: None).values()
    return 2 * size / (min(sample.median for sample in samples if isinstance(sample, Samples)) * 1e-9)


def measure(
    shape_set: ShapeSet, dtype: str, chosen: Sequence[Peer], device: str, bandwidth: float, rounds: int | None = None
) -> Iterator[GpuResult]:
    """Times the peers on one set. They must have been verified."""
    clock = Clock(device)
    arrays = Arrays(shape_set, device=device, dtype=DTYPES[dtype])
    rounds = rounds or shape_set.rounds
    cases: dict[tuple[str, str], Callable[[], Any]] = {}
    failed: dict[tuple[str, str], str] = {}
    for peer in chosen:
        for mode in ("eager", "graph") if peer.graph and clock.on_device else ("eager",):
            try:
                step = peer.build(arrays, mode == "graph")
                step()
                cases[peer.name, mode] = graphed(step) if mode == "graph" else step
            except Exception as error:  # told of in the results
                failed[peer.name, mode] = f"{type(error).__name__}: {error}".splitlines()[0]
    keys = {f"{name} {mode}": (name, mode) for name, mode in cases}
    timed = interleaved(clock, {key: cases[keys[key]] for key in keys}, rounds, arrays.stir)
    samples: dict[tuple[str, str], Samples | str] = {keys[key]: value for key, value in timed.items()}
    samples.update(failed)
    if shape_set.numel < 2**26:  # where the host is what is waited for
        for (name, mode), case in cases.items():
            if mode == "eager" and isinstance(samples[name, mode], Samples):
                samples[name, "wall"] = Samples.of([clock.wall(case, _WALL_STEPS) for _ in range(5)])

    bytes_of = {peer.name: peer.bytes for peer in chosen}
    baseline = {mode: sample for (name, mode), sample in samples.items() if name == "torch-fused"}
    for (name, mode), sample in samples.items():
        moved = bytes_of[name] * shape_set.numel
        fused = baseline.get(mode)
        yield gpu_report.result(
            sample, moved, bandwidth, fused if isinstance(fused, Samples) else None,
            set=shape_set.name, dtype=dtype, candidate=name, mode=mode, rounds=rounds, bytes_per_param=bytes_of[name],
        )  # fmt: skip


@contextmanager
def configured(chunk: int, threads: int) -> Iterator[None]:
    """The backends with another chunk and block size."""
    from aim_kernels.backends import cuda, triton

    before = cuda._Kernels.CHUNK, triton._Kernels.CHUNK, cuda.THREADS
    cuda._Kernels.CHUNK = triton._Kernels.CHUNK = chunk
    cuda.THREADS = threads
    try:
        yield
    finally:
        cuda._Kernels.CHUNK, triton._Kernels.CHUNK, cuda.THREADS = before


def sweep(device: str, bandwidth: float, rounds: int) -> Iterator[GpuResult]:
    """The step by chunk and block size."""
    wanted = [peer for peer in peers("float32", device) if peer.name in ("aim", "aim-triton")]
    for name in ("256m", "resnet50"):
        for chunk in CHUNKS:
            for threads in THREADS:
                # Block size is the CUDA kernels' alone.
                chosen = wanted if threads == THREADS[0] else wanted[:1]
                with configured(chunk, threads):
                    for found in measure(SETS[name], "float32", chosen, device, bandwidth, rounds):
                        yield gpu_report.configured(found, chunk, threads if found.candidate == "aim" else 0)


def verified(chosen: Iterable[Peer], dtype: str, device: str) -> Iterator[tuple[Peer, str]]:
    """Every peer with why it must not be timed; empty if it may."""
    for peer in chosen:
        try:
            gate_of(peer, dtype, device)
        except Exception as error:  # a peer that cannot run is told of, too
            yield peer, f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            yield peer, ""


def gate_of(peer: Peer, dtype: str, device: str) -> None:
    """Raises where a peer computes something else than it claims, on a small copy."""
    if dtype == "float32":
        gate.verify([peer.as_candidate()], device)
    elif peer.settings is not None:
        # 16-bit parameters: the true weights and moments are float32 on both sides.
        mine, reference = (Arrays(gate.SMALL, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        from aim_kernels.bench.peers import ours

        step, expected = peer.build(mine, False), ours(peer.settings, "reference")(reference)[0]
        for number in range(gate.STEPS):
            step()
            expected()
            mine.stir()
            reference.stir()
            gate.compare(peer.name, number, mine, reference, kinds=("exp_avg", "exp_avg_sq", "master"))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 1 where one of this library's candidates failed."""
    arguments = parser().parse_args(argv)
    device = arguments.device
    clock = Clock(device)
    bandwidth = copy_bandwidth(clock, device)
    title = gpu_report.device_name(device)
    print(f"{title}: copy {bandwidth / 1e9:.0f} GB/s, read and written", flush=True)
    results: list[GpuResult] = []
    for dtype in arguments.dtypes:
        gated = list(verified(peers(dtype, device), dtype, device))
        for peer, reason in gated:
            if reason:
                print(f"{peer.name} ({dtype}) is not timed: {reason}", flush=True)
                results.append(gpu_report.failure(peer.name, dtype, reason))
        good = [peer for peer, reason in gated if not reason]
        for name in arguments.sets:
            chosen = [peer for peer in good if len(SETS[name].shapes) <= peer.most_tensors]
            lines = list(measure(SETS[name], dtype, chosen, device, bandwidth, arguments.rounds))
            gpu_report.print_table(f"{name}, {dtype}: {SETS[name].note}", lines)
            results += lines
            if clock.on_device:
                torch.cuda.empty_cache()
    print("\ntargets:")
    gpu_report.print_targets(results)
    if arguments.sweep:
        lines = list(sweep(device, bandwidth, arguments.rounds or 7))
        gpu_report.print_table("chunk and block size", lines)
        results += lines
    if arguments.out is not None:
        for path in gpu_report.write(arguments.out, results, title, bandwidth):
            print(f"written: {path}")
    return int(any(line.error and line.candidate.startswith("aim") for line in results))


def parser() -> argparse.ArgumentParser:
    """The options of ``python -m aim_kernels bench --device ...``."""
    p = argparse.ArgumentParser(prog="python -m aim_kernels bench", description=(__doc__ or "").partition("\n\n")[0])
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu is a dry run")
    p.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), metavar="SET", help=", ".join(SETS))
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the parameters")
    p.add_argument("--rounds", type=int, help="samples of every candidate (default: by set)")
    p.add_argument("--sweep", action="store_true", help="also time the kernels by chunk and block size")
    p.add_argument("--out", type=Path, help="folder for gpu-<device>.csv (appended to), .md and .png")
    return p


if __name__ == "__main__":
    sys.exit(main())
