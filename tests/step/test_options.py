"""The table of options: signature, docstring, defaults, checks, records and refusals are what it says."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
from helpers import CLASSES, TORCH_CLASSES, frozen, parameter, parameters_of, same_bits
from torch.optim import lr_scheduler

import aim_kernels as ak
from aim_kernels.step import options, plan
from aim_kernels.step.layout import FLAGS, GROUP_RECORD, RULES
from aim_kernels.step.options import OF_GROUPS, OPTIONS, WHOLE, Option

pytestmark = pytest.mark.usefixtures("one_thread")

AK: Any = ak.AIMFusedOptimizer
BY_NAME = {option.name: option for option in OPTIONS}

#: Of options that some rules do not know, another value than the default.
OTHER: dict[str, Any] = {
    "momentum": 0.5,
    "dampening": 0.25,
    "alpha": 0.5,
    "lr_decay": 0.125,
    "initial_accumulator_value": 0.5,
    **dict.fromkeys(("nesterov", "amsgrad", "centered", "decouple_lr"), True),
    "reference_lr": 0.5,
}
#: What they need beside them.
NEEDS: dict[str, dict[str, Any]] = {"nesterov": {"momentum": 0.5}}
UNKNOWN = [(rule, option) for option in OTHER for rule in RULES if rule not in BY_NAME[option].rules]
KNOWN = [(rule, option) for option in OTHER for rule in BY_NAME[option].rules if BY_NAME[option].argument]


def stepped(optimizer: Any, steps: int = 1) -> Any:
    for number in range(steps):
        for p in parameters_of(optimizer):
            p.grad = torch.linspace(-1.0, 1.0 + number, p.numel(), dtype=p.dtype).view_as(p)
        optimizer.step()
    return optimizer


# -- one table ---------------------------------------------------------------------------------------------------------


def test_the_signature_is_that_of_the_table() -> None:
    found = [(p.name, p.default) for p in inspect.signature(AK).parameters.values() if p.name != "params"]
    assert found == [(option.name, option.default) for option in OPTIONS if option.argument]


def test_the_docstring_documents_every_option() -> None:
    args = inspect.cleandoc(AK.__doc__).partition("Args:\n")[2].partition("\nAttributes:")[0]
    heads = re.findall(r"^    (\w[\w, ]*): ", args, re.MULTILINE)
    assert [name for head in heads for name in head.split(", ")].count("lr") == 1
    assert sorted(name for head in heads for name in head.split(", ")) == sorted(
        ["params", *(option.name for option in OPTIONS if option.argument)]
    )


def test_names_are_unique_and_defaults_pass_their_checks() -> None:
    assert len(BY_NAME) == len(OPTIONS)
    for option in OPTIONS:
        assert set(option.rules) <= set(RULES) and option.rules
        assert not (option.whole and (option.rules != RULES or option.recorded or option.number or option.decides))
        if option.check is not None and option.name != "weight_decay":  # None: the rule's
            assert option.check(option.name, option.default) == option.default


def test_groups_have_every_option_of_theirs_at_its_default() -> None:
    group = AK([parameter((3,))]).param_groups[0]
    assert {option.name for option in OF_GROUPS} <= group.keys()
    assert not {option.name for option in OPTIONS if option.whole or option.asked} & group.keys()
    for option in OF_GROUPS:
        assert group[option.name] == (0.01 if option.name == "weight_decay" else option.default)


WHOLE_VALUES: dict[str, Any] = {
    "anchor": "init",
    "backend": "cpu",
    "seed": 7,
    "fused_scaling": True,
    "max_grad_norm": 0.5,
    "sync_every": 3,
    "keep_masters": True,
    "zero_grad_in_step": True,
    "process_group": None,
}


@pytest.mark.parametrize("option", WHOLE, ids=lambda option: option.name)
def test_options_of_the_whole(option: Option) -> None:
    """Refused in a group, kept by the optimizer, its copies and its pickles, and told by ``repr``."""
    value = WHOLE_VALUES[option.name]
    with pytest.raises(ValueError, match=rf"^{option.name} \(group 0\): is of the optimizer as a whole"):
        AK([{"params": [parameter((3,))], option.name: value}])
    made = AK([parameter((3,))], **{option.name: value})
    for each in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert getattr(each, option.attribute or option.name) == value
        assert f"\n{option.name}: {value}\n" in repr(each)
    assert f"\n{option.name}: {option.default}\n" in repr(AK([parameter((3,))]))


@pytest.mark.parametrize("rule", CLASSES)
def test_the_class_of_a_rule_takes_the_options_that_the_rule_knows(rule: str) -> None:
    """No more and no less, in its signature or beyond."""
    rules = ("adam", "adamw") if rule == "adam" else (rule,)
    expected = {o.name for o in OPTIONS if o.argument and not o.asked and set(rules) & set(o.rules)} - {"rule"}
    signature = inspect.signature(CLASSES[rule]).parameters
    annotation = str(signature["options"].annotation).removeprefix("Unpack[").removesuffix("]")
    beyond = getattr(inspect.getmodule(CLASSES[rule]), annotation).__optional_keys__
    named = signature.keys() - {"params", "options", "decoupled_weight_decay", *(o.name for o in OPTIONS if o.asked)}
    assert not named & beyond
    assert named | beyond == expected


# -- records -----------------------------------------------------------------------------------------------------------

#: A rule, its options, each different from all others, and the fields of the record that they make.
RECORDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": (
        {"lr": 0.5, "betas": (0.125, 0.25), "eps": 0.375, "weight_decay": 0.0625, "amsgrad": True, "measure": "grad"},
        {"lr": 0.5, "beta1": 0.125, "beta2": 0.25, "eps": 0.375, "weight_decay": 0.0625, "scale": 1.0}
        | {"flags": FLAGS["amsgrad"] | FLAGS["grad"], "momentum": 0.0, "dampening": 0.0, "nesterov": 0},
    ),
    "adam": (
        {"under_optimized": ("fraction", 0.75), "threshold_rate": 0.625, "ema_decay": 0.875, "maximize": True},
        {"target": 0.75, "rate": 0.625, "ema_decay": 0.875, "scale": -1.0, "flags": 0},
    ),
    "sgd": (
        {"momentum": 0.5, "dampening": 0.25, "under_optimized": ("absolute", 0.75), "measure": "fisher"},
        {"momentum": 0.5, "dampening": 0.25, "nesterov": 0, "target": 0.75, "rate": 0.0, "flags": FLAGS["fisher"]},
    ),
    "sgd, Nesterov's": ({"momentum": 0.5, "nesterov": True}, {"momentum": 0.5, "dampening": 0.0, "nesterov": 1}),
    "adagrad": ({"lr_decay": 0.5, "eps": 0.25}, {"lr_decay": 0.5, "eps": 0.25, "ema_decay": 0.0}),
    "rmsprop": (
        {"alpha": 0.5, "momentum": 0.25, "betas": (0.125, 0.75)},
        {"beta1": 0.125, "beta2": 0.5, "momentum": 0.25, "flags": 0, "lr_decay": 0.0},
    ),
    "rmsprop, centered": (
        {"alpha": 0.5, "centered": True, "betas": (0.125, 0.75)},
        {"beta1": 0.5, "beta2": 0.5, "flags": FLAGS["centered"]},
    ),
    "lion": (
        {"lr": 0.25, "weight_decay": 0.125, "decouple_lr": True, "betas": (0.375, 0.625)},
        {"lr": 0.25, "weight_decay": 0.5, "beta1": 0.375, "beta2": 0.625},
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_of_a_record_is_its_option(name: str) -> None:
    rule = name.partition(",")[0]
    given, expected = RECORDS[name]
    optimizer = stepped(AK([parameter((3,))], rule=rule, backend="cpu", **given))
    record = optimizer._plan.groups[0]
    assert record["rule"] == RULES.index(rule)
    for field, value in expected.items():
        assert record[field] == value, field


def test_the_records_above_go_through_every_field() -> None:
    covered = {field for _, expected in RECORDS.values() for field in expected}
    assert covered | {"rule", "lr_tensor", "lr_dtype"} == set(GROUP_RECORD.names or ())


#: What makes another record of a group, by option: the rule, and two values.
CHANGES: dict[str, tuple[str, Any, Any]] = {
    "lr": ("adamw", 0.5, 0.25),
    "betas": ("adamw", (0.5, 0.25), (0.5, 0.75)),
    "eps": ("adamw", 0.5, 0.25),
    "weight_decay": ("adamw", 0.5, 0.25),
    "momentum": ("sgd", 0.5, 0.25),
    "dampening": ("sgd", 0.5, 0.25),
    "amsgrad": ("adamw", False, True),
    "alpha": ("rmsprop", 0.5, 0.25),
    "centered": ("rmsprop", False, True),
    "lr_decay": ("adagrad", 0.5, 0.25),
    "decouple_lr": ("lion", True, False),
    "reference_lr": ("lion", 0.5, 0.25),
    "maximize": ("adamw", False, True),
    "ema_decay": ("adamw", 0.5, 0.25),
    "measure": ("adamw", "snr", "grad"),
    "under_optimized": ("adamw", ("fraction", 0.5), ("fraction", 0.25)),
    "threshold_rate": ("adamw", 0.5, 0.25),
    "nesterov": ("sgd", False, True),
}
#: Recorded for the sake of checks, or because it decides which of the others are.
WITHOUT_A_FIELD = {"rule", "initial_accumulator_value"}


@pytest.mark.parametrize("option", CHANGES)
def test_an_option_that_changes_between_steps_changes_the_record(option: str) -> None:
    rule, before, after = CHANGES[option]
    beside: dict[str, Any] = {}
    if rule in ("sgd", "lion"):
        beside = {"momentum": 0.75} if rule == "sgd" else {"decouple_lr": True, "weight_decay": 0.5}
    optimizer = stepped(AK([{"params": [parameter((3,))], "rule": rule, **beside, option: before}], backend="cpu"))
    record = optimizer._plan.groups[0].copy()
    optimizer.param_groups[0][option] = after
    stepped(optimizer)
    assert optimizer._plan.groups[0] != record


def test_what_decides_which_states_are_kept() -> None:
    """The plan is built anew for those options, and for no others, which schedulers may change at every step."""
    group = AK([parameter((3,))], rule="sgd", momentum=0.5).param_groups[0]
    decisive = plan._decisive(group)
    other: dict[str, Any] = {
        "rule": "adam",
        "measure": "grad",
        "modulated": True,
        "momentum": 0.0,
        "amsgrad": True,
        "centered": True,
        "state_dtype": "int8",
        "rounding": "nearest",
        "master": "kahan",
        "ema_decay": 0.5,
    }
    for option in OF_GROUPS:
        changed = {**group, option.name: other.get(option.name, 0.25)}
        assert (plan._decisive(changed) != decisive) == (option.name in other), option.name
    assert plan._decisive({**group, "momentum": 0.75}) == decisive
    averaged = {**group, "ema_decay": 0.5}
    assert plan._decisive({**averaged, "ema_decay": 0.25}) == plan._decisive(averaged)


# -- options that a rule does not know ---------------------------------------------------------------------------------


def test_the_lists_here_are_complete() -> None:
    assert set(OTHER) == {option.name for option in OF_GROUPS if option.rules != RULES}
    assert set(CHANGES) | WITHOUT_A_FIELD == {option.name for option in OF_GROUPS if option.recorded}


@pytest.mark.parametrize(("rule", "option"), UNKNOWN)
def test_an_option_that_no_rule_knows_is_refused(rule: str, option: str) -> None:
    """By name, before anything is written: in the constructor, in a group, in one that is added, and between steps."""
    value, words = OTHER[option], rf"rule '{rule}' has no such option, only "
    groups = [{"params": [parameter((3,))]}, {"params": [parameter((2,))], option: value}]
    if BY_NAME[option].argument:
        plain: list[dict[str, Any]] = [{"params": [parameter((3,))]}, {"params": [parameter((2,))]}]
        with pytest.raises(ValueError, match=rf"^{option}: {words}"):
            AK(plain, rule=rule, **{option: value})
        assert [set(group) for group in plain] == [{"params"}] * 2
    with pytest.raises(ValueError, match=rf"^{option} \(group 1\): {words}"):
        AK(groups, rule=rule)
    assert set(groups[1]) == {"params", option}
    with pytest.raises(ValueError, match=rf"^{option} \(group 0\): {words}"):
        CLASSES[rule]([{"params": [parameter((2,))], option: value}])
    optimizer = stepped(AK([parameter((3,))], rule=rule))
    before, saved = frozen(optimizer), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"^{option} \(group 1\): {words}"):
        optimizer.add_param_group(groups[1])
    assert set(groups[1]) == {"params", option} and len(optimizer.param_groups) == 1
    if not BY_NAME[option].cycled:
        optimizer.param_groups[0][option] = value
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        with pytest.raises(ValueError, match=rf"^{option} \(group 0\): {words}"):
            optimizer.step()
        optimizer.param_groups[0][option] = BY_NAME[option].default
        saved["param_groups"][0][option] = value
        with pytest.raises(ValueError, match=rf"^{option} \(group 0\): {words}"):
            optimizer.load_state_dict(saved)
    same_bits(before, frozen(optimizer))
    groups[1][option] = BY_NAME[option].default  # what leaves it alone is taken
    optimizer.add_param_group(groups[1])
    stepped(optimizer)


@pytest.mark.parametrize(("rule", "option"), KNOWN)
def test_an_option_for_all_groups_is_for_those_whose_rule_knows_it(rule: str, option: str) -> None:
    other = next(each for each in RULES if each not in BY_NAME[option].rules)
    value, beside = OTHER[option], NEEDS.get(option, {})

    def groups() -> list[dict[str, Any]]:
        return [{"params": [parameter((3,))], "rule": rule}, {"params": [parameter((2,))], "rule": other}]

    mixed = AK(groups(), **beside, **{option: value})
    assert [group[option] for group in mixed.param_groups] == [value, BY_NAME[option].default]
    assert mixed.defaults[option] == value or option not in mixed.defaults
    added = [{"params": [parameter((2,))], "rule": each} for each in (rule, other)]
    for group in added:
        mixed.add_param_group(group)
    assert [group[option] for group in added] == [value, BY_NAME[option].default]
    expected = groups()
    expected[0] |= {**beside, option: value}
    expected += [{**group, "params": [parameter((2,))]} for group in added]
    same_bits(frozen(stepped(mixed, 2)), frozen(stepped(AK(expected), 2)))


def test_several_rules_that_do_not_know_it_are_all_named() -> None:
    groups = [{"params": [parameter((2,))], "rule": rule} for rule in ("adam", "lion")]
    with pytest.raises(ValueError, match=r"^centered: rules 'adam', 'lion' have no such option, only rmsprop"):
        AK(groups, centered=True)
    with pytest.raises(ValueError, match=r"rule \(group 0\): unknown rule 'lamb'"):  # which is said first
        AK([{"params": [parameter((2,))], "rule": "lamb"}], centered=True)
    for bad in (torch.ones(2), "0.9", float("nan")):
        with pytest.raises(ValueError, match=r"^momentum: "):
            AK([parameter((2,))], momentum=bad)


@pytest.mark.parametrize("rule", ["sgd", "rmsprop"])
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_schedulers_write_a_momentum_into_groups_of_every_rule(name: str, rule: str) -> None:
    """Which changes nothing there, as today, and is in checkpoints of it."""

    def made(optimizer: Any) -> Any:
        if name == "OneCycleLR":
            return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
        return lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2)

    mixed = AK([{"params": [parameter((3,))]}, {"params": [parameter((4,))], "rule": "adamw"}], rule=rule, momentum=0.5)
    alone = AK([parameter((4,))], rule="adamw")
    schedule = made(mixed)
    for _ in range(4):
        alone.param_groups[0]["lr"] = mixed.param_groups[1]["lr"]
        stepped(mixed)
        stepped(alone)
        schedule.step()
    assert mixed.param_groups[1]["momentum"] == mixed.param_groups[0]["momentum"] != 0.0
    same_bits(parameters_of(mixed)[1].detach(), parameters_of(alone)[0].detach())
    target = copy.deepcopy(mixed)
    target.load_state_dict(mixed.state_dict())
    same_bits(frozen(stepped(target)), frozen(stepped(mixed)))


@pytest.mark.parametrize("rule", TORCH_CLASSES)
def test_a_checkpoint_of_torch_is_not_refused_for_what_torch_ignores(rule: str) -> None:
    """Its groups keep whatever they are given."""
    # But for what makes another rule's group of it.
    unknown = {"sgd": {"alpha": 0.5, "amsgrad": True}, "rmsprop": {"lr_decay": 0.5}}.get(rule, {"momentum": 0.5})
    theirs = TORCH_CLASSES[rule]([{"params": [parameter((3,))], **unknown, "note": 1}], foreach=False)
    ours = AK([parameter((3,))], rule=rule)
    ours.load_state_dict(copy.deepcopy(stepped(theirs).state_dict()))
    group = ours.param_groups[0]
    assert group["note"] == 1 and all(group[option] == BY_NAME[option].default for option in unknown)
    assert group["lr"] == theirs.param_groups[0]["lr"]
    stepped(ours)


def test_a_step_looks_at_no_option_twice() -> None:
    """A group whose options stay is compared with what they were, and checked no more."""
    optimizer = stepped(AK([parameter((3,))], backend="cpu"))
    with pytest.MonkeyPatch.context() as patch:

        def refuse(group: dict[str, Any], number: int) -> None:
            raise AssertionError("checked again")

        patch.setattr(plan, "check_hyperparameters", refuse)
        stepped(optimizer, 2)
        optimizer.param_groups[0]["lr"] = 0.5
        with pytest.raises(AssertionError, match="checked again"):
            stepped(optimizer)
    assert options.check_hyperparameters is plan.check_hyperparameters
