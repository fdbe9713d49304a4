"""AIM, adaptive intra-network modulation: scores, strengths, trials, and the mixing of forward passes."""

from __future__ import annotations

from aim_kernels.aim.aim import AIM
from aim_kernels.aim.blocks import block_param_groups
from aim_kernels.aim.strengths import ModulationTable

__all__ = ["AIM", "ModulationTable", "block_param_groups"]
