"""One line changes: torch.optim.AdamW becomes ak.AdamW, and the losses stay the same.

Run it: python examples/drop_in.py
"""

from collections.abc import Callable

import torch
from torch import nn

import aim_kernels as ak


def train(make_optimizer: Callable[..., torch.optim.Optimizer], steps: int = 50) -> list[float]:
    """Fit a small regression and return the loss of every step."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(256, 20), torch.randn(256, 1)
    model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = make_optimizer(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    theirs = train(torch.optim.AdamW)
    ours = train(ak.AdamW)
    for step in range(0, len(ours), 10):
        print(f"step {step:3d}   torch.optim.AdamW {theirs[step]:.6f}   ak.AdamW {ours[step]:.6f}")
    gap = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    print(f"largest difference of a loss: {gap:.1e}")


if __name__ == "__main__":
    main()
