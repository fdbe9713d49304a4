"""Training runs: a data set, a contestant and a seed in; accuracies, linear probes and times out."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.experiments import measures
from aim_kernels.experiments.arguments import arguments_of
from aim_kernels.experiments.data import DATA_SETS, MultimodalData, Split
from aim_kernels.experiments.networks import MultimodalNetwork, network_for
from aim_kernels.methods import Method, make_method
from aim_kernels.optim.optimizer import AIMFusedOptimizer

#: AdamW, the same for all methods and data sets.
HYPERPARAMETERS: dict[str, Any] = {"rule": "adamw", "lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 1e-2}
#: Training and held-out samples that a method scores with, drawn anew for every update.
PROBE_SAMPLES = 512
#: "alone:audio": the audio encoder trained by itself.
ALONE = "alone:"


@dataclass(frozen=True)
class Contestant:
    """A method of the registry, and the configurations that it may take.

    Attributes:
        grid: options, the default first.
        optimizer: options of the optimizer that differ from the common ones.
        control: what every method has to beat, rather than a method.
        held_out: also reads labelled validation samples while it trains.
        trains_on_held_out: gets the whole validation split in every update, and as its option ``share`` what that is
            of the training split.
    """

    method: str
    grid: tuple[dict[str, Any], ...] = ({},)
    optimizer: dict[str, Any] = field(default_factory=dict)
    control: bool = False
    held_out: bool = False
    trains_on_held_out: bool = False

    def options(self, choice: int) -> str:
        """One configuration as results.csv records it; empty for a choice that there is not."""
        return json.dumps({**self.optimizer, **self.grid[choice]}) if choice < len(self.grid) else ""


def contestant_of(contestants: Mapping[str, Contestant], name: str) -> Contestant:
    """A contestant by its name, or by that of an encoder trained alone. Raises ValueError for one that is none."""
    if name.startswith(ALONE):
        return Contestant("joint", control=True)
    if name not in contestants:
        raise ValueError(f"unknown contestant {name!r}; it is one of {', '.join(contestants)}")
    return contestants[name]


@dataclass(frozen=True)
class Run:
    """What identifies a training run; equal runs give equal results on one machine.

    ``contestant``: the name that tables show. ``choice``: the number of the configuration in the contestant's grid.
    ``backbone``, ``width``: of :func:`~aim_kernels.experiments.networks.network_for`.
    """

    data: str
    contestant: str
    choice: int
    seed: int
    epochs: int
    backbone: str = "auto"
    width: int = 64
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """What a training run gave. Accuracies, F1 and calibration error in percent; ``probes``: modality to percent.

    ``history``: AIM's tables, one an update (empty for other methods). ``step_ms``, ``update_ms``: medians over epochs,
    measured beside whatever else ran.
    """

    train_samples: int
    test_samples: int
    test: float
    validation: float
    train: float
    f1: float
    calibration: float
    probes: dict[str, float]
    history: list[dict[str, Any]]
    step_ms: float
    update_ms: float
    seconds: float

    @property
    def kappa_mean(self) -> float:
        """Mean strength over updates, modalities and depths; 0 without a history."""
        means = [sum(row) / len(row) for table in self.history for row in table["kappa"].values()]
        return statistics.fmean(means) if means else 0.0

    @property
    def kappa_max(self) -> float:
        """Greatest strength of all; 0 without a history."""
        return max((k for table in self.history for row in table["kappa"].values() for k in row), default=0.0)


def draw(split: Split, count: int, generator: torch.Generator) -> Split:
    """``count`` samples at random (all, in another order, where there are fewer)."""
    index = torch.randperm(len(split), generator=generator)[:count]
    return split.take(index.to(split.labels.device))


def network_of(data: MultimodalData, seed: int, backbone: str = "auto", width: int = 64) -> MultimodalNetwork:
    """The network that all contestants of a seed begin with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network_for(data, backbone, width=width)


def held_out_of(entry: Contestant, data: MultimodalData, generator: torch.Generator) -> Split:
    """The validation samples that a contestant gets in one update."""
    return data.validation if entry.trains_on_held_out else draw(data.validation, PROBE_SAMPLES, generator)


def build(entry: Contestant, choice: int, network: MultimodalNetwork, seed: int, data: MultimodalData) -> Method:
    """A contestant, ready to train on ``data``."""
    blocks = network.as_blocks()
    settings = {**HYPERPARAMETERS, **entry.optimizer}
    optimizer = AIMFusedOptimizer(blocks.param_groups(settings.pop("weight_decay")), seed=seed, **settings)
    arguments = arguments_of(entry.grid[choice])
    if entry.trains_on_held_out:
        arguments["share"] = len(data.validation) / len(data.train)
    return make_method(entry.method, blocks, optimizer, seed=seed, **arguments)


