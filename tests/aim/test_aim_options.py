"""Options of AIM: schedules, rules, the guard, regression, modalities that are missing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from aim_helpers import CLASSES, DOMINANT_A, batch, build, fixed, phase_rows, train
from torch import Tensor, nn

from aim_kernels.aim import (
    AIM,
    Constant,
    CosineOut,
    CustomProbe,
    CustomSchedule,
    Gap,
    LinearOut,
    Margin,
    Ratio,
    Schedule,
    block_param_groups,
)
from aim_kernels.aim.samples import binned
from aim_kernels.aim.strengths import Guard, Measured, margin_errors, margins
from aim_kernels.optim.optimizer import AIMFusedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Constant(), [1.0] * 8),
        (Constant(warmup_updates=2), [0.0, 0.5] + [1.0] * 6),
        (LinearOut(total_updates=5), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]),
        (LinearOut(total_updates=7, warmup_updates=2), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (CosineOut(total_updates=5), [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0, 0.0, 0.0, 0.0]),
        (
            CustomSchedule(function=lambda update: 1 / (1 + update), warmup_updates=4),
            [0.0, 0.125, 1 / 6, 3 / 16, 1 / 5, 1 / 6, 1 / 7, 1 / 8],
        ),
    ],
)
def test_schedules(schedule: Schedule, factors: list[float]) -> None:
    assert [schedule(update) for update in range(8)] == pytest.approx(factors, abs=1e-12)


def test_a_schedule_scales_what_is_written() -> None:
    model, optimizer = build()
    schedule = LinearOut(total_updates=4, warmup_updates=1)
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, alpha=1.0, schedule=schedule)
    kappas = [aim.update(*batch()).kappa["a"][0] for _ in range(4)]
    assert kappas == pytest.approx([0.0, kappas[1], kappas[1] / 2, 0.0])
    assert kappas[1] > 0.3
    assert phase_rows(optimizer, "a", 0, True) == ({}, {})


def test_margins_by_hand() -> None:
    scores = {"a": [0.8, 0.5], "b": [0.5, 0.4, 0.9]}
    outside = {"a": [0.4, 0.5], "b": [0.45, 0.4, 0.6]}
    # lost shares: a 1/2, 0; b 1/10, 0, 1/3
    found = margins(scores, outside)
    assert found["a"] == pytest.approx([1 + 0.5 - 0.1, 1 + 0.0 - 1 / 3])
    assert found["b"] == pytest.approx([1 + 0.1 - 0.5, 1 + 0.0 - 0.25, 1 + 1 / 3])
    exact = {m: [0.0] * len(row) for m, row in scores.items()}
    measured, held_out = Measured(scores, exact), Measured(outside, exact)
    table = Margin(confidence=0.0, dead_zone=0.1).assess(0, measured, held_out, scores, alpha=1.0)
    assert table.kappa["a"] == pytest.approx([math.tanh(0.3), 0.0])
    assert table.weak_kappa["a"] == pytest.approx([0.0, math.tanh(1 / 3 - 0.1)])
    assert (table.dominant, table.weak) == (("a",), ("b",))
    # a loses 0.4 / 0.8 with relative errors of 0.05 and 0.12; b's are exact
    spread = [Measured(s, {**exact, "a": [e, 0.0]}) for s, e in ((scores, 0.04), (outside, 0.048))]
    assert margin_errors(*spread)["a"] == pytest.approx([0.5 * 0.13, 0.0])
    assert margin_errors(*spread)["b"] == pytest.approx([0.5 * 0.13, 0.25 * 0.13, 0.0])
    third = margins({"a": [1.0], "b": [1.0], "c": [1.0]}, {"a": [0.4], "b": [0.8], "c": [1.0]})
    assert third == {"a": pytest.approx([1.5]), "b": pytest.approx([0.9]), "c": pytest.approx([0.6])}


def test_the_margin_rule_finds_a_shortcut() -> None:
    inputs, labels = batch(96)
    for shortcut, found in ((True, ()), (False, ("b",))):
        model, optimizer = build()
        train(model, optimizer, 150)
        held_out = batch(96, seed=1, shortcut=shortcut)
        table = AIM(model, optimizer, CLASSES, rule="margin").update(inputs, labels, held_out=held_out)
        assert table.dominant == found
        assert table.rule == "margin"


def test_the_guard_halves_and_gives_back() -> None:
    guard = Guard()
    steps = [(1.0, False), (2.0, True), (3.0, True), (2.5, True), (2.6, False), (math.nan, True), (1.0, True)]
    factors = [1.0, 0.5, 0.25, 0.35, 0.45, 0.225, 0.1125]  # nothing is known to be lower than NaN
    assert [guard.update(*step) for step in steps] == pytest.approx(factors)
    for number in range(5):
        guard.update(2.0 + number, True)
    assert guard.factor == 0.0
    assert guard.update(1.0, False) == pytest.approx(0.1)


def test_the_guard_watches_the_held_out_joint_loss() -> None:
    model, optimizer = build(normalization=nn.LayerNorm(8))
    options = {"probe": DOMINANT_A, "rule": "ratio", "alpha": 1.0, "batch_size": 7}
    aim = AIM(model, optimizer, CLASSES, guard=True, **options)
    inputs, labels = batch(seed=1)
    full = aim.update(*batch(), held_out=(inputs, labels)).kappa["a"][0]
    assert aim.guard is not None
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model.eval()(*inputs), labels).item()
    assert aim.guard.loss == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        model.head.weight.mul_(-3.0)
    assert aim.update(*batch(), held_out=(inputs, labels)).kappa["a"][0] == pytest.approx(full / 2)
    state = copy.deepcopy(aim.state_dict())
    with torch.no_grad():
        model.head.weight.mul_(0.1)
    assert aim.update(*batch(), held_out=(inputs, labels)).kappa["a"][0] == pytest.approx(0.6 * full)
    again = AIM(model, optimizer, CLASSES, guard=True, **options)
    again.load_state_dict(state)
    assert again.update(*batch(), held_out=(inputs, labels)).kappa["a"][0] == pytest.approx(0.6 * full)
    with pytest.raises(ValueError, match="guard=True watches the held-out loss; pass held_out"):
        aim.update(*batch())
    with pytest.raises(ValueError, match="needs held-out labels"):
        aim.update(*batch(), held_out=(inputs, None))


# -- regression -----------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Sequential(nn.Linear(3, 16), nn.Tanh()), nn.Sequential(nn.Linear(16, 8), nn.Tanh()))
        self.b = nn.Sequential(nn.Linear(3, 16), nn.Tanh())
        self.head = nn.Linear(24, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(a), self.b(b)], 1))


def samples(seed: int, *, shortcut: bool) -> tuple[list[Tensor], Tensor]:
    """b shows the target, or (without ``shortcut``) another one; a shows it noisily."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(120, 1, generator=generator)
    a = y + 1.5 * torch.randn(120, 3, generator=generator)
    b = (y if shortcut else y[torch.randperm(120, generator=generator)]).repeat(1, 3)
    return [a, b], y


