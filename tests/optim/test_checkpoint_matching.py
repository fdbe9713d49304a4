"""Whose a checkpoint is, which of its parameters are whose, and how many steps they have taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checkpoint_helpers import batches, drive, through_a_file
from helpers import Gradients, assign, build, frozen, parameter, parameters_of, same_bits, set_row
from torch import Tensor

import aim_kernels as ak

NAMES = ("a.weight", "a.bias", "b.weight", "b.bias", "head")


def named(order: Sequence[Sequence[int]], prefix: Callable[[str], str] = str) -> ak.AIMFusedOptimizer:
    """Five parameters of one shape, so that any fits any; their values go by their names."""
    groups = [
        {"params": [(prefix(NAMES[i]), parameter((4, 3), seed=i)) for i in members], "modulated": True, "lr": 0.01 * lr}
        for lr, members in enumerate(order, 1)
    ]
    return ak.AIMFusedOptimizer(groups, backend="cpu", under_optimized=("fraction", 0.4), threshold_rate=0.3)


def by_name(optimizer: torch.optim.Optimizer, prefix: Callable[[str], str] = str) -> dict[str, Tensor]:
    known = {prefix(name): name for name in NAMES}
    return {
        known[name]: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


def train(optimizer: torch.optim.Optimizer, steps: int, seed: int, prefix: Callable[[str], str] = str) -> None:
    """Gradients go by names."""
    params = by_name(optimizer, prefix)
    gradients = Gradients([params[name] for name in NAMES], seed)
    for _ in range(steps):
        assign([params[name] for name in NAMES], gradients())
        optimizer.step()


def moved(source: Any, target: Any, prefix: Callable[[str], str] = str) -> None:
    """The module's part of a checkpoint, by name."""
    theirs = by_name(source)
    for name, p in by_name(target, prefix).items():
        p.data.copy_(theirs[name].detach())


