"""Large states begin at places of their own behind a page, whatever becomes of them, and the numbers are the same."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import aim_kernels as ak
from aim_kernels.step import states
from aim_kernels.step.placement import LARGE, PAGE, PLACES, placed

COUNT = LARGE // 4 + 77  # floats; odd, so that nothing ends on a boundary


def stepped(optimizer: Any, p: torch.nn.Parameter, steps: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return optimizer.state[p]


def parameter(dtype: torch.dtype = torch.float32, count: int = COUNT) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter(torch.randn(count, generator=generator).to(dtype))


def check(state: dict[str, torch.Tensor], size: int = 1) -> None:
    large = {name: x for name, x in state.items() if x.nbytes >= LARGE}
    assert len(large) >= size
    places = {name: x.data_ptr() % PAGE for name, x in large.items()}
    assert places == {name: PLACES[name] for name in large}
    assert len(set(places.values())) == len(large)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in large.values())  # nothing is saved beside it


CASES = [
    ("adamw", torch.float32, {}),
    ("adamw", torch.float32, {"amsgrad": True, "ema_decay": 0.9}),
    ("adamw", torch.bfloat16, {"master": "float32"}),
    ("adamw", torch.bfloat16, {"state_dtype": "bfloat16"}),
    ("adamw", torch.bfloat16, {"state_dtype": "int8", "master": "split"}),
    ("sgd", torch.float32, {"momentum": 0.9}),
    ("rmsprop", torch.float32, {"momentum": 0.9, "centered": True}),
    ("lion", torch.float32, {}),
    ("adagrad", torch.float64, {}),
]


@pytest.mark.parametrize(("rule", "dtype", "options"), CASES, ids=str)
def test_places_and_bits(rule: str, dtype: torch.dtype, options: dict[str, Any], monkeypatch: Any) -> None:
    p, q = parameter(dtype, 4 * COUNT), parameter(dtype, 4 * COUNT)
    state = stepped(ak.AIMFusedOptimizer([p], rule=rule, seed=1, **options), p)
    check(state)
    kept = dict(state)
    monkeypatch.setattr(states, "spread", lambda p, state: None)
    other = stepped(ak.AIMFusedOptimizer([q], rule=rule, seed=1, **options), q)
    assert torch.equal(p, q)
    for name, x in kept.items():
        assert torch.equal(x, other[name]), name


def test_a_state_that_was_moved_stays() -> None:
    p = parameter()
    optimizer = ak.AdamW([p])
    first = dict(stepped(optimizer, p, 1))
    optimizer._plan = None
    second = stepped(optimizer, p, 2)
    assert all(second[name] is x for name, x in first.items())


def test_copies_and_checkpoints_get_places() -> None:
    p = parameter()
    optimizer = ak.AdamW([p])
    stepped(optimizer, p)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert file.tell() < 2 * p.nbytes + 65536
    file.seek(0)
    other = ak.AdamW([p])
    other.load_state_dict(torch.load(file))
    check(stepped(other, p), 2)
    (model, again) = copy.deepcopy((torch.nn.ParameterList([p]), optimizer))
    check(stepped(again, model[0]), 2)


def test_what_changes_its_type_gets_a_place() -> None:
    p = parameter(count=4 * COUNT)
    optimizer = ak.AdamW([p])
    stepped(optimizer, p)
    optimizer.param_groups[0]["state_dtype"] = "bfloat16"
    state = stepped(optimizer, p)
    assert state["exp_avg"].dtype == torch.bfloat16
    check(state, 2)


def test_small_ones_and_other_layouts() -> None:
    small = parameter(count=100)
    state = stepped(ak.AdamW([small]), small)
    assert state["exp_avg"].nbytes == 400
    images = torch.nn.Parameter(torch.randn(64, 32, 16, 16).to(memory_format=torch.channels_last))
    state = stepped(ak.AdamW([images]), images)
    check(state, 2)
    assert state["exp_avg"].stride() == images.stride()
    values = torch.randn(3, 5, 7).permute(2, 0, 1)
    assert torch.equal(placed(values, 128), values) and placed(values, 128).data_ptr() % PAGE == 128
