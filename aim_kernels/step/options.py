"""The options of ``AIMFusedOptimizer``: names, defaults, values they may have, and rules that know them, in one table.

Signature, docstring, defaults of groups, checks, records, ``repr`` and pickles are made of it, or held against it by
tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aim_kernels.step.layout import RULES
from aim_kernels.step.validation import Group, check_flag, check_number, check_whole, on_device

Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: in the constructor and in groups.
        default: in the constructor; for a group that is of no rule that knows it, what leaves the step as it is.
        check: raises ValueError, by the name that it is given, on a value that the option cannot have; returns the
            value as it is kept. None: anything goes, or it is checked elsewhere.
        rules: those that know it.
        whole: of the optimizer as a whole; else of a group, and the constructor's is for groups without one.
        argument: the constructor has it; else it is of groups only.
        asked: of torch.optim, and in groups only if something was asked for.
        number: a number or None, which a step computes with as Python's float.
        recorded: the record of a group is made of it.
        decides: what of it decides which states are kept, or who can take the step: its "value", its "truth", or its
            "presence".
        cycled: schedulers write it into groups of every rule.
        attribute: of the optimizer, if another than the name.
    """

    name: str
    default: Any
    check: Check | None
    rules: tuple[str, ...] = RULES
    whole: bool = False
    argument: bool = True
    asked: bool = False
    number: bool = False
    recorded: bool = False
    decides: str | None = None
    cycled: bool = False
    attribute: str = ""

    def is_default(self, value: Any) -> bool:
        """Whether a value leaves the option alone."""
        if value is self.default:
            return True
        try:
            return bool(value == self.default)
        except (RuntimeError, TypeError, ValueError):  # of several elements
            return False


# -- what values may be ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Number:
    """A number in ``[low, high]``, or in ``[low, high)`` if ``high_open``. ``on_host``: refused in a device's memory,
    where looking at it would wait for the device."""

    low: float
    high: float = float("inf")
    high_open: bool = False
    on_host: bool = False

    def __call__(self, name: str, value: Any) -> Any:
        if self.on_host and on_device(value):
            raise ValueError(
                f"{name}: only lr may be a tensor on a device, of float32 or float64; got {value.dtype} on "
                f"{value.device}"
            )
        check_number(name, value, self.low, self.high, high_open=self.high_open)
        return value


class _LearningRate(_Number):
    """A number of at least 0, or a tensor of one element; one on a device is read by its kernels."""

    def __call__(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name}: a tensor learning rate must have one element, got shape {tuple(value.shape)}")
        if on_device(value) and value.dtype in (torch.float32, torch.float64):
            return value
        return super().__call__(name, value)


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _whole(low: int, high: int | None = None) -> Check:
    return lambda name, value: check_whole(name, value, low, high)


def _choice(*known: str | None) -> Check:
    def check(name: str, value: Any) -> Any:
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
        return value

    return check


def _rule(name: str, value: Any) -> Any:
    if value not in RULES:
        raise ValueError(f"{name}: unknown rule {value!r}; choose one of {', '.join(RULES)}")
    return value


def _betas(name: str, value: Any) -> Any:
    option, _, where = name.partition(" ")
    try:
        first, second = value
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected two numbers, got {value!r}") from error
    for number, beta in enumerate((first, second)):
        check_number(f"{option}[{number}] {where}".rstrip(), beta, 0.0, 1.0, high_open=True)
    return value


def _controller(name: str, value: Any) -> Any:
    try:
        how, target = value
    except (TypeError, ValueError) as error:
        how, target = None, error
    if how not in ("fraction", "absolute"):
        raise ValueError(f"{name}: expected ('fraction', q) or ('absolute', tau), got {value!r}")
    check_number(f"{name}: {how}", target, 0.0, 1.0)
    return value


# -- the table ---------------------------------------------------------------------------------------------------------

_FACTOR, _AMOUNT = _Number(0.0, 1.0, high_open=True), _Number(0.0, on_host=True)