PREFIXES: dict[str, Callable[[str], str]] = {
    "as they were": str,
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "within": lambda name: ".module.".join(name.split(".", 1)),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("order", [((4, 2, 0, 1, 3),), ((0, 1, 2, 3, 4),)])
def test_moments_follow_names(order: Any, prefix: str) -> None:
    first, second = named([range(5)]), named(order, PREFIXES[prefix])
    train(first, 4, seed=1)
    for p in by_name(second, PREFIXES[prefix]).values():
        p.grad = None
    moved(first, second, PREFIXES[prefix])
    second.load_state_dict(through_a_file(first.state_dict()))
    train(first, 3, seed=2)
    train(second, 3, seed=2, prefix=PREFIXES[prefix])
    there = by_name(second, PREFIXES[prefix])
    for name, p in by_name(first).items():
        same_bits(p.detach(), there[name].detach(), name)
        same_bits(dict(first.state[p]), dict(second.state[there[name]]), name)
    assert second.param_groups[0]["param_names"] == [PREFIXES[prefix](NAMES[i]) for i in order[0]]


@pytest.mark.parametrize("saver", ["here", "torch"])
def test_groups_follow_names(saver: str) -> None:
    """With their options, and thresholds; none of a group's parameters may have gone elsewhere."""
    order: Any = [(0, 1), (2, 3), (4,)]
    other: Any = [(4,), (3, 2), (0, 1)]
    first: Any = named(order)
    if saver == "torch":
        groups = [
            {"params": list(zip(g["param_names"], g["params"], strict=True)), "lr": g["lr"]} for g in first.param_groups
        ]
        first = torch.optim.AdamW(groups)
    second = named(other)
    if saver == "here":
        first.set_modulation(1, live_well=0.5, grad_well=0.5)
    train(first, 4, seed=1)
    moved(first, second)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert [group["lr"] for group in second.param_groups] == [0.03, 0.02, 0.01]
    there = by_name(second)
    for name, p in by_name(first).items():
        same_bits(first.state[p]["exp_avg"], second.state[there[name]]["exp_avg"], name)
        assert float(second.state[there[name]]["step"]) == 4
    if saver == "here":
        same_bits(first.tables.rows[[2, 1, 0]], second.tables.rows)
        same_bits(first.tables.statistics[[2, 1, 0]], second.tables.statistics)
        train(first, 3, seed=2)
        train(second, 3, seed=2)
        same_bits([p.detach() for p in by_name(first).values()], [there[name].detach() for name in by_name(first)])


@pytest.mark.parametrize(
    ("order", "change", "words"),
    [
        ([(0, 1, 2), (3, 4)], None, r"'b.weight' \(parameter 2 of group 0\).*in one group with 'a.weight' here"),
        ([(0,), (1, 2, 3, 4)], None, r"'a.bias' \(parameter 0 of group 1\).*in one group with 'a.weight' in the check"),
        ([(0, 1, 2, 3, 4)], None, "2 param groups, the optimizer 1"),
        ([(1, 0), (2, 3, 4)], {"a.weight": "c.weight"}, r"'a.weight' \(parameter 1 of group 0\).*it has 'c.weight'"),
        ([(1, 0), (2, 3, 4)], {"a.weight": "head"}, "'head': in the checkpoint two parameters"),
    ],
)
def test_names_that_cannot_be_matched(order: Any, change: dict[str, str] | None, words: str) -> None:
    first, second = named([(0, 1), (2, 3, 4)]), named(order)
    train(first, 2, seed=1)
    train(second, 2, seed=3)
    saved = through_a_file(first.state_dict())
    for group in saved["param_groups"]:
        group["param_names"] = [(change or {}).get(name, name) for name in group["param_names"]]
    before, options = frozen(second), copy.deepcopy([{**g, "params": 0} for g in second.param_groups])
    with pytest.raises(ValueError, match=words):
        second.load_state_dict(saved)
    same_bits(before, frozen(second))
    assert options == [{**g, "params": 0} for g in second.param_groups]


def test_names_that_the_checkpoint_has_and_the_optimizer_not() -> None:
    """Of as many parameters in each group; also a wrapper's words that are somebody's own."""
    first, second = named([(0, 1)]), named([(0, 2)])
    with pytest.raises(ValueError, match=r"'b.weight' \(parameter 1 of group 0\).*it has 'a.bias'"):
        second.load_state_dict(first.state_dict())
    pair = [("module.w", parameter((3,))), ("w", parameter((3,)))]
    third = ak.AIMFusedOptimizer(pair, backend="cpu")
    fourth = ak.AIMFusedOptimizer([(f"module.{name}", parameter((3,))) for name, _ in pair], backend="cpu")
    with pytest.raises(ValueError, match="the checkpoint has no parameter of this name"):
        fourth.load_state_dict(third.state_dict())  # bare names would stand for two
    fifth = ak.AIMFusedOptimizer([(name, parameter((3,))) for name, _ in reversed(pair)], backend="cpu")
    drive(third, batches(third, 2))
    fifth.load_state_dict(third.state_dict())
    same_bits(fifth.state[parameters_of(fifth)[0]]["exp_avg"], third.state[pair[1][1]]["exp_avg"])


@pytest.mark.parametrize("named_side", ["checkpoint", "optimizer"])
def test_without_names_on_one_side_it_goes_by_place(named_side: str) -> None:
    """As torch.optim does always."""
    first, second = named([range(5)]), named([(4, 3, 2, 1, 0)])
    train(first, 2, seed=1)
    saved = through_a_file(first.state_dict())
    if named_side == "optimizer":
        del saved["param_groups"][0]["param_names"]
    else:
        second = ak.AIMFusedOptimizer([{"params": parameters_of(second), "modulated": True}], backend="cpu")
    second.load_state_dict(saved)
    for p, q in zip(parameters_of(first), parameters_of(second), strict=True):
        same_bits(first.state[p]["exp_avg"], second.state[q]["exp_avg"])


def test_parameters_that_the_checkpoint_calls_by_name() -> None:
    """torch.distributed.checkpoint puts them into today's order, and leaves param_names as they were."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def model_of() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(3)))

    def optimizer_of(model: torch.nn.Module, order: Sequence[int], names: bool) -> ak.AIMFusedOptimizer:
        entries = [list(model.named_parameters())[i] for i in order]
        return ak.AIMFusedOptimizer(entries if names else [p for _, p in entries], backend="cpu")

    for names in (False, True):
        model, other = model_of(), model_of()
        first, second = optimizer_of(model, (0, 1, 2), names), optimizer_of(other, (2, 0, 1), names)
        drive(first, batches(first, 3))
        saved = get_optimizer_state_dict(model, first)
        set_optimizer_state_dict(other, second, copy.deepcopy(saved))
        for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            same_bits(first.state[p]["exp_avg"], second.state[q]["exp_avg"], name)
        if names:  # also where nobody has put them into order
            assert second.param_groups[0]["param_names"] == ["2.weight", "0.weight", "1.weight"]
            third = optimizer_of(other, (1, 2, 0), names)
            third.load_state_dict(copy.deepcopy(saved))
            for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
                same_bits(first.state[p]["exp_avg"], third.state[q]["exp_avg"], name)


# -- step counts -----------------------------------------------------------------------------------------------------

FUSED = {"lr": 0.01, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def fused(step: Any, **changes: Any) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """AdamW after seven steps, and what apex's FusedAdam would have saved of them: one count for the group."""
    source = torch.optim.AdamW([parameter((4, 3)), parameter((5,), seed=1)], lr=0.01, weight_decay=0.1, foreach=False)
    drive(source, batches(source, 7))
    states = {
        key: {name: value for name, value in state.items() if name != "step"}
        for key, state in source.state_dict()["state"].items()
    }
    group = {**FUSED, "step": step, "params": [0, 1], **changes}
    return source, copy.deepcopy({"state": states, "param_groups": [group]})


@pytest.mark.parametrize("number", [int, torch.tensor, lambda n: torch.tensor([n], dtype=torch.int32)])
@pytest.mark.parametrize("like", ["apex", "torch"])
def test_the_count_of_a_group(like: str, number: Callable[[int], Any]) -> None:
    """Bias corrections go on where they were; counted from 1, the first update would be several times too small."""
    source, saved = fused(number(7))
    if like == "torch":
        saved["param_groups"][0] = {**source.state_dict()["param_groups"][0], "step": number(7)}
    params = [p.detach().clone().requires_grad_() for p in parameters_of(source)]
    target = ak.AIMFusedOptimizer(params, lr=0.5, backend="cpu")
    target.load_state_dict(through_a_file(saved))
    assert all(target.state[p]["step"].item() == 7 for p in params) and "step" not in target.param_groups[0]
    grads = batches(source, 3, seed=5)
    for optimizer in (source, target):
        drive(optimizer, grads)
    for p, q in zip(parameters_of(source), params, strict=True):
        torch.testing.assert_close(q.detach(), p.detach(), rtol=2e-6, atol=2e-7)
        assert target.state[q]["step"].item() == 10


def test_the_states_counts_go_before_their_group_s() -> None:
    source, saved = fused(99)
    saved["state"][0]["step"] = torch.tensor(7.0)
    target = ak.AIMFusedOptimizer([p.detach().clone().requires_grad_() for p in parameters_of(source)], backend="cpu")
    target.load_state_dict(saved)
    assert [target.state[p]["step"].item() for p in parameters_of(target)] == [7, 99]
    own = build("adamw", (((3,),),))
    drive(own, batches(own, 2))
    saved = copy.deepcopy(own.state_dict())
    saved["param_groups"][0]["step"] = "somebody's own"
    own.load_state_dict(saved)
    assert own.param_groups[0]["step"] == "somebody's own" and own.state[parameters_of(own)[0]]["step"].item() == 2


@pytest.mark.parametrize("step", [-1, 2.5, float("nan"), [7], "7", torch.tensor([1, 2])], ids=repr)
def test_counts_of_a_group_that_are_none(step: Any) -> None:
    source, saved = fused(step)
    target = ak.AIMFusedOptimizer([p.detach().clone().requires_grad_() for p in parameters_of(source)], backend="cpu")
    before = frozen(target)
    with pytest.raises(ValueError, match="parameter 0 of group 0: the step of its group"):
        target.load_state_dict(saved)
    same_bits(before, frozen(target))


def test_adam_without_bias_correction_is_refused() -> None:
    source, saved = fused(7, bias_correction=False)
    target = ak.AIMFusedOptimizer([p.detach().clone().requires_grad_() for p in parameters_of(source)], backend="cpu")
    with pytest.raises(ValueError, match="group 0: the checkpoint has bias_correction=False"):
        target.load_state_dict(saved)


@pytest.mark.parametrize("rule", ["adamw", "adam", "adagrad", "rmsprop", "rmsprop-momentum", "lion", "sgd-momentum"])
def test_moments_without_a_count_are_refused(rule: str) -> None:
    optimizer = build(rule, (((4, 3), (5,)),))
    drive(optimizer, batches(optimizer, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]["step"]
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*no step"):
        optimizer.load_state_dict(saved)
    same_bits(before, frozen(optimizer))


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}], ids=str)
def test_torch_s_sgd_counts_no_steps(options: dict[str, Any]) -> None:
    source = torch.optim.SGD([parameter((4, 3), "float64")], lr=0.1, foreach=False, **options)
    drive(source, batches(source, 3))
    target = ak.AIMFusedOptimizer(
        [p.detach().clone().requires_grad_() for p in parameters_of(source)], rule="sgd", backend="cpu"
    )
    target.load_state_dict(through_a_file(source.state_dict()))
    grads = batches(source, 3, seed=2)
    for optimizer in (source, target):
        drive(optimizer, grads)
    torch.testing.assert_close(parameters_of(target)[0], parameters_of(source)[0], rtol=1e-13, atol=1e-14)


