"""``rule="trial"``: what a few steps with a modality held back do to the held-out loss (our own: a hill climb over the
set of modalities that are held back, each move judged from the same state)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim_kernels.aim.inputs import Inputs
from aim_kernels.aim.reliance import PIECES, piece_losses
from aim_kernels.aim.samples import Samples, pieces_of
from aim_kernels.aim.snapshot import Snapshot
from aim_kernels.aim.strengths import KAPPA_MAX, Measured, ModulationTable
from aim_kernels.aim.tables import whole_table
from aim_kernels.step.sharding import local_of

if TYPE_CHECKING:
    from aim_kernels.aim.interface import Modulator

#: One training step of the user's: ``train(inputs, labels)``, inputs in the form that :meth:`AIM.update` was given.
Train = Callable[..., Any]
#: The arm in which everything goes on as it is; every other arm is the modality that changes.
AS_IT_IS = ""
#: How often a trial is looked at, in its latter half.
LOOKS = 4
#: A batch of fewer samples is warned of.
FEW = 8


def checked(samples: Samples, held_out: Samples | None, train: Train | None) -> tuple[Samples, Samples, Train]:
    """What trials need. Raises ValueError where something is missing."""
    if train is None:
        raise ValueError("rule='trial' tries training steps; pass train=, one step as train(inputs, labels)")
    if held_out is None or samples.labels is None or held_out.labels is None:
        raise ValueError("rule='trial' compares held-out losses; pass labels and held_out=(inputs, labels)")
    if held_out.size < 2:
        raise ValueError("rule='trial' needs at least two held-out samples for a standard error")
    return samples, held_out, train


def measure(
    aim: Modulator, samples: Samples, held_out: Samples, train: Train, restore: Sequence[Any], steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The held-out loss in the latter half of ``steps`` steps of ``train``, and the standard error of its
    difference to going on as it is, of every arm: as it is, and with each modality held back that is not, or let go
    that is. All modalities are never held back at once.

    The loss is a mean over four looks; the error joins that of the sample with how unsteadily the difference moves from
    look to look, since two runs from one state also differ by where they happen to stop. Every arm begins with the
    weights, states and random state of now, and sees the same batches. Afterwards everything is as it was, also where
    ``train`` raises. Raises RuntimeError where it never steps; warns at the first trial where batches are small.
    """
    snapshot, remembered = Snapshot(aim.model, aim.optimizer), aim.remember()
    others = [(each, copy.deepcopy(each.state_dict())) for each in restore]
    history = len(aim.history)

    def back(gradients: bool) -> None:
        snapshot.restore(gradients)
        for each, state in others:
            each.load_state_dict(copy.deepcopy(state))
        remembered()
        del aim.history[history:]

    pieces = pieces_of(samples.size, steps)
    if not any(table.rule == "trial" for table in aim.history):  # once, also in a run that goes on
        _warn_of_small_batches(samples.size, len(pieces), steps)
    ahead = {look * max(len(pieces) // (2 * LOOKS), 1) for look in range(LOOKS)}  # steps to the end
    losses: dict[str, Tensor] = {}  # [looks, pieces of the held-out samples]
    try:
        for arm in (AS_IT_IS, *aim.modalities):
            held_back = aim.held_back ^ ({arm} - {AS_IT_IS})
            if len(held_back) == len(aim.modalities):
                continue
            back(gradients=False)
            aim.optimizer.train()
            if not aim.model.training:  # after a validation
                aim.model.train()
            table = whole_table(aim, "trial", {m: KAPPA_MAX * (m in held_back) for m in aim.modalities})
            aim.history.append(table)  # two passes and hooks look there for who is held back
            aim.mixing.write(aim, table)
            seen = []
            counted = aim.optimizer.tables.steps
            for number, piece in enumerate(pieces, 1):
                _step(train, samples.part(piece))
                if len(pieces) - number in ahead:
                    seen.append(_held_out_losses(aim, samples.inputs, held_out))
            if arm == AS_IT_IS and aim.optimizer.tables.steps == counted:
                reached = _true_weights(aim)
                back(gradients=True)
                # A graph that is replayed steps without being counted.
                if all(map(torch.equal, reached, _true_weights(aim))):
                    raise RuntimeError(
                        f"train= was called {len(pieces)} times and never stepped the optimizer that AIM writes to; it "
                        "is one whole step, zero_grad, backward and optimizer.step(), without accumulation (a "
                        "GradScaler that skips all of them looks the same: pass more samples)"
                    )
            losses[arm] = torch.stack(seen)
    finally:
        back(gradients=True)
    # Processes have samples of their own, which make the mean surer, and one path through the weights, which does not.
    looks, sampled = aim.scoring.averaged(
        Measured(
            {arm: loss.mean(1).tolist() for arm, loss in losses.items()},
            {arm: [_over_samples(losses[AS_IT_IS] - loss)] * len(loss) for arm, loss in losses.items()},
        )
    )
    means = {arm: sum(row) / len(row) for arm, row in looks.items()}
    errors = {
        arm: math.hypot(sampled[arm][0], _unsteadiness([a - b for a, b in zip(looks[AS_IT_IS], row, strict=True)]))
        for arm, row in looks.items()
    }
    return means, errors


def _step(train: Train, batch: Samples) -> None:
    """One step of the user's, on inputs in the form that the update was given; "present" is a keyword of it, too."""
    positional, keywords = batch.inputs.arguments()
    if positional and keywords:
        train(positional, batch.labels, **keywords)
    else:
        train(batch.inputs.given(), batch.labels)


def _true_weights(aim: Modulator) -> list[Tensor]:
    with aim.optimizer.true_parameters():
        return [local_of(p).detach().clone() for p in aim.model.parameters()]


def _warn_of_small_batches(samples: int, batches: int, steps: int) -> None:
    if batches == steps and samples // batches >= FEW:
        return
    warnings.warn(
        f"rule='trial' cuts the {samples} samples into {batches} batches of about {samples / batches:.3g}: each arm "
        f"has {batches} steps, which tell little. As samples pass {steps} times the batch size of training ({steps} * "
        f"32 = {steps * 32}), or try fewer steps, Trial(steps=...)",
        stacklevel=5,  # whoever calls AIM.update
    )


def _over_samples(difference: Tensor) -> float:
    """Standard error of the mean difference over samples; ``[looks, pieces]``."""
    return float(difference.mean(0).std()) / math.sqrt(difference.shape[1])


def _unsteadiness(differences: Sequence[float]) -> float:
    """Standard deviation from look to look around a line: that the difference grows is what is looked for."""
    looks = torch.tensor(differences, dtype=torch.float64, device="cpu")
    if len(looks) < 3:
        return 0.0
    time = torch.linspace(-1.0, 1.0, len(looks), dtype=looks.dtype, device="cpu")
    rest = looks - looks.mean() - time * (looks @ time) / (time @ time)
    return math.sqrt(float(rest @ rest) / (len(looks) - 2))


def judge(
    held_back: frozenset[str],
    losses: Mapping[str, float],
    errors: Mapping[str, float],
    dead_zone: float,
    confidence: float,
) -> frozenset[str]:
    """Who is held back from now on: the move with the greatest gain is made, if its loss is lower by more than
    ``confidence`` standard errors and ``dead_zone`` times the loss as it is."""
    now = losses[AS_IT_IS]
    gains = {m: now - loss for m, loss in losses.items() if m != AS_IT_IS}
    sure = {m: gain for m, gain in gains.items() if gain > confidence * errors[m] + dead_zone * abs(now)}
    return held_back ^ {max(sure, key=lambda m: sure[m])} if sure else held_back


def table_of(
    aim: Modulator,
    before: frozenset[str],
    held_back: frozenset[str],
    losses: Mapping[str, float],
    errors: Mapping[str, float],
    factor: float,
) -> ModulationTable:
    """The table of an update that found these losses while ``before`` were held back.

    ``excess`` is 1 + (loss with a modality free - loss with it held back) / loss as it is, the others being as they
    were; not a number of one that was not tried.
    """
    unit = max(abs(losses[AS_IT_IS]), 1e-12)
    gain = {m: (losses[AS_IT_IS] - losses.get(m, math.nan)) / unit for m in aim.modalities}
    excess = {m: 1.0 + (-gain[m] if m in before else gain[m]) for m in aim.modalities}
    error = {m: errors.get(m, 0.0) / unit for m in aim.modalities}
    kappa = {m: factor * KAPPA_MAX * (m in held_back) for m in aim.modalities}
    return whole_table(aim, "trial", kappa, excess, error, losses=losses)


@torch.no_grad()
def _held_out_losses(aim: Modulator, trained_on: Inputs, held_out: Samples) -> Tensor:
    """Mean losses (float64) of pieces of the held-out samples, with the true weights and their running statistics:
    those that the steps of an arm have collected lag, and are of degraded weights where it holds somebody back."""
    with aim.measuring(trained_on, refresh=True):
        return piece_losses(aim, held_out, PIECES)
