"""Small made-up problems on which methods can go wrong: shortcuts of every strength, honest modalities of every kind,
and what networks of this field have (BatchNorm, convolutions, frozen encoders, SGD, late starts, few samples).

    python benchmarks/problems.py --methods joint aim --seeds 30-33 --out problems.csv
    python benchmarks/problems.py --unshifted --seeds 60-65 --out unshifted.csv
    python benchmarks/problems.py --report problems.csv

``--unshifted``: held-out samples are like the training ones, and the methods are those that need no shift.

Modality 0 is honest. Of a shortcut problem the others carry the label in training, and held-out and test samples show
them at random (or less often). Told are accuracies (of unbalanced classes: balanced; of regression: R2) on test samples
like the held-out ones and on samples like the training ones, in percent.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels.bench.report import commit

VIEW, LATENT, WIDTH = 20, 8, 32
FIELDS = ("commit", "torch", "problem", "method", "seed", "test", "like", "held_honest", "held_others", "seconds")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "joint": ("joint", {}),
    "aim": ("aim", {}),
    "aim (own losses)": ("aim", {"unimodal_weight": 0.3}),
    "aim (gap)": ("aim", {"rule": "gap"}),
    "aim (trial)": ("aim", {"rule": "trial"}),
    "own losses": ("sum-of-losses", {"unimodal_weight": 0.3}),
    "train-on-held": ("train-on-held", {}),
    "modality-dropout": ("modality-dropout", {}),
    "best-subset": ("best-subset", {}),
}
#: AIM without held-out samples, as the paper reads, but gentle and in two passes.
GENTLE: dict[str, Any] = {"rule": "ratio", "alpha": 1.0, "mixing": "split"}
WITHOUT_SHIFT: dict[str, tuple[str, dict[str, Any]]] = {
    "joint": ("joint", {}),
    "aim": ("aim", {}),
    "own losses": METHODS["own losses"],
    "split, alpha 1": ("aim", GENTLE),
    "split, alpha 3": ("aim", {**GENTLE, "alpha": 3.0}),
    "split, own losses": ("aim", {**GENTLE, "unimodal_weight": 0.3}),
    "alternate, alpha 1": ("aim", {**GENTLE, "mixing": "alternate"}),
    "modality-dropout": METHODS["modality-dropout"],
    "modality-dropout 0.15": ("modality-dropout", {"probability": 0.15}),
}


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        cue: how often the other modalities carry the label in training; None: they are honest, too.
        cue_outside: how often outside of it; None: at random.
        noise: of the honest modality's latent variable, and of the others'.
        samples: of training, held out, and of each test set.
        prior: shares of the classes; None: equal.
        normalization: "none", "batch", "group" or "layer".
        frozen: number of the encoder that is trained alone beforehand and then frozen.
        starts: epoch of the first update.
        shifted: whether held-out samples are like those of the test; else like those of training.
    """

    cue: float | None = None
    cue_outside: float | None = None
    noise: tuple[float, float] = (1.1, 0.3)
    others: int = 1
    classes: int = 4
    samples: tuple[int, int, int] = (800, 400, 2000)
    prior: tuple[float, ...] | None = None
    wrong_labels: float = 0.0
    regression: bool = False
    normalization: str = "none"
    convolutions: bool = False
    frozen: int | None = None
    starts: int = 0
    epochs: int = 20
    rule: str = "adamw"
    shifted: bool = True


