"""Methods that change gradients themselves, against transcriptions of their formulae in plain PyTorch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from method_helpers import (
    EXACT,
    Net,
    Step,
    batch,
    cross_entropy,
    follow,
    made,
    scaled_step,
    true_probabilities,
)
from torch import Tensor

from aim_kernels.methods.coalitions import coalition_logits

pytestmark = pytest.mark.usefixtures("one_thread")

#: More steps, or steps of some units (1 / (p + 1/n) reaches n): roundoffs grow a hundredfold.
AFTER_MANY = {"rtol": 1e-8, "atol": 1e-10}

BOTH = pytest.mark.parametrize("modalities", [2, 3])


def others(values: list[float], m: int) -> float:
    rest = [v for n, v in enumerate(values) if n != m]
    return sum(rest) / len(rest)


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def amss_shares(net: Net, inputs: list[Tensor], labels: Tensor, published: bool) -> list[float]:
    features = net.features(inputs)
    own = [cross_entropy(x, labels).item() for x in net.own_logits(features)]
    frequency = [labels.tolist().count(k) / len(labels) for k in range(3)]
    if published:
        total = sum(math.exp(f) for f in frequency)
        h = -sum(f * math.log(math.exp(f) / total) for f in frequency)
    else:
        h = entropy(frequency)
    numerators = [h + 0.5 - loss for loss in own]
    if min(numerators) <= 0:
        return [0.5] * len(own)
    t = [
        n / (sum(entropy(row) for row in z.softmax(1).tolist()) / len(labels))
        for n, z in zip(numerators, features, strict=True)
    ]
    e = [math.exp(x) for x in t]
    n = len(e)
    return [min(max((1 - x / sum(e)) * n / (2 * (n - 1)), 0.1), 0.9) for x in e]


def amss(sample: str, weight: str, significance: str, published: bool) -> Step:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        draws = memory.setdefault("draws", torch.Generator().manual_seed(0))
        peer.zero_grad()
        rho = amss_shares(net, inputs, labels, published)
        cross_entropy(net(*inputs), labels).backward()
        weights = [(m, p) for m, encoder in enumerate(net.encoders) for p in encoder.parameters() if p.dim() > 1]
        uniform = iter(torch.rand(sum(len(p) for _, p in weights), generator=draws).tolist())
        for m, p in weights:
            n = len(p)
            u = [next(uniform) for _ in range(n)]
            size = [(p.grad[f] ** 2).sum().item() for f in range(n)]
            if significance == "gn_wn":
                size = [g / (p[f] ** 2).sum().item() for f, g in enumerate(size)]
            if significance == "sqrt_gn":
                size = [math.sqrt(g) for g in size]
            share = [g / sum(size) for g in size]
            keys = {
                "adaptive": [math.log(x) - math.log(-math.log(v)) for x, v in zip(share, u, strict=True)],
                "topk": share,
                "random": u,
                "bernoulli": [min(rho[m] * n * x, 1.0) - v for x, v in zip(share, u, strict=True)],
            }[sample]
            threshold = 0.0 if sample == "bernoulli" else sorted(keys)[-math.ceil(rho[m] * n)]
            for f in range(n):
                if keys[f] < threshold:
                    p.grad[f] = 0.0
                elif weight == "plus":
                    p.grad[f] /= share[f] + 1 / n
                elif weight == "inverse":
                    p.grad[f] /= min(rho[m] * n * share[f], 1.0)
        peer.step()

    return step


@pytest.mark.parametrize(
    ("modalities", "sample", "weight", "significance", "label_entropy"),
    [
        (2, "adaptive", "one", "gn", "published"),
        (3, "adaptive", "plus", "gn", "entropy"),
        (2, "topk", "one", "gn_wn", "published"),
        (3, "random", "plus", "gn", "published"),
        (3, "bernoulli", "one", "sqrt_gn", "entropy"),
        (2, "bernoulli", "inverse", "gn", "published"),
    ],
)
def test_amss(modalities: int, sample: str, weight: str, significance: str, label_entropy: str) -> None:
    options = {"sample": sample, "weight": weight, "significance": significance, "label_entropy": label_entropy}
    follow(
        "amss",
        amss(sample, weight, significance, label_entropy == "published"),
        modalities,
        tolerance=AFTER_MANY,
        **options,
    )


def test_amss_gives_the_modality_that_is_behind_the_larger_share() -> None:
    net, method = made("amss")
    inputs, labels = batch(2, count=60)
    with torch.no_grad():
        net.head.weight *= 0.05  # cross entropies near log 3, so that numerators are positive
        net.head.weight[:, :4] += 0.4 * torch.stack([net.features(inputs)[0][labels == k].mean(0) for k in range(3)])
    rho = method.shares(method.blocks.forward(inputs, labels))
    own = [cross_entropy(x, labels).item() for x in net.own_logits(net.features(inputs))]
    assert own[0] < own[1] and rho[0] < 0.5 < rho[1]
    assert rho.sum().item() == pytest.approx(1.0)
    assert rho.tolist() == pytest.approx(amss_shares(net, inputs, labels, True), rel=1e-9)


def test_amss_draws_filters_as_often_as_they_are_significant() -> None:
    _, method = made("amss")
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    count = 4000
    for rho, expected in ((0.25, p.tolist()), (0.5, inclusion(p.tolist()))):
        share = sum(method.factors(p, torch.tensor(rho), method.uniform(4).double()) for _ in range(count)) / count
        # five standard errors of 4000 draws
        assert (share - torch.tensor(expected, dtype=torch.float64)).abs().max() < 5 * 0.5 / count**0.5
    _, method = made("amss", sample="bernoulli", weight="inverse")
    mean = sum(method.factors(p, torch.tensor(0.6), method.uniform(4).double()) for _ in range(count)) / count
    # right on average: 1 / q has a standard deviation of sqrt(1 / q - 1), 2.7 for the rarest
    assert (mean - 1.0).abs().max() < 5 * 2.7 / count**0.5


def inclusion(p: list[float]) -> list[float]:
    """Probability of being among two drawn without replacement, in proportion to p."""
    return [x + sum(y * x / (1 - y) for n, y in enumerate(p) if n != m) for m, x in enumerate(p)]


def test_amss_leaves_other_gradients_and_other_epochs_alone() -> None:
    net, method = made("amss", starts=1, ends=1)
    inputs, labels = batch(2)
    for updates in range(4):  # the second update begins epoch 1
        method.optimizer.zero_grad()
        outputs = method.blocks.forward(inputs, labels)
        method.loss(outputs).backward()
        before = [p.grad.clone() for p in net.parameters()]
        acted = method.after_backward(outputs)
        same = [torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True)]
        masked = [p.dim() > 1 and "encoders" in name for name, p in net.named_parameters()]
        if updates != 2:
            assert all(same)
        else:
            assert all(s or m for s, m in zip(same, masked, strict=True)) and not all(same)
        assert (acted is None) == (updates != 2)
        method.update(inputs, labels)


def mmpareto(gamma: float, sign: float) -> Step:
    """The published four backward passes, on flat vectors."""

    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        def gradients(pick: int) -> list[Tensor]:
            peer.zero_grad()
            own = [sign * x for x in net.own_logits(net.features(inputs))]
            losses = [cross_entropy(net(*inputs), labels), *(cross_entropy(x, labels) for x in own)]
            (sum(losses) if pick < 0 else losses[pick]).backward()
            return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]

        joint, total = gradients(0), gradients(-1)
        names = [name for name, _ in net.named_parameters()]
        result = list(total)
        for m in range(len(net.encoders)):
            index = [i for i, name in enumerate(names) if name.startswith(f"encoders.{m}.")]
            alone = gradients(m + 1)
            a = torch.cat([joint[i].flatten() for i in index])
            b = torch.cat([alone[i].flatten() for i in index])
            k = 0.5
            if a @ b <= 0:
                memory["conflicts"] = memory.get("conflicts", 0) + 1
                k = min(max((b @ (b - a) / (a - b).square().sum()).item(), 0.001), 0.999)
            for i in index:
                g = 2 * k * joint[i] + 2 * (1 - k) * alone[i]
                longer = max((total[i].norm() / g.norm()).item(), 1.0)
                result[i] = gamma * longer * g
        for p, g in zip(net.parameters(), result, strict=True):
            p.grad = g
        peer.step()
        assert memory.get("conflicts", 0) > 0 or sign > 0, "nothing was in conflict"

    return step


@BOTH
@pytest.mark.parametrize("sign", [1.0, -0.3])
def test_mmpareto(modalities: int, sign: float) -> None:
    def contrary(method: Any) -> None:
        net = method.blocks.model
        method.blocks._unimodal = lambda z: [sign * x for x in net.own_logits(z)]

    follow("mmpareto", mmpareto(1.5, sign), modalities, prepare=contrary)


def test_mmpareto_weights_are_the_shortest_combination_and_clamped() -> None:
    _, method = made("mmpareto", gamma=1.0)
    generator = torch.Generator().manual_seed(3)

    def combined(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        parameters = [torch.nn.Parameter(torch.zeros_like(x)) for x in a]
        for p, g in zip(parameters, b, strict=True):
            p.grad = g.clone()
        method.combine(parameters, a)
        return [p.grad for p in parameters]

    a = [torch.randn(3, 2, generator=generator).double(), torch.randn(2, generator=generator).double()]
    b = [-0.5 * x + 0.1 * torch.randn(x.shape, generator=generator).double() for x in a]
    flat = lambda gs: torch.cat([g.flatten() for g in gs])  # noqa: E731
    lengths = [(k * flat(a) + (1 - k) * flat(b)).norm().item() for k in torch.linspace(0, 1, 2001).tolist()]
    k = lengths.index(min(lengths)) / 2000
    for x, y, g in zip(a, b, combined(a, b), strict=True):
        shortest = 2 * k * x + 2 * (1 - k) * y
        expected = shortest * max((x + y).norm() / shortest.norm(), 1.0)
        torch.testing.assert_close(g, expected, rtol=0.02, atol=0.01)  # the grid is 1/2000 wide
    zeros = [torch.zeros_like(x) for x in a]
    assert all(torch.equal(g, z) for g, z in zip(combined(zeros, zeros), zeros, strict=True))
    # k = 351 / 661: the first tensor is lengthened, the second, already longer than its sum of 1.4, is not shortened
    pair = [[torch.tensor([x]).double() for x in xs] for xs in ((1.0, 1.0), (-1.5, 0.4))]
    first, second = combined(*pair)
    assert first.item() == pytest.approx(-0.5)
    assert second.item() == pytest.approx(2 * 351 / 661 + 2 * 310 / 661 * 0.4)
    one_sided = combined(a, zeros)  # the shortest is all b; the clamp keeps a thousandth, which the norm undoes
    for x, g in zip(a, one_sided, strict=True):
        torch.testing.assert_close(g, x, **EXACT)


def inforeg(strengths: list[float], threshold: float, mean: bool) -> Step:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        n = len(net.encoders)
        if "update" in memory:
            del memory["update"]
            if "start" in memory:
                memory.setdefault("traces", []).append(memory["sums"])
            memory["sums"] = [0.0] * n
            memory["start"] = [[p.detach().clone() for p in encoder.parameters()] for encoder in net.encoders]
        peer.zero_grad()
        own = net.own_logits(net.features(inputs))
        (cross_entropy(net(*inputs), labels) + sum(cross_entropy(x, labels) for x in own)).backward()
        s = [sum(true_probabilities(x, labels)) / (len(labels) if mean else 1) for x in own]
        history = memory.get("traces", [])
        for m, encoder in enumerate(net.encoders):
            open_ = True
            if history:
                tr1 = sum(row[m] for row in history[-10:]) / 10
                tr2 = sum(row[m] for row in history[-11:-1]) / 10
                open_ = (tr1 - tr2) / tr1 > threshold
            memory.setdefault("open", []).append(open_)
            gap = s[m] - others(s, m)
            beta = strengths[m] * math.exp(math.tanh(gap)) if gap > 0 and open_ else 0.0
            for p, start in zip(encoder.parameters(), memory["start"][m], strict=True):
                p.grad += beta * (p.detach() - start)
                if p.dim() > 1:
                    memory["sums"][m] += (p.grad**2).mean().item()
        peer.step()
        if len(history) == 11:
            assert set(memory["open"]) == {True, False}, "windows never closed, or never opened"

    return step


@BOTH
@pytest.mark.parametrize("scores", ["sum", "mean"])
def test_inforeg(modalities: int, scores: str) -> None:
    strengths = [0.95, 0.1, 0.3][:modalities]
    follow(
        "inforeg",
        inforeg(strengths, 0.1, scores == "mean"),
        modalities,
        steps=26,
        update_every=2,
        strength=strengths,
        threshold=0.1,
        scores=scores,
        tolerance=AFTER_MANY,
    )


def test_inforeg_without_an_epoch_is_the_sum_of_losses() -> None:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        own = net.own_logits(net.features(inputs))
        loss = cross_entropy(net(*inputs), labels) + sum(cross_entropy(x, labels) for x in own)
        scaled_step(net, peer, loss, [1.0, 1.0])

    follow("inforeg", step, 2)


def probability_values(net: Net, features: list[Tensor], labels: Tensor) -> list[float]:
    """Shapley values of the mean probability of the true class, over all orders; 1/3 for nobody."""
    n = len(features)
    orders = list(itertools.permutations(range(n)))
    phi = [0.0] * n
    for order in orders:
        present: set[int] = set()
        before = 1 / 3
        for m in order:
            present = present | {m}
            now = sum(true_probabilities(net.with_zeros(features, present), labels)) / len(labels)
            phi[m] += (now - before) / len(orders)
            before = now
    return phi


def sam(rho: float, modality: bool = False, dominant_only: bool = False) -> Step:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        phi = [max(x, 0.0) for x in probability_values(net, net.features(inputs), labels)]
        lead = phi.index(max(phi))
        v = phi[lead] / sum(phi) if modality else 1.0
        peer.zero_grad()
        cross_entropy(net(*inputs), labels).backward()
        first = [p.grad.clone() for p in net.parameters()]
        moves = [not dominant_only or name.startswith(f"encoders.{lead}.") for name, _ in net.named_parameters()]
        norm = math.sqrt(sum((g**2).sum().item() for g, move in zip(first, moves, strict=True) if move))
        before = [p.detach().clone() for p in net.parameters()]
        peer.zero_grad()
        with torch.no_grad():
            for p, g, move in zip(net.parameters(), first, moves, strict=True):
                if move:
                    p += rho * g / norm
        cross_entropy(net(*inputs), labels).backward()
        with torch.no_grad():
            for p, old, g in zip(net.parameters(), before, first, strict=True):
                p.copy_(old)
                p.grad = v * p.grad + (1 - v) * g
        peer.step()

    return step


@BOTH
def test_sam(modalities: int) -> None:
    follow("sam", sam(0.1), modalities, rho=0.1)


@BOTH
@pytest.mark.parametrize("perturb", ["all", "dominant"])
def test_m_sam(modalities: int, perturb: str) -> None:
    follow("m-sam", sam(0.1, True, perturb == "dominant"), modalities, rho=0.1, perturb=perturb)


def test_sam_puts_weights_back_to_the_bit_also_where_a_pass_fails() -> None:
    net, method = made("sam", rho=0.3)
    inputs, labels = batch(2)
    before = [p.detach().clone() for p in net.parameters()]
    calls = []
    loss = method.loss

    def failing(outputs: Any) -> Tensor:
        calls.append([p.detach().clone() for p in net.parameters()])
        if len(calls) == 2:
            raise FloatingPointError("second pass")
        return loss(outputs)

    method.loss = failing
    with pytest.raises(FloatingPointError):
        method.step(inputs, labels)
    assert not any(torch.equal(p, q) for p, q in zip(calls[1], before, strict=True)), "nothing was perturbed"
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@BOTH
def test_shapley_alternation_by_step(modalities: int) -> None:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        phi = probability_values(net, net.features(inputs), labels)
        alone = phi.index(min(phi))
        learnt.add(alone)
        k = [float(m == alone) for m in range(modalities)]
        scaled_step(net, peer, cross_entropy(net(*inputs), labels), k, biases=True)

    learnt: set[int] = set()
    follow("shapley-alternation", step, modalities, steps=16, all_move=False, tolerance=AFTER_MANY)
    assert len(learnt) > 1, "one modality learnt all the time"


@BOTH
def test_shapley_alternation_by_epoch(modalities: int) -> None:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        if "update" in memory:
            seen, seen_labels, _, _ = memory.pop("update")
            phi = probability_values(net, net.features(seen), seen_labels)
            memory["alone"] = phi.index(min(phi))
        k = [float(m == memory["alone"]) for m in range(modalities)]
        scaled_step(net, peer, cross_entropy(net(*inputs), labels), k, biases=True)

    follow(
        "shapley-alternation",
        step,
        modalities,
        steps=16,
        update_every=2,
        period="epoch",
        all_move=False,
        tolerance=AFTER_MANY,
    )


def test_shapley_alternation_lets_everybody_learn_where_values_are_equal() -> None:
    _, method = made("shapley-alternation", margin=10.0)
    assert method.after_backward(method.blocks.forward(*batch(2))).tolist() == [1.0, 1.0]
    _, method = made("shapley-alternation", period="epoch")
    assert method.after_backward(method.blocks.forward(*batch(2))).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="pass labels"):
        method.update(batch(2)[0])


def test_more_modalities_than_coalitions_can_be_tried() -> None:
    with pytest.raises(ValueError, match="11 modalities have 2047 coalitions"):
        coalition_logits(lambda z: z[0], [torch.zeros(1, 1)] * 11)
