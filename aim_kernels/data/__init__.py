"""Small multimodal data sets for the demo, built from files that installed packages carry: nothing is downloaded."""

from __future__ import annotations

from aim_kernels.data.common import MissingPackageError, MultimodalData, Split
from aim_kernels.data.digits import coloured_digits
from aim_kernels.data.watch import smartwatch

__all__ = ["MissingPackageError", "MultimodalData", "Split", "coloured_digits", "smartwatch"]
