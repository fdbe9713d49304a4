"""The trainings: the demo's two data sets with AIM, and a small transformer over text."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib import resources

import torch
from torch import Tensor, nn

from aim_kernels.aim import AIM, block_param_groups
from aim_kernels.bench.report import commit
from aim_kernels.experiments.data import DATA_SETS, Split
from aim_kernels.experiments.measures import logits_of
from aim_kernels.experiments.precision.configurations import Configuration, Line
from aim_kernels.experiments.precision.masks import Watcher
from aim_kernels.experiments.runs import HYPERPARAMETERS, PROBE_SAMPLES, draw, network_of
from aim_kernels.optim.optimizer import AIMFusedOptimizer

#: Steps of the transformer, and epochs of the others: long enough that losses have settled on their slope.
STEPS, EPOCHS = 600, {"digits": 20, "watch": 6}
CONTEXT, WIDTH, BATCH = 64, 64, 16
SHARE = 0.1  # of the steps, at the end, over which the training loss is averaged


def multimodal(name: str, configuration: Configuration, seed: int, watched: bool) -> Line:
    """The demo's network. With AIM; where masks are compared, joint training with its thresholds."""
    task, dtype = DATA_SETS[name], configuration.dtype
    data = task.make(seed)
    model = network_of(data, seed).to(dtype)
    groups = model.as_blocks().param_groups(HYPERPARAMETERS["weight_decay"])
    optimizer = AIMFusedOptimizer(groups, seed=seed, **HYPERPARAMETERS, **configuration.options)
    batches, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    aim = None if watched else AIM(model, optimizer, data.num_classes, rule="gap", seed=seed)
    watcher, losses, number = Watcher(optimizer, watched), [], 0

    def cast(split: Split) -> Split:
        return Split(tuple(x.to(dtype) for x in split.inputs), split.labels)

    for _ in range(EPOCHS[name]):
        if aim is not None:
            seen, held = (cast(draw(split, PROBE_SAMPLES, draws)) for split in (data.train, data.validation))
            aim.update(seen.inputs, seen.labels, held_out=(held.inputs, held.labels))
        for part in torch.randperm(len(data.train), generator=batches).split(task.batch_size):
            batch = cast(data.train.take(part))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(*batch.inputs).float(), batch.labels)
            loss.backward()
            watcher.step(optimizer, number)
            losses.append(loss.item())
            number += 1
    optimizer.eval()
    logits = logits_of(model, cast(data.test)).float()
    return _line(name, configuration, seed, losses, logits, data.test.labels, watcher)


def _line(
    task: str,
    configuration: Configuration,
    seed: int,
    losses: list[float],
    logits: Tensor,
    labels: Tensor,
    watcher: Watcher,
) -> Line:
    return Line(
        commit=commit(),
        torch=torch.__version__,
        task=task,
        configuration=configuration.name,
        seed=seed,
        steps=len(losses),
        train_loss=statistics.fmean(losses[-max(round(SHARE * len(losses)), 1) :]),
        test_loss=float(nn.functional.cross_entropy(logits, labels)),
        test_accuracy=100.0 * float((logits.argmax(-1) == labels).float().mean()),
        agreement=watcher.agreement,
        jaccard=watcher.jaccard,
    )


# -- text --------------------------------------------------------------------------------------------------------------


def text() -> Tensor:
    """The bytes of scikit-learn's data set descriptions, in the order of their names; int64 [n]."""
    folder = resources.files("sklearn.datasets.descr")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".rst")), key=lambda f: f.name)
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()


class Reader(nn.Module):
    """A causal transformer of two layers over the bytes of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, CONTEXT] to logits [B, CONTEXT, 256]."""
        x = self.token(tokens) + self.place
        for layer in self.layers:
            x = layer(x, src_mask=self.mask.to(x.dtype), is_causal=True)
        return self.head(x)


def reading(configuration: Configuration, seed: int, watched: bool) -> Line:
    """The transformer, its layers as blocks; the last tenth of the text is held out."""
    data = text()
    cut = len(data) * 9 // 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Reader().to(configuration.dtype)
    groups = block_param_groups(model, {"text": list(model.layers)}, weight_decay=1e-2)
    optimizer = AIMFusedOptimizer(groups, lr=2e-3, betas=(0.9, 0.999), seed=seed, **configuration.options)
    if not watched:  # under-optimized elements go ahead of the others
        for number, group in enumerate(optimizer.param_groups):
            if group["modulated"]:
                optimizer.set_modulation(number, step_well=0.8)
    draw = torch.Generator().manual_seed(seed)
    windows = torch.arange(CONTEXT + 1)
    watcher, losses = Watcher(optimizer, watched), []
    for number in range(STEPS):
        begins = torch.randint(cut - CONTEXT - 1, (BATCH, 1), generator=draw)
        batch = data[begins + windows]
        optimizer.zero_grad()
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        watcher.step(optimizer, number)
        losses.append(loss.item())
    optimizer.eval()
    held = data[cut:]
    held = held[: len(held) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)[:128]
    with torch.no_grad():
        logits = model(held[:, :-1]).float()
    return _line("text", configuration, seed, losses, logits.flatten(0, 1), held[:, 1:].flatten(), watcher)


TASKS: dict[str, Callable[[Configuration, int, bool], Line]] = {
    "digits": lambda c, seed, watched: multimodal("digits", c, seed, watched),
    "watch": lambda c, seed, watched: multimodal("watch", c, seed, watched),
    "text": reading,
}
#: What masks are compared for.
WATCHED = ("fp32", "fp32+bf16n", "fp32+bf16", "fp32+int8")
