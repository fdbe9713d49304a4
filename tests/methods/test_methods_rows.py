"""Methods that are a factor a modality, against transcriptions of their formulae: every weight, after several steps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from method_helpers import (
    FROM_FLOAT32,
    Net,
    Step,
    batch,
    cross_entropy,
    follow,
    made,
    network,
    scaled_step,
    true_probabilities,
)
from torch import Tensor

from aim_kernels import AIMFusedOptimizer, make_method

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = pytest.mark.parametrize("modalities", [2, 3])


def others(values: list[float], m: int) -> float:
    rest = [v for n, v in enumerate(values) if n != m]
    return sum(rest) / len(rest)


def scores(net: Net, inputs: list[Tensor], labels: Tensor) -> list[float]:
    return [sum(true_probabilities(x, labels)) for x in net.own_logits(net.features(inputs))]


def ogm(alpha: float, shift: float = 0.0, boost: float | None = None) -> Step:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        s = scores(net, inputs, labels)
        k = []
        for m in range(len(s)):
            r = s[m] / others(s, m)
            if boost is not None:
                k.append(1.0 if r > 1 else boost)
            else:
                k.append(1.0 - math.tanh(alpha * max(r - shift, 0.0)) if r > 1 else 1.0)
        memory.setdefault("k", []).append(k)
        scaled_step(net, peer, cross_entropy(net(*inputs), labels), k)

    return step


@BOTH
@pytest.mark.parametrize(("argument", "shift"), [("r", 0.0), ("r-1", 1.0)])
def test_ogm(modalities: int, argument: str, shift: float) -> None:
    follow("ogm", ogm(0.4, shift), modalities, tolerance=FROM_FLOAT32, alpha=0.4, argument=argument)


@BOTH
def test_ogm_that_boosts_the_weak(modalities: int) -> None:
    follow("ogm", ogm(0.4, boost=4.0), modalities, tolerance=FROM_FLOAT32, alpha=0.4, boost=4.0)


def test_ogm_ge_adds_noise_of_the_gradients_size() -> None:
    _, quiet = made("ogm")
    net, loud = made("ogm-ge")
    inputs, labels = batch(2)
    for _ in range(2):  # the first step has no gradient before it, so it is without
        loud.optimizer.zero_grad()
        outputs = loud.blocks.forward(inputs, labels)
        loud.loss(outputs).backward()
        k = loud.after_backward(outputs)
        before = [p.detach().clone() for p in net.parameters()]
        momenta = [loud.optimizer.state[p].get("momentum_buffer", torch.zeros(())).clone() for p in net.parameters()]
        loud.optimizer.step()
    row = {
        (g["modality"], g["depth"], g["modulated"]): r["noise"]
        for g, r in zip(loud.optimizer.param_groups, loud.optimizer.modulation(), strict=True)
    }
    assert row == {key: float(key[2]) for key in row}
    noise = []
    for (name, p), old, momentum in zip(net.named_parameters(), before, momenta, strict=True):
        factor = k[0 if "encoders.0" in name else 1].item() if "encoders" in name and p.dim() > 1 else 1.0
        plain = old - 0.1 * (0.9 * momentum + factor * p.grad)
        if "encoders" in name and p.dim() > 1:
            noise.append(((plain - p.detach()) / 0.1).flatten() / p.grad.std())
        else:
            torch.testing.assert_close(p.detach(), plain, rtol=1e-10, atol=1e-12)
    _, all_of_it = made("ogm-ge", biases=True)
    all_of_it.after_backward(all_of_it.blocks.forward(inputs, labels))
    for group, row in zip(all_of_it.optimizer.param_groups, all_of_it.optimizer.modulation(), strict=True):
        assert row["noise"] == float(group["modulated"]), "biases are scaled, but get no noise"
    noise = torch.cat(noise)
    # 118 draws; the scale is the previous step's deviation over that of this step's tensor, between a half and two
    assert 0.4 < noise.std() < 2.5 and noise.mean().abs() < 0.5
    assert quiet.noise == 0.0


def mlb(alpha: float, beta_max: float) -> Step:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        s = scores(net, inputs, labels)
        k = []
        for m in range(len(s)):
            r = others(s, m) / s[m]
            k.append(1.0 + ((beta_max if r > 1 else 2.0) - 1.0) * math.tanh(alpha * (r - 1.0)))
        own = net.own_logits(net.features(inputs))
        loss = cross_entropy(net(*inputs), labels) + sum(cross_entropy(x, labels) for x in own)
        scaled_step(net, peer, loss, k, biases=True)

    return step


@BOTH
def test_mlb(modalities: int) -> None:
    method = follow("mlb", mlb(1.3, 3.0), modalities, alpha=1.3, beta_max=3.0)
    k = method.after_backward(method.blocks.forward(*batch(modalities)))
    assert k.min() < 1.0 < k.max(), "one is damped, one boosted"


def cggm(rou: float, guard: float, direction: float) -> Step:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        own = net.own_logits(net.features(inputs))
        joint = net(*inputs)
        loss = cross_entropy(joint, labels)
        if "c" in memory and direction:
            hot = torch.eye(3, dtype=torch.float64)[labels]
            g = (joint.softmax(1) - hot).flatten()
            cosines = []
            for x in own:
                u = (x.softmax(1) - hot).flatten()
                cosines.append((g * u).sum() / (g.norm() * u.norm()))
            c = memory["c"]
            loss = loss + direction * (sum(map(abs, c)) - sum(a * b for a, b in zip(c, cosines, strict=True))) / len(c)
        now = [(x.argmax(1) == labels).double().mean().item() for x in own]
        gain = [a - b for a, b in zip(now, memory.get("accuracy", [0.0] * len(now)), strict=True)]
        memory["accuracy"] = now
        total = sum(gain) + 1e-8
        memory["c"] = [1.0 if abs(sum(gain)) < guard else (total - d) / total for d in gain]
        scaled_step(net, peer, loss, [rou * c for c in memory["c"]], biases=True)

    return step


@BOTH
@pytest.mark.parametrize("direction", [0.0, 0.2])
def test_cggm(modalities: int, direction: float) -> None:
    follow("cggm", cggm(0.8, 1e-6, direction), modalities, rou=0.8, direction=direction)


def test_cggm_is_neutral_where_no_accuracy_changes_and_bounded_on_request() -> None:
    _, method = made("cggm", bounds=(0.5, 1.5))
    outputs = method.blocks.forward(*batch(2))
    first, second = method.after_backward(outputs), method.after_backward(outputs)
    assert second.tolist() == [1.0, 1.0]
    assert first.min() >= 0.5 and first.max() <= 1.5
    _, raw = made("cggm", guard=0.0)
    raw.after_backward(outputs)
    assert raw.after_backward(outputs).tolist() == [1.0, 1.0]  # (1e-8 - 0) / 1e-8: unguarded, gains of exactly zero
    raw.accuracy = raw.accuracy + torch.tensor([0.25, -0.25], dtype=torch.float64)
    assert raw.after_backward(outputs).abs().max() > 1e6, "gains that cancel: what the guard is for"


def shapley_by_orders(net: Net, features: list[Tensor]) -> list[Tensor]:
    """Each modality's contribution, averaged over all orders in which they may arrive; nothing gives zero."""
    total = [torch.zeros(1)] * len(features)
    orders = list(itertools.permutations(range(len(features))))
    for order in orders:
        present: set[int] = set()
        for m in order:
            before = net.with_zeros(features, present) if present else 0.0
            present = present | {m}
            total[m] = total[m] + net.with_zeros(features, present) - before
    return [x / len(orders) for x in total]


