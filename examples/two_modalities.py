"""AIM on a made-up problem: an honest modality, and a shortcut that works in training only.

"shape" carries the class, under noise. "colour" tells the class nearly for free in the training set and is random
elsewhere, so joint training leans on it. AIM tries a few steps with the colour held back, sees that the held-out loss
falls, and makes the network learn against a degraded colour encoder.

Run it: python examples/two_modalities.py
"""

import torch
from torch import Tensor, nn

import aim_kernels as ak

CLASSES, EPOCHS, BATCH = 4, 10, 64


class TwoModalities(nn.Module):
    """Late fusion by concatenation: two encoders of two blocks, one linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = nn.ModuleList([block(16, 32), block(32, 32)])
        self.colour = nn.ModuleList([block(8, 32), block(32, 32)])
        self.head = nn.Linear(64, CLASSES)

    def forward(self, shape: Tensor, colour: Tensor) -> Tensor:
        for layer in self.shape:
            shape = layer(shape)
        for layer in self.colour:
            colour = layer(colour)
        return self.head(torch.cat([shape, colour], dim=1))


def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())


def samples(count: int, shortcut: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(shape [count, 16], colour [count, 8], labels [count]); without the shortcut the colour is that of any class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, CLASSES, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    shown = labels if shortcut else torch.randint(CLASSES, (count,), generator=generator)
    shape = centres[0, labels] + torch.randn(count, 16, generator=generator)
    colour = centres[1, shown, :8] + 0.3 * torch.randn(count, 8, generator=generator)
    return shape, colour, labels


def train(balanced: bool) -> float:
    """Train with or without AIM; the share of test samples that it gets right. There the colour says nothing."""
    torch.manual_seed(0)
    shape, colour, labels = samples(1024, shortcut=True, seed=2)
    *held_out, held_out_labels = samples(256, shortcut=False, seed=3)
    *test, test_labels = samples(2048, shortcut=False, seed=4)

    model = TwoModalities()
    groups = ak.block_param_groups(model, {"shape": list(model.shape), "colour": list(model.colour)})
    optimizer = ak.AIMFusedOptimizer(groups, lr=3e-3)
    aim = ak.AIM(model, optimizer, num_classes=CLASSES)

    def step(inputs: list[Tensor], labels: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()

    for epoch in range(EPOCHS):
        if balanced:
            table = aim.update((shape, colour), labels, held_out=(held_out, held_out_labels), train=step)
            strengths = {modality: [round(kappa, 2) for kappa in row] for modality, row in table.kappa.items()}
            print(f"epoch {epoch}: strength by depth {strengths}")
        for batch in torch.randperm(len(labels)).split(BATCH):
            step([shape[batch], colour[batch]], labels[batch])

    optimizer.eval()
    model.eval()
    with torch.no_grad():
        return (model(*test).argmax(1) == test_labels).float().mean().item()


def main() -> None:
    joint, balanced = train(balanced=False), train(balanced=True)
    print(f"joint training: {joint:.1%} of the test samples")
    print(f"with AIM:       {balanced:.1%} of the test samples")


if __name__ == "__main__":
    main()
