"""Hooks and closures: when they run, what they see, what is left when they raise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import Gradients, assign, build, frozen, parameters_of, same_bits, set_row
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import aim_kernels as ak

TABLES = ("modulation_row", "statistics_row", "control")


def stepped(row: str = "all", steps: int = 2, **options: Any) -> ak.AIMFusedOptimizer:
    optimizer = build(**options)
    set_row(optimizer, 0, row)
    gradients = Gradients(parameters_of(optimizer))
    for _ in range(steps):
        assign(parameters_of(optimizer), gradients())
        optimizer.step()
    assign(parameters_of(optimizer), gradients())
    return optimizer


def test_step_hooks_run_around_the_step_and_can_be_removed() -> None:
    optimizer, seen = stepped(), []
    counter = optimizer.tables.control[1:2]
    handles = [
        optimizer.register_step_pre_hook(lambda o, *_: seen.append(("pre", o is optimizer, int(counter)))),
        optimizer.register_step_post_hook(lambda o, *_: seen.append(("post", o is optimizer, int(counter)))),
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("every pre", o is optimizer, int(counter)))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("every post", o is optimizer, int(counter)))),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert sorted(seen) == [("every post", True, 3), ("every pre", True, 2), ("post", True, 3), ("pre", True, 2)]


def test_a_step_hook_may_replace_the_closure() -> None:
    optimizer = stepped()
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    assert optimizer.step(lambda: 3.0) == 7.0


def test_gradients_that_a_hook_changes_are_those_of_the_step() -> None:
    """Clipping in a hook, in place and by other tensors."""
    one, two, three = stepped(), stepped(), stepped()
    one.register_step_pre_hook(lambda *_: [p.grad.mul_(0.5) for p in parameters_of(one)] and None)
    two.register_step_pre_hook(lambda *_: assign(parameters_of(two), [p.grad * 0.5 for p in parameters_of(two)]))
    for p in parameters_of(three):
        p.grad = p.grad * 0.5
    for optimizer in (one, two, three):
        optimizer.step()
    same_bits(frozen(one), frozen(two))
    same_bits(frozen(one), frozen(three))


def test_hooks_of_state_dict_see_all_of_it() -> None:
    """The tables too; a hook that returns another dict has the last word."""
    optimizer, order = stepped(), []
    optimizer.register_state_dict_pre_hook(lambda o: order.append("pre"))

    def post(o: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        order.append("post")
        assert all(key in group for group in state_dict["param_groups"] for key in TABLES)
        return {"wrapped": state_dict}

    handle = optimizer.register_state_dict_post_hook(post)
    made = optimizer.state_dict()
    assert order == ["pre", "post"] and list(made) == ["wrapped"]
    handle.remove()
    assert optimizer.state_dict().keys() == {"state", "param_groups"}


def test_state_dict_hooks_may_edit_in_place() -> None:
    optimizer = stepped()
    optimizer.register_state_dict_post_hook(lambda o, d: d["param_groups"][0].update(note="kept"))
    assert optimizer.state_dict()["param_groups"][0]["note"] == "kept"
    assert "note" not in optimizer.param_groups[0]


def test_hooks_of_load_state_dict() -> None:
    """The first may replace what is loaded; the last sees it loaded."""
    source, target, seen = stepped(), stepped(steps=0), []
    saved = {"wrapped": copy.deepcopy(source.state_dict())}
    target.register_load_state_dict_pre_hook(lambda o, d: d["wrapped"])
    target.register_load_state_dict_post_hook(lambda o: seen.append(int(o.tables.control[1])))
    for p, q in zip(parameters_of(target), parameters_of(source), strict=True):
        p.data.copy_(q)
    target.load_state_dict(saved)
    assert seen == [2] and list(saved) == ["wrapped"]
    for optimizer in (source, target):
        assign(parameters_of(optimizer), Gradients(parameters_of(optimizer), seed=8)())
        optimizer.step()
    same_bits(frozen(source), frozen(target))


def test_anchors_stay_where_a_checkpoint_has_none() -> None:
    """As one of torch.optim: what weights are withdrawn to is of the construction."""
    optimizer = stepped("chain", anchor="init")
    anchors = [optimizer.state[p]["anchor"].clone() for p in parameters_of(optimizer)]
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        del state["anchor"]
    optimizer.load_state_dict(saved)
    same_bits(anchors, [optimizer.state[p]["anchor"] for p in parameters_of(optimizer)])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_closure_that_raises_leaves_everything_as_it_was(error: type[BaseException], steps: int) -> None:
    optimizer, twin = stepped(steps=steps), stepped(steps=steps)
    versions = [p._version for p in parameters_of(optimizer)]

    def closure() -> float:
        assert torch.is_grad_enabled()
        raise error("out of data")

    before = frozen(optimizer)
    with torch.no_grad():
        with pytest.raises(error, match="out of data"):
            optimizer.step(closure)
        assert not torch.is_grad_enabled()
    same_bits(before, frozen(optimizer))
    assert versions == [p._version for p in parameters_of(optimizer)]
    for each in (optimizer, twin):
        each.step()
    same_bits(frozen(optimizer), frozen(twin))


def test_a_closure_may_change_what_the_step_will_see() -> None:
    """It runs first: learning rate, strength and groups that it sets are those of this step."""
    optimizer, twin = stepped(), stepped()
    extra = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]

    def change(each: ak.AIMFusedOptimizer, q: torch.nn.Parameter) -> float:
        each.param_groups[0]["lr"] = 0.5
        each.set_strength("audio", 0, 0.25)
        each.add_param_group({"params": [q]})
        q.grad = torch.ones(3)
        return 1.5

    assert optimizer.step(lambda: change(optimizer, extra[0])) == 1.5
    change(twin, extra[1])
    twin.step()
    same_bits(frozen(optimizer), frozen(twin))
    assert (extra[0] != 1).all()


def test_zero_grad_keeps_the_tensors_where_asked_to() -> None:
    optimizer = stepped()
    grads = [p.grad for p in parameters_of(optimizer)]
    optimizer.zero_grad(set_to_none=False)
    for p, grad in zip(parameters_of(optimizer), grads, strict=True):
        assert p.grad is grad and not grad.any()
    counts = [int(optimizer.state[p]["step"]) for p in parameters_of(optimizer)]
    optimizer.step()  # a gradient of zeros is a gradient
    assert [int(optimizer.state[p]["step"]) for p in parameters_of(optimizer)] == [n + 1 for n in counts]
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters_of(optimizer))
    before = frozen(optimizer)
    optimizer.step()
    same_bits(before, frozen(optimizer))


def test_repr_shows_the_options() -> None:
    optimizer = ak.AIMFusedOptimizer(
        [{"params": [torch.nn.Parameter(torch.ones(2))], "modality": "audio", "depth": 3, "modulated": True}],
        lr=0.125,
        rule="sgd",
        momentum=0.75,
        under_optimized=("absolute", 0.25),
        anchor="init",
        backend="reference",
        seed=77,
    )
    text = repr(optimizer)
    for part in ("lr: 0.125", "rule: sgd", "momentum: 0.75", "'absolute', 0.25", "modality: audio", "depth: 3"):
        assert part in text
    for part in ("anchor: init", "backend: reference", "seed: 77"):
        assert part in text
