"""States and groups that are reset, reordered, replaced: true weights and rows outlive it."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import frozen, same_bits
from torch import Tensor

import aim_kernels as ak

Optimizer = ak.AIMFusedOptimizer


# -- states, while the module holds live weights -----------------------------------------------------------------------


def _each(edit: Callable[[Any, Tensor], Any]) -> Callable[[Optimizer], None]:
    def edited(optimizer: Optimizer) -> None:
        for p in list(optimizer.state):
            edit(optimizer.state, p)

    return edited


RESETS: dict[str, Callable[[Optimizer], Any]] = {
    "replaced": lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
    "cleared": lambda optimizer: optimizer.state.clear(),
    "deleted": _each(lambda state, p: state.pop(p)),
    "emptied": _each(lambda state, p: state[p].clear()),
    "begun anew": _each(lambda state, p: state.update({p: {}})),
    "without master": _each(lambda state, p: state[p].pop("master")),
}
WHOLE = [name for name in RESETS if name not in ("emptied", "without master")]


def degraded(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Tensor], Optimizer]:
    torch.manual_seed(7)
    params: list[Tensor] = [torch.nn.Parameter(torch.rand(size).add(0.5).to(dtype)) for size in (50, 7)]
    groups = [{"params": params, "modality": "a", "depth": 0, "modulated": True}]
    options = {"lr": 1e-3, "under_optimized": ("absolute", 0.7), "backend": "cpu", **options}
    optimizer = Optimizer(groups, **options)
    optimizer.set_strength("a", 0, 0.5)
    train(params, optimizer, 3)
    return params, optimizer


def train(params: list[Tensor], optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()


def true_of(params: list[Tensor], optimizer: Optimizer) -> list[Tensor]:
    true = [optimizer.state[p]["master"].to(p.dtype).clone() for p in params]
    assert not any(torch.equal(p, values) for p, values in zip(params, true, strict=True)), "nothing is degraded"
    return true


@pytest.mark.parametrize("after", ["eval", "step", "state_dict", "copy"])
@pytest.mark.parametrize("reset", RESETS)
def test_a_reset_leaves_the_true_weights_in_the_module(reset: str, after: str) -> None:
    params, optimizer = degraded()
    true = true_of(params, optimizer)
    RESETS[reset](optimizer)
    if after == "step":
        for group in optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        train(params, optimizer, 1)
    elif after == "state_dict":
        optimizer.state_dict()
        same_bits([p.detach() for p in params], true)
    elif after == "copy":
        train(params, optimizer, 0)
        optimizer.train()
    optimizer.eval()
    same_bits([p.detach() for p in params], true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{"anchor": "init"}, {"anchor": "ema", "ema_decay": 0.9}, {"state_dtype": "bfloat16"}, {"rule": "lion"}],
    ids=str,
)
def test_a_reset_of_any_kind_of_live_weights(options: dict[str, Any], dtype: torch.dtype) -> None:
    params, optimizer = degraded(dtype, lr=0.1, **options)
    true = true_of(params, optimizer)
    optimizer.state.clear()
    optimizer.eval()
    same_bits([p.detach() for p in params], true)


def test_many_resets_do_not_wear_the_weights_down() -> None:
    params, optimizer = degraded(lr=1e-6)
    begin = torch.cat(true_of(params, optimizer)).mean().item()
    for _ in range(4):
        optimizer.state.clear()
        train(params, optimizer, 3)
    optimizer.eval()
    assert torch.cat([p.detach() for p in params]).mean().item() == pytest.approx(begin, rel=1e-3)


@pytest.mark.parametrize("write", ["in place", "through data", "by replacing data"])
@pytest.mark.parametrize("order", ["loaded after", "loaded before"])
@pytest.mark.parametrize("reset", WHOLE)
def test_weights_that_are_loaded_around_a_reset_are_kept(reset: str, order: str, write: str) -> None:
    params, optimizer = degraded()

    def load() -> None:
        for p in params:
            if write == "in place":
                with torch.no_grad():
                    p.fill_(3.0)
            elif write == "through data":
                p.data.fill_(3.0)
            else:
                p.data = torch.full_like(p, 3.0)

    if order == "loaded before":
        load()
    RESETS[reset](optimizer)
    if order == "loaded after":
        load()
    optimizer.eval()
    assert all((p == 3.0).all() for p in params)


def test_a_checkpoint_without_masters_takes_the_place_of_true_weights_only() -> None:
    """Of states; the module is not in it, and must not be left with the degraded weights."""
    params, optimizer = degraded()
    true = true_of(params, optimizer)
    group = {**optimizer.param_groups[0], "params": params}
    fresh = Optimizer([{name: group[name] for name in ("params", "modality", "depth", "modulated")}])
    optimizer.load_state_dict(fresh.state_dict())
    optimizer.eval()
    same_bits([p.detach() for p in params], true)


def test_moments_that_were_deleted_begin_anew_after_eval() -> None:
    params, optimizer = degraded()
    true = true_of(params, optimizer)
    for p in params:
        del optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
    optimizer.eval()
    same_bits([p.detach() for p in params], true)
    optimizer.train()
    train(params, optimizer, 1)


@pytest.mark.parametrize("then", ["eval", "step"])
@pytest.mark.parametrize("move", ["to another group", "merged", "taken out", "a part of a copy", "no master"])
def test_a_parameter_that_leaves_its_group_takes_its_true_weights_along(move: str, then: str) -> None:
    params, optimizer = degraded()
    true = true_of(params, optimizer)
    other = torch.nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [other]})
    groups = optimizer.param_groups
    if move == "to another group":
        groups[1]["params"].append(groups[0]["params"].pop(0))
    elif move == "merged":
        groups[1]["params"] = groups[1]["params"] + groups[0]["params"]
        groups.pop(0)
    elif move == "taken out":
        groups.pop(0)
    elif move == "no master":
        optimizer.state[params[0]]["master"] = None
    else:
        optimizer.param_groups = [{**groups[0], "params": params[:1]}, {**groups[1], "params": [other, params[1]]}]
    if then == "step":
        for group in optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        other.grad = torch.ones(4)
        train(params, optimizer, 1)
    optimizer.eval()
    same_bits([p.detach() for p in params], true)


def test_a_reset_in_eval_mode_changes_nothing() -> None:
    params, optimizer = degraded()
    true = true_of(params, optimizer)
    optimizer.eval()
    optimizer.state.clear()
    optimizer.train()
    same_bits([p.detach() for p in params], true)


# -- groups ------------------------------------------------------------------------------------------------------------


def three_blocks() -> tuple[dict[str, Tensor], Optimizer]:
    torch.manual_seed(8)
    params: dict[str, Tensor] = {
        name: torch.nn.Parameter(torch.rand(n)) for name, n in zip("abc", (5, 6, 7), strict=True)
    }
    groups = [{"params": [p], "modality": name, "depth": 0, "modulated": True} for name, p in params.items()]
    optimizer = Optimizer(groups, lr=1e-2, backend="cpu")
    optimizer.set_strength("b", 0, 0.5)
    optimizer.param_groups[2]["lr"] = 1e-3
    return params, optimizer


def advance(params: dict[str, Tensor], optimizer: Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn_like(p)
    optimizer.step()


def told(optimizer: Optimizer) -> dict[str, Any]:
    """Rows and statistics by modality."""
    rows = {row["modality"]: row for row in optimizer.modulation()}
    return {"rows": rows, "statistics": {row["modality"]: row for row in optimizer.statistics()}}


def reverse(optimizer: Optimizer) -> None:
    optimizer.param_groups.reverse()


def assign_reversed(optimizer: Optimizer) -> None:
    optimizer.param_groups = optimizer.param_groups[::-1]


def assign_copies(optimizer: Optimizer) -> None:
    optimizer.param_groups = [dict(optimizer.param_groups[n]) for n in (2, 0, 1)]


def replace_by_copies(optimizer: Optimizer) -> None:
    optimizer.param_groups[:] = [{**group, "params": list(group["params"])} for group in optimizer.param_groups[::-1]]


def clear_and_fill(optimizer: Optimizer) -> None:
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    optimizer.param_groups.extend(groups[n] for n in (1, 2, 0))


def sort(optimizer: Optimizer) -> None:
    optimizer.param_groups.sort(key=lambda group: group["lr"])


@pytest.mark.parametrize("edit", [reverse, assign_reversed, assign_copies, replace_by_copies, clear_and_fill, sort])
def test_rows_follow_their_groups(edit: Callable[[Optimizer], None]) -> None:
    (params, optimizer), (others, other) = three_blocks(), three_blocks()
    for seed in range(8):
        if seed in (3, 5):
            edit(optimizer)
        if seed == 6:  # by its name, wherever the block stands
            optimizer.set_strength("c", 0, 0.25)
            other.set_strength("c", 0, 0.25)
        advance(params, optimizer, seed)
        advance(others, other, seed)
        assert str(sorted(map(str, told(optimizer)["rows"].items()))) == str(
            sorted(map(str, told(other)["rows"].items()))
        )
        assert str(told(optimizer)["statistics"].get("a")) == str(told(other)["statistics"].get("a"))
    for name in params:
        same_bits(optimizer.state[params[name]], other.state[others[name]], name)
        same_bits(params[name].detach(), others[name].detach(), name)


def test_a_group_that_was_taken_out_finds_its_row_when_it_comes_back() -> None:
    params, optimizer = three_blocks()
    advance(params, optimizer, 0)
    before = told(optimizer)
    group = optimizer.param_groups.pop(1)
    kept = params["b"].detach().clone()
    advance(params, optimizer, 1)
    assert torch.equal(params["b"], kept), "a parameter of no group is not stepped"
    assert [row["modality"] for row in optimizer.modulation()] == ["a", "c"] and len(optimizer.statistics()) == 2
    optimizer.param_groups.insert(0, group)
    after = told(optimizer)
    assert after["rows"]["b"]["live_well"] == before["rows"]["b"]["live_well"] == 0.5
    assert str(after["statistics"]["b"]) == str(before["statistics"]["b"])
    advance(params, optimizer, 2)
    assert not torch.equal(params["b"], kept)


def test_a_group_that_is_new_begins_with_a_neutral_row() -> None:
    params, optimizer = three_blocks()
    advance(params, optimizer, 0)
    more = torch.nn.Parameter(torch.ones(4))
    block = {**optimizer.param_groups[0], "params": [more], "modality": "d", "under_optimized": ("absolute", 0.3)}
    optimizer.param_groups = [block, *optimizer.param_groups]
    rows = told(optimizer)["rows"]
    assert rows["d"]["tau"] == 0.3 and rows["d"]["live_well"] == 1.0 and rows["b"]["live_well"] == 0.5
    advance({**params, "d": more}, optimizer, 1)
    assert (more != 1).all()


def test_groups_that_swap_places_keep_their_options_though_their_parameters_stay_in_order() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    q = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.2}], weight_decay=0.0)
    other = torch.optim.AdamW([{"params": [p.detach().clone()], "lr": 0.1}], weight_decay=0.0)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    optimizer.param_groups[1]["params"] = []
    optimizer.param_groups.reverse()
    q.grad, before = None, p.detach().clone()
    optimizer.step()
    assert torch.allclose(before - p, torch.full((3,), other.param_groups[0]["lr"]), rtol=1e-5)


def test_edited_groups_are_saved_loaded_copied() -> None:
    params, optimizer = three_blocks()
    advance(params, optimizer, 0)
    optimizer.param_groups.reverse()
    saved = copy.deepcopy(optimizer.state_dict())
    assert [group["modality"] for group in saved["param_groups"]] == ["c", "b", "a"]
    assert saved["param_groups"][1]["modulation_row"] == optimizer.tables.rows[1].tolist()
    twin = copy.deepcopy(optimizer)
    same_bits(frozen(twin), frozen(optimizer))
    twin.param_groups.reverse()
    assert [row["live_well"] for row in twin.modulation()] == [1.0, 0.5, 1.0]
    advance(params, optimizer, 1)
    optimizer.load_state_dict(saved)
    same_bits(optimizer.state_dict()["param_groups"], saved["param_groups"])


def test_an_open_step_refuses_edits_of_groups() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = Optimizer([{"params": [model.weight]}, {"params": [model.bias]}], backend="cpu")
    ak.step_in_backward(optimizer, model)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.param_groups.reverse()
    with pytest.raises(RuntimeError, match="param_groups"):
        optimizer.step()
    optimizer.param_groups.reverse()
    optimizer.step()
