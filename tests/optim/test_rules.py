"""Classes of one rule each: torch.optim's signatures and defaults, and what a torch user does with an optimizer."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from checkpoint_helpers import PEERS, batches, drive, through_a_file
from helpers import CLASSES, TORCH_CLASSES, frozen, parameter, same_bits
from torch.optim import lr_scheduler

import aim_kernels as ak
from aim_kernels.optim import rules

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters(dtype: str = "float32") -> list[torch.Tensor]:
    return [parameter(shape, dtype, seed=i) for i, shape in enumerate(((4, 3), (7,), ()))]


def options_beyond(made: Any) -> set[str]:
    """Names of what a class takes as ``**options``."""
    (rest,) = (p for p in inspect.signature(made).parameters.values() if p.kind is p.VAR_KEYWORD)
    return set(getattr(rules, str(rest.annotation).removeprefix("Unpack[").removesuffix("]")).__optional_keys__)


@pytest.mark.parametrize("rule", TORCH_CLASSES)
def test_signatures_are_those_of_torch(rule: str) -> None:
    """Every parameter of the installed torch's, in its order, with its kind and default."""
    theirs = inspect.signature(TORCH_CLASSES[rule]).parameters
    ours = inspect.signature(CLASSES[rule]).parameters
    for name, expected in theirs.items():
        assert name in ours, name
        assert ours[name].kind is expected.kind, name
        assert ours[name].default == expected.default, name
    by_place = [[p.name for p in each.values() if p.kind is p.POSITIONAL_OR_KEYWORD] for each in (theirs, ours)]
    assert by_place[0] == by_place[1]


def test_lion_s_signature_is_that_of_its_authors() -> None:
    ours = list(inspect.signature(ak.Lion).parameters.values())
    assert [(p.name, p.default) for p in ours[:4]] == [
        ("params", inspect.Parameter.empty),
        ("lr", 1e-4),
        ("betas", (0.9, 0.99)),
        ("weight_decay", 0.0),
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[4:-1])


@pytest.mark.parametrize("rule", CLASSES)
def test_options_of_the_library_are_taken(rule: str) -> None:
    """By keyword, and with the defaults of ``AIMFusedOptimizer``. Which: ``test_options.py``."""
    made, whole = CLASSES[rule], inspect.signature(ak.AIMFusedOptimizer).parameters
    beyond = options_beyond(made)
    assert made.__name__ in ak.__all__ and getattr(ak, made.__name__) is made
    default = made(parameters())
    given = made(parameters(), **{name: whole[name].default for name in beyond})
    same_bits(frozen(default), frozen(given))
    assert repr(default) == repr(given)
    for name in beyond & default.defaults.keys():
        assert default.defaults[name] == whole[name].default


@pytest.mark.parametrize("rule", TORCH_CLASSES)
def test_groups_have_torch_s_defaults(rule: str) -> None:
    ours, theirs = CLASSES[rule](parameters()), TORCH_CLASSES[rule](parameters())
    for option, value in theirs.defaults.items():
        if option not in ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"):
            assert ours.param_groups[0][option] == value, option


@pytest.mark.parametrize("rule", CLASSES)
def test_an_argument_reaches_the_groups(rule: str) -> None:
    """Each by itself, with another value than its default."""
    others = {
        "lr": 0.5,
        "betas": (0.5, 0.6),
        "eps": 0.5,
        "weight_decay": 0.5,
        "momentum": 0.5,
        "dampening": 0.5,
        "amsgrad": True,
        "alpha": 0.5,
        "centered": True,
        "lr_decay": 0.5,
        "initial_accumulator_value": 0.5,
        "maximize": True,
        "fused": True,
        "foreach": False,
        "nesterov": True,
    }
    beyond = options_beyond(CLASSES[rule])
    neutral = ("params", "capturable", "differentiable", "decoupled_weight_decay", "options")
    for name in (inspect.signature(CLASSES[rule]).parameters.keys() - {*neutral}) | beyond & others.keys():
        extra = {"momentum": 0.9} if name == "nesterov" else {}
        assert CLASSES[rule](parameters(), **{name: others[name]}, **extra).param_groups[0][name] == others[name], name
    for name in inspect.signature(CLASSES[rule]).parameters.keys() & {"capturable", "differentiable"}:
        with pytest.raises(ValueError, match=name):
            CLASSES[rule](parameters(), **{name: True})


POSITIONAL = {
    "adamw": (0.1, (0.8, 0.9), 1e-6, 0.2, True),
    "adam": (0.1, (0.8, 0.9), 1e-6, 0.2, True),
    "sgd": (0.1, 0.9, 0.0, 0.2, True),
    "adagrad": (0.1, 0.05, 0.2, 0.3, 1e-6, False),
    "rmsprop": (0.1, 0.9, 1e-6, 0.2, 0.8, True, False, False, True),
}