#: All options, those of the constructor in its order.
OPTIONS = (
    Option("lr", 1e-3, _LearningRate(0.0, on_host=True), number=True, recorded=True),
    Option("rule", "adamw", _rule, recorded=True, decides="value"),
    # Of all rules, since modulated groups need them for their classes; so with eps.
    Option("betas", (0.9, 0.999), _betas, recorded=True),
    Option("eps", 1e-8, _AMOUNT, number=True, recorded=True),
    Option("weight_decay", None, _AMOUNT, number=True, recorded=True),  # None: the rule's (``RULE_DECAY``)
    Option(
        "momentum",
        0.0,
        _AMOUNT,
        ("sgd", "rmsprop"),
        number=True,
        recorded=True,
        decides="truth",
        cycled=True,
    ),
    Option("dampening", 0.0, _Number(-float("inf")), ("sgd",), number=True, recorded=True),
    Option("nesterov", False, check_flag, ("sgd",), recorded=True),
    Option("amsgrad", False, check_flag, ("adamw", "adam"), recorded=True, decides="value"),
    Option("alpha", 0.99, _FACTOR, ("rmsprop",), number=True, recorded=True),
    Option("centered", False, check_flag, ("rmsprop",), recorded=True, decides="value"),
    Option("lr_decay", 0.0, _AMOUNT, ("adagrad",), number=True, recorded=True),
    Option("initial_accumulator_value", 0.0, _AMOUNT, ("adagrad",), number=True, recorded=True),
    Option("decouple_lr", False, check_flag, ("adamw", "lion"), recorded=True),
    Option("reference_lr", None, _or_none(_Number(0.0)), ("adamw", "lion"), argument=False, number=True, recorded=True),
    Option("maximize", False, check_flag, recorded=True),
    Option("state_dtype", None, _choice(None, "float32", "bfloat16", "int8"), decides="value"),
    Option("rounding", "stochastic", _choice("stochastic", "nearest"), decides="value"),
    Option("master", None, _choice(None, "stochastic", "kahan", "split", "float32"), decides="value"),
    Option("ema_decay", None, _or_none(_FACTOR), number=True, recorded=True, decides="presence"),
    Option("under_optimized", ("fraction", 0.1), _controller, recorded=True),
    Option("measure", "snr", _choice("snr", "fisher", "grad", "random"), recorded=True, decides="value"),
    Option("threshold_rate", 0.1, _Number(0.0, 1.0), number=True, recorded=True),
    # What a block's group says of itself (``block_param_groups``); plain groups keep these.
    Option("modality", None, None, argument=False),
    Option("depth", None, None, argument=False),
    Option("modulated", False, check_flag, argument=False, decides="value"),
    Option("module", None, None, argument=False),
    Option("anchor", "zero", _choice("zero", "init", "ema"), whole=True),
    Option("backend", "auto", None, whole=True),
    Option("seed", 0, _whole(0, 2**63), whole=True, attribute="_seed"),
    # Kept under the name that GradScaler asks for.
    Option("fused_scaling", False, check_flag, whole=True, attribute="_step_supports_amp_scaling"),
    Option("max_grad_norm", None, _or_none(_Number(0.0)), whole=True),
    Option("process_group", None, None, whole=True),
    Option("sync_every", 1, _whole(1), whole=True),
    Option("keep_masters", False, check_flag, whole=True),
    Option("zero_grad_in_step", False, check_flag, whole=True),
    # How torch.optim is told which of its implementations takes the step, and what asks for none.
    Option("fused", None, _or_none(check_flag), asked=True),
    Option("foreach", None, _or_none(check_flag), asked=True),
    Option("capturable", False, _or_none(check_flag), asked=True),
    Option("differentiable", False, _or_none(check_flag), asked=True),
)

WHOLE = tuple(option for option in OPTIONS if option.whole)
ASKED = tuple(option for option in OPTIONS if option.asked)
#: What every group has.
OF_GROUPS = tuple(option for option in OPTIONS if not option.whole and not option.asked)

DEFAULT_RULE = next(option.default for option in OPTIONS if option.name == "rule")

#: Weight decay of a rule in torch.optim, if it is not 0.
RULE_DECAY = {"adamw": 1e-2}

_SOME = tuple(option for option in OF_GROUPS if option.rules != RULES)
_NUMBERS = tuple(option.name for option in OF_GROUPS if option.number)
_NEVER = object()


def _quick(option: Option) -> tuple[str, Any, float, float, Check]:
    """What a check before a step starts with, at every change of a learning rate: the default, and bounds between which
    a Python float is right."""
    assert option.check is not None
    default = _NEVER if option.name == "weight_decay" else option.default  # None: of no group that is complete
    low, high = (option.check.low, option.check.high) if isinstance(option.check, _Number) else (0.0, 0.0)
    return option.name, default, low, high, option.check


_CHECKED = tuple(_quick(option) for option in OF_GROUPS if option.check is not None)

#: Options that a rule does not know, and that nobody but the user writes: schedulers write what they cycle into groups
#: of every rule.
_REFUSED = {rule: [option for option in _SOME if rule not in option.rules and not option.cycled] for rule in RULES}


