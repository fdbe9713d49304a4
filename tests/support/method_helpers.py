"""A tiny late-fusion network with any number of modalities, and what the tests of methods share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.methods import Blocks, Method, make_method
from aim_kernels.methods.scores import late_fusion_logits
from aim_kernels.optim.optimizer import AIMFusedOptimizer

CLASSES = 3
WIDTH = 4
LR, MOMENTUM = 0.1, 0.9

#: float64 throughout: the two sides differ in the order of sums and products only, some hundred roundoffs (1e-16) after
#: four steps of a network whose numbers are near one. What is skipped or doubled changes weights by more than 1e-6.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
#: OGM's scores are taken in float32 (roundoff 6e-8), k is a smooth function of them, and four steps add up.
FROM_FLOAT32 = {"rtol": 1e-6, "atol": 1e-7}

#: Options without which a method cannot be made, and which leave the loss as it is.
NEEDED: dict[str, dict[str, Any]] = {
    name: {"num_classes": CLASSES, "unimodal_weight": 0.0} for name in ("aim", "drop", "feature-scale", "no-mask")
}

Step = Callable[["Net", torch.optim.Optimizer, list[Tensor], Tensor, dict[str, Any]], None]


class Net(nn.Module):
    """Encoders of two blocks; the first modality's begins with a convolution. A linear head on all features."""

    def __init__(self, modalities: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten())
        shallow = [first, *(nn.Sequential(nn.Linear(5, 8), nn.Tanh()) for _ in range(modalities - 1))]
        self.encoders = nn.ModuleList(nn.Sequential(e, nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh())) for e in shallow)
        self.head = nn.Linear(modalities * WIDTH, CLASSES)

    def features(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(torch.cat(self.features(inputs), 1))

    def own_logits(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Slices of the head, with a share of its bias: written out."""
        modalities = len(features)
        return [
            z @ self.head.weight[:, m * WIDTH : (m + 1) * WIDTH].T + self.head.bias / modalities
            for m, z in enumerate(features)
        ]

    def with_zeros(self, features: Sequence[Tensor], present: set[int]) -> Tensor:
        """Logits where only some modalities have features."""
        return self.head(torch.cat([z if m in present else 0.0 * z for m, z in enumerate(features)], 1))


def network(modalities: int, seed: int = 0) -> tuple[Net, Blocks]:
    """A float64 network and its blocks, named a, b, c, ..."""
    torch.manual_seed(seed)
    net = Net(modalities).double()
    encoders = {name: list(encoder) for name, encoder in zip("abcdef", net.encoders, strict=False)}
    blocks = Blocks(
        net,
        encoders,
        fuse=lambda z: net.head(torch.cat(z, 1)),
        unimodal=lambda z: late_fusion_logits(net.head, z),
    )
    return net, blocks


def batch(modalities: int, seed: int = 0, count: int = 12) -> tuple[list[Tensor], Tensor]:
    """Every modality shows the class; the first one ([B, 1, 6]) clearest, later ones fainter. Half are of class 0."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(count, generator=generator) % 4 % CLASSES
    inputs = []
    for m in range(modalities):
        x = torch.randn(count, 5 if m else 6, generator=generator, dtype=torch.float64)
        x[:, :CLASSES] += 3.0 / (m + 1) * nn.functional.one_hot(labels, CLASSES)
        inputs.append(x if m else x[:, None])
    return inputs, labels


def sgd(blocks: Blocks, **options: Any) -> AIMFusedOptimizer:
    return AIMFusedOptimizer(blocks.param_groups(), lr=LR, rule="sgd", momentum=MOMENTUM, **options)


def made(name: str, modalities: int = 2, seed: int = 0, **options: Any) -> tuple[Net, Method]:
    net, blocks = network(modalities, seed)
    return net, make_method(name, blocks, sgd(blocks), **{**NEEDED.get(name, {}), **options})


def assert_same(net: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **(tolerance or EXACT))


def follow(
    name: str,
    transcription: Step,
    modalities: int,
    *,
    steps: int = 4,
    tolerance: dict[str, float] = EXACT,
    update_every: int = 0,
    prepare: Callable[[Method], Any] = lambda method: None,
    all_move: bool = True,
    **options: Any,
) -> Method:
    """Trains one network with a method and a copy with a step in plain PyTorch; every weight must agree.

    Before every ``update_every``-th step the method gets an update; the transcription finds its samples as
    ``memory["update"]`` (training inputs, labels, held-out inputs, labels), and removes them.
    """
    net, method = made(name, modalities, **options)
    prepare(method)
    twin = copy.deepcopy(net)
    start = copy.deepcopy(net)
    peer = torch.optim.SGD(twin.parameters(), lr=LR, momentum=MOMENTUM)
    memory: dict[str, Any] = {}
    for step in range(steps):
        if update_every and step % update_every == 0:
            seen, held_out = batch(modalities, seed=50 + step), batch(modalities, seed=70 + step)
            method.update(*seen, held_out=held_out)
            memory["update"] = (*seen, *held_out)
        inputs, labels = batch(modalities, seed=step)
        method.step(inputs, labels)
        transcription(twin, peer, inputs, labels, memory)
        assert_same(net, twin, **tolerance)
    assert "update" not in memory
    moved = [(p - q).abs().max() for p, q in zip(net.parameters(), start.parameters(), strict=True)]
    assert (min if all_move else max)(moved) > 1e-4, "training moved nothing that could differ"
    return method


def scaled_step(
    net: Net, peer: torch.optim.Optimizer, loss: Tensor, factors: Sequence[float], *, biases: bool = False
) -> None:
    """Backward, each encoder's weights (and biases) times its factor, step."""
    peer.zero_grad()
    loss.backward()
    for encoder, factor in zip(net.encoders, factors, strict=True):
        for p in encoder.parameters():
            if p.dim() > 1 or biases:
                p.grad *= factor
    peer.step()


def true_probabilities(logits: Tensor, labels: Tensor) -> list[float]:
    """One number a sample, by the exponentials."""
    found = []
    for row, label in zip(logits.detach().tolist(), labels.tolist(), strict=True):
        total = sum(torch.tensor(row, dtype=torch.float64).exp().tolist())
        found.append(torch.tensor(row[label], dtype=torch.float64).exp().item() / total)
    return found


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    rows = torch.arange(len(labels))
    return (logits.logsumexp(1) - logits[rows, labels]).mean()
