"""``rule="reliance"``: how much of the loss rests on each modality, on training samples and on held-out ones (our own;
inputs that trade places among samples are permutation importance, Breiman 2001, Fisher, Rudin and Dominici 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aim_kernels.aim.prototypes import probing
from aim_kernels.aim.samples import Samples, pieces_of
from aim_kernels.aim.strengths import Measured, Scores
from aim_kernels.aim.watching import measuring_live

if TYPE_CHECKING:
    from aim_kernels.aim.interface import Modulator

#: Pieces of the samples whose mean losses are compared: enough for a standard error good to a sixth.
PIECES = 16


#: Names of the training losses that a table keeps: with the true weights, with the live ones, and the standard error of
#: the difference.
TRUE, LIVE, ERROR = "true weights", "live weights", "error of the difference"


class Unconfirmed(NamedTuple):
    """The share of all reliance that rests on each modality and that held-out samples do not confirm, its standard
    error, the modalities that the network relies on for sure, and those that help outside for sure."""

    shares: dict[str, float]
    errors: dict[str, float]
    sure: frozenset[str]
    helpful: frozenset[str]


def measure(aim: Modulator, samples: Samples, held_out: Samples) -> tuple[Measured, Measured, dict[str, float]]:
    """Reliance on training and on held-out samples, one number per modality with an input, means over ranks, with the
    true weights and running statistics of these. While a modality is held back also the training losses with true and
    with live weights."""
    live = None
    if aim.history and aim.history[-1].dominant:
        with torch.no_grad(), probing(aim.model), measuring_live():
            live = piece_losses(aim, samples, PIECES)
    with aim.measuring(samples.inputs):
        train, outside = (aim.scoring.averaged(_reliance(aim, each)) for each in (samples, held_out))
        if live is None:
            return train, outside, {}
        with torch.no_grad():
            true = piece_losses(aim, samples, PIECES)
    parts = {TRUE: true, LIVE: live, ERROR: true - live}
    means, errors = aim.scoring.averaged(
        Measured(
            {name: [float(each.mean())] for name, each in parts.items()},
            {name: [float(each.std()) / math.sqrt(len(each))] for name, each in parts.items()},
        )
    )
    return train, outside, {TRUE: means[TRUE][0], LIVE: means[LIVE][0], ERROR: errors[ERROR][0]}


def fits(losses: Mapping[str, float], confidence: float) -> bool:
    """Whether the head fits the true weights: their training loss is not above that of the live ones by more than
    chance. It does not where it never sees the true features of a modality and its outputs do not outgrow what they
    say, as in regression."""
    return TRUE not in losses or losses[TRUE] - losses[LIVE] <= confidence * losses[ERROR]


def unconfirmed(train: Measured, held_out: Measured, confidence: float) -> Unconfirmed:
    """``u_m = min(q A_m - B_m, A_m) / sum_j max(A_j, 0)`` of reliances A in training and B outside of it; 0 if A_m is
    none.

    ``q``: the greatest ``B_j / A_j``, at most 1, of the modalities with A more than ``confidence`` errors above 0: what
    is lost by memorizing alone, the modality that loses least loses too. 1 if no such ratio is positive.
    """
    a, b = ({m: row[0] for m, row in each.scores.items()} for each in (train, held_out))
    a_error, b_error = ({m: row[0] for m, row in each.errors.items()} for each in (train, held_out))
    sure = frozenset(m for m in a if a[m] > confidence * a_error[m] and a[m] > 0.0)
    total = sum(max(value, 0.0) for value in a.values()) or math.inf
    kept = max((b[m] / a[m] for m in sure), default=1.0)
    q = min(kept, 1.0) if kept > 0.0 else 1.0
    helpful = frozenset(m for m in b if b[m] > confidence * b_error[m])
    return Unconfirmed(
        {m: min(q * a[m] - b[m], a[m]) / total if a[m] > 0.0 else 0.0 for m in a},
        {m: math.hypot(q * a_error[m], b_error[m]) / total for m in a},
        sure,
        helpful,
    )


def judge(
    found: Unconfirmed, confidence: float, dead_zone: float, whole_above: float, partial: float, wholly: bool
) -> dict[str, float]:
    """Strength of each modality that was measured, by the share that is unconfirmed for sure, ``u - confidence *
    error``: 0 up to ``dead_zone`` and if the network does not rely on it for sure, else ``partial``; 1 above
    ``whole_above``, if the modality does not help outside and ``wholly`` allows it. Where all would be held back, the
    one with the smallest share is not."""
    lower = {m: share - confidence * found.errors[m] for m, share in found.shares.items()}

    def strength(modality: str) -> float:
        if modality not in found.sure or lower[modality] <= dead_zone:
            return 0.0
        return 1.0 if wholly and lower[modality] > whole_above and modality not in found.helpful else partial

    strengths = {m: strength(m) for m in lower}
    if all(strengths.values()):
        strengths[min(lower, key=lambda m: lower[m])] = 0.0
    return strengths


@torch.no_grad()
def _reliance(aim: Modulator, samples: Samples) -> Measured:
    """The mean of what a modality takes off the loss beside all others, and by itself: with two modalities the Shapley
    value. Its input, or those of all others, trade places among the samples; errors are over pieces of the samples."""
    inputs, count = samples.inputs, samples.size
    order = torch.randperm(count, generator=aim.generator, device=aim.generator.device)
    shuffled = inputs.take(order, count)
    given = [number for number, x in enumerate(inputs) if x is not None]
    known: dict[frozenset[int], Tensor] = {}

    def losses(intact: frozenset[int]) -> Tensor:
        if intact not in known:
            mixed = inputs.exchanged([number for number in given if number not in intact], shuffled)
            known[intact] = piece_losses(aim, Samples(mixed, samples.labels), PIECES)
            if not bool(known[intact].isfinite().all()):
                raise ValueError(
                    "rule='reliance' compares losses, and that of some samples is not finite: leave out samples with "
                    "NaN or infinity, or stop, if the network has diverged"
                )
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
    """Mean losses (float64) of so many pieces of the samples. Outputs that are tensors ``[B, ...]``, one or a tuple or
    a mapping of them, are computed in batches of ``batch_size`` and cut; any others piece by piece: a loss of the
    model's own, ``[T, B, C]``, and ``[B, B, ...]``, which may be of pairs."""
    count = samples.size
    parts = pieces_of(count, pieces)
    totals = torch.zeros(len(parts), dtype=torch.float64, device="cpu")
    batch = aim.scoring.batch_size
    for start in range(0, count, batch):
        stop = min(start + batch, count)
        outputs = samples.inputs.take(slice(start, stop), count).call(aim.model)
        cut = _by_sample(outputs, stop - start)
        if cut and not isinstance(outputs, Tensor) and stop - start > 1:
            # What has as many rows by chance (prototypes of as many classes) one sample tells.
            cut = _by_sample(samples.inputs.take(slice(start, start + 1), count).call(aim.model), 1)
        terms: list[Tensor] = []
        numbers: list[int] = []
        for number, part in enumerate(parts):
            low, high = max(part.start, start), min(part.stop, stop)
            if low >= high:
                continue
            here = samples.part(slice(low, high))
            if cut:
                piece = slice(low - start, high - start)
                output = pytree.tree_map(partial(_rows_of, index=piece), outputs)
            else:
                output = here.inputs.call(aim.model)
            loss = _scalar(aim.scoring.loss(output, here.labels))
            if cut and not start and not number:
                _refuse_sums(aim, output, here.labels, loss)
            terms.append(loss.double() * ((high - low) / (part.stop - part.start)))
            numbers.append(number)
        totals[numbers] += torch.stack(terms).cpu()
    return totals


