"""Copies of a model, its optimizer and AIM, with hooks on the blocks: each mixes by its own weights and table."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aim_helpers import CLASSES, Net, batch
from aim_helpers import build as build_with
from helpers import same_bits
from torch import nn

from aim_kernels.aim import AIM
from aim_kernels.methods.controls import ScaleFeatures

pytestmark = pytest.mark.usefixtures("one_thread")

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda parts: pickle.loads(pickle.dumps(parts)),
}


def build() -> tuple[Net, Any]:
    """Without dropout, whose draws differ from pass to pass."""
    return build_with(normalization=nn.LayerNorm(8))


def led_by_a(_model: nn.Module, _inputs: Any, _labels: Any) -> Any:
    return (0.6, 0.8), (0.4, 0.4, 0.4)


def made(mixing: Any) -> Any:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, probe=led_by_a, mixing=mixing, alpha=0.5)
    for _ in range(3):
        trained(model, optimizer)
        aim.update(*batch())
    assert aim.history[-1].dominant == ("a",)
    return model, optimizer, aim


def trained(model: nn.Module, optimizer: Any) -> None:
    inputs, labels = batch()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(*inputs), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mixing", ["features", ScaleFeatures()], ids=["features", "scale"])
def test_a_copy_mixes_by_itself(mixing: Any, how: str) -> None:
    original = made(mixing)
    model, optimizer, aim = COPIES[how](original)
    inputs, _ = batch()
    plain, _ = build()
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model(*inputs), plain(*inputs))
    for _ in range(3):
        for net, steps, _ in (original, (model, optimizer, aim)):
            trained(net, steps)
    same_bits(dict(original[0].state_dict()), dict(model.state_dict()))
    aim.remove()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(*inputs), plain(*inputs))
    plain.load_state_dict(original[0].state_dict())
    assert not torch.equal(original[0](*inputs), plain(*inputs))


@pytest.mark.parametrize("how", COPIES)
def test_a_model_copied_alone_mixes_nothing(how: str) -> None:
    model, _, _ = made("features")
    alone = COPIES[how](model)
    plain, _ = build()
    plain.load_state_dict(alone.state_dict())
    inputs, _ = batch()
    assert torch.equal(alone(*inputs), plain(*inputs))


def test_a_copy_of_one_whose_hooks_were_removed_has_none() -> None:
    model, optimizer, aim = made("features")
    aim.remove()
    model, optimizer, aim = copy.deepcopy((model, optimizer, aim))
    plain, _ = build()
    plain.load_state_dict(model.state_dict())
    inputs, _ = batch()
    assert torch.equal(model(*inputs), plain(*inputs))
