"""Optimizers, and what belongs to them: weights, checkpoints, clipping, gradient release, torch.compile, ZeRO."""
