"""What wrappers, hooks and users keep in an optimizer's states and groups: kept, saved, loaded, and left alone."""

from __future__ import annotations

import collections
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import batches, drive
from helpers import Gradients, assign, build, parameters_of, same_bits, set_row
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels.aim import snapshot

SHAPES = (((65, 67), (33,), ()), ((6, 2),))
Point = collections.namedtuple("Point", ["x", "y"])


def things(p: Tensor) -> dict[Any, Any]:
    """One of every kind, none of which is a step's."""
    return {
        "z": p.detach().double() * 3,
        "norm": torch.tensor(2.5, dtype=torch.float16),
        "history": torch.arange(7),
        "loss_scale": torch.full((2, 2), 0.5),
        "exp_avg_scale": torch.tensor([1.5]) if p.numel() < 4096 else 1.5,
        "a_scale": None,
        "a": torch.zeros(3, dtype=torch.uint8),
        "count": 7,
        "share": 0.25,
        "name": "left.weight",
        "nothing": None,
        "flags": [True, torch.tensor([1, 2]), {"deep": torch.ones(2, 2, dtype=torch.bfloat16)}],
        "pair": (1, torch.tensor([3.0])),
        "options": {},
        "empty": torch.zeros(0),
        "complex": torch.tensor([1 + 2j]),
        "sparse": torch.eye(3).to_sparse(),
        "numpy": np.arange(3.0),
        3: torch.ones(1),
    }


def same_things(one: Any, other: Any) -> None:
    """Types, bits and structure."""
    if isinstance(one, Tensor):
        assert type(one) is type(other) and one.layout == other.layout and one.device == other.device
        same_bits(one.to_dense(), other.to_dense())
    elif isinstance(one, dict):
        assert type(one) is type(other) and list(one) == list(other)
        for key in one:
            same_things(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert type(one) is type(other) and len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same_things(a, b)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other) and one.dtype == other.dtype
    else:
        assert type(one) is type(other) and one == other


def ours(optimizer: ak.AIMFusedOptimizer) -> list[dict[Any, Any]]:
    """Parameters and the states that are not from ``things``."""
    return [
        {"p": p.detach(), **{k: v for k, v in optimizer.state[p].items() if k in OWN and isinstance(v, Tensor)}}
        for p in parameters_of(optimizer)
    ]


OWN = {"step", "exp_avg", "exp_avg_sq", "master", "ema", "anchor", "remainder"}


def keep(optimizer: ak.AIMFusedOptimizer) -> list[dict[Any, Any]]:
    """Puts things into every state; returns copies of them."""
    kept = []
    for p in parameters_of(optimizer):
        optimizer.state[p].update(things(p))
        kept.append(things(p))
    optimizer.state["a wrapper's"] = {"k": 3, "weights": torch.arange(3.0)}  # type: ignore[index]
    optimizer.state["a number"] = 5  # type: ignore[index]
    optimizer.state["steps"] = "step"  # type: ignore[index]
    return kept


def left_alone(optimizer: ak.AIMFusedOptimizer, kept: list[dict[Any, Any]]) -> None:
    for p, expected in zip(parameters_of(optimizer), kept, strict=True):
        same_things(expected, {name: optimizer.state[p][name] for name in expected})
    others = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    same_things({"a wrapper's": {"k": 3, "weights": torch.arange(3.0)}, "a number": 5, "steps": "step"}, others)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("when", ["before the first step", "later"])
@pytest.mark.parametrize("row", ["ones", "alternate"])
def test_they_are_left_alone(row: str, when: str, backend: str) -> None:
    """Every call gives the bits that it gives without them."""
    plain, kept_by = (build("adamw", SHAPES, ema_decay=0.5, backend=backend) for _ in range(2))
    grads = batches(plain, 6)
    for optimizer in (plain, kept_by):
        set_row(optimizer, 0, row)
    if when == "later":
        for optimizer in (plain, kept_by):
            drive(optimizer, grads[:2])
    kept = keep(kept_by)
    for optimizer in (plain, kept_by):
        drive(optimizer, grads[2:4])
        optimizer.eval()
    same_bits(ours(plain), ours(kept_by))
    for optimizer in (plain, kept_by):
        with optimizer.ema_parameters():
            pass
        optimizer.train()
        for group in optimizer.param_groups:
            group["state_dtype"] = "bfloat16"
        drive(optimizer, grads[4:])
    same_bits(ours(plain), ours(kept_by))
    same_bits(plain.tables.rows, kept_by.tables.rows)
    left_alone(kept_by, kept)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle", "rolled back"])
