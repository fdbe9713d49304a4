"""One training run of the comparison: a data set, a contestant, a seed."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from aim_kernels.bench.report import commit
from aim_kernels.experiments.arguments import arguments_of
from aim_kernels.experiments.compare import measures
from aim_kernels.experiments.compare.contestants import ALONE, Contestant, contestant
from aim_kernels.experiments.data import DATA_SETS, MultimodalData, Split
from aim_kernels.experiments.networks import MultimodalNetwork, network_for
from aim_kernels.methods import Method, make_method
from aim_kernels.optim.optimizer import AIMFusedOptimizer

#: AdamW, the same for all methods and data sets.
HYPERPARAMETERS: dict[str, Any] = {"rule": "adamw", "lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 1e-2}
#: Training and held-out samples that a method scores with, drawn anew for every update.
PROBE_SAMPLES = 512


@dataclass(frozen=True)
class Run:
    """What identifies a training run; equal runs give equal results on one machine.

    ``choice``: the number of the configuration in the contestant's grid. ``backbone``, ``width``: of
    :func:`~aim_kernels.experiments.networks.network_for`.
    """

    data: str
    contestant: str
    choice: int
    seed: int
    epochs: int
    backbone: str = "auto"
    width: int = 64


@dataclass(frozen=True)
class Line:
    """One line of results.csv. Accuracies, F1 and calibration error in percent; ``probes``: JSON, modality to percent.

    ``step_ms`` was measured beside whatever else ran; ``compare --cost`` measures time and memory by themselves.
    """

    commit: str
    date: str
    torch: str
    data: str
    contestant: str
    choice: int
    options: str
    seed: int
    epochs: int
    backbone: str
    width: int
    train_samples: int
    test_samples: int
    test: float
    validation: float
    train: float
    f1: float
    calibration: float
    probes: str
    kappa_mean: float
    kappa_max: float
    step_ms: float
    update_ms: float
    seconds: float

    @property
    def run(self) -> Run:
        return Run(self.data, self.contestant, self.choice, self.seed, self.epochs, self.backbone, self.width)


def draw(split: Split, count: int, generator: torch.Generator) -> Split:
    """``count`` samples at random (all, in another order, where there are fewer)."""
    index = torch.randperm(len(split), generator=generator)[:count]
    return split.take(index.to(split.labels.device))


def network_of(data: MultimodalData, seed: int, backbone: str = "auto", width: int = 64) -> MultimodalNetwork:
    """The network that all contestants of a seed begin with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network_for(data, backbone, width=width)


def build(entry: Contestant, choice: int, network: MultimodalNetwork, seed: int) -> Method:
    """A contestant, ready to train."""
    blocks = network.as_blocks()
    settings = {**HYPERPARAMETERS, **entry.optimizer}
    optimizer = AIMFusedOptimizer(blocks.param_groups(settings.pop("weight_decay")), seed=seed, **settings)
    return make_method(entry.method, blocks, optimizer, seed=seed, **arguments_of(entry.grid[choice]))


def train(run: Run, on_epoch: Callable[[int], None] = lambda epoch: None) -> tuple[Line, list[dict[str, Any]]]:
    """Train and judge one network; returns its line, and AIM's history (empty for other methods).

    The network of the last epoch is judged. The test split is read once, after training. Initial weights, batches and
    modulation have random generators of their own, so all contestants of a seed begin with the same weights and see the
    same batches. The validation split is read by methods that take held-out samples, and for tuning.
    """
    began = time.perf_counter()
    entry, task = contestant(run.contestant), DATA_SETS[run.data]
    data = task.make(run.seed)
    network = network_of(data, run.seed, run.backbone, run.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)  # for what a method draws without a generator of its own
        if run.contestant.startswith(ALONE):
            line = _train_alone(run, data, network, on_epoch)
            history: list[dict[str, Any]] = []
        else:
            line, history = _train_together(run, entry, data, network, on_epoch)
    fixed: dict[str, Any] = {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "data": run.data,
        "contestant": run.contestant,
        "choice": run.choice,
        "options": entry.options(run.choice),
        "seed": run.seed,
        "epochs": run.epochs,
        "backbone": run.backbone,
        "width": run.width,
        "train_samples": len(data.train),
        "test_samples": len(data.test),
        "seconds": time.perf_counter() - began,
    }
    return Line(**fixed, **line), history


