"""``rule="reliance"``: how much of the loss rests on each modality, on training samples and on held-out ones (our own;
inputs that trade places among samples are permutation importance, Breiman 2001, Fisher, Rudin and Dominici 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aim_kernels.aim.samples import Samples, part_of, pieces_of
from aim_kernels.aim.strengths import Measured, Scores

if TYPE_CHECKING:
    from aim_kernels.aim.interface import Modulator

#: Pieces of the samples whose mean losses are compared: enough for a standard error good to a sixth.
PIECES = 16


class Unconfirmed(NamedTuple):
    """The share of all reliance that rests on each modality and that held-out samples do not confirm, its standard
    error, and the modalities that the network relies on for sure."""

    shares: dict[str, float]
    errors: dict[str, float]
    sure: frozenset[str]


def measure(aim: Modulator, samples: Samples, held_out: Samples) -> tuple[Measured, Measured]:
    """Reliance on training and on held-out samples, one number per modality with an input, means over ranks.

    The module holds the true weights, with the running statistics of these.
    """
    with aim.measuring(samples[0]):
        return tuple(aim.scoring.averaged(_reliance(aim, each)) for each in (samples, held_out))


def unconfirmed(train: Measured, held_out: Measured, confidence: float) -> Unconfirmed:
    """``u_m = min(q A_m - B_m, A_m) / sum_j max(A_j, 0)`` of reliances A in training and B outside of it; 0 if A_m is
    none.

    ``q``: the greatest ``B_j / A_j``, at most 1, of the modalities with A more than ``confidence`` errors above 0: what
    is lost by memorizing alone, the modality that loses least loses too. 1 if no such ratio is positive.
    """
    a, b = ({m: row[0] for m, row in each.scores.items()} for each in (train, held_out))
    a_error, b_error = ({m: row[0] for m, row in each.errors.items()} for each in (train, held_out))
    sure = frozenset(m for m in a if a[m] > confidence * a_error[m] and a[m] > 0.0)
    total = max(sum(max(value, 0.0) for value in a.values()), 1e-12)
    kept = max((b[m] / a[m] for m in sure), default=1.0)
    q = min(kept, 1.0) if kept > 0.0 else 1.0
    return Unconfirmed(
        {m: min(q * a[m] - b[m], a[m]) / total if a[m] > 0.0 else 0.0 for m in a},
        {m: math.hypot(q * a_error[m], b_error[m]) / total for m in a},
        sure,
    )


def judge(
    found: Unconfirmed, confidence: float, dead_zone: float, whole_above: float, partial: float
) -> dict[str, float]:
    """Strength of each modality that was measured, by the share that is unconfirmed for sure, ``u - confidence *
    error``: 1 above ``whole_above``, ``partial`` above ``dead_zone``, else 0, and 0 if the network does not rely on it
    for sure. Where all would be held back, the one with the smallest share is not."""
    lower = {m: share - confidence * found.errors[m] for m, share in found.shares.items()}
    strengths = {
        m: 0.0 if m not in found.sure or share <= dead_zone else 1.0 if share > whole_above else partial
        for m, share in lower.items()
    }
    if all(strengths.values()):
        strengths[min(lower, key=lambda m: lower[m])] = 0.0
    return strengths


@torch.no_grad()
def _reliance(aim: Modulator, samples: Samples) -> Measured:
    """The mean of what a modality takes off the loss beside all others, and by itself: with two modalities the Shapley
    value. Its input, or those of all others, trade places among the samples; errors are over pieces of the samples."""
    inputs, labels = samples
    assert labels is not None
    order = torch.randperm(len(labels), generator=aim.generator, device=aim.generator.device)
    shuffled = [None if x is None else x[order.to(x.device)] for x in inputs]
    given = [number for number, x in enumerate(inputs) if x is not None]
    known: dict[frozenset[int], Tensor] = {}

    def losses(intact: frozenset[int]) -> Tensor:
        if intact not in known:
            mixed = [x if number in intact else y for number, (x, y) in enumerate(zip(inputs, shuffled, strict=True))]
            known[intact] = piece_losses(aim, (mixed, labels), PIECES)
        return known[intact]

    everything = frozenset(given)
    found = {
        aim.modalities[number]: 0.5
        * (losses(everything - {number}) - losses(everything) + losses(frozenset()) - losses(frozenset({number})))
        for number in given
    }
    scores: Scores = {m: [float(each.mean())] for m, each in found.items()}
    errors: Scores = {m: [float(each.std()) / math.sqrt(len(each))] for m, each in found.items()}
    return Measured(scores, errors)


def piece_losses(aim: Modulator, samples: Samples, pieces: int) -> Tensor:
    """Mean losses (float64) of so many pieces of the samples. Outputs that are one tensor ``[B, ...]`` are computed in
    batches of ``batch_size`` and cut; any others piece by piece."""
    inputs, labels = samples
    assert labels is not None
    parts = pieces_of(len(labels), pieces)
    totals = torch.zeros(len(parts), dtype=torch.float64, device="cpu")
    batch = aim.scoring.batch_size
    for start in range(0, len(labels), batch):
        stop = min(start + batch, len(labels))
        outputs = aim.model(*part_of(inputs, slice(start, stop)))
        cut = isinstance(outputs, Tensor) and outputs.dim() > 0 and len(outputs) == stop - start
        terms: list[Tensor] = []
        numbers: list[int] = []
        for number, part in enumerate(parts):
            low, high = max(part.start, start), min(part.stop, stop)
            if low >= high:
                continue
            here = slice(low, high)
            output = outputs[low - start : high - start] if cut else aim.model(*part_of(inputs, here))
            loss = aim.scoring.loss(output, labels[here])
            terms.append(loss.double() * ((high - low) / (part.stop - part.start)))
            numbers.append(number)
        totals[numbers] += torch.stack(terms).cpu()
    return totals


def rows(measured: Measured, depths: Mapping[str, int]) -> Measured:
    """The same number at every depth; NaN of modalities that were not measured."""
    return Measured(*({m: each.get(m, [math.nan]) * count for m, count in depths.items()} for each in measured))