PROBLEMS: dict[str, Problem] = {
    **{f"cue {cue:.0%}": Problem(cue=cue) for cue in (0.6, 0.8, 0.95, 1.0)},
    **{
        f"cue {cue:.0%}, {kind} normalization": Problem(cue=cue, normalization=kind)
        for cue in (0.95, 1.0)
        for kind in ("batch", "group", "layer")
    },
    **{
        f"cue {cue:.0%}, convolutions, {kind} normalization": Problem(cue=cue, normalization=kind, convolutions=True)
        for cue in (0.95, 1.0)
        for kind in ("batch", "group")
    },
    "cue 95%, 60% outside": Problem(cue=0.95, cue_outside=0.6),
    "two cues 95%": Problem(cue=0.95, others=2),
    "cue 95%, late": Problem(cue=0.95, starts=5),
    "cue 100%, late": Problem(cue=1.0, starts=5),
    "cue 95%, its encoder frozen": Problem(cue=0.95, frozen=1),
    "cue 95%, honest encoder frozen": Problem(cue=0.95, frozen=0),
    "cue 95%, 50 held out": Problem(cue=0.95, samples=(800, 50, 2000)),
    "cue 95%, SGD": Problem(cue=0.95, rule="sgd"),
    "cue 95%, 5 epochs": Problem(cue=0.95, epochs=5),
    "cue 95%, ten classes": Problem(cue=0.95, classes=10, noise=(0.9, 0.3)),
    "regression, cue 95%": Problem(cue=0.95, regression=True, noise=(0.6, 0.3)),
    "a strong and a weak one": Problem(noise=(1.4, 0.8)),
    "two alike": Problem(noise=(1.4, 1.4)),
    "three alike": Problem(noise=(1.8, 1.8), others=2),
    "two alike, batch normalization": Problem(noise=(1.4, 1.4), normalization="batch"),
    "a weak one, batch normalization": Problem(noise=(1.1, 2.5), normalization="batch"),
    "200 samples": Problem(noise=(1.6, 1.4), samples=(200, 400, 2000)),
    "ten classes": Problem(noise=(1.4, 1.4), classes=10),
    "20% wrong labels, 40 epochs": Problem(noise=(1.4, 1.1), wrong_labels=0.2, epochs=40),
    "classes 90/10": Problem(noise=(1.6, 1.6), classes=2, prior=(0.9, 0.1)),
    "one only noise": Problem(noise=(1.1, 30.0)),
    "an honest encoder frozen": Problem(noise=(1.4, 1.1), frozen=1),
    "regression, both honest": Problem(regression=True, noise=(0.6, 0.8)),
}


UNSHIFTED: dict[str, Problem] = {
    f"{name}, no shift": replace(problem, shifted=False)
    for name, problem in {
        "one under-used": Problem(noise=(1.0, 1.4)),
        **{
            name: PROBLEMS[name]
            for name in (
                "a strong and a weak one",
                "two alike",
                "three alike",
                "two alike, batch normalization",
                "a weak one, batch normalization",
                "200 samples",
                "ten classes",
                "20% wrong labels, 40 epochs",
                "classes 90/10",
                "one only noise",
                "cue 80%",
                "cue 95%",
            )
        },
        "classes 70/10/10/10": Problem(noise=(1.4, 1.4), prior=(0.7, 0.1, 0.1, 0.1)),
    }.items()
}


class Samples(NamedTuple):
    """Inputs, one per modality, and labels."""

    inputs: list[Tensor]
    labels: Tensor

    def take(self, index: Tensor) -> Samples:
        """Those of these numbers."""
        return Samples([x[index] for x in self.inputs], self.labels[index])


def views(count: int, generator: torch.Generator) -> list[Callable[[Tensor], Tensor]]:
    """Fixed maps from latent variables ``[B, 8]`` to inputs ``[B, 20]``."""
    found: list[Callable[[Tensor], Tensor]] = []
    for _ in range(count):
        inner = torch.randn(LATENT, 32, generator=generator) / LATENT**0.5
        outer = torch.randn(32, VIEW, generator=generator) / 32**0.5
        found.append(lambda z, inner=inner, outer=outer: torch.tanh(2.0 * z @ inner) @ outer)  # type: ignore[misc]
    return found


def make(problem: Problem, seed: int) -> dict[str, Samples]:
    """Training, held-out, test samples, and test samples like the training ones."""
    generator = torch.Generator().manual_seed(7919 * seed + 13)
    count, classes = 1 + problem.others, problem.classes
    maps = views(count, generator)
    centres = [1.2 * torch.randn(classes, LATENT, generator=generator) for _ in range(count)]
    shares = torch.tensor(problem.prior or (1.0 / classes,) * classes)

    def samples(size: int, outside: bool) -> Samples:
        labels = torch.multinomial(shares, size, True, generator=generator)
        inputs = []
        for number, (view, centre) in enumerate(zip(maps, centres, strict=True)):
            shown = labels
            if number and problem.cue is not None:
                chance = 1.0 / classes
                often = problem.cue if not outside else problem.cue_outside or chance
                right = torch.rand(size, generator=generator) < (often - chance) / (1.0 - chance)
                shown = torch.where(right, labels, torch.randint(classes, (size,), generator=generator))
            z = centre[shown] + problem.noise[min(number, 1)] * torch.randn(size, LATENT, generator=generator)
            x = view(z) + 0.05 * torch.randn(size, VIEW, generator=generator)
            inputs.append(x[:, None].repeat(1, 2, 1) if problem.convolutions else x)
        wrong = torch.rand(size, generator=generator) < problem.wrong_labels
        if not outside:
            labels = torch.where(wrong, torch.randint(classes, (size,), generator=generator), labels)
        return Samples(inputs, labels.float()[:, None] if problem.regression else labels)

    train, held_out, test = problem.samples
    return {
        "train": samples(train, False),
        "held_out": samples(held_out, problem.shifted),
        "test": samples(test, True),
        "like": samples(test, False),
    }


