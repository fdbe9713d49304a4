"""Methods that change the loss, the order of steps or the weights, against transcriptions in plain PyTorch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from method_helpers import (
    CLASSES,
    LR,
    MOMENTUM,
    WIDTH,
    Net,
    Step,
    assert_same,
    batch,
    cross_entropy,
    follow,
    made,
    network,
    scaled_step,
    sgd,
)
from torch import Tensor, nn

from aim_kernels.methods import Blocks, make_method
from aim_kernels.methods.relearning import kmeans, purity
from aim_kernels.optim.optimizer import AIMFusedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = pytest.mark.parametrize("modalities", [2, 3])


def others(values: list[float], m: int) -> float:
    rest = [v for n, v in enumerate(values) if n != m]
    return sum(rest) / len(rest)


def pmr(alpha: float, momentum: float, ratio: bool) -> Step:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        if "update" in memory:
            seen, seen_labels, _, _ = memory.pop("update")
            features = [z.detach() for z in net.features(seen)]
            new = [[z[seen_labels == k].mean(0) for k in range(CLASSES)] for z in features]
            for m, old in enumerate(memory.get("prototypes", [])):
                new[m] = [momentum * p + (1 - momentum) * q for p, q in zip(old, new[m], strict=True)]
            memory["prototypes"] = new
        similarity = [
            torch.stack([-((z - p) ** 2).sum(1).sqrt() for p in prototypes], 1)
            for z, prototypes in zip(net.features(inputs), memory["prototypes"], strict=True)
        ]
        s = [x.softmax(1)[torch.arange(len(labels)), labels].sum().item() for x in similarity]
        loss = cross_entropy(net(*inputs), labels)
        for m, x in enumerate(similarity):
            behind = others(s, m) / s[m] - 1
            weight = min(max(behind, 0.0), 1.0) if ratio else float(behind > 0)
            memory.setdefault("weights", set()).add(weight > 0)
            loss = loss + alpha * weight * cross_entropy(x, labels)
        scaled_step(net, peer, loss, [1.0] * len(s))
        assert memory["weights"] == {True, False}

    return step


@BOTH
@pytest.mark.parametrize("weighting", ["one", "ratio"])
def test_pmr(modalities: int, weighting: str) -> None:
    options = {"alpha": 0.7, "momentum": 0.4, "weighting": weighting}
    follow("pmr", pmr(0.7, 0.4, weighting == "ratio"), modalities, update_every=2, **options)


def test_pmr_knows_classes_only_by_their_samples() -> None:
    net, method = made("pmr", momentum=0.25)
    inputs, labels = batch(2)
    outputs = method.blocks.forward(inputs, labels)
    assert torch.equal(method.loss(outputs), nn.functional.cross_entropy(outputs.logits, labels)), "no prototypes yet"
    some = labels != 2
    method.update([x[some] for x in inputs], labels[some])
    assert method.known(torch.arange(3)).tolist() == [True, True, False]
    loss = method.loss(method.blocks.forward(inputs, labels))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())
    unknown = method.blocks.forward([x[~some] for x in inputs], labels[~some])
    torch.testing.assert_close(method.loss(unknown), cross_entropy(unknown.logits, labels[~some]), rtol=1e-12, atol=0.0)
    before = [p.clone() for p in method.prototypes]
    last = labels == 2
    method.update([x[last] for x in inputs], labels[last])
    for m, z in enumerate(net.features([x[last] for x in inputs])):
        assert torch.equal(method.prototypes[m][:2], before[m][:2]), "classes without samples keep theirs"
        torch.testing.assert_close(method.prototypes[m][2], z.mean(0).detach(), rtol=1e-12, atol=1e-15)
    assert method.seen.all()
    with pytest.raises(ValueError, match="pass labels"):
        method.update(inputs)
    method.ends = 0
    assert torch.equal(method.loss(outputs), nn.functional.cross_entropy(outputs.logits, labels)), "its epochs are over"


class SharedNet(Net):
    """One head for all modalities; the logits are their mean."""

    def __init__(self, modalities: int) -> None:
        super().__init__(modalities)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.stack([self.head(z) for z in self.features(inputs)]).mean(0)


def shared(modalities: int) -> tuple[SharedNet, Blocks]:
    torch.manual_seed(0)
    net = SharedNet(modalities).double()
    encoders = {name: list(encoder) for name, encoder in zip("abc", net.encoders, strict=False)}
    return net, Blocks(net, encoders, fuse=lambda z: torch.stack([net.head(x) for x in z]).mean(0))


@BOTH
@pytest.mark.parametrize("projection", ["none", "published", "owm"])
@pytest.mark.parametrize("steps_per_epoch", [None, 2])
def test_mla_through_a_shared_head(modalities: int, projection: str, steps_per_epoch: int | None) -> None:
    net, blocks = shared(modalities)
    twin = copy.deepcopy(net)
    method = make_method(
        "mla", blocks, sgd(blocks), head=net.head, projection=projection, steps_per_epoch=steps_per_epoch
    )
    peer = torch.optim.SGD(twin.parameters(), lr=LR, momentum=MOMENTUM)
    projector = torch.eye(WIDTH, dtype=torch.float64)
    turn = 0
    for step in range(5):
        if step % 2 == 0:
            method.update(*batch(modalities))
        a = 0.1 ** (1 + (step % 2) / 2) if steps_per_epoch else 0.1
        inputs, labels = batch(modalities, seed=step)
        loss = method.step(inputs, labels)
        expected = 0.0
        for m in range(modalities):
            peer.zero_grad()
            z = twin.encoders[m](inputs[m])
            own = cross_entropy(twin.head(z), labels)
            expected += own.item()
            own.backward()
            if projection != "none" and turn > 0:
                r = z.detach().mean(0, keepdim=True)
                k = projector @ r.T
                if projection == "published":
                    projector = projector - (k @ k.T) / (a + k @ r)
                    projector = projector / projector.square().sum().sqrt()
                else:
                    projector = projector - (k @ k.T) / (a + (r @ projector @ r.T).item())
                twin.head.weight.grad = twin.head.weight.grad @ projector.T
            peer.step()
            turn += 1
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        # the published quotient has denominators near zero: roundoffs grow
        assert_same(net, twin, rtol=1e-7, atol=1e-9)


@BOTH
def test_mla_without_a_shared_head_alternates_over_each_modalitys_own_logits(modalities: int) -> None:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        for m in range(modalities):
            peer.zero_grad()
            own = net.own_logits(net.features(inputs))[m]
            cross_entropy(own, labels).backward()
            for n, encoder in enumerate(net.encoders):
                if n != m:
                    for p in encoder.parameters():
                        p.grad = None
            peer.step()

    follow("mla", step, modalities)


def test_mla_resumes_its_projector() -> None:
    def run(method: Any, steps: range) -> None:
        for step in steps:
            method.step(*batch(2, seed=step))

    net, blocks = shared(2)
    method = make_method("mla", blocks, sgd(blocks), head=net.head, projection="published")
    run(method, range(3))
    weights, saved = (
        copy.deepcopy(net.state_dict()),
        copy.deepcopy((method.optimizer.state_dict(), method.state_dict())),
    )
    run(method, range(3, 6))
    other, blocks = shared(2)
    resumed = make_method("mla", blocks, sgd(blocks), head=other.head, projection="published")
    other.load_state_dict(weights)
    resumed.optimizer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(resumed, range(3, 6))
    assert_same(net, other, rtol=0.0, atol=0.0)


def test_mla_refuses() -> None:
    net, blocks = shared(2)
    with pytest.raises(ValueError, match="pass head="):
        make_method("mla", blocks, sgd(blocks), projection="owm")
    with pytest.raises(TypeError, match=r"nn.Linear that all modalities share, got Sequential"):
        make_method("mla", blocks, sgd(blocks), head=nn.Sequential(net.head))
    with pytest.raises(ValueError, match="zero_grad_in_step"):
        make_method("mla", blocks, sgd(blocks, zero_grad_in_step=True), head=net.head)
    with pytest.raises(ValueError, match="steps_per_epoch must be at least 1"):
        make_method("mla", blocks, sgd(blocks), head=net.head, steps_per_epoch=0)


def test_purity_and_kmeans_of_clusters_that_are_plain() -> None:
    assigned = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    labels = torch.tensor([1, 1, 0, 2, 2, 0, 2, 2])
    assert purity(assigned, labels) == (2 + 2 + 2) / 8
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    truth = torch.arange(80) % 4
    x = centres[truth] + torch.randn(80, 2, generator=generator)
    for seed in range(5):
        found = kmeans(x, 4, torch.Generator().manual_seed(seed))
        assert purity(found, truth) == 1.0 and len(found.unique()) == 4
    assert kmeans(x[:2], 4, generator).shape == (2,), "fewer samples than clusters"
    assert purity(kmeans(torch.zeros(6, 2), 3, generator), torch.arange(6) % 3) == pytest.approx(1 / 3)


@BOTH
def test_relearning_moves_encoders_back_by_the_gap_of_purities(modalities: int) -> None:
    net, method = made("diagnosing-relearning", modalities, every=2, times=2, strength=1.5)
    start = copy.deepcopy(net)
    seen, held_out = batch(modalities, seed=1), batch(modalities, seed=2)
    scripted = iter([[0.9, 0.5, 0.7], [0.6, 0.8, 0.7]] * 2)
    method.purities = lambda inputs, labels: torch.tensor(next(scripted)[:modalities], dtype=torch.float64)
    given = []
    for epoch in range(7):
        before = copy.deepcopy(net)
        given.append(method.update(*seen, held_out=held_out))
        w = [math.tanh(1.5 * gap) for gap in (0.3, 0.3, 0.0)[:modalities]] if epoch in (2, 4) else [0.0] * modalities
        for m, encoder in enumerate(net.encoders):
            for p, old, first in zip(
                encoder.parameters(), before.encoders[m].parameters(), start.encoders[m].parameters(), strict=True
            ):
                torch.testing.assert_close(p, w[m] * first + (1 - w[m]) * old, rtol=1e-12, atol=1e-15)
        assert torch.equal(net.head.weight, before.head.weight)
        method.step(*batch(modalities, seed=epoch))
    assert [x is not None for x in given] == [False, False, True, False, True, False, False]
    method.times = None
    with pytest.raises(ValueError, match="pass labels and held_out"):
        [method.update(*seen) for _ in range(2)]


def test_relearning_measures_purities_of_features() -> None:
    _, method = made("diagnosing-relearning")
    inputs, labels = batch(2, count=60)
    outputs = method.blocks.forward(inputs, labels)
    outputs.features[:] = [nn.functional.one_hot(labels, WIDTH).double(), torch.zeros(60, WIDTH).double()]
    method.blocks.forward = lambda inputs, labels: outputs
    # the first modality's features are its classes; the second one's tell nothing, and every cluster is half right
    assert method.purities(inputs, labels).tolist() == pytest.approx([1.0, 1 / 2])


def test_relearning_changes_the_true_weights_where_live_ones_are_degraded() -> None:
    net, method = made("diagnosing-relearning", every=1)
    start = copy.deepcopy(net)
    method.optimizer.set_modulation(("a", 0), live_under=0.5, live_well=0.5)
    method.purities = lambda inputs, labels: torch.full((2,), 0.4 if inputs is seen else 0.1, dtype=torch.float64)
    seen, labels = batch(2)
    method.update(seen, labels, held_out=batch(2, seed=1))
    for step in range(3):
        method.step(*batch(2, seed=step))
    with method.evaluating():
        true = copy.deepcopy(net)
    w = method.update(seen, labels, held_out=batch(2, seed=1))[0]
    weight = net.encoders[0][0][0].weight
    with method.evaluating():
        expected = w * start.encoders[0][0][0].weight + (1 - w) * true.encoders[0][0][0].weight
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(weight, expected), "the module trains on live weights again"


def test_weight_averaging_is_judged_by_its_average() -> None:
    net, method = made("weight-averaging", 3, decay=0.8)
    average = [p.detach().clone() for p in net.parameters()]

    for step in range(5):
        method.step(*batch(3, seed=step))
        average = [0.8 * a + 0.2 * p.detach() for a, p in zip(average, net.parameters(), strict=True)]
    trained = [p.detach().clone() for p in net.parameters()]
    with method.evaluating():
        for p, a in zip(net.parameters(), average, strict=True):
            torch.testing.assert_close(p.detach(), a, rtol=1e-12, atol=1e-15)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), trained, strict=True))


def test_weight_averaging_keeps_the_optimizers_own_decay_and_comes_before_the_first_step() -> None:
    _, blocks = network(2)
    optimizer = AIMFusedOptimizer(blocks.param_groups(), ema_decay=0.5)
    make_method("weight-averaging", blocks, optimizer)
    assert {group["ema_decay"] for group in optimizer.param_groups} == {0.5}
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1.0"):
        make_method("weight-averaging", blocks, optimizer, decay=1.0)
    _, joint = made("joint")
    joint.step(*batch(2))
    with pytest.raises(ValueError, match="give the optimizer ema_decay="):
        make_method("weight-averaging", joint.blocks, joint.optimizer)