def test_they_are_saved_and_loaded(how: str, options: dict[str, Any]) -> None:
    first, second = (build("adamw", SHAPES, **options) for _ in range(2))
    set_row(first, 0, "alternate")
    grads = batches(first, 6)
    drive(first, grads[:3])
    scales = {p: first.state[p]["exp_avg_scale"].clone() for p in first.state if "exp_avg_scale" in first.state[p]}
    kept = keep(first)
    for p, expected in zip(parameters_of(first), kept, strict=True):
        if p in scales:  # of moments in 8 bits: no name for anything else
            first.state[p]["exp_avg_scale"] = scales[p]
            del expected["exp_avg_scale"]
    for group in first.param_groups:
        group["initial_lr"], group["mine"] = 0.5, {"list": [1, torch.ones(2)]}
    if how == "file":
        buffer = io.BytesIO()
        torch.save(first.state_dict(), buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=False)
        for p, q in zip(parameters_of(first), parameters_of(second), strict=True):
            q.data.copy_(p.detach())
        second.load_state_dict(saved)
        saved["state"][0]["flags"][2]["deep"].zero_()  # nor is it the loaded dict's memory
        saved["state"]["a wrapper's"]["weights"].zero_()
        saved["param_groups"][0]["mine"]["list"][1].zero_()
    elif how == "rolled back":
        second = first
        saved, params = copy.deepcopy(first.state_dict()), [p.detach().clone() for p in parameters_of(first)]
        drive(first, grads[3:])
        keep(first)
        first.state[parameters_of(first)[0]]["came later"] = 1
        for p, old in zip(parameters_of(first), params, strict=True):
            p.data.copy_(old)
        first.load_state_dict(saved)
        assert "came later" not in first.state[parameters_of(first)[0]]
    else:
        second = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
    left_alone(second, kept)
    for group in second.param_groups:
        same_things(
            {"initial_lr": 0.5, "mine": {"list": [1, torch.ones(2)]}}, {k: group[k] for k in ("initial_lr", "mine")}
        )
    for optimizer in {id(o): o for o in (first, second)}.values():
        drive(optimizer, grads[3:])
    same_bits(ours(first), ours(second))
    left_alone(second, kept)


def test_they_do_not_wait_for_ours() -> None:
    """A hook may keep something of a parameter that was never stepped."""
    first, second = (build("adamw", SHAPES) for _ in range(2))
    kept = keep(first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    left_alone(second, kept)
    assert not any("step" in second.state[p] for p in parameters_of(second))
    drive(second, batches(second, 2))
    assert all(float(second.state[p]["step"]) == 2 for p in parameters_of(second))
    left_alone(second, kept)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "adagrad", "rmsprop", "lion"])
