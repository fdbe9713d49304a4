"""``python -m aim_kernels precision``: what fewer bytes cost in training, against float32.

Real trainings, several seeds: coloured digits and smartwatch signals with AIM (the demo's networks), and a small
transformer that reads the descriptions which scikit-learn ships. All configurations of one seed begin with the same
weights and see the same batches. Results are appended to a CSV file as they come; a run that is started again goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.bench.report import append_csv, commit
from aim_kernels.data.common import MissingPackageError, require
from aim_kernels.demo.networks import network_for
from aim_kernels.demo.trainer import DATA, HYPERPARAMETERS, PROBE_SAMPLES
from aim_kernels.modulation import AIM, block_param_groups
from aim_kernels.optimizer import AIMFusedOptimizer
from aim_kernels.rows import ROW
from aim_kernels.states import read_moment

#: Steps of the transformer, and epochs of the others: long enough that losses have settled on their slope.
STEPS, EPOCHS = 600, {"digits": 20, "watch": 6}
CONTEXT, WIDTH, BATCH = 64, 64, 16
SHARE = 0.1  # of the steps, at the end, over which the training loss is averaged


@dataclass(frozen=True)
class Configuration:
    """How parameters and states are stored."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    #: Bytes of weights and optimizer states a parameter, without gradients; of large parameters.
    bytes: float = 0.0


_BF16 = torch.bfloat16
CONFIGURATIONS = {
    c.name: c
    for c in (
        Configuration("fp32", torch.float32, {}, 12),
        Configuration("fp32+bf16n", torch.float32, {"state_dtype": "bfloat16", "rounding": "nearest"}, 8),
        Configuration("fp32+bf16", torch.float32, {"state_dtype": "bfloat16"}, 8),
        Configuration("fp32+int8", torch.float32, {"state_dtype": "int8"}, 6.02),
        Configuration("bf16", _BF16, {}, 10),
        Configuration("bf16 stochastic", _BF16, {"master": "stochastic"}, 10),
        Configuration("bf16 kahan", _BF16, {"master": "kahan"}, 12),
        Configuration("bf16 split", _BF16, {"master": "split"}, 12),
        Configuration("bf16 master", _BF16, {"master": "float32"}, 14),
        Configuration("bf16 split+bf16", _BF16, {"master": "split", "state_dtype": "bfloat16"}, 8),
        Configuration("bf16 split+int8", _BF16, {"master": "split", "state_dtype": "int8"}, 6.02),
        Configuration("bf16 stochastic+int8", _BF16, {"master": "stochastic", "state_dtype": "int8"}, 4.02),
    )
}


@dataclass(frozen=True)
class Line:
    """One training run."""

    commit: str
    torch: str
    task: str
    configuration: str
    seed: int
    steps: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    agreement: float  # share of the elements whose class is that of float32 moments of the same gradients
    jaccard: float  # of the under-optimized elements: those of both over those of either


class Shadow:
    """float32 moments of the gradients that an optimizer sees, to compare classes with. For AdamW, rows of ones."""

    def __init__(self, optimizer: AIMFusedOptimizer) -> None:
        self.optimizer = optimizer
        self.moments = {
            p: (torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32))
            for group in optimizer.param_groups
            for p in group["params"]
        }

    @torch.no_grad()
    def see(self) -> None:
        """Before a step."""
        for group in self.optimizer.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m, v = self.moments[p]
                g = p.grad.float()
                m.mul_(beta1).add_(g * (1 - beta1))
                v.mul_(beta2).add_((g * g) * (1 - beta2))

    @torch.no_grad()
    def compare(self) -> tuple[int, int, int, int]:
        """Of stored moments of fewer bits or more: elements, of equal class, under in both, under in either."""
        counts = [0, 0, 0, 0]
        for number, group in enumerate(self.optimizer.param_groups):
            beta1, beta2 = group["betas"]
            tau = float(self.optimizer.tables.rows[number, ROW["tau_prev"]])
            for p in group["params"]:
                state = self.optimizer.state[p]
                t = float(state["step"])
                slope = tau**2 * (1 - beta1**t) ** 2 / (1 - beta2**t)
                stored = (read_moment(state, "exp_avg"), read_moment(state, "exp_avg_sq"))
                a, b = (m * m >= v * slope for m, v in (stored, self.moments[p]))
                counts[0] += a.numel()
                counts[1] += int((a == b).sum())
                counts[2] += int((a & b).sum())
                counts[3] += int((a | b).sum())
        return counts[0], counts[1], counts[2], counts[3]


