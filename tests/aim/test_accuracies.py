"""Accuracies of a network that is left with one modality at a time."""

from __future__ import annotations

import pytest
import torch
from aim_helpers import CLASSES
from torch import Tensor, nn

from aim_kernels.aim import AIM, block_param_groups
from aim_kernels.aim.accuracies import unimodal_accuracies
from aim_kernels.optim.optimizer import AIMFusedOptimizer


class Sum(nn.Module):
    """Logits are the inputs' sum: b counts ten times as much as a."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(CLASSES, CLASSES, bias=False), nn.Linear(CLASSES, CLASSES, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(CLASSES))
            self.b.weight.copy_(10.0 * torch.eye(CLASSES))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.a(a) + self.b(b)


@pytest.mark.parametrize("batch_size", [512, 7])
def test_what_each_modality_tells_alone(batch_size: int) -> None:
    model = Sum()
    optimizer = AIMFusedOptimizer(block_param_groups(model, {"a": [model.a], "b": [model.b]}), lr=1e-2)
    aim = AIM(model, optimizer, batch_size=batch_size)
    labels = torch.arange(3000) % CLASSES
    shown = nn.functional.one_hot(labels, CLASSES).float()
    state, weights = torch.get_rng_state(), aim.generator.get_state()
    found = unimodal_accuracies(aim, ([shown, shown], labels))
    assert found["all"] == found["b"] == 1.0
    # a is overruled by a b of another sample, which is right one time in three: an error of 0.009
    assert found["a"] == pytest.approx(1 / 3, abs=0.04)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(aim.generator.get_state(), weights)


def test_there_are_none_without_classes() -> None:
    model = Sum()
    optimizer = AIMFusedOptimizer(block_param_groups(model, {"a": [model.a], "b": [model.b]}), lr=1e-2)
    aim = AIM(model, optimizer)
    x = torch.randn(5, CLASSES)
    assert unimodal_accuracies(aim, ([x, x], torch.randn(5))) == {}
    assert unimodal_accuracies(aim, ([x, x], torch.ones(5, 2, dtype=torch.int64))) == {}