def test_names_of_other_rules_are_names_like_any(rule: str) -> None:
    """Whether it is a checkpoint of another rule its groups say."""
    moments = {"exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg", "grad_avg"}
    known = {"adamw": {"exp_avg_sq", "max_exp_avg_sq"}, "sgd": {"momentum_buffer", "exp_avg_sq"}, "adagrad": {"sum"}}
    known |= {"rmsprop": {"square_avg", "grad_avg", "momentum_buffer"}, "lion": {"exp_avg_sq"}}
    foreign = moments - known[rule]
    plain, other = (build(rule, SHAPES, modulated=False) for _ in range(2))
    for p in parameters_of(other):
        other.state[p].update({name: torch.full((2, 3), 7, dtype=torch.int32) for name in foreign})
    grads = batches(plain, 4)
    for optimizer in (plain, other):
        drive(optimizer, grads[:2])
    resumed = build(rule, SHAPES, modulated=False)
    for p, q in zip(parameters_of(other), parameters_of(resumed), strict=True):
        q.data.copy_(p.detach())
    resumed.load_state_dict(copy.deepcopy(other.state_dict()))
    for optimizer in (plain, resumed):
        drive(optimizer, grads[2:])
    for p, q in zip(parameters_of(plain), parameters_of(resumed), strict=True):
        same_bits(p.detach(), q.detach())
        for name in foreign:
            same_bits(resumed.state[q][name], torch.full((2, 3), 7, dtype=torch.int32))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("exp_avg", torch.zeros(3), r"exp_avg has shape \(3,\)"),
        ("exp_avg_sq", [1.0, 2.0], "exp_avg_sq is a list"),
        ("max_exp_avg_sq", 0.5, "max_exp_avg_sq is a float"),
        ("exp_avg", torch.zeros(6, 2).to_sparse(), "exp_avg is a torch.sparse_coo tensor"),
        ("exp_avg", torch.zeros(6, 2, dtype=torch.complex64), "exp_avg is a torch.strided tensor of torch.complex64"),
    ],
)
def test_what_has_a_name_of_ours_must_fit(name: str, value: Any, words: str) -> None:
    optimizer = build("adamw", SHAPES)
    drive(optimizer, batches(optimizer, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    last = parameters_of(optimizer)[-1]
    before = copy.deepcopy(ours(optimizer))
    kept = optimizer.state[last].get(name)
    optimizer.state[last][name] = value
    assign(parameters_of(optimizer), batches(optimizer, 1)[0])
    with pytest.raises(RuntimeError, match=f"parameter 0 of group 1.*{words}"):
        optimizer.step()
    optimizer.state[last][name] = kept
    if kept is None:
        del optimizer.state[last][name]
    same_bits(before, ours(optimizer))
    saved["state"][3][name] = value
    with pytest.raises(ValueError, match=rf"parameter 0 of group 1.*{name}"):
        optimizer.load_state_dict(saved)
    same_bits(before, ours(optimizer))


# -- step counts -----------------------------------------------------------------------------------------------------

COUNTS: dict[str, Callable[[int], Any]] = {
    "int": int,
    "float": float,
    "numpy integer": np.int16,
    "numpy float": np.float32,
    "numpy array": lambda n: np.array([n]),
    "0-dim": lambda n: torch.tensor(float(n)),
    "int64": lambda n: torch.tensor(n),
    "float64 of one element": lambda n: torch.tensor([float(n)], dtype=torch.float64),
    "bfloat16 of one element": lambda n: torch.tensor([[n]], dtype=torch.bfloat16),
    "int32 with a gradient's shape": lambda n: torch.full((1, 1, 1), n, dtype=torch.int32),
}


@pytest.mark.parametrize("type_name", COUNTS)
@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_step_counts_set_by_hand(backend: str, count: int, type_name: str) -> None:
    """As a 0-dim float32 tensor counts; torch.optim takes only some of them."""
    expected, other = (build("adamw", SHAPES, backend=backend) for _ in range(2))
    grads = batches(expected, 5)
    for optimizer in (expected, other):
        drive(optimizer, grads[:3])
    for p, q in zip(parameters_of(expected), parameters_of(other), strict=True):
        expected.state[p]["step"].fill_(count)
        other.state[q]["step"] = COUNTS[type_name](count)
    saved = copy.deepcopy(other.state_dict())
    resumed = build("adamw", SHAPES, backend=backend)
    for p, q in zip(parameters_of(other), parameters_of(resumed), strict=True):
        q.data.copy_(p.detach())
    resumed.load_state_dict(saved)
    for optimizer in (expected, other, resumed):
        drive(optimizer, grads[3:])
    for optimizer in (other, resumed):
        same_bits(ours(expected), ours(optimizer))
        assert all(optimizer.state[p]["step"].item() == count + 2 for p in parameters_of(optimizer))


@pytest.mark.parametrize(
    "value",
    [
        -1,
        2.5,
        float("nan"),
        float("inf"),
        "3",
        None,
        [3],
        1j,
        torch.tensor(-2.0),
        torch.tensor([1.0, 2.0]),
        torch.tensor(1 + 1j),
        torch.empty(0),
        torch.empty((), device="meta"),
        np.array([1, 2]),
    ],
    ids=repr,
)
def test_step_counts_that_are_none(value: Any) -> None:
    optimizer = build("adamw", SHAPES)
    drive(optimizer, batches(optimizer, 2))
    before, saved = copy.deepcopy(ours(optimizer)), copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["step"] = value
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*step"):
        optimizer.load_state_dict(saved)
    same_bits(before, ours(optimizer))
    p = parameters_of(optimizer)[1]
    kept = optimizer.state[p]["step"]
    if value is None:  # as if there were none: the next step would begin to count
        return
    optimizer.state[p]["step"] = value
    assign(parameters_of(optimizer), batches(optimizer, 1)[0])
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*its state step"):
        optimizer.step()
    optimizer.state[p]["step"] = kept
    same_bits(before, ours(optimizer))


# -- whoever else reads states ---------------------------------------------------------------------------------------


def test_a_compiled_step_does_not_take_them() -> None:
    plain, kept_by = (build("adamw", SHAPES[1:]) for _ in range(2))
    kept = keep(kept_by)
    gradients = [Gradients(parameters_of(o)) for o in (plain, kept_by)]
    compiled = torch.compile(lambda: kept_by.step(), fullgraph=True, backend="aot_eager")
    for number in range(4):
        if number == 2:
            for optimizer in (plain, kept_by):
                optimizer.set_strength("audio", 0, 0.5)
        assign(parameters_of(plain), gradients[0]())
        assign(parameters_of(kept_by), gradients[1]())
        plain.step()
        compiled()
    same_bits(ours(plain), ours(kept_by))
    left_alone(kept_by, kept)
    inputs = kept_by._inputs
    assert inputs is not None
    taken = {id(t) for t in (*inputs.states, *inputs.anchors)}
    foreign = {id(v) for p in parameters_of(kept_by) for k, v in kept_by.state[p].items() if k not in OWN}
    assert not taken & foreign


def test_steps_in_backward_do_not_touch_them() -> None:
    model = nn.Linear(4, 3)
    optimizer = ak.AIMFusedOptimizer(model.parameters(), lr=0.1)
    z = torch.ones(2)
    for p in model.parameters():
        optimizer.state[p].update(z=z, note="mine", step=0)
    ak.step_in_backward(optimizer, model)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert z._version == 0 and all(optimizer.state[p]["note"] == "mine" for p in model.parameters())
    assert all(float(optimizer.state[p]["step"]) == 2 for p in model.parameters())


def test_a_snapshot_has_them() -> None:
    """Hooks run in steps that are only tried, too."""
    model = nn.Linear(4, 3)
    optimizer = ak.AIMFusedOptimizer(model.parameters(), lr=0.1)
    kept = keep(optimizer)
    before = snapshot.Snapshot(model, optimizer)
    for p in parameters_of(optimizer):
        state = optimizer.state[p]
        state["z"].add_(1)
        state["flags"][2]["deep"].zero_()
        state["flags"].append(3)
        state["numpy"][:] = 0
        state["count"] += 1
        state["options"]["new"] = 1
    optimizer.state["a wrapper's"]["k"] = 9  # type: ignore[index]
    optimizer.state["a number"] = 6  # type: ignore[index]
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    before.restore()
    left_alone(optimizer, kept)
    assert not any("step" in optimizer.state[p] for p in parameters_of(optimizer))


def test_averages_and_dummy_steps_look_at_parameters_only() -> None:
    """torch.distributed.checkpoint steps an optimizer that has no states yet; keys of a wrapper are no parameters."""
    p = torch.ones(3, requires_grad=True)
    optimizer = ak.AIMFusedOptimizer([p], lr=0.0, ema_decay=0.5)
    optimizer.state["steps"] = "step, ema"  # type: ignore[index]
    p.grad = torch.zeros(3)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 0 and optimizer.tables.control.tolist()[1] == 0
    with optimizer.ema_parameters():
        same_bits(p.detach(), torch.ones(3))


def test_a_buffer_that_is_none_is_none_at_all() -> None:
    """As older releases of torch.optim.SGD keep it."""
    plain, other = (build("sgd-momentum", SHAPES, modulated=False) for _ in range(2))
    for p in parameters_of(other):
        other.state[p]["momentum_buffer"] = None
    saved = copy.deepcopy(other.state_dict())
    resumed = build("sgd-momentum", SHAPES, modulated=False)
    resumed.load_state_dict(saved)
    grads = batches(plain, 3)
    for optimizer in (plain, other, resumed):
        drive(optimizer, grads)
    for p, q, r in zip(*map(parameters_of, (plain, other, resumed)), strict=True):
        same_bits(p.detach(), q.detach())
        same_bits(p.detach(), r.detach())