class Watcher:
    """Adds up what shadows find, every so many steps."""

    every = 10

    def __init__(self, optimizer: AIMFusedOptimizer, wanted: bool) -> None:
        self.shadow = Shadow(optimizer) if wanted else None
        self.totals = [0, 0, 0, 0]

    def step(self, optimizer: AIMFusedOptimizer, number: int) -> None:
        """A step of the optimizer, watched."""
        if self.shadow is None:
            optimizer.step()
            return
        self.shadow.see()
        optimizer.step()
        if number % self.every == self.every - 1:
            self.totals = [a + b for a, b in zip(self.totals, self.shadow.compare(), strict=True)]

    @property
    def agreement(self) -> float:
        """NaN where nothing was compared."""
        return self.totals[1] / self.totals[0] if self.totals[0] else math.nan

    @property
    def jaccard(self) -> float:
        """The same."""
        return self.totals[2] / self.totals[3] if self.totals[3] else math.nan


# -- multimodal --------------------------------------------------------------------------------------------------------


def multimodal(name: str, configuration: Configuration, seed: int, watched: bool) -> Line:
    """The demo's network. With AIM; where masks are compared, joint training with its thresholds."""
    task, dtype = DATA[name], configuration.dtype
    data = task.make(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network_for(data).to(dtype)
    groups = block_param_groups(model, model.blocks(), weight_decay=HYPERPARAMETERS["weight_decay"])
    optimizer = AIMFusedOptimizer(groups, seed=seed, **HYPERPARAMETERS, **configuration.options)
    cast = lambda inputs: [x.to(dtype) for x in inputs]  # noqa: E731
    batches, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    aim = None if watched else AIM(model, optimizer, data.num_classes, seed=seed)
    watcher, losses, number = Watcher(optimizer, watched), [], 0
    for _ in range(EPOCHS[name]):
        if aim is not None:
            seen, held = (
                split.take(torch.randperm(len(split), generator=draws)[:PROBE_SAMPLES])
                for split in (data.train, data.validation)
            )
            aim.update(cast(seen.inputs), seen.labels, held_out=(cast(held.inputs), held.labels))
        for part in torch.randperm(len(data.train), generator=batches).split(task.batch_size):
            batch = data.train.take(part)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(*cast(batch.inputs)).float(), batch.labels)
            loss.backward()
            watcher.step(optimizer, number)
            losses.append(float(loss))
            number += 1
    optimizer.eval()
    with torch.no_grad():
        logits = torch.cat(
            [model(*(x[i : i + 512] for x in cast(data.test.inputs))) for i in range(0, len(data.test), 512)]
        )
    return _line(name, configuration, seed, losses, logits.float(), data.test.labels, watcher)


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
        losses.append(float(loss))
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


# -- summary -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Of one configuration on one task: paired differences of final losses to float32, with their standard errors."""

    task: str
    configuration: str
    train: float
    train_error: float
    test: float
    test_error: float
    spread: float  # standard error of float32's own final training loss over the seeds

    @property
    def reached(self) -> bool:
        """Final training loss within one standard error of float32's: its own over the seeds, or that of the paired
        difference, whichever is larger."""
        return self.train <= max(self.spread, self.train_error)


