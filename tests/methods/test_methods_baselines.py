"""Baselines without modulation, against loops written by hand: held-out samples in training, subsets, dropout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from method_helpers import LR, MOMENTUM, Net, assert_same, batch, cross_entropy, made, network, sgd
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels.methods import Blocks, make_method
from aim_kernels.methods.baselines import FIRST_SHARE
from aim_kernels.step.layout import ROW

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = pytest.mark.parametrize("modalities", [2, 3])
HELD = 10


def plain_sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)


def record(method: Any) -> list[list[int]]:
    """What the method draws of its held-out samples, step by step."""
    drawn: list[list[int]] = []
    draw = method.draw
    method.draw = lambda count: (drawn.append((index := draw(count)).tolist()), index)[1]
    return drawn


# -- training on held-out samples --------------------------------------------------------------------------------------


@BOTH
def test_a_step_is_joint_training_on_both(modalities: int) -> None:
    net, method = made("train-on-held", modalities, share=0.4)
    twin = copy.deepcopy(net)
    peer = plain_sgd(twin)
    held, held_labels = batch(modalities, seed=70, count=HELD)
    method.update(*batch(modalities, seed=50), held_out=(held, held_labels))
    order = torch.randperm(HELD, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = record(method)
    for step in range(2):
        inputs, labels = batch(modalities, seed=step)  # 12 samples: 4.8 more a step, so 4, then 5
        loss = method.step(inputs, labels)
        index = [order[:4], order[4:9]][step]
        assert drawn[step] == index
        both = [torch.cat([x, h[index]]) for x, h in zip(inputs, held, strict=True)]
        peer.zero_grad()
        expected = cross_entropy(twin(*both), torch.cat([labels, held_labels[index]]))
        expected.backward()
        peer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0.0)
        assert_same(net, twin)


@pytest.mark.parametrize("share", [HELD / 36, 10.0 / 3.0, 0.0])
def test_an_epoch_has_the_proportion_of_the_union(share: float) -> None:
    """36 training samples an epoch, in uneven batches; every held-out sample as often as any other, none before all."""
    _, method = made("train-on-held", share=share)
    drawn = record(method)
    for epoch in range(3):
        method.update(*batch(2), held_out=batch(2, seed=70, count=HELD))
        for number, count in enumerate((16, 16, 4)):
            method.step(*batch(2, seed=3 * epoch + number, count=count))
        came = [sample for index in drawn for sample in index]
        assert len(came) == round(36 * share * (epoch + 1))
        for start in range(0, len(came), HELD):
            part = came[start : start + HELD]
            assert len(set(part)) == len(part)
    passes = [tuple(came[start : start + HELD]) for start in range(0, len(came), HELD)]
    assert len(set(passes)) == len(passes), "each pass in an order of its own"


def test_without_a_share_the_latest_epoch_is_counted() -> None:
    _, method = made("train-on-held")
    drawn = record(method)
    method.step(*batch(2, count=8))
    assert not drawn, "nothing is known: joint training"
    _, method = made("train-on-held")
    drawn = record(method)
    for epoch, batches in enumerate((2, 3, 1)):
        method.update(*batch(2), held_out=batch(2, seed=70, count=HELD))
        assert method.share_now() == (FIRST_SHARE, HELD / 16, HELD / 24)[epoch]
        before = sum(map(len, drawn))
        for number in range(batches):
            method.step(*batch(2, seed=number, count=8))
        assert sum(map(len, drawn)) - before == (4, 15, 3)[epoch]  # 16 / 4; 24 * 10 / 16; 8 * 10 / 24, rounded down


def test_seeds_and_other_held_out_samples() -> None:
    def drawn_by(seed: int, second: int) -> list[list[int]]:
        _, blocks = network(2)
        method = make_method("train-on-held", blocks, sgd(blocks), share=0.5, seed=seed)
        drawn = record(method)
        for count in (HELD, second):
            method.update(*batch(2), held_out=batch(2, seed=70, count=count))
            method.step(*batch(2))
        return drawn

    assert drawn_by(0, HELD) == drawn_by(0, HELD) != drawn_by(1, HELD)
    first, second = drawn_by(0, HELD)
    assert not set(second[:4]) & set(first), "as many samples: in the order that was begun"
    first, second = drawn_by(0, 6)
    assert sorted(second) == list(range(6)), "other samples: in an order of their own"


@pytest.mark.parametrize("name", ["train-on-held", "best-subset"])
def test_held_out_samples_are_needed_once(name: str) -> None:
    _, method = made(name)
    for held_out, message in (
        (None, "needs held-out samples"),
        ((batch(2)[0], None), "needs held-out samples with labels"),
        ((batch(2)[0], torch.zeros(0, dtype=torch.int64)), "held-out labels have 0"),
    ):
        with pytest.raises(ValueError, match=message):
            method.update(*batch(2), held_out=held_out)
    assert method.updates == 0
    method.update(*batch(2), held_out=batch(2, seed=1))
    held = method.held
    method.update(*batch(2))
    assert method.held is held and method.updates == 2


# -- the best subset ---------------------------------------------------------------------------------------------------


def subset_logits(net: Net, subset: tuple[int, ...], inputs: list[Tensor]) -> Tensor:
    return net.with_zeros(net.features(inputs), set(subset))


@BOTH
def test_every_subset_is_a_training_of_its_own(modalities: int) -> None:
    net, method = made("best-subset", modalities)
    subsets = method.subsets
    assert len(set(subsets)) == 2**modalities - 1 and subsets[-1] == tuple(range(modalities))
    nets = [copy.deepcopy(net) for _ in subsets]
    peers = [plain_sgd(twin) for twin in nets]
    for step in range(4):
        if step == 2:  # as a scheduler does
            for group in (*method.optimizer.param_groups, *(g for peer in peers for g in peer.param_groups)):
                group["lr"] = LR / 4
        inputs, labels = batch(modalities, seed=step)
        losses = []
        for twin, peer, subset in zip(nets, peers, subsets, strict=True):
            peer.zero_grad()
            loss = cross_entropy(subset_logits(twin, subset, inputs), labels)
            loss.backward()
            peer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(method.step(inputs, labels), losses[-1], rtol=1e-12, atol=0.0)
        assert_same(net, nets[-1])
    held, held_labels = batch(modalities, seed=99)
    method.update(*batch(modalities), held_out=(held, held_labels))
    with torch.no_grad():
        expected = [cross_entropy(subset_logits(n, s, held), held_labels) for n, s in zip(nets, subsets, strict=True)]
    torch.testing.assert_close(method.held_out_losses(), torch.stack(expected), rtol=1e-9, atol=0.0)

    start = network(modalities)[0]
    for m in range(modalities):  # every encoder was left alone where it is missing
        alone = method.weights[subsets.index((m,))]
        names = [name for name, _ in net.named_parameters()]
        for name, weight, first in zip(names, alone, start.parameters(), strict=True):
            missing = name.startswith("encoders.") and not name.startswith(f"encoders.{m}.")
            assert torch.equal(weight, first) == missing, name


@BOTH
def test_the_best_one_is_judged(modalities: int) -> None:
    """The last modality alone tells the class outside of training; training samples say the same of all."""
    net, method = made("best-subset", modalities)
    with method.evaluating():
        assert method.inside == len(method.subsets) - 1, "nothing to choose by"
    for step in range(12):
        method.step(*batch(modalities, seed=step, count=24))
    held, labels = batch(modalities, seed=99, count=60)
    misled = [x.roll(1, 0) for x in held[:-1]] + held[-1:]
    for xs, subset in ((misled, (modalities - 1,)), (held, None)):
        method.update(*batch(modalities), held_out=(xs, labels))
        losses = method.held_out_losses().tolist()
        chosen = losses.index(min(losses))
        assert subset is None or method.subsets[chosen] == subset
        before = [p.detach().clone() for p in net.parameters()]
        with method.evaluating(), torch.no_grad():
            judged = net(*xs)
            loss = cross_entropy(judged, labels).item()
            noise = [x if m in method.subsets[chosen] else torch.randn_like(x) for m, x in enumerate(xs)]
            assert torch.equal(net(*noise), judged), "other modalities are not read"
        assert loss == pytest.approx(min(losses), rel=1e-12)
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        with torch.no_grad():
            assert torch.equal(net(*xs), judged) == (chosen == len(losses) - 1)


def test_subsets_have_buffers_of_their_own_and_a_nan_is_not_the_best() -> None:
    net, blocks = network(2)
    net.encoders[0].append(nn.BatchNorm1d(4).double())
    blocks = Blocks(net, {"a": list(net.encoders[0]), "b": list(net.encoders[1])}, fuse=blocks.fuse)
    other = copy.deepcopy(net)
    joint = Blocks(
        other, {"a": list(other.encoders[0]), "b": list(other.encoders[1])}, lambda z: other.head(torch.cat(z, 1))
    )
    method, twin = make_method("best-subset", blocks, sgd(blocks)), make_method("joint", joint, sgd(joint))
    for step in range(3):
        method.step(*batch(2, seed=step))
        twin.step(*batch(2, seed=step))
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), f"{name}: all modalities together are joint training"
    assert net.encoders[0][2].num_batches_tracked == 3
    method.update(*batch(2), held_out=batch(2, seed=9))
    best = method.best()
    method.weights[best][0].fill_(float("nan"))
    if best == len(method.subsets) - 1:
        next(net.parameters()).data.fill_(float("nan"))
    assert method.best() != best


def test_more_than_four_modalities_are_too_many() -> None:
    with pytest.raises(ValueError, match="5 modalities have 31 subsets; at most 4"):
        made("best-subset", 5)


# -- modality dropout --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_modality_dropout_by_hand(modalities: int, probability: float) -> None:
    net, method = made("modality-dropout", modalities, probability=probability)
    twin = copy.deepcopy(net)
    peer = plain_sgd(twin)
    generator = torch.Generator().manual_seed(0)
    lost = 0
    for step in range(4):
        inputs, labels = batch(modalities, seed=step)
        loss = method.step(inputs, labels)
        u = torch.rand(modalities, len(labels), generator=generator)
        keep = torch.ones(modalities, len(labels), dtype=torch.float64)
        for i in range(len(labels)):
            gone = [m for m in range(modalities) if u[m, i] < probability]
            if len(gone) == modalities:
                lost += 1
                gone.remove(int(u[:, i].argmax()))
            keep[gone, i] = 0.0
        peer.zero_grad()
        features = [z * keep[m][:, None] for m, z in enumerate(twin.features(inputs))]
        expected = cross_entropy(twin.head(torch.cat(features, 1)), labels)
        expected.backward()
        peer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0.0)
        assert_same(net, twin)
    assert (lost > 0) == (probability > 0.0)
    inputs, _ = batch(modalities)
    assert torch.equal(net(*inputs), net.head(torch.cat(net.features(inputs), 1))), "outside of a step nothing is"


def test_how_often_modalities_are_dropped() -> None:
    _, method = made("modality-dropout", 3, probability=0.5)
    keep = method.draw(20000)
    assert keep.any(0).all()
    # p - p^3 / 3 each; the standard error of a share is 0.0035
    torch.testing.assert_close(
        (~keep).double().mean(1), torch.full((3,), 0.5 - 0.5**3 / 3).double(), rtol=0, atol=0.015
    )
    other = make_method("modality-dropout", method.blocks, sgd(method.blocks), probability=0.5, seed=1)
    assert not torch.equal(other.draw(20000), keep)


def test_frames_in_the_batch_belong_to_their_sample() -> None:
    """Encoders that return ``[B * T, C]``, and a fusion that takes the mean over T."""
    net, _ = network(2)
    frames = 3

    def fuse(features: list[Tensor]) -> Tensor:
        return net.head(torch.cat([z.unflatten(0, (-1, frames)).mean(1) for z in features], 1))

    net.forward = lambda *inputs: fuse(net.features([x.repeat_interleave(frames, 0) for x in inputs]))
    seen: list[Tensor] = []
    blocks = Blocks(net, dict(zip("ab", map(list, net.encoders), strict=True)), fuse=fuse)
    method = make_method("modality-dropout", blocks, sgd(blocks), probability=0.5)
    net.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    inputs, labels = batch(2)
    method.step(inputs, labels)
    keep = make_method("modality-dropout", blocks, sgd(blocks), probability=0.5).draw(len(labels))
    for m, z in enumerate(seen[0].split(4, 1)):
        assert torch.equal((z != 0.0).all(1), keep[m]) and torch.equal((z != 0.0).any(1), keep[m])
    net.forward = lambda *inputs: fuse(net.features([x[:9] for x in inputs]))
    with pytest.raises(ValueError, match=r"the last block of 'a' has features of shape \[9, 4\] for a batch of 12"):
        method.step(inputs, labels)
    method.optimizer.zero_grad()
    net.forward = Net.forward.__get__(net)
    assert torch.isfinite(net(*inputs)).all()


# -- all of them -------------------------------------------------------------------------------------------------------

ALL = pytest.mark.parametrize("name", ["train-on-held", "best-subset", "modality-dropout"])


@ALL
def test_they_run_under_autocast(name: str) -> None:
    """Casts of weights are kept while autocast lasts, and must not be those of another subset."""

    def trained(whole_loop: bool) -> list[Tensor]:
        net, method = made(name)
        net.float()
        _, blocks = network(2)
        blocks = Blocks(net, method.blocks.encoders, fuse=method.blocks.fuse)
        method = make_method(name, blocks, ak.AIMFusedOptimizer(blocks.param_groups(), lr=1e-2))
        held, held_labels = batch(2, seed=9)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=True, cache_enabled=whole_loop):
            for step in range(3):
                inputs, labels = batch(2, seed=step)
                method.update([x.float() for x in inputs], labels, held_out=([x.float() for x in held], held_labels))
                assert method.step([x.float() for x in inputs], labels).isfinite()
                torch.clear_autocast_cache()  # as leaving autocast after every step would
        with method.evaluating():
            return [p.detach().clone() for p in net.parameters()]

    for p, q in zip(trained(True), trained(False), strict=True):
        assert torch.equal(p, q)


@ALL
def test_they_train_networks_with_an_encode_of_their_own(name: str) -> None:
    net, _ = network(3)

    class Fusion(nn.Module):
        def forward(self, features: list[Tensor]) -> Tensor:
            return net.head(torch.cat([2.0 * z for z in features], 1))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoders, self.head, self.fusion = net.encoders, net.head, Fusion()

        def encode(self, *inputs: Tensor) -> list[Tensor]:
            return [z + 1.0 for z in net.features(inputs)]

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.fusion(self.encode(*inputs))

    model = Whole()
    encoders = dict(zip("abc", map(list, net.encoders), strict=True))
    blocks = Blocks(model, encoders, fuse=model.fusion, encode=model.encode)
    method = make_method(name, blocks, sgd(blocks))
    seen: list[list[Tensor]] = []
    model.fusion.register_forward_pre_hook(lambda _module, args: seen.append([z.detach() for z in args[0]]))
    before = [p.detach().clone() for p in model.parameters()]
    rows = method.optimizer.tables.rows.clone()
    method.update(*batch(3), held_out=batch(3, seed=1))
    assert method.step(*batch(3)).isfinite()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    own = [column for name, column in ROW.items() if not name.startswith("tau")]
    assert torch.equal(method.optimizer.tables.rows[:, own], rows[:, own]), "no rows are written"
    assert len(seen) == (7 if name == "best-subset" else 1), "one pass a network"
    with blocks.treated(lambda m, z: torch.zeros_like(z) if m else z):
        outputs = blocks.forward(*batch(3))
    assert [bool(z.any()) for z in outputs.features] == [True, False, False], "what is treated is what the fusion gets"
    torch.testing.assert_close(outputs.logits, model.fusion(outputs.features), rtol=1e-12, atol=0.0)