def deciding(what: str) -> list[str]:
    """Names of the options whose "value", "truth" or "presence" decides which states are kept."""
    return [option.name for option in OF_GROUPS if option.decides == what]


# -- at construction ---------------------------------------------------------------------------------------------------


def given_in(arguments: Group) -> Group:
    """The options among the arguments of a constructor, by name."""
    return {option.name: arguments[option.name] for option in OPTIONS if option.argument}


def group_defaults(given: Group) -> Group:
    """What groups have that say nothing, by name."""
    values = {option.name: given.get(option.name, option.default) for option in OF_GROUPS}
    asked = {option.name: given[option.name] for option in ASKED if given[option.name] is not option.default}
    return values | asked


def whole_values(given: Group) -> Group:
    """The options of the optimizer as a whole, as they are kept; raises ValueError by name."""
    return {
        option.name: given[option.name] if option.check is None else option.check(option.name, given[option.name])
        for option in WHOLE
    }


def neutral(rule: Any) -> Group:
    """Defaults of the options that a rule does not know."""
    return {option.name: option.default for option in _SOME if rule in RULES and rule not in option.rules}


def check_known_by_any(given: Group, rules: Iterable[Any]) -> None:
    """Raises ValueError on an option for all groups that none of their rules knows; of an unknown rule nothing is
    said."""
    found = list(dict.fromkeys(rule for rule in rules if isinstance(rule, str)))
    for option in _SOME:
        value = given.get(option.name, option.default)
        if found and set(found) <= set(RULES) - set(option.rules) and not option.is_default(value):
            raise _unknown(option, option.name, found)


def check_known(group: Group, number: int) -> None:
    """Raises ValueError on an option of a group that its rule does not know, if it is not at its default."""
    for option in _SOME:
        if group["rule"] not in option.rules and not option.is_default(group[option.name]):
            raise _unknown(option, f"{option.name} (group {number})", [group["rule"]])


def _unknown(option: Option, name: str, rules: list[str]) -> ValueError:
    of = f"rule {rules[0]!r} has" if len(rules) == 1 else f"rules {', '.join(map(repr, rules))} have"
    return ValueError(
        f"{name}: {of} no such option, only {' and '.join(option.rules)}; leave it {option.default!r}, or take it out"
    )


# -- before a step -----------------------------------------------------------------------------------------------------


def in_floats(group: Group) -> Group:
    """The group with its numbers as Python's floats: those of numpy and tensors compute in their own precision."""
    plain = {option: None if group[option] is None else float(group[option]) for option in _NUMBERS}
    first, second = group["betas"]
    how, value = group["under_optimized"]
    return {**group, **plain, "betas": (float(first), float(second)), "under_optimized": (how, float(value))}


def check_hyperparameters(group: Group, number: int) -> None:
    """Raises ValueError that names the option and the group."""
    where = f" (group {number})"
    for name, default, low, high, check in _CHECKED:
        value = group[name]
        if value is not default and not (type(value) is float and low <= value < high):
            check(name + where, value)
    for option in _REFUSED[group["rule"]]:
        value = group[option.name]
        if value is not option.default and not option.is_default(value):
            raise _unknown(option, option.name + where, [group["rule"]])
    decoupled = group.get("decoupled_weight_decay")
    if decoupled is not None and bool(decoupled) != (group["rule"] == "adamw"):
        raise ValueError(
            f"decoupled_weight_decay{where}: says {decoupled!r}, and the group's rule is {group['rule']!r}; rule "
            "'adamw' decouples the decay, 'adam' does not: make both say the same, or make a new optimizer"
        )
    if group["decouple_lr"]:
        if group["reference_lr"] is None:
            raise ValueError(
                f"decouple_lr{where}: was set after the group was made; set its reference_lr too, the learning rate "
                "at which the decay is weight_decay"
            )
        check_number(f"reference_lr{where}", group["reference_lr"], 0.0)
        if not group["reference_lr"]:
            raise ValueError(
                f"decouple_lr{where}: the decay is relative to the first learning rate, which must not be 0"
            )
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(f"nesterov{where}: Nesterov momentum needs a momentum and zero dampening")
    if group["state_dtype"] == "int8" and group["rounding"] == "nearest":
        raise ValueError(
            f"rounding{where}: moments in 8 bits are rounded at random only (to nearest, small ones would neither "
            "grow nor vanish); leave it 'stochastic'"
        )
    if group["measure"] == "random" and group["under_optimized"][0] == "absolute":
        raise ValueError(
            f"under_optimized{where}: measure='random' draws a share of the elements, an absolute threshold has none; "
            "give ('fraction', q)"
        )