def _batches(run: Run, data: MultimodalData, generator: torch.Generator) -> list[Split]:
    size = DATA_SETS[run.data].batch_size
    return [data.train.take(part) for part in torch.randperm(len(data.train), generator=generator).split(size)]


def _judged(model: Any, data: MultimodalData) -> dict[str, float]:
    found = {
        name: measures.accuracy(measures.logits_of(model, split), split.labels)
        for name, split in (("validation", data.validation), ("train", data.train))
    }
    logits, labels = measures.logits_of(model, data.test), data.test.labels
    return found | {
        "test": measures.accuracy(logits, labels),
        "f1": measures.macro_f1(logits, labels),
        "calibration": measures.calibration_error(logits, labels),
    }


def _train_together(
    run: Run,
    entry: Contestant,
    data: MultimodalData,
    network: MultimodalNetwork,
    on_epoch: Callable[[int], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    method = build(entry, run.choice, network, run.seed)
    batches, draws = torch.Generator().manual_seed(run.seed), torch.Generator().manual_seed(run.seed + 1_000_003)
    step_ms, update_ms = [], []
    for epoch in range(run.epochs):
        network.train()
        method.optimizer.train()
        start = time.perf_counter()
        seen, held_out = draw(data.train, PROBE_SAMPLES, draws), draw(data.validation, PROBE_SAMPLES, draws)
        method.update(seen.inputs, seen.labels, held_out=(held_out.inputs, held_out.labels))
        update_ms.append(1e3 * (time.perf_counter() - start))
        parts = _batches(run, data, batches)
        start = time.perf_counter()
        for batch in parts:
            method.step(batch.inputs, batch.labels)
        step_ms.append(1e3 * (time.perf_counter() - start) / len(parts))
        on_epoch(epoch)
    with method.evaluating():
        network.eval()
        line: dict[str, Any] = _judged(network, data)
        probes = measures.linear_probes(method.blocks, data)
    history = [table.to_dict() for table in getattr(getattr(method, "aim", None), "history", ())]
    means = [sum(row) / len(row) for table in history for row in table["kappa"].values()]
    line |= {
        "probes": json.dumps(dict(zip(data.modalities, (round(p, 4) for p in probes), strict=True))),
        "kappa_mean": statistics.fmean(means) if means else 0.0,
        "kappa_max": max((k for table in history for row in table["kappa"].values() for k in row), default=0.0),
        "step_ms": statistics.median(step_ms),
        "update_ms": statistics.median(update_ms),
    }
    return line, history


def _train_alone(
    run: Run, data: MultimodalData, network: MultimodalNetwork, on_epoch: Callable[[int], None]
) -> dict[str, Any]:
    """One encoder of the network, with a linear head of its own: what its modality is worth by itself."""
    number = data.modalities.index(run.contestant.removeprefix(ALONE))
    encoder = nn.Sequential(*network.blocks()[data.modalities[number]])
    with torch.no_grad():
        width = encoder(data.train.inputs[number][:2]).shape[1]
    model = nn.Sequential(encoder, nn.Linear(width, data.num_classes))
    decayed, plain = ([p for p in model.parameters() if (p.dim() > 1) == weights] for weights in (True, False))
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]  # as in joint training
    optimizer = AIMFusedOptimizer(groups, seed=run.seed, **HYPERPARAMETERS)
    batches = torch.Generator().manual_seed(run.seed)
    step_ms = []
    for epoch in range(run.epochs):
        model.train()
        parts = _batches(run, data, batches)
        start = time.perf_counter()
        for batch in parts:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch.inputs[number]), batch.labels).backward()
            optimizer.step()
        step_ms.append(1e3 * (time.perf_counter() - start) / len(parts))
        on_epoch(epoch)
    model.eval()
    own = MultimodalData(
        data.name,
        (data.modalities[number],),
        data.num_classes,
        *(Split((split.inputs[number],), split.labels) for split in (data.train, data.validation, data.test)),
    )
    return {
        **_judged(model, own),
        "probes": json.dumps({}),
        "kappa_mean": 0.0,
        "kappa_max": 0.0,
        "step_ms": statistics.median(step_ms),
        "update_ms": 0.0,
    }
