"""Candidates to be timed: this library's optimizer, torch.optim's, and AIM written in PyTorch, on the same arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aim_kernels.bench.eager import CompiledAIM, EagerAIM, Settings
from aim_kernels.bench.shapes import Arrays, ShapeSet
from aim_kernels.optim.optimizer import AIMFusedOptimizer

PLAIN = Settings()
#: The class and the count decide the step of every element.
STEP = replace(PLAIN, step=(1.0, 0.5))
#: Live weights in addition.
LIVE = replace(STEP, live=(1.0, 0.5))
#: The row of ``set_strength(0.5)``: live weights, and gradients by the class of the old moments.
CHAIN = replace(PLAIN, grad=(1.0, 0.5), live=(1.0, 0.5))

States = Mapping[Tensor, Mapping[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """One way to take a step.

    ``reads_and_writes`` is in bytes a float32 parameter and names the floor; ``settings`` is None where it is not AIM.
    """

    name: str
    title: str
    build: Callable[[Arrays], tuple[Callable[[], Any], States]]
    settings: Settings | None = None
    reads_and_writes: int = 28
    most_tensors: int | None = None  # sets of more are left out

    def skips(self, shape_set: ShapeSet) -> str:
        """Why the set is left out; empty if it is not."""
        if self.most_tensors is not None and len(shape_set.shapes) > self.most_tensors:
            return (
                f"{self.name}: not on {shape_set.name}, more than {self.most_tensors} tensors take minutes to compile"
            )
        return ""


def adopt(optimizer: torch.optim.Optimizer, arrays: Arrays, master: bool = False) -> None:
    """Point the optimizer's states at the common arrays."""
    for i, param in enumerate(arrays.params):
        state = {"exp_avg": arrays.exp_avg[i], "exp_avg_sq": arrays.exp_avg_sq[i]}
        state["step"] = torch.zeros((), device=param.device)
        if master:
            state["master"] = arrays.master[i]
        optimizer.state[param].update(state)


def ours(settings: Settings, backend: str = "auto") -> Callable[[Arrays], tuple[Callable[[], Any], States]]:
    def build(arrays: Arrays) -> tuple[Callable[[], Any], States]:
        s = settings
        modulated = s.modulation() != PLAIN.modulation()
        optimizer = AIMFusedOptimizer(
            [{"params": arrays.params, "modulated": modulated}],
            lr=s.lr,
            betas=s.betas,
            eps=s.eps,
            weight_decay=s.weight_decay,
            under_optimized=("fraction", s.target),
            threshold_rate=s.rate,
            backend=backend,
        )
        live = s.live != PLAIN.live
        adopt(optimizer, arrays, master=live)
        if modulated:
            optimizer.set_modulation(0, **s.modulation())
        return optimizer.step, optimizer.state

    return build


def _torch(**options: bool) -> Callable[[Arrays], tuple[Callable[[], Any], States]]:
    def build(arrays: Arrays) -> tuple[Callable[[], Any], States]:
        s = PLAIN
        optimizer = torch.optim.AdamW(
            arrays.params, lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, **options
        )
        adopt(optimizer, arrays)
        return optimizer.step, optimizer.state

    return build


def _written(peer: type[EagerAIM] | type[CompiledAIM], settings: Settings) -> Callable[..., Any]:
    def build(arrays: Arrays) -> tuple[Callable[[], Any], States]:
        master = arrays.master if settings.live != PLAIN.live else None
        aim = peer(arrays.params, arrays.exp_avg, arrays.exp_avg_sq, settings, master)
        return aim.step, aim.state

    return build


CANDIDATES = {
    c.name: c
    for c in (
        Candidate("aim", "AIMFusedOptimizer, mask + modulation + count", ours(STEP), STEP),
        Candidate("aim-live", "the same, writing live weights", ours(LIVE), LIVE, reads_and_writes=32),
        Candidate("aim-chain", "the same, gradients modulated too", ours(CHAIN), CHAIN, reads_and_writes=32),
        Candidate("aim-plain", "AIMFusedOptimizer, row of ones", ours(PLAIN), PLAIN),
        Candidate("torch-fused", "torch.optim.AdamW(fused=True)", _torch(fused=True)),
        Candidate("torch-foreach", "torch.optim.AdamW(foreach=True)", _torch(foreach=True)),
        Candidate("aim-eager", "AIM in tuned eager PyTorch", _written(EagerAIM, STEP), STEP),
        Candidate("aim-compiled", "AIM under torch.compile", _written(CompiledAIM, STEP), STEP, most_tensors=200),
    )
}


def state_bytes(states: States, params: Sequence[Tensor]) -> float:
    """Bytes of optimizer state per parameter, step counts included."""
    total = sum(t.nbytes for p in params for t in states[p].values() if isinstance(t, Tensor))
    return total / sum(p.numel() for p in params)