def test_others_lion_counts_no_steps() -> None:
    """Nor does its update depend on them; torch.optim has none, so the formula is the judge."""
    p = parameter((6,), "float64")
    m, theta = torch.linspace(-1, 1, 6, dtype=torch.float64), p.detach().clone()
    saved = {
        "state": {0: {"exp_avg": m.clone()}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.01, "params": [0]}],
    }
    optimizer = ak.AIMFusedOptimizer([p], rule="lion", backend="cpu")
    optimizer.load_state_dict(saved)
    for seed in range(3):
        g = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        theta = theta * (1 - 0.1 * 0.01) - 0.1 * (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), theta, rtol=1e-13, atol=1e-14)


# -- other optimizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd", "adagrad", "rmsprop", "lion"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.ASGD, {}),
        (torch.optim.Adadelta, {}),
        (torch.optim.Rprop, {}),
        *([(torch.optim.Adafactor, {})] if hasattr(torch.optim, "Adafactor") else []),
        *([(torch.optim.Muon, {"lr": 0.1})] if hasattr(torch.optim, "Muon") else []),
    ],
)
def test_rules_that_are_not_here_are_refused(make: Any, options: dict[str, Any], rule: str) -> None:
    source = make([parameter((4, 3)), parameter((3, 2), seed=1)], **options)
    drive(source, batches(source, 2))
    target = ak.AIMFusedOptimizer([parameter((4, 3)), parameter((3, 2), seed=1)], rule=rule, backend="cpu")
    drive(target, batches(target, 1))
    before = frozen(target)
    with pytest.raises(ValueError, match="group 0: the checkpoint is of"):
        target.load_state_dict(through_a_file(source.state_dict()))
    same_bits(before, frozen(target))