class Alone:
    """One encoder of a network, with a linear head of its own: what its modality is worth by itself.

    ``data``: the same samples, of this modality only.
    """

    def __init__(self, network: MultimodalNetwork, data: MultimodalData, modality: str, seed: int) -> None:
        number = data.modalities.index(modality)
        splits = (Split((split.inputs[number],), split.labels) for split in (data.train, data.validation, data.test))
        self.data = MultimodalData(data.name, (modality,), data.num_classes, *splits)
        encoder = nn.Sequential(*network.blocks()[modality])
        with torch.no_grad():
            width = encoder(self.data.train.inputs[0][:2]).shape[1]
        self.model = nn.Sequential(encoder, nn.Linear(width, data.num_classes).to(data.train.labels.device))
        decayed, plain = ([p for p in self.model.parameters() if (p.dim() > 1) == weights] for weights in (True, False))
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]  # as in joint training
        self.optimizer = AIMFusedOptimizer(groups, seed=seed, **HYPERPARAMETERS)

    def step(self, inputs: Sequence[Tensor], labels: Tensor) -> None:
        """One training step on one batch."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(*inputs), labels).backward()
        self.optimizer.step()

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Nothing: the module holds the weights to be judged."""
        return contextlib.nullcontext()


def train(
    run: Run, entry: Contestant, on_epoch: Callable[[int], None] = lambda epoch: None, draw_seed: int | None = None
) -> Outcome:
    """Train and judge one network.

    The network of the last epoch is judged, with its true weights. The test split is read once, after training. Initial
    weights, batches, scored samples (``draw_seed``; None: one of its own) and modulation have random generators of
    their own, so all contestants of a seed begin with the same weights and see the same batches. The validation split
    is read by methods that take held-out samples, and for tuning; accuracy on it is that of training samples for those
    that train on it.
    """
    began = time.perf_counter()
    task = DATA_SETS[run.data]
    data = task.make(run.seed).to(run.device)
    backbone = task.backbone if run.backbone == "auto" else run.backbone
    network = network_of(data, run.seed, backbone, run.width).to(run.device)
    if task.frozen is not None:
        _freeze(network, data, task.frozen, run)
    draws = torch.Generator().manual_seed(run.seed + 1_000_003 if draw_seed is None else draw_seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)  # for what a method draws without a generator of its own
        if run.contestant.startswith(ALONE):
            alone = Alone(network, data, run.contestant.removeprefix(ALONE), run.seed)
            times = _epochs(run, entry, alone, alone.model, alone.data, draws, on_epoch)
            return _outcome(alone, alone.model, alone.data, times, began)
        method = build(entry, run.choice, network, run.seed, data)
        times = _epochs(run, entry, method, network, data, draws, on_epoch)
        return _outcome(method, network, data, times, began)


def _freeze(network: MultimodalNetwork, data: MultimodalData, modality: str, run: Run) -> None:
    """Trains one encoder alone for a quarter of the epochs, the same for all contestants of a seed, and freezes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        alone = Alone(network, data, modality, run.seed)
        batches = torch.Generator().manual_seed(run.seed)
        for _ in range(-(-run.epochs // 4)):
            index = torch.randperm(len(data.train), generator=batches).to(run.device)
            for part in index.split(DATA_SETS[run.data].batch_size):
                batch = alone.data.train.take(part)
                alone.step(batch.inputs, batch.labels)
    for block in network.blocks()[modality]:
        block.requires_grad_(False)


def _epochs(
    run: Run,
    entry: Contestant,
    method: Method | Alone,
    model: nn.Module,
    data: MultimodalData,
    draws: torch.Generator,
    on_epoch: Callable[[int], None],
) -> tuple[float, float]:
    """Trains; returns the milliseconds of a step and of an update."""
    batches = torch.Generator().manual_seed(run.seed)
    step_ms, update_ms = [], []
    for epoch in range(run.epochs):
        model.train()
        method.optimizer.train()
        if isinstance(method, Method):
            start = time.perf_counter()
            seen, held_out = draw(data.train, PROBE_SAMPLES, draws), held_out_of(entry, data, draws)
            method.update(seen.inputs, seen.labels, held_out=(held_out.inputs, held_out.labels))
            update_ms.append(1e3 * (time.perf_counter() - start))
        index = torch.randperm(len(data.train), generator=batches).to(run.device)
        parts = [data.train.take(part) for part in index.split(DATA_SETS[run.data].batch_size)]
        start = time.perf_counter()
        for batch in parts:
            method.step(batch.inputs, batch.labels)
        if run.device.startswith("cuda"):
            torch.cuda.synchronize(run.device)
        step_ms.append(1e3 * (time.perf_counter() - start) / len(parts))
        on_epoch(epoch)
    return statistics.median(step_ms), statistics.median(update_ms) if update_ms else 0.0


def _outcome(
    method: Method | Alone, model: nn.Module, data: MultimodalData, times: tuple[float, float], began: float
) -> Outcome:
    probes: dict[str, float] = {}
    with method.evaluating():
        model.eval()
        validation, train = (
            measures.accuracy(measures.logits_of(model, split), split.labels) for split in (data.validation, data.train)
        )
        logits, labels = measures.logits_of(model, data.test), data.test.labels
        if isinstance(method, Method):
            probes = dict(zip(data.modalities, measures.linear_probes(method.blocks, data), strict=True))
    return Outcome(
        train_samples=len(data.train),
        test_samples=len(data.test),
        test=measures.accuracy(logits, labels),
        validation=validation,
        train=train,
        f1=measures.macro_f1(logits, labels),
        calibration=measures.calibration_error(logits, labels),
        probes=probes,
        history=[table.to_dict() for table in getattr(getattr(method, "aim", None), "history", ())],
        step_ms=times[0],
        update_ms=times[1],
        seconds=time.perf_counter() - began,
    )