def agm(alpha: float, sign: float) -> Step:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        own = shapley_by_orders(net, net.features(inputs))
        n = len(own)
        s = [sign * sum(map(math.log, true_probabilities(x, labels))) / len(labels) for x in own]
        past = memory.setdefault("s", [])
        mean = [sum(row[m] for row in past) / len(past) if past else 0.0 for m in range(n)]
        rho = [math.exp(n / (n - 1) * (x - sum(s) / n)) for x in s]
        tau = [math.exp(n / (n - 1) * (x - sum(mean) / n)) for x in mean]
        past.append(s)
        k = [math.exp(alpha * min(t - r, 7.0)) for t, r in zip(tau, rho, strict=True)]
        scaled_step(net, peer, cross_entropy(net(*inputs), labels), k)

    return step


@BOTH
@pytest.mark.parametrize(("sign", "factor"), [("paper", 1.0), ("published", -1.0)])
def test_agm(modalities: int, sign: str, factor: float) -> None:
    follow("agm", agm(0.7, factor), modalities, alpha=0.7, sign=sign)


@pytest.mark.parametrize(("sign", "boosted"), [("paper", "weak"), ("published", "strong")])
def test_agm_boosts_the_weaker_modality_unless_as_published(sign: str, boosted: str) -> None:
    net, method = made("agm", sign=sign)
    for step in range(8):  # the first modality is the clearer one, and is learnt first
        made_of, labels = batch(2, seed=step)
        torch.nn.functional.cross_entropy(net(*made_of), labels).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.5 * p.grad
                p.grad = None
    inputs, labels = batch(2, seed=9)
    strong, weak = scores(net, inputs, labels)
    assert strong > weak
    k = method.after_backward(method.blocks.forward(inputs, labels))
    assert (k[1] > 1.0 > k[0]) if boosted == "weak" else (k[0] > 1.0 > k[1])


