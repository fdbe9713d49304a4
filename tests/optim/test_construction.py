"""How an optimizer comes to its groups: what torch.optim does with the caller's dicts, and how much work that is."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from helpers import frozen, same_bits
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels.optim.zero_redundancy import AIMZeroRedundancyOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

AK: Any = ak.AIMFusedOptimizer


def parameters(count: int = 3, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(4, generator=generator)) for _ in range(count)]


#: Ways to pass parameters; those that can be read once only among them.
CONTAINERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda ps: (p for p in ps),
    "map": lambda ps: map(nn.Parameter.requires_grad_, ps),
    "filter": lambda ps: filter(lambda p: p.requires_grad, ps),
    "values": lambda ps: {str(n): p for n, p in enumerate(ps)}.values(),
    "iterator": iter,
    "parameters()": lambda ps: nn.ParameterList(ps).parameters(),
    "named_parameters()": lambda ps: nn.ParameterList(ps).named_parameters(),
    "ParameterList": nn.ParameterList,
    "one tensor": lambda ps: ps[0],
}


def ids(group: dict[str, Any]) -> list[int]:
    return list(map(id, group["params"]))


def outline(groups: list[dict[str, Any]]) -> list[Any]:
    """What the two libraries must have alike: parameters, their order, their names, and what the caller has set."""
    return [(ids(g), g.get("param_names"), g["lr"], g.get("note")) for g in groups]


@pytest.mark.parametrize("container", CONTAINERS)
def test_groups_can_be_passed_again(container: str) -> None:
    """A second optimizer from the same groups has what torch's has, and steps it."""
    ours, theirs = parameters(), parameters()
    groups = [
        [
            {"params": CONTAINERS[container](ps[:2]), "lr": 0.5, "note": 1},
            {"params": [("b", ps[2])] if "named" in container else ps[2:]},
        ]
        for ps in (ours, theirs)
    ]
    first, second = AK(groups[0], lr=0.1), AK(groups[0], lr=0.2)
    torch.optim.AdamW(groups[1], lr=0.1)
    expected = torch.optim.AdamW(groups[1], lr=0.2)
    number_of = {id(p): n for n, p in enumerate(ours)} | {id(p): n for n, p in enumerate(theirs)}

    def numbered(groups: list[dict[str, Any]]) -> list[Any]:
        return [([number_of[i] for i in ids], *rest) for ids, *rest in outline(groups)]

    for optimizer in (first, second):
        assert numbered(optimizer.param_groups) == numbered(expected.param_groups)
        assert all(group is given for group, given in zip(optimizer.param_groups, groups[0], strict=True))
    for ps, optimizer in ((ours, second), (theirs, expected)):
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert len(groups[0][0]["params"]) == (1 if container == "one tensor" else 2)


@pytest.mark.parametrize("container", CONTAINERS)
def test_given_at_the_top(container: str) -> None:
    ps = parameters()
    given: Any = CONTAINERS[container](ps)
    if container == "one tensor":
        with pytest.raises(TypeError, match="iterable of Tensors"):
            AK(given)
        return
    assert ids(AK(given).param_groups[0]) == list(map(id, ps))
    groups = ({"params": CONTAINERS[container]([p])} for p in ps)
    assert [ids(group) for group in AK(groups).param_groups] == [[id(p)] for p in ps]


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "option": ({"lr": -1.0}, {}),
    "string": ({"eps": "1e-8"}, {}),
    "of the whole": ({"seed": 1}, {}),
    "implementation": ({"foreach": True}, {}),
    "rule": ({"rule": "sgdd"}, {}),
    "constructor": ({}, {"betas": (0.9, 2.0)}),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_constructor_can_be_tried_again(wrong: str, container: str) -> None:
    """An error in the second group, or in all: the dicts keep their parameters, and get no option of the failed one."""
    ps = parameters(4)
    of_group, of_all = WRONG[wrong]
    groups = [
        {"params": CONTAINERS[container](ps[:2]), "lr": 0.5},
        {"params": CONTAINERS[container](ps[2:]), **of_group},
    ]
    with pytest.raises(ValueError, match=next(iter(of_group or of_all))):
        AK(groups, **of_all)
    assert set(groups[1]) == {"params", *of_group}
    for option in of_group:
        del groups[1][option]
    optimizer = AK(groups)
    count = 1 if container == "one tensor" else 2
    assert [ids(group) for group in optimizer.param_groups] == [
        list(map(id, ps[:count])),
        list(map(id, ps[2 : 2 + count])),
    ]
    assert optimizer.tables.rows.shape[0] == 2


