"""Every method by its name: rivals of AIM and the controls that each method has to beat, on the same kernels."""

from __future__ import annotations

import importlib
from typing import Any

from aim_kernels.methods.base import Blocks, Method, Outputs

__all__ = ["METHODS", "Blocks", "Method", "Outputs", "make_method"]

#: Name to the module and the class of a method, and the options that make it of the class.
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "joint": ("aim_kernels.methods.base", "Method", {}),
    "aim": ("aim_kernels.methods.aim", "AIMMethod", {}),
    "ogm": ("aim_kernels.methods.ogm", "OGM", {}),
    "ogm-ge": ("aim_kernels.methods.ogm", "OGM", {"noise": 1.0}),
    "opm": ("aim_kernels.methods.opm", "OPM", {}),
    "agm": ("aim_kernels.methods.agm", "AGM", {}),
    "mlb": ("aim_kernels.methods.mlb", "MLB", {}),
    "cggm": ("aim_kernels.methods.cggm", "CGGM", {}),
    "pdmp": ("aim_kernels.methods.pdmp", "PDMP", {}),
    "drop": ("aim_kernels.methods.controls", "Drop", {}),
    "feature-scale": ("aim_kernels.methods.controls", "FeatureScale", {}),
    "no-mask": ("aim_kernels.methods.controls", "NoMask", {}),
    "sum-of-losses": ("aim_kernels.methods.controls", "SumOfLosses", {}),
    "train-on-held": ("aim_kernels.methods.baselines", "TrainOnHeld", {}),
    "best-subset": ("aim_kernels.methods.baselines", "BestSubset", {}),
    "modality-dropout": ("aim_kernels.methods.baselines", "ModalityDropout", {}),
    "amss": ("aim_kernels.methods.amss", "AMSS", {}),
    "amss+": ("aim_kernels.methods.amss", "AMSS", {"weight": "plus"}),
    "inforeg": ("aim_kernels.methods.inforeg", "InfoReg", {}),
    "mmpareto": ("aim_kernels.methods.mmpareto", "MMPareto", {}),
    "pmr": ("aim_kernels.methods.pmr", "PMR", {}),
    "mla": ("aim_kernels.methods.mla", "MLA", {}),
    "diagnosing-relearning": ("aim_kernels.methods.relearning", "Relearning", {}),
    "sam": ("aim_kernels.methods.sam", "SAM", {}),
    "m-sam": ("aim_kernels.methods.sam", "MSAM", {}),
    "weight-averaging": ("aim_kernels.methods.averaging", "WeightAveraging", {}),
    "shapley-alternation": ("aim_kernels.methods.shapley", "ShapleyAlternation", {}),
}


def make_method(name: str, blocks: Blocks, optimizer: Any, **options: Any) -> Method:
    """A method, ready to train: ``make_method("ogm-ge", blocks, optimizer, alpha=0.5)``.

    Args:
        name: a key of :data:`METHODS`.
        blocks: the network.
        optimizer: an :class:`AIMFusedOptimizer` over ``blocks.param_groups()``.
        options: of the method's class.

    Raises:
        ValueError: an unknown name; what the class refuses.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; it is one of {', '.join(METHODS)}")
    module, cls, fixed = METHODS[name]
    return getattr(importlib.import_module(module), cls)(blocks, optimizer, **{**fixed, **options})