@BOTH
def test_pdmp(modalities: int) -> None:
    k = [1.0] * modalities
    k[1] = 2.5

    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        scaled_step(net, peer, cross_entropy(net(*inputs), labels), k)

    follow("pdmp", step, modalities, dominant="b", gamma_p=2.5)


def test_pdmp_ranks_modalities_by_held_out_accuracy() -> None:
    net, method = made("pdmp", 3)
    outputs = method.blocks.forward(*batch(3))
    assert method.after_backward(outputs).tolist() == [1.0, 1.0, 1.0]
    held_out = batch(3, seed=5, count=60)
    with torch.no_grad():
        right = [(x.argmax(1) == held_out[1]).sum().item() for x in net.own_logits(net.features(held_out[0]))]
    expected = [float(n == max(right)) for n in right]
    assert sum(expected) == 1.0
    net.train()
    assert method.update(*batch(3), held_out=held_out).tolist() == expected
    assert net.training
    assert method.after_backward(outputs).tolist() == [2.0 if x else 1.0 for x in expected]
    with pytest.raises(ValueError, match="pass labels"):
        method.update(batch(3)[0])


@BOTH
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_sum_of_losses(modalities: int, factor: float) -> None:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        own = net.own_logits(net.features(inputs))
        loss = cross_entropy(net(*inputs), labels) + sum(cross_entropy(x, labels) for x in own)
        scaled_step(net, peer, loss, [factor] * modalities, biases=True)

    follow("sum-of-losses", step, modalities, encoder_factor=factor)


@pytest.mark.parametrize("name", ["ogm", "mlb", "agm", "cggm", "pdmp"])
@pytest.mark.parametrize("apply_to", ["grad", "step"])
def test_rows_hold_what_was_asked_for(name: str, apply_to: str) -> None:
    options: dict[str, Any] = {"dominant": "a"} if name == "pdmp" else {}
    _, method = made(name, 3, apply_to=apply_to, biases=False, **options)
    k = method.after_backward(method.blocks.forward(*batch(3)))
    assert k.shape == (3,) and not torch.all(k == 1.0)
    other = "step" if apply_to == "grad" else "grad"
    for group, row in zip(method.optimizer.param_groups, method.optimizer.modulation(), strict=True):
        expected = k["abc".index(group["modality"])].item() if group["modulated"] else 1.0
        assert row[f"{apply_to}_under"] == row[f"{apply_to}_well"] == expected
        assert row[f"{other}_under"] == row[f"{other}_well"] == 1.0


@pytest.mark.parametrize("name", ["ogm-ge", "mlb", "agm", "cggm", "pdmp"])
def test_outside_of_its_epochs_a_method_leaves_rows_at_one(name: str) -> None:
    _, method = made(name, starts=1, ends=1, **({"dominant": "a"} if name == "pdmp" else {}))
    inputs, labels = batch(2)
    neutral = method.optimizer.tables.rows.clone()
    changed = []
    for _ in range(4):
        method.update(inputs, labels)
        method.after_backward(method.blocks.forward(inputs, labels))
        changed.append(not torch.equal(method.optimizer.tables.rows, neutral))
    assert changed == [False, True, False, False]


def test_step_factors_act_where_gradient_factors_cancel() -> None:
    """AdamW: a constant factor on gradients leaves the weights (up to eps), one on updates halves the way."""

    def way(**options: Any) -> Tensor:
        net, blocks = network(2)
        optimizer = AIMFusedOptimizer(blocks.param_groups(), lr=1e-2, weight_decay=0.0, eps=1e-15)
        method = make_method("pdmp", blocks, optimizer, dominant="b", gamma_p=1.0, gamma_r=0.5, **options)
        before = net.encoders[0][1][0].weight.detach().clone()
        method.step(*batch(2))
        return (net.encoders[0][1][0].weight - before).detach()

    torch.testing.assert_close(way(apply_to="step"), 0.5 * way(apply_to="grad"), rtol=1e-9, atol=1e-15)


def test_joint_is_plain_training() -> None:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        scaled_step(net, peer, cross_entropy(net(*inputs), labels), [1.0, 1.0])

    follow("joint", step, 2)
