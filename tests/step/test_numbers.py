"""What is a number, and what is a yes or no: strings, which configuration files give, are refused by name at once, and
numbers of numpy and torch are what they are worth, in every backend."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import aim_helpers
import method_helpers
import numpy as np
import pytest
import torch
from backends_under_test import DEVICE_BACKENDS, enter
from helpers import frozen, parameter, same_bits

import aim_kernels as ak
from aim_kernels.aim import (
    Alternate,
    Constant,
    CosineOut,
    DecoupleAll,
    Gap,
    LinearOut,
    Margin,
    Prototypes,
    Ratio,
    Split,
    Trial,
)
from aim_kernels.methods import METHODS, make_method
from aim_kernels.step.layout import PUBLIC_COLUMNS

pytestmark = pytest.mark.usefixtures("one_thread")

AK: Any = ak.AIMFusedOptimizer

#: Every numeric option of a group: the rule that reads it, a value that float32 holds, and others that it needs.
NUMBERS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "lr": ("adamw", 0.125, {}),
    "eps": ("adamw", 2.0**-20, {}),
    "weight_decay": ("adamw", 0.25, {}),
    "momentum": ("sgd", 0.75, {}),
    "dampening": ("sgd", 0.5, {"momentum": 0.5}),
    "alpha": ("rmsprop", 0.875, {}),
    "lr_decay": ("adagrad", 0.25, {}),
    "initial_accumulator_value": ("adagrad", 0.5, {}),
    "threshold_rate": ("adamw", 0.5, {}),
    "ema_decay": ("adamw", 0.75, {}),
    "reference_lr": ("lion", 0.5, {"decouple_lr": True}),
}
#: The same of options that hold a number: how to put it in.
INSIDE: dict[str, tuple[float, Callable[[Any], Any]]] = {
    "betas[0]": (0.75, lambda value: (value, 0.875)),
    "betas[1]": (0.75, lambda value: (0.5, value)),
    "under_optimized": (0.25, lambda value: ("fraction", value)),
}
FLAGS = {"nesterov": "sgd", "amsgrad": "adamw", "centered": "rmsprop", "decouple_lr": "lion", "maximize": "adamw"}
FLAGS["modulated"] = "adamw"
CASES = [*NUMBERS, *INSIDE]

#: What is no number, though float() or arithmetic takes much of it.
NONE_AT_ALL: dict[str, Callable[[float], Any]] = {
    "string": str,
    "bytes": lambda value: str(value).encode(),
    "complex": complex,
    "bool": lambda value: True,
    "bool of numpy": lambda value: np.bool_(True),
    "Decimal": Decimal,
    "Fraction": Fraction,
    "list": lambda value: [value],
    "array": lambda value: np.array([value]),
    "two elements": lambda value: torch.tensor([value, value]),
    "bool tensor": lambda value: torch.tensor(True),
    "complex tensor": lambda value: torch.tensor(complex(value)),
}


def case(name: str, make: Callable[[float], Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The option's name, what its group needs, and the option with ``make(value)``."""
    if name in INSIDE:
        value, put = INSIDE[name]
        return name, {"rule": "adamw"}, {name.partition("[")[0]: put(make(value))}
    rule, value, needed = NUMBERS[name]
    return name, {"rule": rule, **needed}, {name: make(value)}


def stepped(optimizer: Any, steps: int = 1) -> Any:
    for step in range(steps):
        for group in optimizer.param_groups:
            for n, p in enumerate(group["params"]):
                p.grad = torch.linspace(-1.0, 1.0 + n + step, p.numel(), dtype=p.dtype, device=p.device).view_as(p)
        optimizer.step()
    return optimizer


def pattern(name: str) -> str:
    return name.replace("[", r"\[").replace("]", r"\]")


@pytest.mark.parametrize("bad", NONE_AT_ALL)
@pytest.mark.parametrize("name", CASES)
def test_what_is_no_number_is_refused_by_name(name: str, bad: str) -> None:
    """In the constructor, in a group, in one that is added, in a checkpoint, and set between steps."""
    name, needed, option = case(name, NONE_AT_ALL[bad])
    name = pattern(name)
    others = {} if "reference_lr" in option else option  # it is of a group only
    if others:
        with pytest.raises(ValueError, match=name):
            AK([parameter((3,))], **needed, **others)
    with pytest.raises(ValueError, match=rf"{name}.*group 1"):
        AK([{"params": [parameter((3,))]}, {"params": [parameter((2,))], **needed, **option}])
    optimizer = stepped(AK([parameter((3,))], **needed, ema_decay=0.5))
    with pytest.raises(ValueError, match=rf"{name}.*group 1"):
        optimizer.add_param_group({"params": [parameter((2,))], **option})
    before = frozen(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(option)
    with pytest.raises((ValueError, TypeError), match=name):
        optimizer.load_state_dict(saved)
    kept = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(option)
    with pytest.raises(ValueError, match=rf"{name}.*group 0"):
        optimizer.step()
    optimizer.param_groups[0].update(kept)
    same_bits(before, frozen(optimizer))
    optimizer.step()


def test_a_string_that_spells_the_number_that_was_there_is_none_either() -> None:
    optimizer = stepped(AK([parameter((3,))], lr=1e-3))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0]["lr"] = "1e-3"
    with pytest.raises(ValueError, match=r"lr \(group 0\).*a string.*float\(\)"):
        optimizer.step()
    same_bits(before, optimizer.state_dict()["state"])


