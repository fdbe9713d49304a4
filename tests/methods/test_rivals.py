"""The control that drops features, and OGM-GE by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from aim_helpers import CLASSES, DOMINANT_A, batch, build
from torch import nn

from aim_kernels.aim import AIM
from aim_kernels.methods import Blocks, Outputs
from aim_kernels.methods.controls import DropFeatures
from aim_kernels.methods.ogm import OGM
from aim_kernels.methods.scores import late_fusion_logits
from aim_kernels.optim.optimizer import AIMFusedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_feature_drop_drops_the_dominant_modality_only_in_training() -> None:
    model, optimizer = build()
    drop = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing=DropFeatures(), alpha=0.5)
    neutral = optimizer.tables.rows.clone()
    kappa = drop.update(*batch()).kappa["a"]
    x = [torch.randn(4000, 4), torch.randn(4000, CLASSES)]
    model.train()
    model.a[1][1].eval()  # its dropout would zero features too
    a, b = model.features(*x)
    dropped = (a == 0.0).all(1)
    plain = nn.functional.relu(model.a[1][0](model.a[0](x[0])))
    assert abs(dropped.float().mean() - (plain == 0.0).all(1).float().mean() - sum(kappa) / 2) < 0.03
    assert torch.equal(a[~dropped], plain[~dropped])
    assert not (b == 0.0).all(1).any()
    assert torch.equal(optimizer.tables.rows, neutral)
    model.eval()
    assert torch.equal(model.features(*x)[0], plain)
    model.train()
    model.a[1][1].eval()
    drop.remove()
    assert torch.equal(model.features(*x)[0], plain)


def test_unimodal_logits_add_up_to_the_joint_ones() -> None:
    model, _ = build()
    model.eval()
    inputs, _ = batch()
    parts = late_fusion_logits(model.head, model.features(*inputs))
    assert torch.allclose(sum(parts), model(*inputs), atol=1e-6)
    zeroed = model.head(torch.cat([model.a(inputs[0]), torch.zeros(24, 8)], 1)) - model.head.bias / 2
    assert torch.allclose(parts[0], zeroed, atol=1e-6)
    with pytest.raises(ValueError, match=r"widths \[8\] do not fill a head of 16"):
        late_fusion_logits(model.head, [torch.ones(2, 8)])


def ogm(**options: Any) -> tuple[AIMFusedOptimizer, OGM]:
    model, optimizer = build()
    blocks = Blocks(model, {"a": list(model.a), "b": list(model.b)}, lambda z: model.head(torch.cat(z, 1)))
    return optimizer, OGM(blocks, optimizer, **options)


def outputs_of(method: OGM, logits: list[torch.Tensor], labels: torch.Tensor) -> Outputs:
    """A batch whose unimodal logits are these."""
    method.blocks._unimodal = lambda _features: logits
    return Outputs(method.blocks, [], logits[0], labels)


@pytest.mark.parametrize("apply_to", ["grad", "step"])
def test_ogm_ge_writes_its_coefficient_and_noise(apply_to: str) -> None:
    optimizer, method = ogm(alpha=0.7, apply_to=apply_to, noise=0.5)
    random = np.random.default_rng(0)
    logits = [random.normal(size=(6, CLASSES)) for _ in range(2)]
    labels = random.integers(0, CLASSES, 6)
    logits[1][np.arange(6), labels] += 2.0
    method.after_backward(outputs_of(method, [torch.tensor(x) for x in logits], torch.tensor(labels)))
    score = [(np.exp(x) / np.exp(x).sum(1, keepdims=True))[np.arange(6), labels].sum() for x in logits]
    k = {"a": 1.0, "b": 1.0 - math.tanh(0.7 * score[1] / score[0])}
    assert score[1] > score[0]
    for group, row in zip(optimizer.param_groups, optimizer.modulation(), strict=True):
        expected = k[group["modality"]] if group["modulated"] else 1.0
        assert row[f"{apply_to}_under"] == row[f"{apply_to}_well"] == pytest.approx(expected, rel=1e-5)
        other = "step" if apply_to == "grad" else "grad"
        assert row[f"{other}_under"] == row[f"{other}_well"] == 1.0
        assert row["noise"] == (0.5 if group["modulated"] else 0.0)


def test_ogm_ge_keeps_the_jump_at_equal_scores() -> None:
    _, method = ogm(alpha=0.8)
    equal = torch.zeros(4, CLASSES)
    labels = torch.zeros(4, dtype=torch.long)
    assert method.coefficients(outputs_of(method, [equal, equal], labels)).tolist() == [1.0, 1.0]
    barely = equal.clone()
    barely[:, 0] += 1e-4
    found = method.coefficients(outputs_of(method, [equal, barely], labels)).tolist()
    assert found == pytest.approx([1.0, 1.0 - math.tanh(0.8)], abs=1e-3)


def test_ogm_ge_of_three_modalities_compares_with_the_mean_of_the_others() -> None:
    _, method = ogm(alpha=0.5)
    logits = [torch.tensor([[s, 1.0 - s]]).log() for s in (0.6, 0.45, 0.3)]
    k = method.coefficients(outputs_of(method, logits, torch.zeros(1, dtype=torch.long)))
    assert k[0].item() == pytest.approx(1.0 - math.tanh(0.5 * 0.6 / 0.375), rel=1e-5)
    assert k[2].item() == 1.0


@pytest.mark.parametrize(("option", "value"), [("apply_to", "weights"), ("alpha", -1.0), ("noise", math.nan)])
def test_ogm_ge_errors(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        ogm(**{option: value})