def _scalar(loss: Any) -> Tensor:
    """The loss. Raises ValueError for anything but one number."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(())
    got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise ValueError(f"loss must return one number, the mean over samples; it returned {got}")


def _refuse_sums(aim: Modulator, output: Any, labels: Any, loss: Tensor) -> None:
    """Raises ValueError for a loss that doubles if every sample is there twice: parts of the samples, and two sets of
    other sizes, cannot be compared by sums."""
    if not isinstance(output, Tensor) or not isinstance(labels, Tensor):
        return
    twice = _scalar(aim.scoring.loss(torch.cat([output, output]), torch.cat([labels, labels])))
    if bool(loss != 0.0) and bool(torch.isclose(twice.double(), 2.0 * loss.double(), rtol=1e-4, atol=0.0)):
        raise ValueError("loss sums over samples, and parts of different sizes are compared; give one with their mean")


def _by_sample(outputs: Any, count: int) -> bool:
    """Whether all tensors of what a model returns count samples in their first dimension, and there are some."""
    leaves = [x for x in pytree.tree_leaves(outputs) if x is not None]
    return bool(leaves) and all(
        isinstance(x, Tensor)
        and x.dim() > 0
        and len(x) == count
        and (x.dim() == 1 or count == 1 or x.shape[1] != count)
        for x in leaves
    )


def _rows_of(tensor: Tensor | None, index: slice) -> Tensor | None:
    return None if tensor is None else tensor[index]


def rows(measured: Measured, depths: Mapping[str, int]) -> Measured:
    """The same number at every depth; NaN of modalities that were not measured."""
    return Measured(*({m: each.get(m, [math.nan]) * count for m, count in depths.items()} for each in measured))
