"""One training run of the demo: data set, method and seed in; accuracies, linear probes and times out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from aim_kernels.aim import AIM, block_param_groups
from aim_kernels.experiments.data import DATA_SETS, MultimodalData, Split
from aim_kernels.experiments.demo.networks import network_for
from aim_kernels.experiments.networks import MultimodalNetwork
from aim_kernels.methods.controls import DropFeatures
from aim_kernels.methods.ogm import OGM
from aim_kernels.optim.optimizer import AIMFusedOptimizer

#: The data sets of the demo.
DATA = {name: DATA_SETS[name] for name in ("digits", "watch")}
#: Option of the command line to the runs it stands for; OGM-GE is run with three values of its alpha.
METHODS: dict[str, tuple[str, ...]] = {
    "joint": ("joint",),
    "ogm-ge": ("ogm-ge 0.5", "ogm-ge 1", "ogm-ge 2"),
    "aim": ("aim",),
    "drop": ("drop",),
}
#: AdamW, the same for all methods and data sets.
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 1e-2}
PROBE_SAMPLES = 512  # training and held-out samples that AIM scores with, drawn anew for every update


@dataclass(frozen=True)
class Run:
    """What identifies a training run; equal runs give equal results on one machine."""

    data: str
    method: str
    seed: int
    epochs: int
    device: str = "cpu"


def _draw(split: Split, count: int, generator: torch.Generator) -> Split:
    index = torch.randperm(len(split), generator=generator)[:count]
    return split.take(index.to(split.labels.device))


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the split, in percent, whose class the model names."""
    correct = sum(
        int((model(*(x[i : i + 512] for x in split.inputs)).argmax(1) == split.labels[i : i + 512]).sum())
        for i in range(0, len(split), 512)
    )
    return 100.0 * correct / len(split)


@torch.no_grad()
def linear_probes(model: MultimodalNetwork, data: MultimodalData) -> list[float]:
    """Test accuracy, in percent, of a ridge classifier on each encoder's frozen features, fitted on training."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def features(split: Split) -> list[Any]:
        return [z.cpu().double().numpy() for z in model.features(*split.inputs)]

    train, test = data.train.labels.cpu().numpy(), data.test.labels.cpu().numpy()
    found = []
    for fitted, held in zip(features(data.train), features(data.test), strict=True):
        probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=1.0)).fit(fitted, train)
        found.append(100.0 * probe.score(held, test))
    return found


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def train(
    run: Run, on_epoch: Callable[[int], None] = lambda epoch: None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train and judge one network; returns a row for results.csv and AIM's history (empty for other methods).

    The network of the last epoch is judged, with its true weights; the validation split is used by nothing but AIM's
    probe. Initialization, batches and modulation have random generators of their own, so methods are compared on the
    same initial weights and batches, and AIM without a dominant modality is joint training bit for bit.
    """
    task = DATA[run.data]
    data = task.make(run.seed).to(run.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = network_for(data).to(run.device)
    groups = block_param_groups(model, model.blocks(), weight_decay=HYPERPARAMETERS["weight_decay"])
    optimizer = AIMFusedOptimizer(groups, rule="adamw", seed=run.seed, **HYPERPARAMETERS)
    batches, draws = torch.Generator().manual_seed(run.seed), torch.Generator().manual_seed(run.seed)

    aim: AIM | None = None
    ogm: OGM | None = None
    if run.method == "aim":
        aim = AIM(model, optimizer, data.num_classes, rule="gap", seed=run.seed)
    elif run.method == "drop":
        aim = AIM(model, optimizer, data.num_classes, rule="gap", mixing=DropFeatures(), seed=run.seed)
    elif run.method.startswith("ogm-ge "):
        ogm = OGM(model.as_blocks(), optimizer, alpha=float(run.method.split()[-1]), noise=1.0)
    elif run.method != "joint":
        raise ValueError(
            f"unknown method {run.method!r}; it is one of {[name for names in METHODS.values() for name in names]}"
        )

    step_ms, update_ms = [], []
    for epoch in range(run.epochs):
        model.train()
        optimizer.train()
        if aim is not None:
            start = time.perf_counter()
            seen, held_out = _draw(data.train, PROBE_SAMPLES, draws), _draw(data.validation, PROBE_SAMPLES, draws)
            aim.update(seen.inputs, seen.labels, held_out=(held_out.inputs, held_out.labels))
            update_ms.append(1e3 * (time.perf_counter() - start))
        index = torch.randperm(len(data.train), generator=batches).split(task.batch_size)
        start = time.perf_counter()
        for part in index:
            _step(model, optimizer, data.train.take(part.to(run.device)), ogm)
        _synchronize(run.device)
        step_ms.append(1e3 * (time.perf_counter() - start) / len(index))
        on_epoch(epoch)

    optimizer.eval()
    model.eval()
    probes = linear_probes(model, data)
    history = [] if aim is None else [table.to_dict() for table in aim.history]
    kappas = [k for table in history for row in table["kappa"].values() for k in row]
    row = {
        "data": run.data,
        "method": run.method,
        "seed": run.seed,
        "epochs": run.epochs,
        "device": run.device,
        "test": accuracy(model, data.test),
        "validation": accuracy(model, data.validation),
        "train": accuracy(model, data.train),
        "probe_0": probes[0],
        "probe_1": probes[1],
        "step_ms": statistics.median(step_ms),
        "update_ms": statistics.median(update_ms) if update_ms else 0.0,
        "kappa_max": max(kappas, default=0.0),
    }
    return row, history


def _step(model: MultimodalNetwork, optimizer: AIMFusedOptimizer, batch: Split, ogm: OGM | None) -> None:
    if ogm is not None:
        ogm.step(batch.inputs, batch.labels)
        return
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(*batch.inputs), batch.labels).backward()
    optimizer.step()
