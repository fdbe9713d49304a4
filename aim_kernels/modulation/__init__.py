"""Who writes modulation rows: AIM, OGM-GE, and a feature-dropping control."""

from __future__ import annotations

from aim_kernels.modulation.aim import AIM
from aim_kernels.modulation.blocks import block_param_groups
from aim_kernels.modulation.drop import FeatureDrop
from aim_kernels.modulation.ogm_ge import OGMGE, late_fusion_logits
from aim_kernels.modulation.strengths import ModulationTable

__all__ = ["AIM", "OGMGE", "FeatureDrop", "ModulationTable", "block_param_groups", "late_fusion_logits"]