def adamw_group(**changes: Any) -> dict[str, Any]:
    group = torch.optim.AdamW([parameter((4, 3))]).state_dict()["param_groups"][0]
    return {**group, **changes}


FOREIGN: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "bitsandbytes, 8 bits": (
        "adamw",
        adamw_group(),
        {
            "step": 3,
            "state1": torch.zeros(4, 3, dtype=torch.uint8),
            "state2": torch.zeros(4, 3, dtype=torch.uint8),
            "absmax1": torch.zeros(1),
            "absmax2": torch.zeros(1),
            "qmap1": torch.zeros(256),
            "qmap2": torch.zeros(256),
        },
        "parameter 0 of group 0: the checkpoint has no exp_avg; it is of bitsandbytes",
    ),
    "bitsandbytes, its own options": (
        "adamw",
        {
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "alpha": 0.0,
            "t_alpha": None,
            "params": [0],
        },
        {"step": 3, "state1": torch.zeros(4, 3), "state2": torch.zeros(4, 3)},
        "group 0: the checkpoint is of bitsandbytes",
    ),
    "bitsandbytes without a count": (
        "adamw",
        adamw_group(),
        {"state1": torch.zeros(4, 3), "state2": torch.zeros(4, 3)},
        "parameter 0 of group 0: the checkpoint has no exp_avg; it is of bitsandbytes",
    ),
    "bitsandbytes, SGD": (
        "sgd",
        torch.optim.SGD([parameter((4, 3))], momentum=0.9).state_dict()["param_groups"][0],
        {"step": 3, "state1": torch.zeros(4, 3, dtype=torch.uint8), "absmax1": torch.zeros(1)},
        "parameter 0 of group 0: the checkpoint has no momentum_buffer; it is of bitsandbytes",
    ),
    "Adafactor of transformers": (
        "adamw",
        {"lr": 0.1, "eps": (1e-30, 1e-3), "beta1": None, "decay_rate": -0.8, "scale_parameter": True, "params": [0]},
        {"step": 3, "exp_avg_sq_row": torch.zeros(4), "exp_avg_sq_col": torch.zeros(3), "RMS": 1.0},
        "group 0: the checkpoint is of an Adafactor",
    ),
    "Adafactor's states": (
        "adamw",
        adamw_group(),
        {"step": 3, "exp_avg": torch.zeros(4, 3), "exp_avg_sq_row": torch.zeros(4), "exp_avg_sq_col": torch.zeros(3)},
        "parameter 0 of group 0: the checkpoint has no exp_avg_sq; it is of an Adafactor",
    ),
    "LAMB": (
        "adamw",
        {**FUSED, "grad_averaging": True, "max_grad_norm": 1.0, "step": 3, "params": [0]},
        {"exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros(4, 3)},
        "group 0: the checkpoint is of LAMB",
    ),
    "codes without exponents": (
        "adamw",
        adamw_group(),
        {"step": 3, "exp_avg": torch.zeros(4, 3, dtype=torch.int8), "exp_avg_sq": torch.zeros(4, 3)},
        "parameter 0 of group 0: its exp_avg is torch.int8",
    ),
    "a list": (
        "adamw",
        adamw_group(),
        {"step": 3, "exp_avg": [[0.0] * 3] * 4, "exp_avg_sq": torch.zeros(4, 3)},
        "parameter 0 of group 0: its exp_avg is a list",
    ),
    "on the meta device": (
        "adamw",
        adamw_group(),
        {"step": 3, "exp_avg": torch.zeros(4, 3, device="meta"), "exp_avg_sq": torch.zeros(4, 3)},
        "parameter 0 of group 0: its exp_avg is a torch.strided tensor on meta",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_formats_that_are_not_ours_are_named(case: str) -> None:
    rule, group, state, words = FOREIGN[case]
    target = ak.AIMFusedOptimizer([parameter((4, 3))], rule=rule, momentum=0.9 if rule == "sgd" else 0.0, backend="cpu")
    drive(target, batches(target, 1))
    before = frozen(target)
    with pytest.raises(ValueError, match=words):
        target.load_state_dict({"state": {0: state}, "param_groups": [group]})
    same_bits(before, frozen(target))


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"zero_stage": 2, "base_optimizer_state": [], "loss_scaler": None}, "DeepSpeed"),
        ({"optimizer_state_dict": {"base_optimizer_state": {"param_groups": []}}, "ds_version": "1"}, "DeepSpeed"),
        ({"model": {}, "optimizer": {"state": {}, "param_groups": []}, "grad_scaler": {}}, "under 'optimizer'"),
        ({"optimizer": {}, "fp32_from_fp16_params": []}, "Megatron"),
        ({"state.a.exp_avg": torch.zeros(1), "param_groups.a.lr": 0.1}, "set_optimizer_state_dict"),
        ({"weights": 1}, "'state' and 'param_groups', got a dict of .*weights"),
        ({"state": {}, "param_groups": [{"lr": 0.1}]}, "'state' and 'param_groups'"),
        ({}, "'state' and 'param_groups'"),
    ],
)
def test_dicts_that_are_no_optimizer_s(saved: dict[str, Any], words: str) -> None:
    target = build("adamw", (((4, 3),),))
    drive(target, batches(target, 1))
    before = frozen(target)
    with pytest.raises(ValueError, match=words):
        target.load_state_dict(saved)
    same_bits(before, frozen(target))