@pytest.mark.parametrize("probe", ["prototypes", "linear"])
def test_regression_goes_by_quantiles(probe: str) -> None:
    torch.manual_seed(0)
    model = Regression()
    optimizer = AIMFusedOptimizer(block_param_groups(model, {"a": list(model.a), "b": [model.b]}), lr=1e-2)
    inputs, y = samples(0, shortcut=True)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(*inputs), y).backward()
        optimizer.step()
    # prototypes of features in [-1, 1] lie close together, and so do their scores
    options: dict[str, Any] = {
        "targets": "quantiles",
        "loss": nn.functional.mse_loss,
        "probe": probe,
    }
    aim = AIM(model, optimizer, 3, rule=Gap(confidence=0.0, dead_zone=0.05), guard=True, **options)
    confirmed = aim.update(inputs, y, held_out=samples(1, shortcut=True))
    assert "b" not in confirmed.dominant
    table = aim.update(inputs, y, held_out=samples(1, shortcut=False))
    assert table.excess["b"][0] > 1.05 > confirmed.excess["b"][0]
    assert table.dominant == ("b",)
    flat = AIM(model, optimizer, 3, rule=Ratio(), **options)
    model.head.register_forward_hook(lambda _module, _args, out: out.flatten())
    assert flat.update(inputs, y.flatten()).scores["b"] == pytest.approx(confirmed.scores["b"], rel=1e-3)


