"""``python -m aim_kernels compare``: every method on the same data, networks, batches and kernels."""

from __future__ import annotations

from aim_kernels.experiments.compare.cli import main

__all__ = ["main"]