def normalization(kind: str, channels: int, convolutions: bool) -> nn.Module:
    """A layer of this kind for ``[B, C]`` or ``[B, C, T]``."""
    if kind == "batch":
        return nn.BatchNorm1d(channels)
    if kind == "group":
        return nn.GroupNorm(4, channels)
    if kind == "layer":
        return nn.GroupNorm(1, channels) if convolutions else nn.LayerNorm(channels)
    return nn.Identity()


class Network(nn.Module):
    """An encoder of three blocks (two convolutions) per modality, and a linear head on their features."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        outputs = 1 if problem.regression else problem.classes
        self.encoders = nn.ModuleList(self.encoder(problem) for _ in range(1 + problem.others))
        self.head = nn.Linear(WIDTH * len(self.encoders), outputs)

    @staticmethod
    def encoder(problem: Problem) -> nn.Sequential:
        """``[B, 20]`` or ``[B, 2, 20]`` to ``[B, 32]``."""
        kind = problem.normalization
        if not problem.convolutions:
            return nn.Sequential(
                *(
                    nn.Sequential(
                        nn.Linear(VIEW if d == 0 else WIDTH, WIDTH), normalization(kind, WIDTH, False), nn.ReLU()
                    )
                    for d in range(3)
                )
            )
        return nn.Sequential(
            nn.Sequential(nn.Conv1d(2, WIDTH, 5, 2, 2), normalization(kind, WIDTH, True), nn.ReLU()),
            nn.Sequential(
                nn.Conv1d(WIDTH, WIDTH, 3, 2, 1),
                normalization(kind, WIDTH, True),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(WIDTH * VIEW // 4, WIDTH),
                nn.ReLU(),
            ),
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.fuse([encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)])

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """Logits of the encoders' features."""
        logits: Tensor = self.head(torch.cat(list(features), 1))
        return logits


def pretrain(network: Network, number: int, data: Samples, loss: Callable[..., Tensor]) -> None:
    """Trains an encoder alone for five epochs, and freezes it."""
    head = nn.Linear(WIDTH, network.head.out_features)
    encoder = network.encoders[number]
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 1e-3)
    for _ in range(5):
        for index in torch.randperm(len(data.labels)).split(32):
            optimizer.zero_grad()
            loss(head(encoder(data.inputs[number][index])), data.labels[index]).backward()
            optimizer.step()
    encoder.requires_grad_(False)


@torch.no_grad()
def judged(network: Network, problem: Problem, data: Samples) -> float:
    """Accuracy, balanced accuracy of unbalanced classes, or R2, in percent."""
    outputs = network(*data.inputs)
    if problem.regression:
        return 100.0 * (1.0 - float(nn.functional.mse_loss(outputs, data.labels) / data.labels.var()))
    right = (outputs.argmax(1) == data.labels).double()
    if problem.prior is None:
        return 100.0 * float(right.mean())
    return 100.0 * float(torch.stack([right[data.labels == k].mean() for k in data.labels.unique()]).mean())


def run(problem: Problem, method_name: str, seed: int) -> dict[str, float]:
    """Trains one network; what came out of it."""
    name, options = {**METHODS, **WITHOUT_SHIFT}[method_name]
    loss = nn.functional.mse_loss if problem.regression else nn.functional.cross_entropy
    data = make(problem, seed)
    torch.manual_seed(seed)
    network = Network(problem)
    if problem.frozen is not None:
        pretrain(network, problem.frozen, data["train"], loss)
    names = ["honest", *(f"other {number}" for number in range(problem.others))]
    encoders = {m: list(encoder) for m, encoder in zip(names, network.encoders, strict=True)}
    blocks = ak.Blocks(network, encoders, network.fuse, num_classes=max(problem.classes, 2))
    rates: dict[str, Any] = {"lr": 1e-3} if problem.rule == "adamw" else {"lr": 0.05, "momentum": 0.9}
    optimizer = ak.AIMFusedOptimizer(blocks.param_groups(1e-2), rule=problem.rule, seed=seed, **rates)
    method = ak.make_method(name, blocks, optimizer, seed=seed, loss=loss, **options)
    generator = torch.Generator().manual_seed(seed)
    train = data["train"]
    began = time.perf_counter()
    for epoch in range(problem.epochs):
        network.train()
        optimizer.train()
        if epoch >= problem.starts:
            seen = train.take(torch.randperm(len(train.labels), generator=generator)[:512])
            method.update(seen.inputs, seen.labels, held_out=tuple(data["held_out"]))
        for index in torch.randperm(len(train.labels), generator=generator).split(32):
            batch = train.take(index)
            method.step(batch.inputs, batch.labels)
    seconds = time.perf_counter() - began
    with method.evaluating():
        network.eval()
        found = {part: judged(network, problem, data[part]) for part in ("test", "like")}
    history = getattr(getattr(method, "aim", None), "history", [])
    held = {m: [m in table.dominant for table in history] for m in names}
    return {
        **found,
        "held_honest": statistics.fmean(held["honest"]) if history else math.nan,
        "held_others": statistics.fmean(x for m in names[1:] for x in held[m]) if history else math.nan,
        "seconds": seconds,
    }