@pytest.mark.parametrize("rule", POSITIONAL)
def test_positional_arguments(rule: str) -> None:
    ours = CLASSES[rule](parameters("float64"), *POSITIONAL[rule])
    theirs = TORCH_CLASSES[rule](parameters("float64"), *POSITIONAL[rule])
    grads = batches(ours, 4)
    for optimizer in (ours, theirs):
        drive(optimizer, grads)
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


#: Of each class, options that other rules have, with values other than their defaults.
FOREIGN = {
    "adamw": {"momentum": 0.9, "alpha": 0.5, "nesterov": True, "lr_decay": 0.1, "decoupled_weight_decay": False},
    "adam": {"momentum": 0.9, "centered": True, "dampening": 0.1},
    "sgd": {"amsgrad": True, "alpha": 0.5, "decouple_lr": True, "initial_accumulator_value": 0.1, "capturable": True},
    "adagrad": {"momentum": 0.9, "amsgrad": True, "capturable": True},
    "rmsprop": {"nesterov": True, "dampening": 0.1, "fused": True},
    "lion": {"momentum": 0.9, "amsgrad": True},
}


@pytest.mark.parametrize(("rule", "option"), [(rule, option) for rule, given in FOREIGN.items() for option in given])
def test_an_option_of_another_rule_is_refused_by_name(rule: str, option: str) -> None:
    made = CLASSES[rule]
    with pytest.raises(TypeError, match=rf"^{option}: {made.__name__} has no such option; leave it out"):
        made(parameters(), **{option: FOREIGN[rule][option]})


@pytest.mark.parametrize("rule", CLASSES)
def test_unknown_options_and_other_rules_are_refused(rule: str) -> None:
    made, other = CLASSES[rule], "sgd" if rule != "sgd" else "adam"
    for option, value in (("rule", rule), ("learning_rate", 0.1)):
        with pytest.raises(TypeError, match=rf"^{option}: {made.__name__} has no such option"):
            made(parameters(), **{option: value})
    words = rf"rule \(group 1\): {made.__name__}.*'{rule}', got '{other}'.*AIMFusedOptimizer"
    groups = [{"params": [parameter((2,))]}, {"params": [parameter((3,))], "rule": other}]
    with pytest.raises(ValueError, match=words):
        made(groups)
    assert set(groups[1]) == {"params", "rule"}
    optimizer = made(parameters())
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1 and set(groups[1]) == {"params", "rule"}
    optimizer.add_param_group({"params": [parameter((3,))], "rule": rule})
    again = made(optimizer.param_groups)  # groups are passed again, as in torch.optim
    assert [group["rule"] for group in again.param_groups] == [rule] * 2


def test_implementations_are_asked_for_as_in_torch() -> None:
    """What is so anyway is taken; the rest is refused by name."""
    optimizer = ak.AdamW(parameters(), fused=True, foreach=False, capturable=False, differentiable=False)
    assert optimizer.param_groups[0]["fused"] is True
    assert ak.RMSprop(parameters(), foreach=False).param_groups[0]["foreach"] is False
    for made in CLASSES.values():
        with pytest.raises(ValueError, match=r"foreach.*leave it out"):
            made(parameters(), foreach=True)
        with pytest.raises(ValueError, match=r"differentiable.*torch\.optim"):
            made(parameters(), differentiable=True)


# -- decoupled_weight_decay: Adam that is AdamW ------------------------------------------------------------------------

TORCH_HAS_IT = "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters


def stepped(made: Any, params: Any = None, **options: Any) -> Any:
    optimizer = made(parameters("float64") if params is None else params, **options)
    drive(optimizer, batches(optimizer, 3))
    return optimizer


