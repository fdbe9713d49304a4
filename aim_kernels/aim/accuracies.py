"""Accuracies of a network that is left with one modality at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.aim.samples import Samples, read_held_out

if TYPE_CHECKING:
    from aim_kernels.aim.interface import Modulator

#: The key of the accuracy with all modalities.
ALL = "all"


def unimodal_accuracies(aim: Modulator, samples: Any) -> dict[str, float]:
    """Share of ``(inputs, labels)`` whose class is named, in [0, 1]: of each modality alone, and with "all".

    "Alone": the inputs of all other modalities trade places among the samples (seeded by ``aim``'s updates, which
    leaves its random state alone), so that they tell nothing and no network sees inputs that it does not know. True
    weights, evaluation mode; means over ranks. Empty if the model's outputs are not ``[B, K]`` logits for class
    numbers ``[B]``. ``samples`` may have any form of ``held_out`` of :meth:`AIM.update`.
    """
    found = samples if isinstance(samples, Samples) else read_held_out(aim.layout, samples)
    if not isinstance(found.labels, Tensor) or found.labels.dim() != 1 or found.labels.is_floating_point():
        return {}
    generator = torch.Generator().manual_seed(aim.updates)
    exchanged = found.inputs.take(torch.randperm(found.size, generator=generator, device="cpu"), found.size)
    given = [number for number, x in enumerate(found.inputs) if x is not None]
    accuracies: dict[str, float] = {}
    with torch.no_grad(), aim.measuring(found.inputs):
        for name, kept in [(ALL, given), *((aim.modalities[number], [number]) for number in given)]:
            inputs = found.inputs.exchanged([number for number in given if number not in kept], exchanged)
            right = 0
            for start in range(0, found.size, aim.scoring.batch_size):
                part = slice(start, start + aim.scoring.batch_size)
                logits = _logits(inputs.take(part, found.size).call(aim.model))
                if logits is None or logits.dim() != 2:
                    return {}
                right += int((logits.argmax(1) == found.labels[part]).sum())
            accuracies[name] = right / found.size
    means = aim.scoring.averaged_numbers(list(accuracies.values()))
    return dict(zip(accuracies, means, strict=True))


def _logits(output: Any) -> Tensor | None:
    """A tensor, or the field "logits" of what a model returns."""
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    return found if isinstance(found, Tensor) else None
