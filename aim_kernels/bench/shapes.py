"""Problems to be stepped: the benchmark's sets of tensors, and the arrays that all candidates share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from aim_kernels.optim.optimizer import AIMFusedOptimizer
from aim_kernels.step import layout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeSet:
    """One set of parameter shapes, and how often it is timed."""

    name: str
    shapes: tuple[Shape, ...]
    note: str
    rounds: int = 15
    repeats: int = 1  # steps inside one sample; more than one also means an untimed step first, so the set is warm

    @property
    def numel(self) -> int:
        return sum(map(prod, self.shapes))


def vit_b16() -> tuple[Shape, ...]:
    """ViT-B/16 with 1000 classes, in torchvision's order: 152 tensors, 86,567,656 parameters."""
    return _vit(768, 3072, 12)


def _vit(width: int, hidden: int, depth: int) -> tuple[Shape, ...]:
    tokens = 197
    block: list[Shape] = [
        *[(width,)] * 2,  # ln_1
        *[(3 * width, width), (3 * width,), (width, width), (width,)],  # attention: in_proj, out_proj
        *[(width,)] * 2,  # ln_2
        *[(hidden, width), (hidden,), (width, hidden), (width,)],  # mlp
    ]
    stem: list[Shape] = [(1, 1, width), (1, tokens, width), (width, 3, 16, 16), (width,)]
    return (*stem, *block * depth, (width,), (width,), (1000, width), (1000,))


def resnet18() -> tuple[Shape, ...]:
    """ResNet-18 with 1000 classes, in torchvision's order: 62 tensors, 11,689,512 parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            for source in (inputs, width):
                shapes += [(width, source, 3, 3), (width,), (width,)]
            if block == 0 and inputs != width:
                shapes += [(width, inputs, 1, 1), (width,), (width,)]
            inputs = width
    return (*shapes, (1000, 512), (1000,))


def vit_l16() -> tuple[Shape, ...]:
    """ViT-L/16 with 1000 classes, in torchvision's order: 296 tensors, 304,326,632 parameters."""
    return _vit(1024, 4096, 24)


def resnet50() -> tuple[Shape, ...]:
    """ResNet-50 with 1000 classes, in torchvision's order: 161 tensors, 25,557,032 parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for outputs, source, size in ((width, inputs, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(outputs, source, size, size), (outputs,), (outputs,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return (*shapes, (1000, 2048), (1000,))


SETS = {
    s.name: s
    for s in (
        ShapeSet("64m", ((8192, 8192),), "one tensor of 64M"),
        ShapeSet("vit-b16", vit_b16(), "ViT-B/16, 152 tensors, 86.6M"),
        ShapeSet("resnet18", resnet18(), "ResNet-18, 62 tensors, 11.7M", rounds=31),
        ShapeSet("1000x1k", ((1024,),) * 1000, "1000 tensors of 1024", rounds=31, repeats=3),
        ShapeSet("l3-256k", ((256, 256),) * 4, "4 tensors of 64k, 4 MiB: stays in L3", rounds=41, repeats=20),
    )
}


_SHIFT, _SHIFTS = 97, 64  # gradients are windows of one random pool, moved on by _SHIFT elements a round


class Arrays:
    """Parameters, gradients and states of one set.

    Every candidate works on these same arrays: page placement alone moves a ratio by more than the candidates differ.
    The states are those that AIMFusedOptimizer allocates (those of small tensors lie in common buffers).
    """

    def __init__(
        self, shape_set: ShapeSet, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.shape_set = shape_set
        self.params = [torch.nn.Parameter(randn(*shape)) for shape in shape_set.shapes]
        largest = max(p.numel() for p in self.params)
        self._pool = randn(largest + _SHIFT * _SHIFTS)
        self._round = 0
        self.stir()
        owner = AIMFusedOptimizer(self.params, lr=0.0)
        owner.set_modulation(0, live_well=0.5)
        owner.step()
        self.exp_avg = [owner.state[p]["exp_avg"] for p in self.params]
        self.exp_avg_sq = [owner.state[p]["exp_avg_sq"] for p in self.params]
        self.master = [owner.state[p]["master"] for p in self.params]
        for moment in (*self.exp_avg, *self.exp_avg_sq):
            moment.zero_()

    @property
    def numel(self) -> int:
        return self.shape_set.numel

    @property
    def grads(self) -> list[torch.Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    @torch.no_grad()
    def stir(self) -> None:
        """Give every parameter another gradient, in place: moments never settle, and both classes stay populated."""
        start = self._round % _SHIFTS * _SHIFT
        self._round += 1
        for param in self.params:
            values = self._pool[start : start + param.numel()].view_as(param)
            if param.grad is None:
                param.grad = values.clone()
            else:
                param.grad.copy_(values)

    def table(self) -> np.ndarray[Any, Any]:
        """The set as a table of ``layout.TENSOR_RECORD``, masters included (for the floor's streams)."""
        table = np.zeros(len(self.params), layout.TENSOR_RECORD)
        columns: dict[str, Sequence[torch.Tensor]] = {
            "param": self.params,
            "grad": self.grads,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "master": self.master,
        }
        for name, tensors in columns.items():
            table[name] = [t.data_ptr() for t in tensors]
        table["numel"] = [p.numel() for p in self.params]
        table["first"] = np.cumsum(table["numel"]) - table["numel"]
        table["dtype"] = layout.DTYPES.index("float32")
        return table
