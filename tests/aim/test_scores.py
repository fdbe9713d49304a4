"""Scores, ratios and strengths."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from aim_helpers import CLASSES, batch, build, train
from torch import Tensor, nn

from aim_kernels.aim import Gap, ModulationTable, Ratio
from aim_kernels.aim.inputs import Inputs
from aim_kernels.aim.prototypes import channels_first, channels_last, fit_prototypes, probing, prototype_score
from aim_kernels.aim.strengths import Measured, ratios, strength

pytestmark = pytest.mark.usefixtures("one_thread")


def test_prototype_score_is_the_softmax_of_distances() -> None:
    random = np.random.default_rng(0)
    z, p, y = random.normal(size=(7, 5)), random.normal(size=(3, 5)), random.integers(0, 3, 7)
    distance = ((z[:, None] - p[None]) ** 2).sum(-1) / 5
    share = np.exp(-distance) / np.exp(-distance).sum(1, keepdims=True)
    found = prototype_score(torch.tensor(z).float(), torch.tensor(p).float(), torch.tensor(y))
    assert found.tolist() == pytest.approx(share[np.arange(7), y].tolist(), rel=1e-5)


def test_pooling_keeps_the_channels() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(channels_first(x), x.mean(2))
    assert torch.equal(channels_last(x), x.mean(1))
    assert torch.equal(channels_first(x.view(2, 3, 2, 2)), x.mean(2))
    assert torch.equal(channels_last(x[:, 0]), x[:, 0])


def test_fitted_prototypes_are_classified_as_their_classes() -> None:
    model, optimizer = build()
    train(model, optimizer, 30)
    optimizer.zero_grad()
    inputs, labels = batch()
    weights = copy.deepcopy(model.state_dict())

    def fit(steps: int, init: str = "noise", scale: float = 1.0) -> list[Tensor]:
        with probing(model):
            return fit_prototypes(
                model,
                Inputs(tuple(scale * x for x in inputs)),
                labels,
                CLASSES,
                steps=steps,
                lr=0.1,
                init=init,
                loss=nn.functional.cross_entropy,
                generator=torch.Generator().manual_seed(3),
            )

    def loss(prototypes: list[Tensor]) -> float:
        with torch.no_grad(), probing(model):
            return nn.functional.cross_entropy(model(*prototypes), torch.arange(CLASSES)).item()

    assert [p.shape for p in fit(0)] == [(CLASSES, 4), (CLASSES, CLASSES)]
    assert loss(fit(100)) < 0.2 * loss(fit(0))
    means = torch.stack([inputs[0][labels == k].mean(0) for k in range(CLASSES)])
    assert torch.allclose(fit(0, "mean")[0], means, atol=1e-5)
    # noise has the moments of the batch, whatever its scale
    assert torch.allclose(fit(0, scale=100.0)[0], 100.0 * fit(0)[0], rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_probing_leaves_flags_and_random_state_alone() -> None:
    model, _ = build()
    model.train()
    model.b[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    with contextlib.suppress(KeyError), probing(model):
        assert not any(module.training for module in model.modules())
        torch.rand(3)
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


# -- strengths ------------------------------------------------------------------------------------------------------


def test_ratios_by_relative_depth() -> None:
    table = ratios({"a": [0.2, 0.6], "b": [0.1, 0.2, 0.4]})
    # block 1 of three lies half way: the mean of a's two
    assert table["a"] == pytest.approx([2.0, 1.5])
    assert table["b"] == pytest.approx([0.5, 0.5, 0.4 / 0.6])


def test_ratios_of_three_modalities_use_the_mean_of_the_others() -> None:
    table = ratios({"a": [0.6], "b": [0.2], "c": [0.4]})
    assert [row[0] for row in table.values()] == pytest.approx([2.0, 0.4, 1.0])


def test_a_single_block_counts_as_the_last() -> None:
    assert ratios({"a": [0.5], "b": [0.1, 0.25]})["a"] == pytest.approx([2.0])


def test_strength() -> None:
    assert strength(1.3, 10.0, 0.2) == pytest.approx(math.tanh(1.0))
    assert strength(1.2, 10.0, 0.2) == strength(0.1, 10.0, 0.0) == 0.0
    assert strength(math.nan, 10.0, 0.0) == 0.0
    top = strength(math.inf, 10.0, 0.2)
    assert np.float32(top) < 1.0
    assert top > 0.999


def assessed(train_scores: Any, held_out: Any = None, alpha: float = 2.0, **options: Any) -> ModulationTable:
    rule = (Ratio if held_out is None else Gap)(**{"confidence": 0.0, **options})
    measured = [None if x is None else x if isinstance(x, Measured) else exact(x) for x in (train_scores, held_out)]
    assert measured[0] is not None
    return rule.assess(0, measured[0], measured[1], {m: [math.nan] for m in measured[0].scores}, alpha=alpha)


def exact(scores: dict[str, list[float]]) -> Measured:
    return Measured(scores, {m: [0.0] * len(row) for m, row in scores.items()})


def test_a_lead_counts_as_far_as_it_is_not_chance() -> None:
    train = Measured({"a": [0.6], "b": [0.3]}, {"a": [0.06], "b": [0.015]})
    held_out = Measured({"a": [0.4], "b": [0.4]}, {"a": [0.02], "b": [0.04]})
    table = assessed(train, held_out, confidence=2.0, alpha=0.5)
    # relative errors: 0.1 and 0.05 in training, 0.05 and 0.1 outside of it
    error = 2.0 * math.sqrt(0.01 + 0.0025 + 0.0025 + 0.01)
    assert table.excess == {"a": [pytest.approx(2.0)], "b": [pytest.approx(0.5)]}
    assert table.excess_errors == {"a": [pytest.approx(error)], "b": [pytest.approx(error / 4.0)]}
    assert table.kappa["a"] == [pytest.approx(math.tanh(0.5 * (2.0 - 2.0 * error - 1.0)))]
    assert table.weak_kappa["b"] == [pytest.approx(table.kappa["a"][0])]
    assert assessed(train, held_out, confidence=5.0).dominant == ()
    # the mean of two others of equal error has half of its variance
    three = Measured({"a": [0.6], "b": [0.3], "c": [0.3]}, {"a": [0.0], "b": [0.03], "c": [0.03]})
    assert assessed(three).excess_errors["a"] == [pytest.approx(2.0 * 0.1 / math.sqrt(2.0))]


def test_tables_of_earlier_versions_load() -> None:
    state = assessed({"a": [0.6], "b": [0.3]}).to_dict()
    del state["excess_errors"]
    assert ModulationTable.from_dict(state).excess_errors == {}


def test_gap_compares_training_with_held_out_ratios() -> None:
    table = assessed({"a": [0.6], "b": [0.3]}, {"a": [0.4], "b": [0.4]}, dead_zone=0.5)
    assert table.excess == {"a": [pytest.approx(2.0)], "b": [pytest.approx(0.5)]}
    assert table.kappa == {"a": [pytest.approx(math.tanh(1.0))], "b": [0.0]}
    assert table.weak_kappa == {"a": [0.0], "b": [pytest.approx(math.tanh(1.0))]}
    assert (table.dominant, table.weak) == (("a",), ("b",))


def test_a_deserved_lead_sets_no_strength() -> None:
    table = assessed({"a": [0.9], "b": [0.1]}, {"a": [0.9], "b": [0.1]})
    assert table.kappa == {"a": [0.0], "b": [0.0]}
    assert table.dominant == table.weak == ()


def test_dominance_is_a_mean_over_depths_above_a_hundredth() -> None:
    # kappa is tanh(2 * 0.0075) at one of two depths: 0.0075 on average
    assert assessed({"a": [1.0075, 1.0], "b": [1.0, 1.0]}).dominant == ()
    assert assessed({"a": [1.0125, 1.0], "b": [1.0, 1.0]}).dominant == ("a",)


def test_several_modalities_may_be_dominant() -> None:
    table = assessed({"a": [0.6], "b": [0.5], "c": [0.1]})
    assert (table.dominant, table.weak) == (("a", "b"), ("c",))


def test_of_all_modalities_only_the_strongest_is_held() -> None:
    train = {"a": [0.6, 0.5, 0.5], "b": [0.5, 0.5, 0.7]}
    flat = {m: [0.5] * 3 for m in train}
    table = assessed(train, flat)
    assert all(sum(row) / 3 > 0.01 for row in table.kappa.values())
    assert (table.dominant, table.weak) == (("b",), ("a",))


def test_table_survives_json_and_prints() -> None:
    table = assessed({"a": [0.6], "b": [0.3]}, {"a": [0.4], "b": [0.4]})
    again = ModulationTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again.kappa == table.kappa
    assert again.dominant == ("a",)
    assert isinstance(again.modalities, tuple)
    lines = repr(table).splitlines()
    assert lines[0].startswith("AIM update 0: holds back a (gap 2.00 at depth 0, above 1;")
    assert lines[1].split()[:5] == ["modality", "depth", "score", "held-out", "gap"]
    assert lines[2].split() == ["a", "0", "0.600", "0.400", "2.000", "-", "0.964"]