#: Kinds of numbers, exact in all of them.
MAKERS: dict[str, Callable[[float], Any]] = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "tensor": lambda value: torch.tensor(value, dtype=torch.float64),
    "float32 tensor": torch.tensor,
    "one element": lambda value: torch.tensor([value]),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_numbers_of_numpy_and_torch_are_what_they_are_worth(backend: str, name: str, maker: str) -> None:
    """The bits of Python's floats: nothing is computed in the precision of the number that was given."""
    runs = []
    for make in (float, MAKERS[maker]):
        _, needed, option = case(name, make)
        group = {"params": [parameter((40,)), parameter((3, 5))], "modality": "a", "depth": 0, "modulated": True}
        optimizer = AK([{**group, **option}], **needed, backend=backend, seed=3)
        optimizer.set_strength("a", 0, 0.25)
        runs.append(frozen(stepped(optimizer, 3)))
    same_bits(*runs)


@pytest.mark.parametrize("backend", DEVICE_BACKENDS)
def test_devices_take_them_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = enter(backend, monkeypatch)
    runs = []
    for make in (float, np.float32, torch.tensor):
        options = {
            "lr": make(0.125),
            "eps": make(2.0**-20),
            "weight_decay": make(0.25),
            "betas": (make(0.5), make(0.75)),
        }
        runs.append(frozen(stepped(AK([parameter((40,))], **options, backend=name))))
    same_bits(runs[0], runs[1])
    same_bits(runs[0], runs[2])


@pytest.mark.parametrize(
    "name", [name for name in NUMBERS if name not in ("reference_lr", "initial_accumulator_value")]
)
def test_a_tensor_that_is_written_between_steps_counts(name: str) -> None:
    """As in torch.optim, where nothing keeps what a tensor held before."""
    rule, value, needed = NUMBERS[name]
    runs = []
    for make in (float, torch.tensor):
        optimizer = stepped(AK([parameter((40,))], rule=rule, **needed, **{name: make(value)}, backend="cpu"))
        group = optimizer.param_groups[0]
        if make is float:
            group[name] = value / 2
        else:
            group[name].fill_(value / 2)
        runs.append(frozen(stepped(optimizer)))
    same_bits(*runs)


def test_integers() -> None:
    for option, good, bad in (
        ("seed", 3, ("3", True, 3.0, -1, 2**63, None)),
        ("sync_every", 2, ("2", True, 2.0, 0, None)),
    ):
        same_bits(*(frozen(stepped(AK([parameter((3,))], **{option: make(good)}))) for make in (int, np.int64)))
        for value in bad:
            with pytest.raises(ValueError, match=f"{option}: expected a whole number"):
                AK([parameter((3,))], **{option: value})
    with pytest.raises(ValueError, match=r"lr.*beyond the largest float"):
        AK([parameter((3,))], lr=10**400)


@pytest.mark.parametrize("bad", ["False", "no", "false", "", None, 2, 0.5, [True], torch.tensor(True)], ids=repr)
@pytest.mark.parametrize("flag", FLAGS)
def test_flags(flag: str, bad: Any) -> None:
    """All strings are true: "False" among them."""
    options: dict[str, Any] = {"rule": FLAGS[flag]} | ({"momentum": 0.5} if FLAGS[flag] == "sgd" else {})
    if flag != "modulated":
        with pytest.raises(ValueError, match=rf"{flag}.*expected True or False"):
            AK([parameter((3,))], **options, **{flag: bad})
    optimizer = stepped(AK([parameter((3,))], **options))
    with pytest.raises(ValueError, match=rf"{flag} \(group 1\).*expected True or False"):
        optimizer.add_param_group({"params": [parameter((2,))], flag: bad})
    before = frozen(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0][flag] = bad
    with pytest.raises(ValueError, match=rf"{flag} \(group 0\).*expected True or False"):
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0][flag], kept = bad, optimizer.param_groups[0][flag]
    with pytest.raises(ValueError, match=rf"{flag} \(group 0\).*expected True or False"):
        optimizer.step()
    optimizer.param_groups[0][flag] = kept
    same_bits(before, frozen(optimizer))


