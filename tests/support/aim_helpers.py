"""A small two-modality network and what the tests of the method share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim import block_param_groups
from aim_kernels.optim.optimizer import AIMFusedOptimizer
from aim_kernels.step.layout import CONTROL, PHASE_COLUMNS, ROW

CLASSES = 3


class Net(nn.Module):
    """Two encoders of two and three blocks, late fusion."""

    def __init__(self, normalization: nn.Module | None = None) -> None:
        super().__init__()
        self.a = nn.Sequential(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
            nn.Sequential(nn.Linear(8, 8), normalization or nn.Dropout(0.5), nn.ReLU()),
        )
        self.b = nn.Sequential(*(nn.Sequential(nn.Linear(8 if d else CLASSES, 8), nn.Tanh()) for d in range(3)))
        self.head = nn.Linear(16, CLASSES)

    def features(self, a: Tensor, b: Tensor) -> list[Tensor]:
        return [self.a(a), self.b(b)]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat(self.features(a, b), 1))


def build(seed: int = 0, **options: Any) -> tuple[Net, AIMFusedOptimizer]:
    torch.manual_seed(seed)
    model = Net(options.pop("normalization", None))
    groups = block_param_groups(model, {"a": list(model.a), "b": list(model.b)})
    return model, AIMFusedOptimizer(groups, lr=1e-2, betas=(0.9, 0.99), seed=seed, **options)


def batch(count: int = 24, seed: int = 0, *, shortcut: bool = True) -> tuple[list[Tensor], Tensor]:
    """Modality b is the label itself (with ``shortcut``) or somebody else's; a shows it noisily."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    a = torch.randn(count, 4, generator=generator)
    a[:, :CLASSES] += 1.5 * nn.functional.one_hot(labels, CLASSES)
    other = labels if shortcut else labels[torch.randperm(count, generator=generator)]
    return [a, nn.functional.one_hot(other, CLASSES).float()], labels


def train(model: Net, optimizer: AIMFusedOptimizer, steps: int, seed: int = 0) -> None:
    inputs, labels = batch(seed=seed)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()


def fixed(*rows: Sequence[float], held_out: Sequence[Sequence[float]] | None = None) -> Any:
    """A probe that returns these rows, and ``held_out`` at every second call."""
    calls = []

    def probe(_model: nn.Module, _inputs: Any, _labels: Any) -> Any:
        calls.append(1)
        return held_out if held_out is not None and len(calls) % 2 == 0 else rows

    return probe


DOMINANT_A = fixed((0.6, 0.8), (0.4, 0.4, 0.4))


def phase_rows(optimizer: AIMFusedOptimizer, modality: str | None, depth: int | None, modulated: bool) -> Any:
    """(true, auxiliary) columns that are not one, of one group."""
    for number, group in enumerate(optimizer.param_groups):
        if (group["modality"], group["depth"], group["modulated"]) == (modality, depth, modulated):
            row = optimizer.tables.rows[number]
            return tuple(
                {c: row[ROW[f"{phase}_{c}"]].item() for c in PHASE_COLUMNS if row[ROW[f"{phase}_{c}"]] != 1.0}
                for phase in ("true", "aux")
            )
    raise AssertionError((modality, depth, modulated))


def probability(optimizer: AIMFusedOptimizer) -> float:
    return optimizer.tables.control[CONTROL["threshold"]].item() / 2**32
