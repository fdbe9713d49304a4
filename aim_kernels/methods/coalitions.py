"""Answers of every subset of the modalities, and Shapley values of those answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aim_kernels.methods.losses import IGNORED
from aim_kernels.methods.scores import counted, mean_of_counted, wide
from aim_kernels.methods.trees import detached, zeroed
from aim_kernels.step.sharding import averaged

#: ``2^M - 1`` passes through the fusion: more modalities than this are a mistake.
MOST_MODALITIES = 10


def coalition_answers(fuse: Callable[[list[Any]], Any], features: Sequence[Any]) -> list[Any]:
    """``2^M - 1`` of them: what the fusion says where only a coalition's features are there, the others' at zero.

    Coalition c (from 1) holds modality m where bit m of c is set. Raises ValueError for more than ten modalities.
    """
    if len(features) > MOST_MODALITIES:
        raise ValueError(f"{len(features)} modalities have {2 ** len(features) - 1} coalitions; at most 10 are tried")
    zeros = [zeroed(z) for z in features]
    return [
        fuse([z if coalition >> m & 1 else zeros[m] for m, z in enumerate(features)])
        for coalition in range(1, 2 ** len(features))
    ]


def coalition_logits(fuse: Callable[[list[Any]], Tensor], features: Sequence[Any]) -> Tensor:
    """``[2^M - 1, B, K]``: see :func:`coalition_answers`."""
    return torch.stack(coalition_answers(fuse, features))


def shapley_weights(modalities: int) -> list[list[float]]:
    """``[M][2^M]``: what each coalition's value (the empty one's first) adds to each modality's Shapley value,
    ``phi_m = sum_{S without m} |S|! (M - |S| - 1)! / M! * (v(S and m) - v(S))``."""
    table = [[0.0] * 2**modalities for _ in range(modalities)]
    for m in range(modalities):
        for coalition in range(2**modalities):
            if not coalition >> m & 1:
                size = coalition.bit_count()
                weight = math.factorial(size) * math.factorial(modalities - size - 1) / math.factorial(modalities)
                table[m][coalition | 1 << m] += weight
                table[m][coalition] -= weight
    return table


def shapley_logits(fuse: Callable[[list[Any]], Tensor], features: Sequence[Any]) -> Tensor:
    """``[M, B, K]``: each modality's Shapley value of the logits themselves. The empty coalition counts as zero, so
    that they add up to the joint logits."""
    logits = wide(coalition_logits(fuse, features))
    weights = torch.tensor(shapley_weights(len(features)), dtype=logits.dtype, device="cpu")
    weights = weights.to(logits.device, non_blocking=True)
    return torch.einsum("mc,cbk->mbk", weights[:, 1:], logits)


@torch.no_grad()
def shapley_values(
    fuse: Callable[[list[Any]], Tensor], features: Sequence[Any], labels: Tensor, ignored: int = IGNORED
) -> Tensor:
    """``phi``, float64 ``[M]``: each modality's share of the mean probability of the true class, above the ``1 / K`` of
    a network that sees nothing. They add up to the joint probability less ``1 / K``. Samples with the label ``ignored``
    are left out."""
    logits = wide(coalition_logits(fuse, [detached(z) for z in features]))
    counts, labels = counted(labels, ignored)
    index = labels[None, :, None].expand(len(logits), -1, 1)
    values = mean_of_counted(logits.softmax(2).gather(2, index)[..., 0], counts)
    return _shared_out(torch.cat([torch.full_like(values[:1], 1.0 / logits.shape[2]), values]), len(features))


@torch.no_grad()
def shapley_losses(fuse: Callable[[list[Any]], Any], features: Sequence[Any], loss: Callable[[Any], Tensor]) -> Tensor:
    """``phi``, float64 ``[M]``: each modality's share of what the features take from the loss, of any logits. They add
    up to the loss with all features at zero less the joint one."""
    known = [detached(z) for z in features]
    answers = [fuse([zeroed(z) for z in known]), *coalition_answers(fuse, known)]
    return _shared_out(-torch.stack([loss(each).double() for each in answers]), len(features))


def _shared_out(values: Tensor, modalities: int) -> Tensor:
    """Shapley values of the values ``[2^M]`` of the coalitions, the empty one's first; means over ranks."""
    weights = torch.tensor(shapley_weights(modalities), dtype=torch.float64, device="cpu")
    return weights.to(values.device, non_blocking=True) @ averaged(values)
