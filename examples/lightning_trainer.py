"""AIM under Lightning's Trainer, on the model and the data of two_modalities.py.

Run it: python examples/lightning_trainer.py (needs: pip install lightning)
"""

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from two_modalities import BATCH, CLASSES, EPOCHS, TwoModalities, samples

import aim_kernels as ak
from aim_kernels.integrations.lightning import AIMCallback


class Classifier(TwoModalities, pl.LightningModule):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return cross_entropy(self.forward(*batch[:2]), batch[2])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        blocks = {"shape": list(self.shape), "colour": list(self.colour)}
        return ak.AIMFusedOptimizer(ak.block_param_groups(self, blocks), lr=3e-3)


def train(balanced: bool) -> float:
    """The share of test samples that the network gets right, with or without AIM."""
    pl.seed_everything(0)
    shape, colour, labels = samples(1024, shortcut=True, seed=2)
    *held_out, held_out_labels = samples(256, shortcut=False, seed=3)
    callback = AIMCallback(
        lambda module, optimizer: ak.AIM(module, optimizer, num_classes=CLASSES),
        lambda: ((shape[:256], colour[:256]), labels[:256], (held_out, held_out_labels)),
    )
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[callback] if balanced else [],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    model = Classifier()
    trainer.fit(model, DataLoader(TensorDataset(shape, colour, labels), BATCH, shuffle=True))
    *test, test_labels = samples(2048, shortcut=False, seed=4)
    return (model(*test).argmax(1) == test_labels).float().mean().item()


if __name__ == "__main__":
    print(f"joint training: {train(balanced=False):.1%} of the test samples")
    print(f"with AIM:       {train(balanced=True):.1%} of the test samples")
