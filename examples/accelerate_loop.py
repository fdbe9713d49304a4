"""AIM under Accelerate, on the model and the data of two_modalities.py: prepare, accumulate, save and resume.

Run it: python examples/accelerate_loop.py (needs: pip install accelerate)
"""

import tempfile

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from two_modalities import CLASSES, EPOCHS, TwoModalities, samples

import aim_kernels as ak


class Run:
    """A training that can be stopped and continued."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        network = TwoModalities()
        groups = ak.block_param_groups(network, {"shape": list(network.shape), "colour": list(network.colour)})
        optimizer = ak.AIMFusedOptimizer(groups, lr=3e-3)
        # AIM is made of the network and the optimizer themselves; prepare() wraps both, and hides most methods.
        self.aim = ak.AIM(network, optimizer, CLASSES)
        self.data = samples(1024, shortcut=True, seed=2)
        loader = DataLoader(TensorDataset(*self.data), 32, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(network, optimizer, loader)
        self.accelerator.register_for_checkpointing(self.aim)

    def train(self, epochs: int) -> None:
        *held_out, held_out_labels = (x.to(self.accelerator.device) for x in samples(256, shortcut=False, seed=3))
        *seen, seen_labels = (x[:256].to(self.accelerator.device) for x in self.data)
        for _ in range(epochs):
            self.optimizer.train()  # the live weights
            self.aim.update(seen, seen_labels, held_out=(held_out, held_out_labels))
            for shape, colour, labels in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(cross_entropy(self.model(shape, colour), labels))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            self.optimizer.eval()  # the true weights: validate, save, export


if __name__ == "__main__":
    through = Run()
    with tempfile.TemporaryDirectory() as folder:
        through.train(EPOCHS // 2)
        through.accelerator.save_state(folder)
        through.train(EPOCHS - EPOCHS // 2)
        resumed = Run()
        resumed.accelerator.load_state(folder)
        resumed.train(EPOCHS - EPOCHS // 2)
    *test, labels = samples(2048, shortcut=False, seed=4)
    accuracy = (resumed.model(*test).argmax(1) == labels).float().mean()
    same = all(map(torch.equal, through.model.parameters(), resumed.model.parameters()))
    print(f"with AIM: {accuracy:.1%} of the test samples; resumed and uninterrupted run equal: {same}")
