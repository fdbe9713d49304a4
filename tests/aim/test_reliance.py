"""``AIM(rule="reliance")``: what the loss rests on, and who is held back where held-out samples do not confirm it."""

from __future__ import annotations

import functools
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aim_helpers import CLASSES, batch, build, train
from torch import Tensor, nn

from aim_kernels.aim import AIM, Reliance, block_param_groups
from aim_kernels.aim.inputs import Inputs
from aim_kernels.aim.reliance import Unconfirmed, judge, piece_losses, unconfirmed
from aim_kernels.aim.samples import Samples
from aim_kernels.aim.strengths import KAPPA_MAX, Measured
from aim_kernels.optim.optimizer import AIMFusedOptimizer

cross_entropy = nn.functional.cross_entropy


def measured(**rows: tuple[float, float]) -> Measured:
    """Reliances and their errors."""
    return Measured({m: [row[0]] for m, row in rows.items()}, {m: [row[1]] for m, row in rows.items()})


class Sum(nn.Module):
    """Logits that are sums over any number of modalities, in float64."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(2, CLASSES)) for _ in range(count))
        self.double()

    def forward(self, *inputs: Tensor | None) -> Any:
        return torch.stack([part(x) for part, x in zip(self.parts, inputs, strict=True) if x is not None]).sum(0)


def summed(count: int, **options: Any) -> tuple[Sum, AIM]:
    torch.manual_seed(0)
    model = Sum(count)
    groups = block_param_groups(model, {f"m{number}": [part] for number, part in enumerate(model.parts)})
    return model, AIM(model, AIMFusedOptimizer(groups), CLASSES, rule=Reliance(**options))


def random_samples(count: int, modalities: int, seed: int) -> tuple[list[Tensor | None], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs: list[Tensor | None] = [
        torch.randn(count, 2, generator=generator, dtype=torch.float64) for _ in range(modalities)
    ]
    return inputs, torch.randint(CLASSES, (count,), generator=generator)


def losses_with(model: nn.Module, inputs: Any, labels: Tensor, places: Tensor, intact: set[int]) -> Tensor:
    """Mean losses of 16 pieces; inputs that are not intact trade places."""
    logits = model(*(x if number in intact else x[places] for number, x in enumerate(inputs)))
    each = cross_entropy(logits, labels, reduction="none").tensor_split(16)
    return torch.stack([piece.mean() for piece in each]).detach()


# -- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [2, 3])
def test_reliance_is_half_of_what_is_lost_without_it_and_half_of_what_it_gives_alone(modalities: int) -> None:
    model, aim = summed(modalities)
    samples = random_samples(37, modalities, 0)
    held_out = random_samples(23, modalities, 1)
    order = torch.Generator().manual_seed(0)
    table = aim.update(*samples, held_out=held_out)
    for (inputs, labels), scores, errors in (
        (samples, table.scores, table.errors),
        (held_out, table.held_out_scores, table.held_out_errors),
    ):
        assert scores is not None
        places = torch.randperm(len(labels), generator=order)
        losses = functools.partial(losses_with, model, inputs, labels, places)
        everything = set(range(modalities))
        for number in everything:
            found = (losses(everything - {number}) - losses(everything)) / 2 + (losses(set()) - losses({number})) / 2
            assert scores[f"m{number}"] == [pytest.approx(float(found.mean()), rel=1e-12)]
            assert errors[f"m{number}"] == [pytest.approx(float(found.std()) / 4, rel=1e-12)]


def test_with_two_modalities_reliances_add_up_to_what_all_inputs_take_off_the_loss() -> None:
    model, aim = summed(2)
    inputs, labels = random_samples(64, 2, 0)
    places = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    table = aim.update(inputs, labels, held_out=random_samples(64, 2, 1))
    with torch.no_grad():
        whole = cross_entropy(model(*(x[places] for x in inputs if x is not None)), labels)
        whole -= cross_entropy(model(*inputs), labels)
    assert sum(row[0] for row in table.scores.values()) == pytest.approx(float(whole), rel=1e-12)


def test_batches_and_pieces_do_not_change_what_is_measured() -> None:
    tables = []
    for batch_size in (1, 7, 512):
        _, aim = summed(2)
        aim.scoring.__dict__["batch_size"] = batch_size
        tables.append(aim.update(*random_samples(50, 2, 0), held_out=random_samples(19, 2, 1)))
    for other in tables[1:]:
        for m in tables[0].scores:
            assert other.scores[m] == pytest.approx(tables[0].scores[m], rel=1e-12)
            assert other.errors[m] == pytest.approx(tables[0].errors[m], rel=1e-10)


def wrapped(returned: Any, read: Any) -> tuple[list[int], Tensor, Tensor]:
    """Sizes of the calls of a model that returns something else than its logits, its losses, and those of the logits
    alone."""
    model, aim = summed(2)
    samples = Samples(Inputs(tuple(random_samples(40, 2, 0)[0])), random_samples(40, 2, 0)[1])
    plain, calls = piece_losses(aim, samples, 16), []

    def forward(*inputs: Tensor) -> Any:
        calls.append(len(inputs[0]))
        return returned(model(*inputs))

    aim.scoring.__dict__["loss"] = lambda outputs, labels: cross_entropy(read(outputs), labels)
    aim.model = nn.Module()
    aim.model.forward = forward
    return calls, piece_losses(aim, samples, 16), plain


@pytest.mark.parametrize(
    ("returned", "read"),
    [
        (lambda z: {"logits": z, "hidden": None}, lambda out: out["logits"]),
        (lambda z: (z, z.sum(1)), lambda out: out[0]),
        (lambda z: [z[:, None], {"a": z}], lambda out: out[1]["a"]),
    ],
)
def test_outputs_of_several_tensors_are_computed_at_once(returned: Any, read: Any) -> None:
    calls, found, plain = wrapped(returned, read)
    assert calls == [40, 1] and torch.allclose(found, plain, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("returned", "read"),
    [
        (lambda z: (z, z.mean()), lambda out: out[0]),
        (lambda z: z[None], lambda out: out[0]),  # [T, B, C]
        (lambda z: (z, torch.ones(40, 3)), lambda out: out[0] + out[1].sum() - 120.0),  # as many rows by chance
        (lambda z: SimpleNamespace(logits=z), lambda out: out.logits),
        (lambda z: (z, z @ z.T), lambda out: out[0]),  # of pairs
    ],
)
def test_outputs_that_cannot_be_cut_are_computed_piece_by_piece(returned: Any, read: Any) -> None:
    calls, found, plain = wrapped(returned, read)
    assert [n for n in calls if n < 4 and n > 1] == [3] * 8 + [2] * 8
    assert torch.allclose(found, plain, rtol=1e-12, atol=0.0)


# -- what is decided --------------------------------------------------------------------------------------------------


def test_unconfirmed_shares() -> None:
    train_, held_out = measured(a=(0.6, 0.02), b=(1.2, 0.03)), measured(a=(0.3, 0.04), b=(0.06, 0.05))
    found = unconfirmed(train_, held_out, 3.0)
    q = 0.3 / 0.6
    assert found.shares == {"a": pytest.approx(0.0), "b": pytest.approx((q * 1.2 - 0.06) / 1.8)}
    assert found.errors["b"] == pytest.approx(math.hypot(q * 0.03, 0.05) / 1.8)
    assert found.sure == {"a", "b"}


@pytest.mark.parametrize(
    ("a", "b", "shares"),
    [
        # what nothing outside confirms counts whole; what harms outside counts no more than that
        (((0.0, 0.1), (0.5, 0.01)), ((0.0, 0.1), (-0.4, 0.01)), (0.0, 1.0)),
        # more is gained outside than inside: memorizing takes nothing off
        (((0.2, 0.01), (0.6, 0.01)), ((0.4, 0.01), (0.0, 0.01)), (-0.25, 0.75)),
        # nothing is relied on
        (((0.0, 0.1), (-0.1, 0.01)), ((0.1, 0.1), (0.1, 0.01)), (0.0, 0.0)),
    ],
)
def test_edges_of_shares(a: Any, b: Any, shares: tuple[float, float]) -> None:
    found = unconfirmed(measured(a=a[0], b=a[1]), measured(a=b[0], b=b[1]), 3.0)
    assert tuple(found.shares.values()) == pytest.approx(shares)


def test_strengths() -> None:
    def strengths(
        *shares: float, error: float = 0.01, sure: str = "abc", helpful: str = "", wholly: bool = True
    ) -> list[float]:
        names = "abc"[: len(shares)]
        found = Unconfirmed(
            dict(zip(names, shares, strict=True)), dict.fromkeys(names, error), frozenset(sure), frozenset(helpful)
        )
        return list(judge(found, 3.0, 0.05, 0.2, 0.9, wholly).values())

    assert strengths(0.07, 0.09, 0.24) == [0.0, 0.9, 1.0], "above a limit by three errors"
    assert strengths(0.4, 0.4, error=0.2) == [0.0, 0.0], "chance"
    assert strengths(0.9, 0.0, sure="b") == [0.0, 0.0], "not relied on for sure"
    assert strengths(0.3, 0.5) == [0.0, 1.0], "never all at once"
    assert strengths(0.3, 0.5, 0.4) == [0.0, 1.0, 1.0]
    assert strengths(0.0, 0.5, helpful="b") == [0.0, 0.9], "it helps outside"
    assert strengths(0.0, 0.5, wholly=False) == [0.0, 0.9], "the head would not fit"


def test_the_honest_modality_stays_and_the_shortcut_goes_also_late() -> None:
    inputs, labels = batch(600)
    for (steps, shortcut), seed in itertools.product(((20, False), (150, False), (150, True)), range(3)):
        model, optimizer = build(seed)
        train(model, optimizer, steps)
        held_out = batch(600, seed=1, shortcut=shortcut)
        table = AIM(model, optimizer, CLASSES, seed=seed).update(inputs, labels, held_out=held_out)
        assert table.rule == "reliance"
        assert table.kappa["b"][0] == 0.0 if shortcut else table.kappa["b"][0] >= 0.9
        assert len(set(table.kappa["b"])) == 1 and table.kappa["a"] == [0.0] * 2
        assert table.dominant == (() if shortcut else ("b",))


def test_an_untrained_network_relies_on_nothing() -> None:
    for seed in range(5):
        model, optimizer = build(seed)
        table = AIM(model, optimizer, CLASSES, seed=seed).update(*batch(96), held_out=batch(96, seed=1, shortcut=False))
        assert table.dominant == ()


# -- around it --------------------------------------------------------------------------------------------------------


def test_a_missing_modality_keeps_its_strength() -> None:
    model, optimizer = build()
    train(model, optimizer, 150)
    aim = AIM(model, optimizer, CLASSES, rule="reliance")
    (inputs, labels), (others, classes) = batch(600), batch(600, seed=1, shortcut=False)
    first = aim.update(inputs, labels, held_out=(others, classes))
    assert first.dominant == ("b",)
    model.features = lambda a, b: [model.a(a), model.head.weight.new_zeros(len(a), 8) if b is None else model.b(b)]
    second = aim.update([inputs[0], None], labels, held_out=([others[0], None], classes))
    assert second.kappa == first.kappa and second.dominant == ("b",)
    assert all(math.isnan(score) for score in second.scores["b"]) and not math.isnan(second.scores["a"][0])


def test_nothing_is_left_of_a_measurement() -> None:
    model, optimizer = build(normalization=nn.BatchNorm1d(8))
    with pytest.warns(UserWarning, match="running statistics"):
        aim = AIM(model, optimizer, CLASSES)
    train(model, optimizer, 20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state, training = torch.get_rng_state(), [module.training for module in model.modules()]
    aim.update(*batch(96), held_out=batch(96, seed=1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert training == [module.training for module in model.modules()]


def test_a_resumed_run_measures_the_same() -> None:
    model, optimizer = build()
    train(model, optimizer, 30)
    aim = AIM(model, optimizer, CLASSES)
    arguments: Any = batch(60), {"held_out": batch(60, seed=1, shortcut=False)}
    aim.update(*arguments[0], **arguments[1])
    again = AIM(model, optimizer, CLASSES, seed=9)
    again.load_state_dict(aim.state_dict())
    assert aim.update(*arguments[0], **arguments[1]).to_dict() == again.update(*arguments[0], **arguments[1]).to_dict()


def test_a_schedule_scales_what_is_set() -> None:
    model, optimizer = build()
    train(model, optimizer, 150)
    aim = AIM(model, optimizer, CLASSES, schedule=lambda update: 0.5)
    table = aim.update(*batch(600), held_out=batch(600, seed=1, shortcut=False))
    plain = AIM(model, optimizer, CLASSES).update(*batch(600), held_out=batch(600, seed=1, shortcut=False))
    assert 0.0 < table.kappa["b"][0] == 0.5 * plain.kappa["b"][0]


def test_labels_of_regression() -> None:
    torch.manual_seed(0)
    model = Sum(2)
    groups = block_param_groups(model, {"a": [model.parts[0]], "b": [model.parts[1]]})
    aim = AIM(model, AIMFusedOptimizer(groups), CLASSES, rule="reliance", loss=nn.functional.mse_loss)
    (inputs, _), (others, _) = random_samples(200, 2, 0), random_samples(200, 2, 1)
    with torch.no_grad():
        targets = model(*inputs)
        outside = model(others[0], others[1][torch.randperm(200)])  # type: ignore[index]
    assert aim.update(inputs, targets, held_out=(others, outside)).dominant == ("b",)


def test_a_head_that_does_not_fit_the_true_weights_is_not_kept_from_them() -> None:
    """Held back wholly, the network never sees the true features of a modality."""
    model, optimizer = build()
    train(model, optimizer, 150)
    arguments: Any = batch(600), {"held_out": batch(600, seed=1, shortcut=False)}
    aim = AIM(model, optimizer, CLASSES, rule=Reliance(whole_above=0.0))
    assert aim.update(*arguments[0], **arguments[1]).kappa["b"][0] == KAPPA_MAX
    train(model, optimizer, 2)  # which writes live weights
    table = aim.update(*arguments[0], **arguments[1])
    assert table.trial_losses["true weights"] < table.trial_losses["live weights"], "b is missed"
    assert table.kappa["b"][0] == KAPPA_MAX

    def turned(factor: float) -> None:
        """True weights whose features the head does not expect; 1 / factor turns them back."""
        with torch.no_grad(), optimizer.true_parameters():
            model.b[0][0].weight.mul_(factor)

    turned(-4.0)
    table = aim.update(*arguments[0], **arguments[1])
    assert table.trial_losses["true weights"] > table.trial_losses["live weights"]
    assert KAPPA_MAX not in table.kappa["b"]
    turned(-0.25)
    assert aim.update(*arguments[0], **arguments[1]).kappa["b"][0] == 0.9, "it may come again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partial": 1.5}, "partial must"),
        ({"whole_above": -0.1}, "whole_above must be"),
        ({"confidence": -1.0}, "confidence"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reliance(**options)


def test_a_loss_that_is_not_finite_is_an_error_and_changes_nothing() -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES)
    rows, state = optimizer.tables.rows.clone(), aim.generator.get_state()
    for number in range(2):
        samples, held_out = batch(), batch(seed=1)
        (samples if number else held_out)[0][0][3, 1] = math.inf
        with pytest.raises(ValueError, match="that of some samples is not finite"):
            aim.update(*samples, held_out=held_out)
    assert torch.equal(optimizer.tables.rows, rows) and torch.equal(aim.generator.get_state(), state)
    assert aim.history == []


def test_what_an_update_needs() -> None:
    _, aim = summed(2)
    samples = random_samples(8, 2, 0)
    with pytest.raises(ValueError, match="compares training with held-out"):
        aim.update(*samples)
    with pytest.raises(ValueError, match="pass labels"):
        aim.update(samples[0], held_out=samples)
