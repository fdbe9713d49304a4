"""Adding groups to an optimizer: what becomes of the caller's dict, and what is asked of it.

As in torch.optim the dict itself becomes the group. Where it is refused it has got a list in the place of whatever its
parameters came in, and nothing else, so that it can be passed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.backends import select
from aim_kernels.step import options, validation
from aim_kernels.step.supported import primary_device
from aim_kernels.step.tables import KEYS

if TYPE_CHECKING:
    from aim_kernels.optim.interface import FusedOptimizer

Group = dict[str, Any]


class Members:
    """Whose parameters the groups have: kept, so that a new group is held against all others without a look at each."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # of the groups, by the id() of their parameters
        self._count = 0
        self._last: Group | None = None
        self._mesh: Any = None
        self.device: torch.device | None = None  # of the first parameter that is to be stepped

    def check(self, groups: list[Group], group: Group, process_group: Any, device: torch.device | None) -> None:
        """Raises on parameters that cannot join ``groups``, which are on ``device`` (None: ask the parameters).
        ``group`` is complete."""
        edited = self._count != len(groups) or (groups and self._last is not groups[-1])
        if edited or any(id(p) in self._numbers for p in group["params"]):  # or taken out of their group since
            self._learn(groups, process_group)
        number, params = len(groups), group["params"]
        here = (device or self.device) if self.device is not None else primary_device(_tensors(params))
        validation.check_parameters(group, number, params, here, self._numbers)
        for index, p in enumerate(params):
            if not (p.is_leaf or p.retains_grad):
                raise ValueError(
                    f"{validation.name_in(group, number, index)}: can't optimize a non-leaf Tensor, one that is "
                    "computed from others; pass those, or make it one of its own: torch.nn.Parameter(tensor.detach())"
                )
        names = group.get("param_names") or []
        if None in names:
            raise ValueError(
                f"group {number}: all optimizer params should be with/without names, parameter {names.index(None)} has "
                "none; give (name, parameter) pairs or parameters only"
            )
        if groups and ("param_names" in group) != ("param_names" in groups[0]):
            which = "with" if "param_names" in group else "without"
            raise ValueError(
                f"group {number}: all optimizer param groups should be with/without names, this one is {which}; give "
                "(name, parameter) pairs in all of them or in none"
            )
        widest = validation.check_meshes([group], process_group, number, self._mesh)
        if widest is not self._mesh:
            validation.check_meshes([*groups, group], process_group)

    def add(self, group: Group, process_group: Any) -> None:
        """Notes a group that was checked, and is the last now."""
        self._numbers.update(dict.fromkeys(map(id, group["params"]), self._count))
        self._mesh = validation.check_meshes([group], process_group, self._count, self._mesh)
        self._count, self._last = self._count + 1, group
        self.device = self.device or primary_device(group["params"])

    def _learn(self, groups: list[Group], process_group: Any) -> None:
        self.__dict__.update(Members().__dict__)
        for group in groups:
            self.add(group, process_group)


def _tensors(params: list[Any]) -> list[Tensor]:
    return [p for p in params if isinstance(p, Tensor)]


def listed(param_group: Group) -> None:
    """Makes a list of a group's parameters, in the caller's dict, before anything can fail: a generator gives them only
    once.

    Raises TypeError: no group, or a set of parameters.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
    params = param_group["params"]
    check_ordered(params)
    param_group["params"] = [params] if isinstance(params, Tensor) else list(params)


def set_listed(optimizer: FusedOptimizer) -> None:
    """Makes lists of groups and parameters that somebody set as anything else: torch.optim takes what it can walk
    through, but a generator is gone after one step."""
    given: Any = optimizer.param_groups
    if not isinstance(given, list):
        optimizer.param_groups = list(given)
    for group in optimizer.param_groups:
        if not isinstance(group["params"], list):
            listed(group)


def check_ordered(params: Any) -> None:
    """Raises on a set of parameters."""
    if isinstance(params, (set, frozenset)):
        raise TypeError("params: a set has no order, on which checkpoints and noise depend; pass a list")


def completed(param_group: Group, defaults: Group, number: int) -> Group:
    """The group as the optimizer would have it, in a dict of its own: with all options, and its names apart (None:
    there is none)."""
    # A flattened checkpoint is asked for what groups have: state_dict() fills these in.
    neutral = options.neutral(param_group.get("rule", defaults["rule"]))
    group = {**defaults, **neutral, **param_group, **dict.fromkeys(KEYS)}
    pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in group["params"]]
    if any(isinstance(entry, tuple) for entry in group["params"]):
        group["param_names"], group["params"] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if group["weight_decay"] is None:
        group["weight_decay"] = options.RULE_DECAY.get(group["rule"], 0.0)
    if group["decouple_lr"] and group["reference_lr"] is None:
        validation.check_number(f"lr (group {number})", group["lr"], 0.0)
        group["reference_lr"] = float(group["lr"])
    return group


def check(optimizer: FusedOptimizer, groups: list[Group], members: Members, group: Group) -> None:
    """Raises where ``group``, which is complete, cannot join ``groups``: by option or parameter, and what to do."""
    number = len(groups)
    for option in options.WHOLE:
        if option.name in group:
            raise ValueError(
                f"{option.name} (group {number}): is of the optimizer as a whole; pass it to its constructor"
            )
    options.check_hyperparameters(group, number)
    options.check_known(group, number)
    validation.check_measure(group, number, optimizer.backend)
    validation.check_anchor(group, number, optimizer.anchor)
    made = optimizer._rows is None  # tables are where the parameters are once all groups of the constructor are there
    members.check(groups, group, optimizer.process_group, optimizer._tables.rows.device if made else None)
    device = members.device or primary_device(group["params"])
    _check_implementation(group, f" (group {number})", optimizer.backend, device or torch.device("cpu"))


def _check_implementation(group: Group, where: str, backend: str, device: torch.device) -> None:
    """Raises ValueError on an implementation of torch.optim's that is not the one that takes the step."""
    chosen = {}
    for option in options.ASKED:
        assert option.check is not None
        chosen[option.name] = option.check(option.name + where, group.get(option.name))
    if chosen["differentiable"]:
        raise ValueError(f"differentiable{where}: no gradient goes through this step; use torch.optim for that")
    if chosen["foreach"]:
        raise ValueError(
            f"foreach{where}: the step is not made of foreach operations; leave it out, all tensors are stepped "
            "together anyway"
        )
    if chosen["fused"] is None and not chosen["capturable"]:
        return
    module = select(backend, device)
    eager = module.__name__.endswith("reference")
    if chosen["fused"] and eager:
        raise ValueError(f"fused{where}: the reference backend is not; leave it out, or pass backend='auto'")
    if chosen["fused"] is False and not eager:
        raise ValueError(
            f"fused{where}: the step is fused; leave it out, or pass backend='reference' for one in plain operations"
        )
    if chosen["capturable"] and not (module.ON_DEVICE and device.type == "cuda"):
        raise ValueError(
            f"capturable{where}: only a step of the backends 'cuda' and 'triton' can be captured in a CUDA graph, and "
            f"it needs no such option; leave it out on {device}"
        )
