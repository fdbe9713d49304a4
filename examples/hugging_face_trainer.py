"""AIM under the Trainer of Hugging Face, on the model and the data of two_modalities.py.

Run it: python examples/hugging_face_trainer.py (needs: pip install transformers accelerate)
"""

import tempfile

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
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


def rows(count: int, shortcut: bool, seed: int) -> list[dict[str, Tensor]]:
    columns = zip(*samples(count, shortcut, seed), strict=True)
    return [{"shape": shape, "colour": colour, "labels": label} for shape, colour, label in columns]


def train(balanced: bool, folder: str) -> float:
    """The share of test samples that the network gets right, with or without AIM."""
    torch.manual_seed(0)
    model = Classifier()
    groups = ak.block_param_groups(model, {"shape": list(model.shape), "colour": list(model.colour)})
    optimizer = ak.AIMFusedOptimizer(groups, lr=3e-3)
    aim = ak.AIM(model, optimizer, CLASSES, loss=lambda output, labels: cross_entropy(output.logits, labels))
    *seen, seen_labels = samples(256, shortcut=True, seed=3)
    *held_out, held_out_labels = samples(256, shortcut=False, seed=3)
    callback = AIMCallback(aim, lambda: (seen, seen_labels, (held_out, held_out_labels)))
    options = {"num_train_epochs": EPOCHS, "lr_scheduler_type": "constant", "disable_tqdm": True, "report_to": "none"}
    arguments = TrainingArguments(folder, per_device_train_batch_size=BATCH, use_cpu=True, **options)
    callbacks = [callback] if balanced else []
    trainer = Trainer(
        model, arguments, train_dataset=rows(1024, True, 2), optimizers=(optimizer, None), callbacks=callbacks
    )
    trainer.train()
    result = trainer.predict(rows(2048, False, 4))
    return float((result.predictions.argmax(1) == result.label_ids).mean())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(f"joint training: {train(balanced=False, folder=folder):.1%} of the test samples")
        print(f"with AIM:       {train(balanced=True, folder=folder):.1%} of the test samples")
