"""``mixing="features"``: blocks of a dominant modality answer with a mixture of two passes.

The readable and expensive form of AIM: any module, in eager PyTorch, two forward passes of every block that is held
back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aim_kernels.aim.blocks import block_modules
from aim_kernels.aim.hooks import BlockHook
from aim_kernels.backends.reference import classes_of
from aim_kernels.step.states import is_frozen

if TYPE_CHECKING:
    from aim_kernels.aim.interface import Modulator


def auxiliary_parameters(optimizer: Any, module: nn.Module, kappa: float) -> dict[str, Tensor]:
    """``theta_aux`` of the modulated parameters of a block, by name: ``anchor + (theta - anchor) * (1 - kappa)``, and
    ``theta`` itself, through which gradients flow, where an element is under-optimized.

    What is frozen is well-optimized. Else empty before the first step, when everything is under-optimized, and where a
    group keeps no optimization state.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    rows = optimizer.tables.rows
    found: dict[str, Tensor] = {}
    index = -1
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            index += 1
            state = optimizer.state.get(p, {})
            if id(p) not in names or not group["modulated"]:
                continue
            if is_frozen(p, state):
                under: Tensor | None = torch.zeros_like(p, dtype=torch.bool)
            elif "step" in state:
                under = classes_of(group, state, rows[number].tolist(), optimizer.tables.control.tolist(), index)
            else:
                continue
            if under is None:
                continue
            anchor = state.get("ema" if optimizer.anchor == "ema" else "anchor")
            wide = p.detach().to(torch.promote_types(p.dtype, torch.float32))
            degraded = wide * (1.0 - kappa) if anchor is None else anchor + (wide - anchor) * (1.0 - kappa)
            found[names[id(p)]] = torch.where(under, p, degraded.to(p.dtype))
    return found


class FeatureMixing:
    """Hooks on all blocks that mix while their modality is dominant; in training mode only."""

    def __init__(self, aim: Modulator) -> None:
        self.aim = aim
        self._inside = False
        modules = aim.scoring.modules or block_modules(aim.model, aim.optimizer)
        self.handles = [
            block.register_forward_hook(BlockHook(self._hook_of(modality, depth)), with_kwargs=True)
            for modality, blocks in modules.items()
            for depth, block in enumerate(blocks)
        ]

    def _hook_of(self, modality: str, depth: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            table = self.aim.history[-1] if self.aim.history else None
            if self._inside or not module.training or table is None or modality not in table.dominant:
                return None
            kappa = table.kappa[modality][depth]
            auxiliary = auxiliary_parameters(self.aim.optimizer, module, kappa) if kappa else {}
            if not auxiliary:
                return None
            self._inside = True
            try:
                degraded = torch.func.functional_call(module, auxiliary, args, kwargs)
            finally:
                self._inside = False
            return _mixed(output, degraded, kappa, (modality, depth))

        return hook


def _mixed(true: Any, degraded: Any, kappa: float, block: tuple[str, int]) -> Any:
    """``(1 - kappa) * true + kappa * degraded``, of each tensor."""
    if isinstance(true, Tensor):
        return (1.0 - kappa) * true + kappa * degraded if true.is_floating_point() else true
    if isinstance(true, (tuple, list)):
        return type(true)(_mixed(a, b, kappa, block) for a, b in zip(true, degraded, strict=True))
    if true is None:
        return None
    raise TypeError(
        f"block {block} returns a {type(true).__name__}; mixing='features' needs tensors, or tuples or lists of them"
    )