def seeds_of(text: str) -> list[int]:
    """``30-33`` or ``4``."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def report(path: Path) -> None:
    """Prints a table in Markdown: differences to joint training of the same seeds, mean ± standard error."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    of = {(line["problem"], line["method"], line["seed"]): line for line in lines}
    methods = [m for m in dict.fromkeys(line["method"] for line in lines) if m != "joint"]
    print("| problem | joint | " + " | ".join(methods) + " |\n|" + "---|" * (2 + len(methods)))
    for problem in dict.fromkeys(line["problem"] for line in lines):
        seeds = [seed for p, m, seed in of if (p, m) == (problem, "joint")]
        cells = [f"{statistics.fmean(float(of[problem, 'joint', seed]['test']) for seed in seeds):.1f}"]
        for method in methods:
            common = [seed for seed in seeds if (problem, method, seed) in of]
            if not common:
                cells.append("")
                continue
            pairs = [(of[problem, method, seed], of[problem, "joint", seed]) for seed in common]
            gains = [float(a["test"]) - float(b["test"]) for a, b in pairs]
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.nan
            price = statistics.fmean(float(a["like"]) - float(b["like"]) for a, b in pairs)
            cell = f"{statistics.fmean(gains):+.1f} ± {error:.1f} ({price:+.1f})"
            held = [statistics.fmean(float(a[name]) for a, _ in pairs) for name in ("held_others", "held_honest")]
            cells.append(cell + (f"; {held[0]:.0%}, {held[1]:.0%}" if held[0] == held[0] else ""))
        print(f"| {problem} | " + " | ".join(cells) + " |")
    for method in methods:
        ratios = [
            float(line["seconds"]) / float(of[line["problem"], "joint", line["seed"]]["seconds"])
            for line in lines
            if line["method"] == method and (line["problem"], "joint", line["seed"]) in of
        ]
        print(f"\n{method}: {statistics.median(ratios):.2f} times the time of joint training (median of {len(ratios)})")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every, methods = {**PROBLEMS, **UNSHIFTED}, {**METHODS, **WITHOUT_SHIFT}
    parser.add_argument("--problems", nargs="+", choices=list(every), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(methods), metavar="NAME")
    parser.add_argument("--unshifted", action="store_true", help="other problems and methods, unless they are named")
    parser.add_argument("--seeds", type=seeds_of, default=[0, 1, 2, 3], help="such as 30-33")
    parser.add_argument("--out", type=Path, default=Path("problems.csv"), help="lines are appended")
    parser.add_argument("--report", type=Path, help="print the table of a file, and train nothing")
    arguments = parser.parse_args()
    names = arguments.problems or list(UNSHIFTED if arguments.unshifted else PROBLEMS)
    chosen = arguments.methods or (list(WITHOUT_SHIFT) if arguments.unshifted else ["joint", "aim"])
    if arguments.report:
        report(arguments.report)
        return
    torch.set_num_threads(1)  # networks this small only wait for each other's threads
    warnings.filterwarnings("ignore", message=".*running statistics")
    new = not arguments.out.exists()
    with arguments.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        for name in names:
            for seed in arguments.seeds:
                for method in chosen:
                    if every[name].regression and method not in ("joint", "aim"):
                        continue
                    found = run(every[name], method, seed)
                    shown = {key: f"{value:.6g}" for key, value in found.items()}
                    line = {"commit": commit(), "torch": torch.__version__, "problem": name, "method": method}
                    writer.writerow({**line, "seed": seed, **shown})
                    file.flush()
                    print(f"{name:44} {method:18} seed {seed:3d} " + " ".join(f"{k} {v}" for k, v in shown.items()))


if __name__ == "__main__":
    main()