def verdicts(lines: Sequence[Line]) -> list[Verdict]:
    """For all that has the seeds of float32."""
    plain = {(x.task, x.configuration, x.seed): x for x in lines if math.isnan(x.agreement)}
    found = []
    for task in TASKS:
        base = {seed: x for (t, c, seed), x in plain.items() if t == task and c == "fp32"}
        for name in CONFIGURATIONS:
            pairs = [(plain[task, name, seed], x) for seed, x in base.items() if (task, name, seed) in plain]
            if name == "fp32" or len(pairs) < 2:
                continue
            train = [a.train_loss - b.train_loss for a, b in pairs]
            test = [a.test_loss - b.test_loss for a, b in pairs]
            found.append(
                Verdict(
                    task,
                    name,
                    statistics.fmean(train),
                    _standard_error(train),
                    statistics.fmean(test),
                    _standard_error(test),
                    _standard_error([x.train_loss for x in base.values()]),
                )
            )
    return found


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def table(lines: Sequence[Line]) -> str:
    """Markdown: differences to float32 by task, and how far the classes agree."""
    by_task = {(v.task, v.configuration): v for v in verdicts(lines)}
    head = "| configuration | bytes | " + " | ".join(f"{task}: loss, held-out loss" for task in TASKS) + " |"
    rows = [head, "|---" * (2 + len(TASKS)) + "|"]
    for name, configuration in CONFIGURATIONS.items():
        cells = []
        for task in TASKS:
            v = by_task.get((task, name))
            if v is None:
                base = [x.train_loss for x in lines if (x.task, x.configuration) == (task, name) and name == "fp32"]
                cells.append(f"{statistics.fmean(base):.4f}" if base else "")
                continue
            mark = "" if v.reached else " !"
            cells.append(f"{v.train:+.4f} ± {v.train_error:.4f}{mark}, {v.test:+.3f} ± {v.test_error:.3f}")
        rows.append(f"| {name} | {configuration.bytes:g} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def masks(lines: Sequence[Line]) -> str:
    """Markdown: agreement of the classes with those of float32 moments of the same gradients."""
    rows = ["| configuration | " + " | ".join(f"{task}: same class, overlap" for task in TASKS) + " |"]
    rows.append("|---" * (1 + len(TASKS)) + "|")
    for name in WATCHED:
        cells = []
        for task in TASKS:
            found = [x for x in lines if (x.task, x.configuration) == (task, name) and not math.isnan(x.agreement)]
            if found:
                agreement = statistics.fmean(x.agreement for x in found)
                overlap = statistics.fmean(x.jaccard for x in found)
                cells.append(f"{100 * agreement:.2f} %, {overlap:.3f}")
            else:
                cells.append("")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(path: Path, lines: Sequence[Line]) -> None:
    """Differences of the final training losses to float32, a panel a task; the band is float32's own standard error."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = verdicts(lines)
    figure, axes = pyplot.subplots(1, len(TASKS), figsize=(4 * len(TASKS), 3.6), sharey=True, layout="constrained")
    names = [name for name in CONFIGURATIONS if name != "fp32"][::-1]
    for axis, task in zip(axes, TASKS, strict=True):
        mine = {v.configuration: v for v in found if v.task == task}
        if mine:
            spread = next(iter(mine.values())).spread
            axis.axvspan(-spread, spread, color="#dddddd", label="standard error of float32")
        for at, name in enumerate(names):
            if name in mine:
                v = mine[name]
                axis.errorbar(v.train, at, xerr=v.train_error, fmt="o", color="#4c72b0" if v.reached else "#c44e52")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(task, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("final training loss minus that of float32 (paired over seeds, ± standard error)", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# -- command -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Line]:
    """What earlier runs left."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(Line)}
        return [Line(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def jobs(arguments: argparse.Namespace, done: Sequence[Line]) -> Iterator[tuple[str, Configuration, int, bool]]:
    """Runs that are still to do: seed by seed, so that every comparison is complete as early as can be."""
    have = {(x.task, x.configuration, x.seed, not math.isnan(x.agreement)) for x in done}
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            for name in arguments.configurations:
                for watched in (False, True) if name in WATCHED and seed < 2 else (False,):
                    if (task, name, seed, watched) not in have:
                        yield task, CONFIGURATIONS[name], seed, watched


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = argparse.ArgumentParser(
        prog="python -m aim_kernels precision", description=(__doc__ or "").partition("\n\n")[0]
    )
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    p.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--threads", type=int, default=1, help="small networks are not faster with more (default: 1)")
    p.add_argument("--out", type=Path, default=Path("build/precision"), help="folder of precision.csv and .png")
    arguments = p.parse_args(argv)
    try:
        for package in ("rich", "matplotlib", "sklearn", "seglearn"):
            require(package, "the comparison")
    except MissingPackageError as error:
        print(error, file=sys.stderr)
        return 1
    from rich.progress import track

    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "precision.csv"
    lines = read(path)
    todo = list(jobs(arguments, lines))
    for task, configuration, seed, watched in track(todo, "trainings"):
        line = TASKS[task](configuration, seed, watched)
        append_csv(path, [line], Line)
        lines.append(line)
    print(table(lines), masks(lines), sep="\n\n")
    plot(arguments.out / "precision.png", lines)
    print(f"\nwritten to {arguments.out}")
    return 0