def test_bins_hold_equally_many_and_their_means() -> None:
    y = torch.arange(12.0)[torch.randperm(12)]
    classes, means, edges = binned(y, 4)
    assert classes.tolist() == (y // 3).long().tolist()
    assert means.tolist() == [1.0, 4.0, 7.0, 10.0]
    assert edges.tolist() == [2.75, 5.5, 8.25]
    classes, means, _ = binned(torch.tensor([[0.0], [5.0], [5.0], [5.0]]), 4)  # some bins are empty
    assert means.shape == (4, 1)
    assert classes.unique().numel() == 2
    assert bool(torch.isfinite(means).all())


# -- missing modalities ---------------------------------------------------------------------------------------------


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, *inputs: Tensor | None) -> Tensor:
        features = [e(x) for e, x in zip(self.encoders, inputs, strict=True) if x is not None]
        return self.head(sum(features[1:], features[0]))


@pytest.mark.parametrize("probe", ["prototypes", "linear"])
def test_a_missing_modality_keeps_its_scores(probe: str) -> None:
    torch.manual_seed(0)
    model = Three()
    groups = block_param_groups(model, dict(zip("xyz", ([e] for e in model.encoders), strict=True)))
    optimizer = AIMFusedOptimizer(groups)
    labels = torch.arange(30) % CLASSES
    made = [nn.functional.one_hot(labels, 4) + s * torch.randn(30, 4) for s in (0.1, 1.0, 2.0)]
    outside = [x + 0.3 * torch.randn(30, 4) for x in made]
    aim = AIM(model, optimizer, CLASSES, probe=probe)
    with pytest.raises(ValueError, match="the input of 'y' is None, and there is no earlier update whose scores it"):
        aim.update([made[0], None, made[2]], labels)
    first = aim.update(made, labels)
    with pytest.raises(ValueError, match="no earlier update whose held-out scores it could keep"):
        aim.update([made[0], None, made[2]], labels, held_out=(outside, labels))
    first = aim.update(made, labels, held_out=(outside, labels))
    assert first.held_out_scores is not None
    for inputs, held_out in (
        ([outside[0], None, made[2]], outside),
        ([outside[2], *made[1:]], [made[0], None, outside[2]]),
    ):
        second = aim.update(inputs, labels, held_out=(held_out, labels))
        assert second.held_out_scores is not None
        assert second.scores["y"] == first.scores["y"]
        assert second.held_out_scores["y"] == first.held_out_scores["y"]
        assert second.scores["x"] != first.scores["x"]
        assert list(second.scores) == ["x", "y", "z"]
    assert aim.update([None, made[1], None], labels).scores["z"] == second.scores["z"]
    with pytest.raises(ValueError, match="inputs are all None"):
        aim.update([None] * 3, labels)


def test_a_callable_probe_sees_what_is_missing() -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, probe=fixed((0.2, 0.3), (0.4, 0.4, 0.4)))
    inputs, labels = batch()
    aim.update(inputs, labels)
    seen: list[Any] = []
    aim.probe = CustomProbe(function=lambda _net, x, y: (seen.append((x, y)), [[0.9, 0.9], [0.5, 0.5, 0.5]])[1])
    real = torch.randn(24, 2)
    table = aim.update([None, inputs[1]], real)
    assert table.scores == {"a": [0.2, 0.3], "b": [0.5, 0.5, 0.5]}
    assert seen[0][0][0] is None
    assert torch.equal(seen[0][1], real)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, "unknown schedule 'step'; it is one of 'constant', .* or a callable"),
        ({"schedule": "linear-out"}, r"ends with training; give LinearOut\(total_updates=...\), the number"),
        ({"schedule": "cosine-out"}, r"ends with training; give CosineOut\(total_updates=...\), the number"),
        ({"targets": "real"}, "unknown targets"),
        ({"targets": "quantiles"}, "targets='quantiles' needs a loss"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    model, optimizer = build()
    with pytest.raises(ValueError, match=message):
        AIM(model, optimizer, CLASSES, **options)


def test_label_errors() -> None:
    model, optimizer = build()
    inputs, labels = batch()
    with pytest.raises(ValueError, match="rule='margin' compares training with held-out scores"):
        AIM(model, optimizer, CLASSES, rule="margin").update(inputs, labels)
    with pytest.raises(ValueError, match=r"for real numbers use targets='quantiles'"):
        AIM(model, optimizer, CLASSES).update(inputs, labels.float())
    aim = AIM(model, optimizer, CLASSES, targets="quantiles", loss=nn.functional.mse_loss)
    with pytest.raises(ValueError, match=r"must be real numbers of shape \[B\] or \[B, 1\]"):
        aim.update(inputs, labels)
    with pytest.raises(ValueError, match="are not all finite"):
        aim.update(inputs, labels / 0.0)
    assert aim.history == []
