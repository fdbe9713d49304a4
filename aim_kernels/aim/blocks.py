"""A block is a param group: modality, depth, and whether its rows may modulate it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from aim_kernels.optim.matching import unwrapped_name

#: One block: a module, or several modules and parameters that count as one.
Block = nn.Module | Sequence[nn.Module | nn.Parameter]


def block_param_groups(
    model: nn.Module,
    blocks: Mapping[str, Sequence[Block] | nn.Sequential | nn.ModuleList],
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Param groups for :class:`AIMFusedOptimizer` from the blocks of each modality's encoder.

    ``blocks`` maps a modality to its modules, shallow to deep; the order of the modalities is the order of the model's
    inputs that :meth:`AIM.update` takes. Blocks are found by identity, never by name; any module will do. A block may
    also be a list of modules and parameters (a stem and its first stage, a class token); its output is that of the last
    module.

    Returns, for each modality and depth, the block's weights (``dim >= 2``; ``modulated=True``, with ``weight_decay``
    unless that is None) and its biases and normalization parameters (``modulated=False``, ``weight_decay=0.0``), each
    only where there are any; last one plain group of everything else (fusion, head) where there is something else.
    Every group has the keys ``modality``, ``depth``, ``modulated`` and ``module``, the qualified name in ``model`` of
    the block or of its last module (None in the plain group), so that an optimizer's state stays plain data. The plain
    group's weights and biases share the rule's decay.

    Raises ValueError, naming module or parameter: a modality without blocks, a block that is not in ``model``, a block
    without parameters, blocks that share a module or a parameter (also with each other's submodules), fewer than one
    modality; TypeError where a block is not a module.
    """
    if not blocks:
        raise ValueError("blocks names no modality; give {'audio': [shallow, ..., deep], 'video': [...]}")
    module_names = {id(module): name for name, module in model.named_modules()}
    parameter_names = {id(p): name for name, p in model.named_parameters()}
    owner: dict[int, str] = {}
    groups: list[dict[str, Any]] = []
    for modality, modules in blocks.items():
        if not isinstance(modules, (Sequence, nn.Sequential, nn.ModuleList)):
            raise TypeError(
                f"blocks[{modality!r}] is a {type(modules).__name__}; give a list of modules, shallow to deep"
            )
        if len(modules) == 0:
            raise ValueError(f"blocks[{modality!r}] is empty; every modality needs at least one block")
        for depth, module in enumerate(modules):
            where = f"blocks[{modality!r}][{depth}]"
            parts = parts_of(module)
            for part in parts:
                if not isinstance(part, (nn.Module, nn.Parameter)):
                    raise TypeError(
                        f"{where} is a {type(part).__name__}, or has one; blocks are modules, or lists of modules and "
                        "parameters, not names"
                    )
                if id(part) not in (module_names if isinstance(part, nn.Module) else parameter_names):
                    raise ValueError(f"{where} ({type(part).__name__}) is not a module of the model, nor a parameter")
            last = output_of(module)
            name = None if last is None else module_names[id(last)]
            parameters = [
                p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())
            ]
            if not parameters:
                raise ValueError(
                    f"{where} ({name!r}, {type(module).__name__}) has no parameters; join it to a neighbour: a list of "
                    "modules is one block"
                )
            for parameter in parameters:
                if id(parameter) in owner:
                    raise ValueError(
                        f"parameter {parameter_names[id(parameter)]!r} belongs to {owner[id(parameter)]} and "
                        f"to {where}; blocks must not share parameters"
                    )
                owner[id(parameter)] = where
            key = {"modality": modality, "depth": depth, "module": name}
            weights = [p for p in parameters if p.dim() >= 2]
            if weights:
                group = {"params": weights, **key, "modulated": True}
                groups.append(group if weight_decay is None else {**group, "weight_decay": weight_decay})
            rest = [p for p in parameters if p.dim() < 2]
            if rest:
                groups.append({"params": rest, **key, "modulated": False, "weight_decay": 0.0})
    plain = [p for p in model.parameters() if id(p) not in owner]
    if plain:
        group = {"params": plain, "modality": None, "depth": None, "module": None, "modulated": False}
        groups.append(group if weight_decay is None else {**group, "weight_decay": weight_decay})
    return groups


def parts_of(block: Block) -> list[Any]:
    """The modules and parameters of a block."""
    if isinstance(block, (nn.ModuleList, list, tuple)):
        return list(block)
    return [block]


def output_of(block: Block) -> nn.Module | None:
    """The module whose output is the block's: its last one; None of a block of parameters alone."""
    return next((part for part in reversed(parts_of(block)) if isinstance(part, nn.Module)), None)


def block_depths(optimizer: Any) -> dict[str, int]:
    """Modality to number of blocks, in the order of the optimizer's groups.

    Raises ValueError for fewer than two modalities and for depths that are not 0, 1, 2, ...
    """
    found: dict[str, set[int]] = {}
    for group in optimizer.param_groups:
        if group.get("modality") is not None:
            found.setdefault(group["modality"], set()).add(group["depth"])
    if len(found) < 2:
        raise ValueError(
            f"AIM needs at least two modalities, the optimizer's groups name {sorted(found) or 'none'}; "
            "make them with block_param_groups"
        )
    for modality, depths in found.items():
        if depths != set(range(len(depths))):
            raise ValueError(
                f"modality {modality!r} has blocks of depths {sorted(depths)}; they must be 0, 1, 2, ... To unfreeze "
                "blocks one by one, give the optimizer all of them and use requires_grad_()"
            )
    return {modality: len(depths) for modality, depths in found.items()}


def block_modules(model: nn.Module, optimizer: Any) -> dict[str, list[nn.Module]]:
    """Modality to its blocks, shallow to deep: the modules that the optimizer's groups name.

    Raises ValueError for a block without a name, and for a name that is not in the model.
    """
    depths = block_depths(optimizer)
    named = dict(model.named_modules())
    bare: dict[str, list[nn.Module]] = {}
    for each, found in named.items():
        bare.setdefault(unwrapped_name(each), []).append(found)
    modules: dict[str, list[nn.Module | None]] = {m: [None] * n for m, n in depths.items()}
    for group in optimizer.param_groups:
        if group.get("modality") is None:
            continue
        name = group.get("module")
        if name is None:
            raise ValueError(
                f"block ({group['modality']!r}, {group['depth']}) has no 'module' name to probe; "
                "make the groups with block_param_groups, or give a callable probe"
            )
        # A wrapper and what it wraps have one bare name: hooks on the outer one see its calls.
        module = named.get(name) or next(iter(bare.get(unwrapped_name(name), ())), None)
        if module is None:
            raise ValueError(f"the model has no module {name!r}; give AIM the model that block_param_groups got")
        modules[group["modality"]][group["depth"]] = module
    return {m: [module for module in row if module is not None] for m, row in modules.items()}
