"""Candidates to be timed on a device: both device backends, torch.optim's fused and foreach AdamW, AIM under
torch.compile, and flashoptim where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aim_kernels.bench.eager import CompiledAIM, EagerAIM, Settings
from aim_kernels.bench.peers import LIVE, PLAIN, STEP, Candidate, adopt, ours
from aim_kernels.bench.shapes import Arrays

Step = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """One way to take a step.

    Attributes:
        build: makes the step over arrays; the flag asks for one that a CUDA graph can capture.
        bytes: the fewest a step can move, a parameter: every array it reads or writes once.
        settings: of AIM; None where it is not AIM.
        graph: whether it can be captured.
        most_tensors: sets of more are left out (compiling them takes minutes).
        wide: whether it is a plain step of float32 masters beside 16-bit parameters.
    """

    name: str
    title: str
    build: Callable[[Arrays, bool], Step]
    bytes: int
    settings: Settings | None = None
    graph: bool = False
    most_tensors: int = 10**6
    wide: bool = False

    def reference(self, arrays: Arrays) -> Step | None:
        """What a step over 16-bit parameters is compared with; None where nothing is as exact."""
        if self.wide:
            return _wide_reference(arrays)
        return None if self.settings is None else ours(self.settings, "reference")(arrays)[0]

    def as_candidate(self) -> Candidate:
        """What the gate takes."""
        return Candidate(self.name, self.title, lambda arrays: (self.build(arrays, False), {}), self.settings)


def step_bytes(param: int, *, state: int = 4, master: bool = False) -> int:
    """Bytes of a step a parameter: gradient read, two moments read and written, and either the parameter read and
    written, or a float32 master read and written and the parameter only written."""
    weights = 4 + 4 + param if master else 2 * param
    return param + 4 * state + weights


def peers(dtype: str, device: str) -> list[Peer]:
    """The peers for parameters of ``dtype``; on "cpu" (dry runs) the CPU backend stands in for the device's."""
    backends = {"": "cuda", "-triton": "triton"} if device != "cpu" else {"": "cpu", "-triton": "reference"}
    wide, narrow = step_bytes(4), step_bytes(2, master=True)
    found = []
    if dtype == "float32":
        live = step_bytes(4, master=True)
        for suffix, backend in backends.items():
            found += [
                Peer(f"aim{suffix}", "mask, modulation, statistics", _aim(STEP, backend), wide, STEP, graph=True),
                Peer(f"aim-live{suffix}", "the same, with live weights", _aim(LIVE, backend), live, LIVE, graph=True),
            ]
        found += [
            Peer("aim-plain", "row of ones", _aim(PLAIN, backends[""]), wide, PLAIN),
            Peer("torch-fused", "torch.optim.AdamW(fused=True)", _torch(fused=True), wide, graph=True),
            Peer("torch-foreach", "torch.optim.AdamW(foreach=True)", _torch(foreach=True), wide, graph=True),
            Peer("aim-compiled", "AIM under torch.compile", _written(CompiledAIM), wide, STEP, most_tensors=60),
            Peer("aim-eager", "AIM in tuned eager PyTorch", _written(EagerAIM), wide, STEP, most_tensors=300),
        ]
    else:
        for suffix, backend in backends.items():
            title = "live weights in bfloat16, float32 masters"
            found.append(Peer(f"aim-live{suffix}", title, _aim(LIVE, backend), narrow, LIVE, graph=True))
        stored = step_bytes(2)
        found += [
            Peer("aim", "weights in bfloat16 without masters, float32 moments", _aim(STEP, backends[""]), stored, STEP),
            Peer("aim-plain", "the same, row of ones", _aim(PLAIN, backends[""]), stored, PLAIN),
            Peer(
                "torch-fused",
                "the same masters by fused AdamW and two casts",
                _with_casts,
                narrow,
                graph=True,
                wide=True,
            ),
            Peer("torch-fused-bf16", "fused AdamW, all in bfloat16", _all_narrow, step_bytes(2, state=2)),
        ]
    found.append(Peer("flashoptim", "flashoptim.FlashAdamW", _flash, step_bytes(4 if dtype == "float32" else 2)))
    return found


def _aim(settings: Settings, backend: str) -> Callable[[Arrays, bool], Step]:
    return lambda arrays, capturable: ours(settings, backend)(arrays)[0]


def _options() -> dict[str, Any]:
    return {"lr": PLAIN.lr, "betas": PLAIN.betas, "eps": PLAIN.eps, "weight_decay": PLAIN.weight_decay}


def _torch(**implementation: Any) -> Callable[[Arrays, bool], Step]:
    def build(arrays: Arrays, capturable: bool) -> Step:
        optimizer = torch.optim.AdamW(arrays.params, **_options(), **implementation, capturable=capturable)
        adopt(optimizer, arrays)
        if not (capturable or implementation.get("fused")):
            for p in arrays.params:  # where torch itself keeps it: on the device it would wait for every count
                optimizer.state[p]["step"] = torch.zeros(())
        return optimizer.step

    return build


def _written(peer: type[CompiledAIM] | type[EagerAIM]) -> Callable[[Arrays, bool], Step]:
    return lambda arrays, capturable: peer(arrays.params, arrays.exp_avg, arrays.exp_avg_sq, STEP).step


def _with_casts(arrays: Arrays, capturable: bool) -> Step:
    """Float32 masters as they are commonly kept: cast gradients up, step, cast weights down."""
    masters = [torch.nn.Parameter(master) for master in arrays.master]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = torch.optim.AdamW(masters, **_options(), fused=True, capturable=capturable)
    for number, master in enumerate(masters):
        state = {"step": torch.zeros((), device=master.device), "exp_avg": arrays.exp_avg[number]}
        optimizer.state[master].update(state | {"exp_avg_sq": arrays.exp_avg_sq[number]})
    wide: list[Tensor] = [grad for master in masters if (grad := master.grad) is not None]
    weights: list[Tensor] = list(arrays.params)
    wide_weights: list[Tensor] = list(masters)

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_(wide, arrays.grads)
        optimizer.step()
        torch._foreach_copy_(weights, wide_weights)

    return step


def _wide_reference(arrays: Arrays) -> Step:
    masters = [torch.nn.Parameter(master) for master in arrays.master]
    aim = EagerAIM(list(masters), arrays.exp_avg, arrays.exp_avg_sq, PLAIN)

    @torch.no_grad()
    def step() -> None:
        for master, grad in zip(masters, arrays.grads, strict=True):
            master.grad = grad.float()
        aim.step()
        for param, master in zip(arrays.params, masters, strict=True):
            param.copy_(master)

    return step


def _all_narrow(arrays: Arrays, capturable: bool) -> Step:
    optimizer = torch.optim.AdamW(arrays.params, **_options(), fused=True)
    optimizer.step()  # makes its own states, in the parameters' type
    return optimizer.step


def _flash(arrays: Arrays, capturable: bool) -> Step:
    try:
        module = importlib.import_module("flashoptim")
    except ImportError as error:
        raise RuntimeError("flashoptim is not installed") from error
    copies = [torch.nn.Parameter(p.detach().clone()) for p in arrays.params]
    grads: list[Tensor] = arrays.grads
    for copy, grad in zip(copies, grads, strict=True):
        copy.grad = grad
    step: Step = module.FlashAdamW(copies, **_options()).step
    return step
