"""Fused optimizer kernels that compute AIM, adaptive intra-network modulation, in the pass of the update.

Importing needs no compiler, GPU or Triton; the method, the plots and the demo are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aim_kernels.backends import backends
from aim_kernels.optim.optimizer import AIMFusedOptimizer
from aim_kernels.optim.saving import save

if TYPE_CHECKING:
    from aim_kernels.aim.aim import AIM
    from aim_kernels.aim.blocks import block_param_groups
    from aim_kernels.aim.plots import plot_modulation
    from aim_kernels.aim.statistics import refresh_statistics
    from aim_kernels.methods import make_method
    from aim_kernels.methods.base import Blocks
    from aim_kernels.optim.gradient_release import step_in_backward
    from aim_kernels.optim.rules import SGD, Adagrad, Adam, AdamW, Lion, RMSprop
    from aim_kernels.optim.zero_redundancy import AIMZeroRedundancyOptimizer

__version__ = "0.1.0"

__all__ = [
    "AIM",
    "SGD",
    "AIMFusedOptimizer",
    "AIMZeroRedundancyOptimizer",
    "Adagrad",
    "Adam",
    "AdamW",
    "Blocks",
    "Lion",
    "RMSprop",
    "__version__",
    "backends",
    "block_param_groups",
    "make_method",
    "plot_modulation",
    "refresh_statistics",
    "save",
    "step_in_backward",
]

_LAZY = {
    "AIM": "aim_kernels.aim.aim",
    "AIMZeroRedundancyOptimizer": "aim_kernels.optim.zero_redundancy",
    "Blocks": "aim_kernels.methods.base",
    **dict.fromkeys(("AdamW", "Adam", "SGD", "Adagrad", "RMSprop", "Lion"), "aim_kernels.optim.rules"),
    "block_param_groups": "aim_kernels.aim.blocks",
    "make_method": "aim_kernels.methods",
    "plot_modulation": "aim_kernels.aim.plots",
    "refresh_statistics": "aim_kernels.aim.statistics",
    "step_in_backward": "aim_kernels.optim.gradient_release",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