def close(ours: Any, theirs: Any) -> None:
    for one, two in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(one["params"], two["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_adam_with_decoupled_weight_decay_is_adamw() -> None:
    options = {"lr": 0.1, "weight_decay": 0.3}
    coupled, decoupled = (stepped(ak.Adam, decoupled_weight_decay=flag, **options) for flag in (False, True))
    adamw = stepped(ak.AdamW, **options)
    same_bits(frozen(decoupled), frozen(adamw))
    close(coupled, stepped(torch.optim.Adam, **options))
    close(decoupled, stepped(torch.optim.AdamW, **options))
    assert not torch.equal(coupled.param_groups[0]["params"][0], adamw.param_groups[0]["params"][0])
    assert ak.Adam(parameters(), decoupled_weight_decay=True).param_groups[0]["weight_decay"] == 0
    with pytest.raises(ValueError, match="decoupled_weight_decay: expected True or False"):
        ak.Adam(parameters(), decoupled_weight_decay="no")  # type: ignore[arg-type]


def test_groups_choose_whether_their_decay_is_decoupled() -> None:
    def made(optimizer: Any) -> Any:
        groups = [
            {"params": parameters("float64"), "decoupled_weight_decay": True},
            {"params": parameters("float64")},
        ]
        return stepped(optimizer, groups, lr=0.1, weight_decay=0.3)

    ours = made(ak.Adam)
    assert [group["rule"] for group in ours.param_groups] == ["adamw", "adam"]
    if TORCH_HAS_IT:
        close(ours, made(torch.optim.Adam))
    with pytest.raises(ValueError, match=r"decoupled_weight_decay \(group 0\): AdamW.*use Adam"):
        ak.AdamW([{"params": parameters(), "decoupled_weight_decay": False}])


@pytest.mark.skipif(
    "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters,
    reason="torch < 2.7 has no such Adam",
)
def test_a_checkpoint_of_decoupled_adam_goes_to_torch_s_and_back() -> None:
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}
    ours, theirs = stepped(ak.Adam, **options), stepped(torch.optim.Adam, **options)
    saved = through_a_file(ours.state_dict()), through_a_file(theirs.state_dict())
    theirs.load_state_dict(saved[0])
    ours.load_state_dict(saved[1])
    grads = batches(ours, 3, seed=2)
    for optimizer in (ours, theirs):
        drive(optimizer, grads)
    close(ours, theirs)


@pytest.mark.parametrize(
    ("made", "group", "changed"),
    [
        (ak.Adam, {}, {"decoupled_weight_decay": True}),
        (ak.Adam, {"decoupled_weight_decay": True}, {"decoupled_weight_decay": False}),
        (ak.AdamW, {}, {"decoupled_weight_decay": False}),
        (ak.AdamW, {}, {"rule": "adam"}),
    ],
)
def test_a_group_that_says_two_things_of_its_decay_is_refused(made: Any, group: Any, changed: Any) -> None:
    optimizer = stepped(made, [{"params": parameters("float64"), **group}])
    before = frozen(optimizer)
    optimizer.param_groups[0].update(changed)
    with pytest.raises(ValueError, match=r"decoupled_weight_decay \(group 0\): says"):
        drive(optimizer, batches(optimizer, 1))
    same_bits(before["state"], frozen(optimizer)["state"])


def test_a_group_of_any_rule_cannot_contradict_it() -> None:
    with pytest.raises(ValueError, match=r"decoupled_weight_decay \(group 0\): says True"):
        ak.AIMFusedOptimizer([{"params": parameters(), "decoupled_weight_decay": True}], rule="adam")


@pytest.mark.skipif(not TORCH_HAS_IT, reason="torch < 2.7 has no such Adam")
def test_a_checkpoint_of_adamw_stays_decoupled_in_torch_s_adam() -> None:
    ours = stepped(ak.AdamW, lr=0.1, weight_decay=0.3)
    theirs = stepped(torch.optim.Adam, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    assert theirs.param_groups[0]["decoupled_weight_decay"] is True


# -- what becomes of an optimizer --------------------------------------------------------------------------------------


def made_of(peer: str, of_class: bool = True, params: Any = None, **more: Any) -> Any:
    """The optimizer that has the options of a peer: by its class, or by ``AIMFusedOptimizer``."""
    options = {**PEERS[peer][1], **more}
    rule = options.pop("rule")
    params = parameters("float64") if params is None else params
    return CLASSES[rule](params, **options) if of_class else ak.AIMFusedOptimizer(params, rule=rule, **options)


@pytest.mark.parametrize("peer", PEERS)
def test_a_class_is_its_rule(peer: str) -> None:
    """To the bit, with the same checkpoints, pickles and copies, one into the other."""
    ours, mixed = made_of(peer, eps=1e-9), made_of(peer, of_class=False, eps=1e-9)
    grads = batches(ours, 8)
    for optimizer in (ours, mixed):
        drive(optimizer, grads[:3])
    same_bits(frozen(ours), frozen(mixed))
    # What torch.optim.Adam asks for in a checkpoint of AdamW.
    more = {"decoupled_weight_decay": True} if ours.param_groups[0]["rule"] == "adamw" else {}
    assert [{**group, "params": None} for group in ours.param_groups] == [
        {**group, **more, "params": None} for group in mixed.param_groups
    ]
    for source in (ours, mixed):
        for of_class in (True, False):
            params = [p.detach().clone().requires_grad_() for p in source.param_groups[0]["params"]]
            target = made_of(peer, of_class, params)
            target.load_state_dict(through_a_file(source.state_dict()))
            drive(target, grads[3:])
            expected = copy.deepcopy(source)
            drive(expected, grads[3:])
            same_bits(frozen(target), frozen(expected))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and repr(twin) == repr(ours)
        twin.add_param_group({"params": [parameter((2,), "float64")]})
        with pytest.raises(ValueError, match=f"{type(ours).__name__} steps it"):
            twin.add_param_group({"params": [parameter((2,), "float64")], "rule": "lion"})


@pytest.mark.parametrize("peer", PEERS)
def test_checkpoints_of_torch_load_and_go_back(peer: str) -> None:
    make, options = PEERS[peer]
    options = {k: v for k, v in options.items() if k != "rule"}
    theirs = stepped(make, foreach=False, **options)
    params = [p.detach().clone().requires_grad_() for p in theirs.param_groups[0]["params"]]
    ours = made_of(peer, params=params)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    grads = batches(theirs, 6, seed=2)
    for optimizer in (ours, theirs):
        drive(optimizer, grads[:3])
    close(ours, theirs)
    back = make([p.detach().clone().requires_grad_() for p in params], foreach=False, **options)
    back.load_state_dict(through_a_file(ours.state_dict()))
    for optimizer in (back, theirs):
        drive(optimizer, grads[3:])
    close(back, theirs)


@pytest.mark.parametrize("rule", CLASSES)
def test_repr_names_the_class(rule: str) -> None:
    optimizer = CLASSES[rule](parameters())
    assert repr(optimizer).startswith(f"{CLASSES[rule].__name__} (\nParameter Group 0\n")
    assert f"rule: {rule}\n" in repr(optimizer)


@pytest.mark.parametrize("rule", TORCH_CLASSES)
def test_groups_with_options_of_their_own_and_groups_that_come_later(rule: str) -> None:
    found = []
    for made in (CLASSES[rule], TORCH_CLASSES[rule]):
        groups = [{"params": parameters("float64"), "lr": 0.3, "weight_decay": 0.1}, {"params": parameters("float64")}]
        found.append(made(groups, lr=0.05))
        found[-1].add_param_group({"params": parameters("float64"), "lr": 0.2, "maximize": True})
    grads = batches(found[0], 4)
    for optimizer in found:
        drive(optimizer, grads)
    close(*found)


SCHEDULERS: dict[str, Any] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=2, base_momentum=0.7, max_momentum=0.95),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("rule", TORCH_CLASSES)
def test_schedulers_cycle_what_they_cycle_in_torch(rule: str, scheduler: str) -> None:
    options = {"momentum": 0.9} if rule in ("sgd", "rmsprop") else {}
    pair = [made(parameters("float64"), **options) for made in (CLASSES[rule], TORCH_CLASSES[rule])]
    if rule == "adagrad":  # which has nothing to cycle
        for optimizer in pair:
            with pytest.raises(ValueError, match="momentum"):
                SCHEDULERS[scheduler](optimizer)
        return
    schedulers = [SCHEDULERS[scheduler](optimizer) for optimizer in pair]
    key = "betas" if rule in ("adamw", "adam") else "momentum"
    cycled = set()
    for grads in batches(pair[0], 8):
        for optimizer, each in zip(pair, schedulers, strict=True):
            drive(optimizer, [grads])
            each.step()
        assert pair[0].param_groups[0][key] == pair[1].param_groups[0][key]
        cycled.add(pair[0].param_groups[0][key])
        close(*pair)
    assert len(cycled) > 2


@pytest.mark.parametrize("fused_scaling", [False, True])
@pytest.mark.parametrize("rule", TORCH_CLASSES)
def test_gradscaler(rule: str, fused_scaling: bool) -> None:
    """A step is skipped for an infinity; others are those without a scale, which is a power of two."""
    scaled, plain = CLASSES[rule](parameters(), fused_scaling=fused_scaling), CLASSES[rule](parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for number in range(4):
        for optimizer in (scaled, plain):
            optimizer.zero_grad()
        ours, theirs = (
            sum((p * p).sum() for p in optimizer.param_groups[0]["params"]) for optimizer in (scaled, plain)
        )
        scaler.scale(ours).backward()
        theirs.backward()
        before = frozen(scaled)
        if number == 2:
            scaled.param_groups[0]["params"][0].grad[0, 0] = float("inf")
        scale = scaler.get_scale()
        scaler.step(scaled)
        scaler.update()
        if number == 2:
            same_bits(before["params"], frozen(scaled)["params"])
            assert scaler.get_scale() < scale
        else:
            plain.step()
        same_bits(frozen(scaled)["params"], frozen(plain)["params"])


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_a_compiled_step_is_the_plain_one(rule: str) -> None:
    torch._dynamo.reset()
    compiled, plain = (CLASSES[rule](parameters()) for _ in range(2))
    run = torch.compile(lambda: compiled.step(), fullgraph=True, backend="aot_eager")
    for grads in batches(plain, 3):
        for optimizer, step in ((compiled, run), (plain, plain.step)):
            for p, g in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                p.grad = g.clone()
            step()
        same_bits(frozen(compiled), frozen(plain))
