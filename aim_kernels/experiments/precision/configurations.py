"""Configurations to compare: how parameters and states are stored; one line of the results, and their folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from aim_kernels.experiments.results import Results


@dataclass(frozen=True)
class Configuration:
    """How parameters and states are stored."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    #: Bytes of weights and optimizer states a parameter, without gradients; of large parameters.
    bytes: float = 0.0


_BF16 = torch.bfloat16
CONFIGURATIONS = {
    c.name: c
    for c in (
        Configuration("fp32", torch.float32, {}, 12),
        Configuration("fp32+bf16n", torch.float32, {"state_dtype": "bfloat16", "rounding": "nearest"}, 8),
        Configuration("fp32+bf16", torch.float32, {"state_dtype": "bfloat16"}, 8),
        Configuration("fp32+int8", torch.float32, {"state_dtype": "int8"}, 6.02),
        Configuration("bf16", _BF16, {}, 10),
        Configuration("bf16 stochastic", _BF16, {"master": "stochastic"}, 10),
        Configuration("bf16 kahan", _BF16, {"master": "kahan"}, 12),
        Configuration("bf16 split", _BF16, {"master": "split"}, 12),
        Configuration("bf16 master", _BF16, {"master": "float32"}, 14),
        Configuration("bf16 split+bf16", _BF16, {"master": "split", "state_dtype": "bfloat16"}, 8),
        Configuration("bf16 split+int8", _BF16, {"master": "split", "state_dtype": "int8"}, 6.02),
        Configuration("bf16 stochastic+int8", _BF16, {"master": "stochastic", "state_dtype": "int8"}, 4.02),
    )
}


@dataclass(frozen=True)
class Line:
    """One training run."""

    commit: str
    torch: str
    task: str
    configuration: str
    seed: int
    steps: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    agreement: float  # share of the elements whose class is that of float32 moments of the same gradients
    jaccard: float  # of the under-optimized elements: those of both over those of either


class Folder(Results[Line]):
    """The output folder of the trainings."""

    line_type = Line
    file_name = "precision.csv"
