"""AIM on the protocol, the controls that are made of it, and OPM."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from method_helpers import (
    CLASSES,
    Net,
    assert_same,
    batch,
    cross_entropy,
    follow,
    made,
    network,
    sgd,
    true_probabilities,
)
from torch import Tensor

from aim_kernels import AIM, make_method
from aim_kernels.aim import Alternate, Split, Trial
from aim_kernels.methods.aim import AIMMethod
from aim_kernels.step.layout import PHASES, ROW

pytestmark = pytest.mark.usefixtures("one_thread")


def probe(*rows: tuple[float, float]) -> Any:
    return lambda _model, _inputs, _labels: rows


LED_BY_A = probe((0.6, 0.8), (0.4, 0.4))


def test_aim_as_a_method_is_aim() -> None:
    net, method = made("aim", probe=LED_BY_A, alpha=1.0)
    twin = copy.deepcopy(net)
    _, blocks = network(2)
    blocks = type(blocks)(twin, dict(zip("ab", map(list, twin.encoders), strict=True)), fuse=blocks.fuse)
    optimizer = sgd(blocks)
    aim = AIM(twin, optimizer, CLASSES, probe=LED_BY_A, alpha=1.0)
    for step in range(6):
        inputs, labels = batch(2, seed=step)
        if step % 3 == 0:
            assert repr(method.update(inputs, labels)) == repr(aim.update(inputs, labels))
        method.step(inputs, labels)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(*inputs), labels).backward()
        optimizer.step()
        assert_same(net, twin, rtol=0.0, atol=0.0)
    assert method.aim.history[0].dominant == ("a",) and method.writes_rows_only
    with method.evaluating(), optimizer.true_parameters():
        assert_same(net, twin, rtol=0.0, atol=0.0)


def test_aim_with_losses_of_the_modalities_own() -> None:
    """Nobody leads: what is left is joint training, with half of the other losses; led by one, "split" takes both."""
    net, method = made("aim", probe=probe((0.5, 0.5), (0.5, 0.5)), unimodal_weight=0.5)
    assert not method.writes_rows_only
    other, control = made("joint")
    for step in range(4):
        inputs, labels = batch(2, seed=step)
        method.update(inputs, labels)
        method.step(inputs, labels)
        control.optimizer.zero_grad()
        outputs = control.blocks.forward(inputs, labels)
        own = sum(cross_entropy(logits, labels) for logits in outputs.unimodal())
        (cross_entropy(outputs.logits, labels) + 0.5 * own).backward()
        control.optimizer.step()
    assert_same(net, other, rtol=1e-5, atol=1e-7)
    for weight in (0.0, 0.5):
        _, method = made("aim", probe=LED_BY_A, mixing="split", unimodal_weight=weight)
        inputs, labels = batch(2, seed=0)
        outputs = method.blocks.forward(inputs, labels)
        own = sum(cross_entropy(logits, labels) for logits in outputs.unimodal())
        expected = cross_entropy(outputs.logits, labels) + weight * own
        assert method.step(inputs, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_by_its_defaults_aim_measures_reliance_and_adds_nothing_to_the_loss() -> None:
    defaults = {name: p.default for name, p in inspect.signature(AIMMethod).parameters.items()}
    assert defaults["unimodal_weight"] == 0.0
    inputs, labels = batch(2)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "reliance"),
        ({"probe": LED_BY_A}, "gap"),
        ({"rule": Trial(steps=4)}, "trial"),
    )
    for options, rule in cases:
        _, method = made("aim", **options)
        steps: list[int] = []
        step = method.step
        method.step = lambda inputs, labels, steps=steps, step=step: (steps.append(len(labels)), step(inputs, labels))
        if "rule" not in options:
            assert method.update(inputs, labels).rule == "ratio" and not steps
        table = method.update(inputs, labels, held_out=batch(2, seed=1))
        assert table.rule == rule
        assert sum(steps) == (len(table.trial_losses) * len(labels) if rule == "trial" else 0)
    control, control_loss = (made(name, **options)[1] for name, options in (
        ("aim", {"unimodal_weight": 0.3}), ("sum-of-losses", {"unimodal_weight": 0.3})
    ))  # fmt: skip
    assert control.step(inputs, labels).item() == control_loss.step(inputs, labels).item()


def test_two_passes_are_asked_of_aim() -> None:
    _, method = made("aim", probe=LED_BY_A)
    inputs, labels = batch(2)
    asked = []

    def backward(closure: Any, run: Any) -> Tensor:
        for _ in range(2):
            loss = closure()
            run(loss)
            asked.append(loss.item())
        return loss

    method.aim.mixing, method.aim.backward = Split(), backward
    assert not method.writes_rows_only
    assert method.step(inputs, labels).item() == asked[0] == asked[1]


@pytest.mark.parametrize("mixing", [Alternate(probability=1.0), "weights"])
def test_no_mask_degrades_every_weight_of_a_dominant_block(mixing: Any) -> None:
    net, method = made("no-mask", probe=LED_BY_A, mixing=mixing, alpha=0.5)
    table = method.update(*batch(2))
    assert table.dominant == ("a",)
    for group, row in zip(method.optimizer.param_groups, method.optimizer.tables.rows, strict=True):
        for phase in PHASES:
            pairs = [
                [row[ROW[f"{phase}_{stage}_{c}"]].item() for c in ("under", "well")]
                for stage in ("grad", "step", "live")
            ]
            assert all(under == well for under, well in pairs), "no row tells classes apart"
        degraded = group["modality"] == "a" and group["modulated"]
        expected = 1.0 - table.kappa["a"][group["depth"]] if degraded else 1.0
        assert row[ROW["aux_live_well"]].item() == pytest.approx(expected, abs=1e-12)
    for _ in range(2):
        method.step(*batch(2))
    live = [p.detach().clone() for p in net.parameters()]
    with method.evaluating():
        for (name, p), seen in zip(net.named_parameters(), live, strict=True):
            depth = int(name.split(".")[2]) if "encoders" in name else 0
            degraded = "encoders.0" in name and p.dim() > 1
            expected = (1.0 - table.kappa["a"][depth]) * p if degraded else p
            torch.testing.assert_close(seen, expected.detach(), rtol=1e-12, atol=1e-15)


def test_no_mask_tries_rows_without_a_mask() -> None:
    """What is tried as it is is what is in force."""
    _, method = made("no-mask", rule=Trial(steps=2, confidence=1e9))
    method.aim.held_back = frozenset({"a"})
    seen = []
    step = method.step
    method.step = lambda *samples: (seen.append(method.optimizer.tables.rows.clone()), step(*samples))
    method.update(*batch(2), held_out=batch(2, seed=1))
    rows = method.optimizer.tables.rows
    assert torch.equal(seen[0], rows) and not torch.equal(seen[-1], rows)
    assert rows[:, ROW["aux_live_under"]].min() < 1e-5


@pytest.mark.parametrize("name", ["drop", "feature-scale"])
def test_dominant_features_are_dropped_or_scaled_in_training_only(name: str) -> None:
    net, method = made(name, probe=LED_BY_A, alpha=0.5)
    neutral = method.optimizer.tables.rows.clone()
    kappa = sum(method.update(*batch(2)).kappa["a"]) / 2
    inputs, labels = batch(2, count=3000)
    net.eval()
    plain = net.features(inputs)
    net.train()
    a, b = method.blocks.forward(inputs, labels).features
    assert torch.equal(b, plain[1])
    if name == "feature-scale":
        torch.testing.assert_close(a, plain[0] * (1.0 - kappa), rtol=1e-12, atol=0.0)
    else:
        dropped = (a == 0.0).all(1)
        assert torch.equal(a[~dropped], plain[0][~dropped])
        assert abs(dropped.double().mean() - kappa) < 0.05  # five standard errors of 3000 draws
    assert torch.equal(method.optimizer.tables.rows, neutral)
    method.remove()
    assert torch.equal(net.features(inputs)[0], plain[0])


def opm(alpha: float, base: float, probability: float) -> Any:
    def step(net: Net, peer: Any, inputs: list[Tensor], labels: Tensor, memory: dict[str, Any]) -> None:
        draws = memory.setdefault("draws", torch.Generator().manual_seed(0))
        peer.zero_grad()
        features = net.features(inputs)
        count, modalities = len(labels), len(features)
        if probability < 1.0 and torch.rand((), generator=draws).item() >= probability:
            cross_entropy(net(*inputs), labels).backward()
            peer.step()
            return
        s = [sum(true_probabilities(x, labels)) for x in net.own_logits(features)]
        q = []
        for m in range(modalities):
            r = s[m] * (modalities - 1) / (sum(s) - s[m])
            q.append(min(base * (1 + alpha * math.tanh(r - 1)), 1.0) if r > 1 else 0.0)
        theta = sum(q) / modalities  # all features are equally wide
        kept = (torch.rand(modalities, count, generator=draws).double() >= torch.tensor(q).double()[:, None]).tolist()
        left = [torch.stack([z[i] * kept[m][i] / (1 - theta) for i in range(count)]) for m, z in enumerate(features)]
        cross_entropy(net.head(torch.cat(left, 1)), labels).backward()
        peer.step()

    return step


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_opm(modalities: int, probability: float) -> None:
    follow("opm", opm(0.8, 0.4, probability), modalities, alpha=0.8, base=0.4, probability=probability)


def test_opm_drops_nothing_where_modalities_are_equally_good_or_outside_of_its_epochs() -> None:
    net, method = made("opm", probability=1.0, base=1.0, starts=1, ends=1)
    inputs, labels = batch(2)
    outputs = method.blocks.forward(inputs, labels)
    torch.testing.assert_close(method.loss(outputs), cross_entropy(outputs.logits, labels), rtol=1e-12, atol=0.0)
    method.update(inputs, labels)
    method.update(inputs, labels)
    assert method.probabilities(outputs).max() == 1.0, "else the loss above says nothing"
    assert not torch.isclose(method.loss(outputs), cross_entropy(outputs.logits, labels))
    method.update(inputs, labels)
    torch.testing.assert_close(method.loss(outputs), cross_entropy(outputs.logits, labels), rtol=1e-12, atol=0.0)
    method.ends = None
    net.head.weight.data[:, 4:] = net.head.weight.data[:, :4]
    same = type(outputs)(
        outputs.blocks, [outputs.features[0]] * 2, net.head(torch.cat([outputs.features[0]] * 2, 1)), labels
    )
    assert method.probabilities(same).tolist() == [0.0, 0.0]
    torch.testing.assert_close(method.loss(same), cross_entropy(same.logits, labels), rtol=1e-12, atol=0.0)


def test_no_mask_takes_aims_options() -> None:
    _, blocks = network(2)
    with pytest.raises(ValueError, match="unknown mixing"):
        make_method("no-mask", blocks, sgd(blocks), num_classes=CLASSES, mixing="nothing")
    with pytest.raises(ValueError, match="mixing='features' tells classes apart by itself"):
        make_method("no-mask", blocks, sgd(blocks), num_classes=CLASSES, mixing="features")