@pytest.mark.parametrize("good", [np.bool_(True), 1], ids=repr)
def test_flags_of_numpy_and_integers(good: Any) -> None:
    for flag, rule in FLAGS.items():
        runs = []
        for value in (True, good):
            options: dict[str, Any] = {"rule": rule} | ({"momentum": 0.5} if rule == "sgd" else {})
            optimizer = AK([{"params": [parameter((9,))], flag: value}], **options)
            runs.append(frozen(stepped(optimizer, 2)))
        same_bits(*runs)


@pytest.mark.parametrize("flag", ["fused_scaling", "keep_masters", "zero_grad_in_step"])
def test_flags_of_the_whole(flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag}: expected True or False"):
        AK([parameter((3,))], **{flag: "False"})


def test_attributes_that_are_set_later_are_looked_at_by_the_next_step() -> None:
    for attribute, bad in (("max_grad_norm", "1.0"), ("zero_grad_in_step", "false"), ("sync_every", "1")):
        optimizer = stepped(AK([parameter((3,))]))
        with pytest.raises(ValueError, match="max_grad_norm"):
            AK([parameter((3,))], max_grad_norm="1.0")
        before = frozen(optimizer)
        kept = getattr(optimizer, attribute)
        setattr(optimizer, attribute, bad)
        with pytest.raises(ValueError, match=attribute):
            optimizer.step()
        same_bits(before, frozen(optimizer))
        setattr(optimizer, attribute, kept)
        optimizer.step()


def test_rows_take_numbers_only() -> None:
    _, optimizer = aim_helpers.build()
    number = next(n for n, group in enumerate(optimizer.param_groups) if group["modulated"])
    before = frozen(optimizer)
    for bad in ("0.5", True, 0.5j, Decimal("0.5"), Fraction(1, 2)):
        with pytest.raises(ValueError, match="kappa"):
            optimizer.set_strength("a", 0, bad)
        with pytest.raises(ValueError, match="probability"):
            optimizer.set_phases(bad)
        for column in PUBLIC_COLUMNS:
            with pytest.raises(ValueError, match=column):
                optimizer.set_modulation(number, **{column: bad})
        with pytest.raises(ValueError, match="live_well"):
            optimizer.set_phase_rows(number, true={"live_well": bad})
        with pytest.raises(ValueError, match="grad_well"):
            optimizer.set_phase_rows(number, aux={"grad_well": bad})
    same_bits(before, frozen(optimizer))
    rows = []
    for kappa in (0.3, np.float64(0.3), torch.tensor(0.3, dtype=torch.float64)):
        optimizer.set_strength("a", 0, kappa)
        rows.append(optimizer.tables.rows.clone())
    same_bits(rows[0], rows[1])
    same_bits(rows[0], rows[2])
    optimizer.set_strength("a", 0, np.float32(0.3))
    assert optimizer.tables.rows[number].max() == 1.0
    assert 1.0 - float(np.float32(0.3)) in optimizer.tables.rows[number].tolist()


def numeric(function: Any) -> list[str]:
    """Arguments of a constructor that are numbers or flags, but for those that may be words."""
    found = []
    for name, argument in inspect.signature(function).parameters.items():
        types = [word.strip() for word in str(argument.annotation).split("|")]
        if "str" not in types and any(k in ("float", "int", "bool") or k.startswith("tuple[float") for k in types):
            found.append(name)
    return found


@pytest.mark.parametrize("argument", numeric(ak.AIM.__init__))
def test_numbers_of_aim(argument: str) -> None:
    model, optimizer = aim_helpers.build()
    options = {"num_classes": aim_helpers.CLASSES} | {argument: "1"}
    with pytest.raises(ValueError, match=rf"{argument}.*'1'"):
        ak.AIM(model, optimizer, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_methods(method: str) -> None:
    net = method_helpers.Net(2)
    blocks = net.blocks() if hasattr(net, "blocks") else None
    module, name, _ = METHODS[method]
    made = getattr(importlib.import_module(module), name)
    arguments = dict.fromkeys(argument for base in made.__mro__[:-1] for argument in numeric(base.__init__))
    assert "seed" in arguments
    for argument in arguments:
        with pytest.raises(ValueError, match=rf"{argument}.*'1'"):
            make_method(method, blocks, None, **{argument: "1"})


OPTION_CLASSES = (Gap, Ratio, Margin, Trial, Prototypes, Alternate, Split, DecoupleAll, Constant, LinearOut, CosineOut)


@pytest.mark.parametrize(
    ("made", "option"), [(made, option) for made in OPTION_CLASSES for option in numeric(made.__init__)]
)
def test_numbers_of_option_objects(made: Any, option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}.*'1'"):
        made(**{"total_updates": 9, option: "1"} if made in (LinearOut, CosineOut) else {option: "1"})
