"""Drift of weights from float32's under equal gradients: rounding alone."""

from __future__ import annotations

import torch

from aim_kernels.experiments.precision.configurations import CONFIGURATIONS
from aim_kernels.optim.optimizer import AIMFusedOptimizer
from aim_kernels.step.states import true_weights

NUMEL, STEPS = 1 << 16, 1000


def drift(numel: int = NUMEL, steps: int = STEPS) -> dict[str, float]:
    """For every configuration ``rms(theta - theta_fp32) / rms(theta_fp32 - theta_0)`` after so many steps of AdamW
    (lr 1e-3, betas 0.9 and 0.999, no decay), for normal weights of deviation 0.05 and gradients that are a steady part
    and noise three times as large, of magnitudes that differ by 100 between elements.

    Both begin at bfloat16 numbers, and gradients are bfloat16 numbers, so that all configurations get the same.
    """
    generator = torch.Generator().manual_seed(0)

    def randn() -> torch.Tensor:
        return torch.randn(numel, generator=generator)

    begin = (0.05 * randn()).bfloat16().float()
    size = 10 ** (-2 * torch.rand(numel, generator=generator))
    steady = size * randn()
    runs = {}
    for name, configuration in CONFIGURATIONS.items():
        p = begin.to(configuration.dtype, copy=True).requires_grad_()
        group = {"params": [p], "modulated": True}
        runs[name] = p, AIMFusedOptimizer([group], weight_decay=0.0, **configuration.options)
    for _ in range(steps):
        grad = (steady + 3 * size * randn()).bfloat16()
        for p, optimizer in runs.values():
            p.grad = grad.to(p.dtype)
            optimizer.step()
    with torch.no_grad():
        ends = {name: true_weights(p, optimizer.state[p]).double() for name, (p, optimizer) in runs.items()}
    moved = (ends["fp32"] - begin).square().mean().sqrt()
    return {name: float((end - ends["fp32"]).square().mean().sqrt() / moved) for name, end in ends.items()}
