"""The main job: ``python -m aim_kernels demo`` trains two-modality networks with and without AIM and compares them."""

from __future__ import annotations

from aim_kernels.experiments.demo.cli import main

__all__ = ["main"]