def failing(ps: list[nn.Parameter]) -> dict[str, tuple[type[Exception], str, Iterable[Any], dict[str, Any]]]:
    new = parameters(2, seed=1)
    imaginary = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    made = new[0] * 2
    return {
        "twice": (ValueError, "parameter 1 of group 1.*group 0", (p for p in [new[0], ps[0]]), {}),
        "in itself": (ValueError, "parameter 1 of group 1.*more than once", (p for p in [new[0], new[0]]), {}),
        "type": (ValueError, "parameter 0 of group 1.*complex", (p for p in [imaginary]), {}),
        "no tensor": (TypeError, "parameter 1 of group 1.*expected a tensor, got str", iter([new[0], "w"]), {}),
        "computed": (ValueError, "parameter 1 of group 1.*can't optimize a non-leaf", iter([new[0], made]), {}),
        "names": (ValueError, "group 1.*with/without names", iter([("w", new[0])]), {}),
        "some names": (ValueError, "group 1.*with/without names", iter([("w", new[0]), new[1]]), {}),
        "option": (ValueError, r"betas\[1\].*group 1", (p for p in new), {"betas": (0.9, 1.0)}),
        "flag": (ValueError, r"nesterov.*group 1", (p for p in new), {"nesterov": "False"}),
        "set": (TypeError, "a set has no order", set(new), {}),
        "nothing to go through": (TypeError, "iterable", 3, {}),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("wrong", failing(parameters()))
def test_a_failed_add_param_group_changes_nothing(wrong: str) -> None:
    ps = parameters()
    optimizer = AK(ps, lr=0.1)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = frozen(optimizer), copy.copy(optimizer.param_groups), optimizer.param_groups
    error, words, params, options = failing(ps)[wrong]
    group = {"params": params, **options}
    with pytest.raises(error, match=words):
        optimizer.add_param_group(group)
    assert set(group) == {"params", *options}
    same_bits(before[0], frozen(optimizer))
    assert before[1] == optimizer.param_groups and before[2] is optimizer.param_groups
    with pytest.raises(error, match=words):  # of the same parameters, not of none
        optimizer.add_param_group(group)
    new = parameters(2, seed=1)
    optimizer.add_param_group(added := {"params": (p for p in new)})
    assert optimizer.param_groups[1] is added and ids(added) == list(map(id, new))
    assert optimizer.tables.rows.shape[0] == 2
    for p in new:
        p.grad = torch.ones_like(p)
    old = [p.detach().clone() for p in new]
    optimizer.step()
    assert all((p != q).all() for p, q in zip(new, old, strict=True))


def test_what_add_param_group_finds_goes_by_the_groups_as_they_are() -> None:
    """Whoever edits the list of groups by hand, or loads a checkpoint, is asked about what is there."""
    ps, more = parameters(), parameters(seed=1)
    optimizer = AK([{"params": [p]} for p in ps])
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": [ps[2]]})
    with pytest.raises(ValueError, match=r"parameter 0 of group 3.*group 2"):
        optimizer.add_param_group({"params": [ps[2]]})
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"parameter 1 of group 3.*group 0"):
        optimizer.add_param_group({"params": [more[0], ps[0]]})
    twin = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 of group 3.*group 1"):
        twin.add_param_group({"params": [twin.param_groups[1]["params"][0]]})
    twin.add_param_group({"params": [ps[1]]})
    optimizer.add_param_group({"params": more})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1, 3]


