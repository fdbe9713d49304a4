"""AIM, adaptive intra-network modulation: rules, probes, mixings and schedules, each an object with its own options."""

from __future__ import annotations

from aim_kernels.aim.accuracies import unimodal_accuracies
from aim_kernels.aim.aim import AIM
from aim_kernels.aim.blocks import block_param_groups
from aim_kernels.aim.mixing import (
    Alternate,
    Decouple,
    DecoupleAll,
    DecoupleDominant,
    Features,
    Mixing,
    Split,
    Weights,
)
from aim_kernels.aim.probes import CustomProbe, GradientNorm, LinearReadout, Probe, Prototypes
from aim_kernels.aim.rules import Gap, Margin, Ratio, Reliance, Rule, Trial
from aim_kernels.aim.schedules import Constant, CosineOut, CustomSchedule, LinearOut, Schedule
from aim_kernels.aim.statistics import refresh_statistics
from aim_kernels.aim.strengths import ModulationTable

__all__ = [
    "AIM",
    "Alternate",
    "Constant",
    "CosineOut",
    "CustomProbe",
    "CustomSchedule",
    "Decouple",
    "DecoupleAll",
    "DecoupleDominant",
    "Features",
    "Gap",
    "GradientNorm",
    "LinearOut",
    "LinearReadout",
    "Margin",
    "Mixing",
    "ModulationTable",
    "Probe",
    "Prototypes",
    "Ratio",
    "Reliance",
    "Rule",
    "Schedule",
    "Split",
    "Trial",
    "Weights",
    "block_param_groups",
    "refresh_statistics",
    "unimodal_accuracies",
]
