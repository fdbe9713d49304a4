"""Fused optimizer kernels that compute AIM, adaptive intra-network modulation, in the pass of the update.

Importing needs no compiler, GPU or Triton; the method, the plots and the demo are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aim_kernels.backends import backends
from aim_kernels.optimizer import AIMFusedOptimizer
from aim_kernels.saving import save

if TYPE_CHECKING:
    from aim_kernels.methods import make_method
    from aim_kernels.methods.base import Blocks
    from aim_kernels.modulation.aim import AIM
    from aim_kernels.modulation.blocks import block_param_groups
    from aim_kernels.modulation.ogm_ge import OGMGE
    from aim_kernels.plots import plot_modulation
    from aim_kernels.release import step_in_backward

__version__ = "0.1.0"

__all__ = [
    "AIM",
    "OGMGE",
    "AIMFusedOptimizer",
    "Blocks",
    "__version__",
    "backends",
    "block_param_groups",
    "make_method",
    "plot_modulation",
    "save",
    "step_in_backward",
]

_LAZY = {
    "AIM": "aim_kernels.modulation.aim",
    "Blocks": "aim_kernels.methods.base",
    "OGMGE": "aim_kernels.modulation.ogm_ge",
    "block_param_groups": "aim_kernels.modulation.blocks",
    "make_method": "aim_kernels.methods",
    "plot_modulation": "aim_kernels.plots",
    "step_in_backward": "aim_kernels.release",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