def test_hidden_defaults_reach_groups_that_are_added() -> None:
    """SGD has no "betas" among its defaults, for schedulers that cycle them; its groups have them all the same."""
    optimizer = AK(parameters(), rule="sgd", betas=(0.8, 0.9))
    optimizer.add_param_group(group := {"params": parameters(seed=1)})
    assert "betas" not in optimizer.defaults
    assert group["betas"] == (0.8, 0.9)
    assert set(group) == set(optimizer.param_groups[0])


@pytest.fixture
def alone(tmp_path: Any) -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("container", [container for container in CONTAINERS if "named" not in container])
def test_zero_takes_groups_again_too(container: str, alone: None) -> None:
    ps = parameters(4)
    groups = [{"params": CONTAINERS[container](ps[:2])}, {"params": CONTAINERS[container](ps[2:]), "eps": "1e-8"}]
    for options, words in (({"lr": -1.0}, "lr"), ({"lr": 0.5, "fused": False}, "fused"), ({"lr": 0.5}, "eps")):
        with pytest.raises(ValueError, match=words):
            AIMZeroRedundancyOptimizer(groups, **options)
        assert [set(group) for group in groups] == [{"params"}, {"params", "eps"}]
    groups[1]["eps"] = 1e-8
    for lr in (0.5, 0.25):  # the second finds the options of the first, as in torch.optim
        optimizer = AIMZeroRedundancyOptimizer(groups, lr=lr)
        count = 1 if container == "one tensor" else 2
        for part in (optimizer, optimizer.optim):
            assert [len(group["params"]) for group in part.param_groups] == [count, count]
            assert [group["lr"] for group in part.param_groups] == [0.5, 0.5]
    new = parameters(2, seed=1)
    before = frozen(optimizer.optim), list(optimizer.param_groups)
    for bad in ({"betas": (0.9, "0.999")}, {"seed": 3}, {"foreach": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            optimizer.add_param_group({"params": iter(new), **bad})
    with pytest.raises(ValueError, match=r"parameter 1 of group 2.*group 0"):
        optimizer.add_param_group(wrong := {"params": iter([new[0], ps[0]])})
    assert set(wrong) == {"params"} and len(wrong["params"]) == 2
    same_bits(before[0], frozen(optimizer.optim))
    assert before[1] == optimizer.param_groups
    optimizer.add_param_group({"params": CONTAINERS[container](new)})
    for part in (optimizer, optimizer.optim):
        assert [len(group["params"]) for group in part.param_groups] == [count] * 3
    assert optimizer.tables.rows.shape[0] == 3
    for p in [*ps, *new]:
        p.grad = torch.ones_like(p)
    old = [p.detach().clone() for p in new]
    optimizer.step()
    assert all((p != q).all() for p, q in zip(new[:count], old[:count], strict=True))


def test_zero_takes_groups_of_several_rules(alone: None) -> None:
    """An option for all groups is for those whose rule knows it, as in the optimizer inside."""

    def groups() -> list[dict[str, Any]]:
        return [{"params": parameters(2)}, {"params": parameters(2, seed=1), "rule": "sgd"}]

    zero, plain = AIMZeroRedundancyOptimizer(groups(), momentum=0.9), AK(groups(), momentum=0.9)
    for optimizer in (zero, plain):
        optimizer.add_param_group({"params": parameters(2, seed=2)})
        optimizer.add_param_group({"params": parameters(2, seed=3), "rule": "sgd"})
        for _ in range(2):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            optimizer.step()
        assert [group["momentum"] for group in optimizer.param_groups] == [0.0, 0.9, 0.0, 0.9]
    same_bits(frozen(zero.optim), frozen(plain))
    with pytest.raises(ValueError, match="momentum: rule 'adamw' has no such option"):
        AIMZeroRedundancyOptimizer(parameters(2), momentum=0.9)
    wrong = {"params": parameters(2, seed=4), "momentum": 0.5}
    with pytest.raises(ValueError, match=r"momentum \(group 4\): rule 'adamw' has no such option"):
        zero.add_param_group(wrong)
    assert set(wrong) == {"params", "momentum"} and len(zero.param_groups) == 4


def test_zero_refuses_names_and_sets(alone: None) -> None:
    ps = parameters()
    with pytest.raises(TypeError, match="names"):
        AIMZeroRedundancyOptimizer([{"params": [("w", ps[0])]}])
    with pytest.raises(TypeError, match="names"):
        AIMZeroRedundancyOptimizer((str(n), p) for n, p in enumerate(ps))
    with pytest.raises(TypeError, match="a set has no order"):
        AIMZeroRedundancyOptimizer([{"params": set(ps)}])
    with pytest.raises(TypeError, match="a set has no order"):
        AIMZeroRedundancyOptimizer(set(ps))
    optimizer = AIMZeroRedundancyOptimizer(ps)
    with pytest.raises(TypeError, match="names"):
        optimizer.add_param_group({"params": [("w", nn.Parameter(torch.ones(1)))]})


# -- which implementation: what frameworks tell torch.optim ------------------------------------------------------------

TAKEN: list[dict[str, Any]] = [
    {"fused": True},
    {"fused": None, "foreach": None},
    {"fused": True, "foreach": False, "capturable": False, "differentiable": False},
    {"fused": False, "backend": "reference"},
]
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "not fused": ({"fused": False}, {}, "fused.*leave it out, or pass backend='reference'"),
    "fused": ({"fused": True}, {"backend": "reference"}, "fused.*leave it out, or pass backend='auto'"),
    "foreach": ({"foreach": True}, {}, "foreach.*leave it out"),
    "capturable": ({"capturable": True}, {}, "capturable.*'cuda' and 'triton'.*leave it out on cpu"),
    "differentiable": ({"differentiable": True}, {}, r"differentiable.*torch\.optim"),
    "a string": ({"fused": "True"}, {}, "fused.*expected True or False, got 'True'"),
    "another": ({"foreach": "false"}, {}, "foreach.*expected True or False, got 'false'"),
}


@pytest.mark.parametrize("options", TAKEN, ids=repr)
def test_implementations_that_are_so_anyway(options: dict[str, Any]) -> None:
    """They are found where frameworks look for them, and change nothing."""
    asked = {option: value for option, value in options.items() if option != "backend"}
    of_all = {option: value for option, value in options.items() if option == "backend"}
    runs = []
    for optimizer in (
        AK(parameters(), **options),
        AK([{"params": parameters(), **asked}], **of_all),
        AK(parameters(), **of_all),
    ):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        runs.append(frozen(optimizer))
    same_bits(runs[0], runs[2])
    same_bits(runs[1], runs[2])
    optimizer = AK(parameters(), **options)
    optimizer.add_param_group({"params": parameters(seed=1)})
    for group in optimizer.param_groups:
        assert all(group.get(option) == value or value in (None, False) for option, value in asked.items())
    assert all(optimizer.defaults.get(option) == value or not value for option, value in asked.items())
    assert not optimizer._step_supports_amp_scaling  # GradScaler goes on unscaling by itself


@pytest.mark.parametrize("name", REFUSED)
def test_implementations_that_are_not(name: str) -> None:
    asked, of_all, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        AK(parameters(), **asked, **of_all)
    with pytest.raises(ValueError, match=rf"group 1.*{words.partition('.*')[2]}"):
        AK([{"params": parameters()}, {"params": parameters(seed=1), **asked}], **of_all)
    optimizer = AK(parameters(), **of_all)
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": parameters(seed=1), **asked})
    assert len(optimizer.param_groups) == 1
    same_bits(before, frozen(optimizer))


@pytest.mark.parametrize(
    "asked",
    [{"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}, {"capturable": True}, {}],
    ids=repr,
)
def test_checkpoints_and_groups_of_torch_carry_them_along(asked: dict[str, Any]) -> None:
    """They say nothing of the numbers in a checkpoint, and are there when it goes back to torch."""
    theirs = torch.optim.AdamW(parameters(), **asked)
    if not asked.get("capturable"):  # which torch steps on devices only
        for p in theirs.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        theirs.step()
    ours = AK(parameters(), fused=True)
    ours.load_state_dict(theirs.state_dict())
    assert all(ours.param_groups[0][option] == value for option, value in asked.items())
    for p in ours.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    ours.step()
    saved = copy.deepcopy(ours.state_dict())
    assert all(saved["param_groups"][0][option] == value for option, value in asked.items())
    back, again = torch.optim.AdamW(parameters()), AK(parameters())
    for optimizer in (back, again):
        optimizer.load_state_dict(copy.deepcopy(saved))
        assert all(optimizer.param_groups[0][option] == value for option, value in asked.items())
    # Groups that torch.optim has filled in with what is neutral.
    groups: list[dict[str, Any]] = [{"params": parameters()}]
    torch.optim.AdamW(groups)
    assert AK(groups).param_groups[0] is groups[0]


# -- how much it takes -------------------------------------------------------------------------------------------------


def lines_run(call: Callable[[], Any]) -> int:
    """Lines and calls of Python that a call takes: the same at every run, as seconds are not."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def single(count: int) -> list[dict[str, Any]]:
    return [{"params": [torch.ones(4, requires_grad=True)]} for _ in range(count)]


def grouped(count: int) -> Any:
    """An optimizer with so many groups, and gradients."""
    optimizer = AK(single(count))
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(4)
    return optimizer


def added_one_by_one(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    for group in groups:
        optimizer.add_param_group(group)


def prepared(what: str, count: int) -> Callable[[], Any]:
    if what == "constructor":
        groups = single(count)
        return lambda: AK(groups)
    if what == "one group":
        params = [group["params"][0] for group in single(count)]
        return lambda: AK(params)
    if what == "add_param_group":
        optimizer, more = AK(single(1)), single(count)
        return lambda: added_one_by_one(optimizer, more)
    optimizer = grouped(count)
    if what == "first step":
        return lambda: optimizer.step()
    optimizer.step()
    saved = optimizer.state_dict()
    return {"state_dict": optimizer.state_dict, "load_state_dict": lambda: optimizer.load_state_dict(saved)}[what]


@pytest.mark.parametrize(
    "what", ["constructor", "one group", "add_param_group", "first step", "state_dict", "load_state_dict"]
)
def test_work_grows_with_the_number_of_groups_only(what: str) -> None:
    """Eight times as many groups take eight times as many lines; with its square it were far more."""
    few, many = 50, 400
    prepared(what, 2)()  # loads what is loaded once
    counted = {count: lines_run(prepared(what, count)) for count in (few, many)}
    assert counted[many] < 8.5 * counted[few]


def test_a_model_with_many_groups_is_stepped_as_in_torch() -> None:
    ours, theirs = single(300), single(300)
    pair = AK(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    values: list[Tensor] = []
    for optimizer in pair:
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.1 + number / 1000
            group["params"][0].grad = torch.full((4,), number / 100)
        optimizer.step()
        values.append(torch.stack([group["params"][0].detach() for group in optimizer.param_groups]))
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-7)


def test_a_parameter_that_was_taken_out_can_join_another_group() -> None:
    ps = parameters()
    optimizer = AK(ps, lr=0.1)
    taken = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [taken], "lr": 0.3})
    assert optimizer.param_groups[1]["params"] == [taken]
    with pytest.raises(ValueError, match="group 1"):
        optimizer.add_param_group({"params": [taken]})


def test_groups_and_parameters_that_are_set_as_something_else_than_lists() -> None:
    found = []
    for made in (AK, torch.optim.AdamW):
        ps = parameters()
        optimizer = made(ps, lr=0.1)
        for number in range(5):
            if number == 1:
                optimizer.param_groups[0]["params"] = tuple(ps)
            if number == 2 and made is AK:  # torch has none left in the second step
                optimizer.param_groups[0]["params"] = iter(ps)
            if number == 4:
                optimizer.param_groups = tuple(optimizer.param_groups)
            for p in ps:
                p.grad = torch.full_like(p, number + 1.0)
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in ps]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
