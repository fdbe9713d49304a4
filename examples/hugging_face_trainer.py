"""AIM under the Trainer of Hugging Face, on the model and the data of two_modalities.py.

Run it: python examples/hugging_face_trainer.py (needs: pip install transformers accelerate)
"""

import tempfile

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput
from two_modalities import BATCH, CLASSES, EPOCHS, TwoModalities, samples

import aim_kernels as ak
from aim_kernels.integrations.transformers import AIMCallback


class Classifier(TwoModalities):
    """The modalities are the first arguments; the loss is the model's own, as the Trainer expects."""

    def forward(self, shape: Tensor, colour: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = super().forward(shape, colour)
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


class Samples(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int, shortcut: bool, seed: int) -> None:
        self.columns = dict(zip(("shape", "colour", "labels"), samples(count, shortcut, seed), strict=True))

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def train(balanced: bool, folder: str) -> float:
    """The share of test samples that the network gets right, with or without AIM."""
    torch.manual_seed(0)
    model = Classifier()
    groups = ak.block_param_groups(model, {"shape": list(model.shape), "colour": list(model.colour)})
    optimizer = ak.AIMFusedOptimizer(groups, lr=3e-3)
    aim = ak.AIM(model, optimizer, CLASSES, loss=lambda output, labels: cross_entropy(output.logits, labels))
    train_set = Samples(1024, shortcut=True, seed=2)
    seen, held_out = (list(Samples(256, shortcut, 3).columns.values()) for shortcut in (True, False))
    callback = AIMCallback(aim, lambda: (seen[:2], seen[2], (held_out[:2], held_out[2])))
    arguments = TrainingArguments(
        folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, lr_scheduler_type="constant", use_cpu=True
    )
    callbacks = [callback] if balanced else []
    trainer = Trainer(model, arguments, train_dataset=train_set, optimizers=(optimizer, None), callbacks=callbacks)
    trainer.train()
    result = trainer.predict(Samples(2048, shortcut=False, seed=4))
    return float((result.predictions.argmax(1) == result.label_ids).mean())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(f"joint training: {train(balanced=False, folder=folder):.1%} of the test samples")
        print(f"with AIM:       {train(balanced=True, folder=folder):.1%} of the test samples")