@pytest.mark.parametrize("master", [None, "split", "kahan", "float32"])
def test_master_weights_of_fused_adam_are_taken(master: str | None) -> None:
    """TransformerEngine saves them under a name of its own; the weights go on from them, not from their 16 bits."""
    source, saved = fused(7)
    for key, p in zip((0, 1), parameters_of(source), strict=True):
        saved["state"][key]["master_param"] = p.detach().clone()
    params = [p.detach().bfloat16().requires_grad_() for p in parameters_of(source)]
    target = ak.AIMFusedOptimizer(params, master=master, backend="cpu")
    target.load_state_dict(through_a_file(saved))
    whole = ak.AIMFusedOptimizer([p.detach().clone().requires_grad_() for p in parameters_of(source)], backend="cpu")
    whole.load_state_dict(saved)
    grads = [g.bfloat16() for g in batches(source, 1, seed=5)[0]]
    assign(params, grads)
    assign(parameters_of(whole), [g.float() for g in grads])
    for optimizer in (target, whole):
        optimizer.step()
    for p, q in zip(params, parameters_of(whole), strict=True):
        same_bits(p.detach(), q.detach().bfloat16())
        assert ("master" in target.state[p]) == (master == "float32") and "master_param" not in target.state[p]
    saved["state"][1]["master_param"] = torch.zeros(5, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*store_param_remainders"):
        target.load_state_dict(saved)


# -- live weights ----------------------------------------------------------------------------------------------------


def test_what_is_said_where_masters_are_missing() -> None:
    """That torch drops them is not the dict's fault: the fresh optimizer has to ask for them."""
    optimizer = build("adamw", (((5, 7), (33,)),))
    set_row(optimizer, 0, "chain")
    drive(optimizer, batches(optimizer, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.pop("master", None)
    with pytest.raises(ValueError, match="keep_masters=True") as error:
        optimizer.load_state_dict(saved)
    assert "flatten" not in str(error.value)


@pytest.mark.parametrize(("live", "refused"), [({"live_well": 0.5}, False), ({"live_under": 0.9}, True)])
def test_states_of_frozen_parameters_that_torch_dropped(live: dict[str, float], refused: bool) -> None:
    """What was never stepped is under-optimized, so whether the module has its true weights can be known."""
    optimizer = build("adamw", (((5, 7), (33,)),))
    frozen_one = parameters_of(optimizer)[1]
    optimizer.set_modulation(0, **live)
    for grads in batches(optimizer, 2):
        assign(parameters_of(optimizer), [grads[0], None])
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]
    if refused:
        with pytest.raises(ValueError, match=r"parameter 1 of group 0.*no master"):
            optimizer.load_state_dict(saved)
        return
    master = optimizer.state[frozen_one]["master"].clone()
    optimizer.load_state_dict(saved)
    same_bits(frozen_one.detach(), master)


def test_thresholds_and_rows_are_asked_for() -> None:
    optimizer = build("adamw", (((5, 7), (33,)),))
    drive(optimizer, batches(optimizer, 2))
    for value in (None, "absent"):
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            group["modulation_row"] = value
            if value == "absent":
                del group["modulation_row"]
        with pytest.raises(ValueError, match="neither thresholds nor rows"):
            optimizer.load_state_dict(saved)
