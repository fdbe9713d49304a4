"""Baselines: what held-out samples, or a random choice of modalities, are worth without any modulation."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from aim_kernels.aim.samples import Samples
from aim_kernels.methods.base import Blocks, Method, Outputs
from aim_kernels.methods.batches import samples_of, state_of, union
from aim_kernels.methods.losses import Loss
from aim_kernels.methods.scores import evaluation_mode, wide
from aim_kernels.methods.trees import by_sample, frames_of, zeroed
from aim_kernels.step.arguments import check_finite, check_within
from aim_kernels.step.sharding import averaged
from aim_kernels.step.tables import KEYS

#: Held-out samples per training sample while nothing is known: a fifth of all samples is held out.
FIRST_SHARE = 0.25
#: ``2^M - 1`` networks: fifteen of them.
MOST_MODALITIES = 4


class _KeepsHeldOut(Method):
    """The latest held-out samples, kept between updates; they are part of the state."""

    writes_rows_only = False

    def __init__(self, blocks: Blocks, optimizer: Any, *, loss: Loss | None = None, seed: int = 0) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        self.held: Samples | None = None

    def _update(self, samples: Samples, held_out: Samples | None) -> Any:
        """Keeps ``held_out`` (not a copy) in place of the samples before; None: keeps those before.

        Raises ValueError where there are none, or where they have no rows, or no labels beside the default loss.
        """
        if held_out is not None:
            if not held_out.size or (held_out.labels is None and self.given_loss is None):
                raise ValueError(f"{type(self).__name__} needs held-out samples with labels; pass held_out=(xs, ys)")
            self.held = held_out
        elif self.held is None:
            raise ValueError(f"{type(self).__name__} needs held-out samples; pass held_out=(xs, ys)")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "held": state_of(self.held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.held = samples_of(self.blocks.layout, state["held"], self.device)


class TrainOnHeld(_KeepsHeldOut):
    """Joint training on the union of the training and the held-out samples.

    A step on ``B`` training samples is one step on ``B + n`` samples: ``n = floor(carry + share * B)``, and what is
    left is the next carry, so that over a whole epoch with ``share = |held-out| / |training|`` every sample of both
    sets comes once. Held-out samples come in a seeded random order, none twice before all came. Everything else is as
    with bigger batches: the loss is the mean over all of them, BatchNorm takes all of them.

    ``share``: held-out samples per training sample. None: the number of held-out samples over that of the samples that
    steps saw between the latest two updates, which is right where :meth:`update` comes once an epoch; 1/4 before that.
    Steps before the first update are joint training. The samples are those of the latest update, and are part of the
    state. Source: this library's control; what anybody with held-out samples would try first.

    Raises ValueError for a ``share`` that is negative or not finite, and in :meth:`update` without held-out samples.
    """

    def __init__(
        self, blocks: Blocks, optimizer: Any, *, share: float | None = None, loss: Loss | None = None, seed: int = 0
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        if share is not None:
            check_finite("share", share)
        self.share = share
        self.seen, self.epoch_size = 0, 0  # training samples since the latest update, and between the two before
        self.carry = 0.0
        self.order: Tensor | None = None  # of the held-out samples, and how many of them came
        self.position = 0

    def _update(self, samples: Samples, held_out: Samples | None) -> Any:
        """See the class. Other samples as many as those before go on in the same order."""
        super()._update(samples, held_out)
        self.epoch_size, self.seen = self.seen or self.epoch_size, 0
        if self.order is not None and self.held is not None and len(self.order) != self.held.size:
            self.order = None

    def share_now(self) -> float:
        """Held-out samples per training sample in the coming step."""
        if self.held is None:
            return 0.0
        if self.share is not None:
            return self.share
        return self.held.size / self.epoch_size if self.epoch_size else FIRST_SHARE

    def draw(self, count: int) -> Tensor:
        """Numbers of the next held-out samples, ``[count]``, on the device."""
        assert self.held is not None
        parts = []
        while count > 0:
            if self.order is None or self.position == len(self.order):
                size = self.held.size
                self.order = torch.randperm(size, generator=self.generator, device=self.generator.device)
                self.position = 0
            parts.append(self.order[self.position : self.position + count])
            self.position += len(parts[-1])
            count -= len(parts[-1])
        index = torch.cat(parts)
        # From ordinary memory the copy would wait for the device.
        return (index.pin_memory() if self.device.type == "cuda" else index).to(self.device, non_blocking=True)

    def _batch(self, batch: Samples) -> Samples:
        """The batch with its part of the held-out samples."""
        size = batch.size
        owed = self.carry + self.share_now() * size
        count = math.floor(owed + 1e-9)  # roundoff must not put a sample off
        self.carry = owed - count
        self.seen += size
        if count and self.held is not None:
            return union(type(self).__name__, batch, self.held.part(self.draw(count)))
        return batch

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("seen", "epoch_size", "carry", "order", "position")}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.seen, self.epoch_size, self.position = (int(state[k]) for k in ("seen", "epoch_size", "position"))
        self.carry = float(state["carry"])
        self.order = None if state["order"] is None else state["order"].to(self.generator.device)


class BestSubset(_KeepsHeldOut):
    """One network for every non-empty subset of the modalities; the one with the least held-out loss is judged.

    The network of a subset is the whole one with the features of all other modalities at zero on their way to the
    fusion, as in :meth:`Blocks.unimodal`, in training and when it is judged: ``argmin_S loss(f_S(x), y)`` over the
    samples of the latest :meth:`update`, taken when :meth:`evaluating` begins. All networks begin with the same weights
    and see the same batches; the one of all modalities is joint training, and is what the module holds outside of
    :meth:`evaluating`. Encoders that a subset is without get no gradient in it, so their weights stay those of the
    beginning.

    A step is ``2^M - 1`` whole steps, and copies weights to and fro; memory grows by as many copies of weights and of
    the optimizer's states. Every subset has an optimizer of its own over the same parameters, which follows the options
    of the given one (learning rates of a scheduler). Source: this library's control; exhaustive search.

    Raises ValueError for more than four modalities, and in :meth:`update` without held-out samples.
    """

    one_pass = False

    def __init__(self, blocks: Blocks, optimizer: Any, *, loss: Loss | None = None, seed: int = 0) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        count = len(blocks.modalities)
        if count > MOST_MODALITIES:
            raise ValueError(f"{count} modalities have {2**count - 1} subsets; at most {MOST_MODALITIES} are tried")
        #: Numbers of the modalities of each subset; the last one is all of them.
        self.subsets = [tuple(m for m in range(count) if code >> m & 1) for code in range(1, 2**count)]
        groups = self.optimizer.param_groups
        shared = {id(p): p for group in groups for p in group["params"]}  # copies are over the same parameters
        self.optimizers = [*(copy.deepcopy(self.optimizer, dict(shared)) for _ in self.subsets[1:]), self.optimizer]
        for optimizer in self.optimizers[:-1]:
            optimizer.process_group = self.optimizer.process_group  # which copies leave behind
        self.weights = [[t.detach().clone() for t in self._tensors()] for _ in self.subsets]
        self.inside = len(self.subsets) - 1  # the subset of which the module holds the weights

    def _tensors(self) -> list[Tensor]:
        """Parameters and buffers; what is expanded cannot be written, and is the same in all networks."""
        model = self.blocks.model
        written = [
            b for b in model.buffers() if not any(n > 1 and not s for n, s in zip(b.shape, b.stride(), strict=True))
        ]
        return [*model.parameters(), *written]

    @torch.no_grad()
    def _put_in(self, number: int) -> None:
        """The weights and buffers of one subset into the module; those that were there are kept."""
        if number == self.inside:
            return
        tensors = self._tensors()
        torch._foreach_copy_(self.weights[self.inside], tensors)
        torch._foreach_copy_(tensors, self.weights[number])
        self.inside = number
        torch.clear_autocast_cache()  # casts of the other weights

    def _present(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Inside, only a subset's features reach the fusion."""
        present = self.subsets[number]
        if len(present) == len(self.blocks.modalities):
            return contextlib.nullcontext()
        return self.blocks.treated(lambda m, z: z if m in present else zeroed(z))

    def _step_on(self, batch: Samples) -> Tensor:
        """One training step of every network on one batch; returns the loss of that of all modalities, detached."""
        given = self.optimizer
        loss = torch.empty(0, device="cpu")
        try:
            for number, optimizer in enumerate(self.optimizers):
                if optimizer is not given:
                    for group, leader in zip(optimizer.param_groups, given.param_groups, strict=True):
                        group.update({k: v for k, v in leader.items() if k not in ("params", *KEYS)})
                self._put_in(number)
                self.optimizer = optimizer
                with self._present(number):
                    loss = super()._step_on(batch)
        finally:
            self.optimizer = given
            self._put_in(len(self.subsets) - 1)
        return loss

    @torch.no_grad()
    def held_out_losses(self) -> Tensor:
        """The loss of every network on the latest held-out samples, float64 ``[2^M - 1]``, over all ranks.

        Raises ValueError before the first update.
        """
        if self.held is None:
            raise ValueError("BestSubset needs held-out samples; call update(..., held_out=(xs, ys))")
        losses = []
        try:
            for number in range(len(self.subsets)):
                self._put_in(number)
                with self._present(number), evaluation_mode(self.blocks.model):
                    logits = self.held.inputs.call(self.blocks.model)
                losses.append(self.loss_of(_wide(logits), self.held.labels).double())
        finally:
            self._put_in(len(self.subsets) - 1)
        return averaged(torch.stack(losses))

    def best(self) -> int:
        """The number of the subset with the least held-out loss; of all modalities before the first update."""
        if self.held is None:
            return len(self.subsets) - 1
        return int(self.held_out_losses().nan_to_num(nan=math.inf).argmin())

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the module holds the best subset's weights, and zeros the features of all other modalities."""
        with self.optimizer.true_parameters():
            best = self.best()
            self._put_in(best)
            try:
                with self._present(best):
                    yield
            finally:
                self._put_in(len(self.subsets) - 1)

    def state_dict(self) -> dict[str, Any]:
        """Weights and states of all networks but that of all modalities, which are the module's and optimizer's."""
        return {
            **super().state_dict(),
            "weights": [[t.clone() for t in row] for row in self.weights[:-1]],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers[:-1]],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for row, saved in zip(self.weights, state["weights"], strict=False):
            torch._foreach_copy_(row, [t.to(self.device) for t in saved])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=False):
            optimizer.load_state_dict(saved)


class ModalityDropout(Method):
    """Joint training in which every modality's features of every sample are put to zero with ``probability``.

    ``keep[m, i] = u[m, i] >= probability`` for uniform ``u``; a sample that would lose all modalities keeps that of the
    greatest ``u``, which is a uniform choice. What stays is not rescaled, and at evaluation all modalities are there:
    a modality is missing as a whole, and is no unit whose mean activity is to be kept. Rows of features belong to
    samples in order, several to each where a sample's frames are folded into the batch (``[B * T, ...]``).

    Source: ModDrop (Neverova et al. 2016, arXiv 1501.00102), there while encoders that were initialized one by one are
    fused; here from the first step on. The default of ``probability`` is ours.

    Raises ValueError for a ``probability`` outside [0, 1], and in :meth:`step` for features that are not of the batch.
    """

    writes_rows_only = False

    def __init__(
        self, blocks: Blocks, optimizer: Any, *, probability: float = 0.3, loss: Loss | None = None, seed: int = 0
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_within("probability", probability, 0.0, 1.0)
        self.probability = probability

    def draw(self, count: int) -> Tensor:
        """What is kept, bool ``[M, count]``."""
        u = self.uniform(len(self.blocks.modalities), count)
        return (u >= self.probability) | (u == u.amax(0))

    def _backward(self, batch: Samples, run: Callable[[Tensor], Any]) -> tuple[Tensor, Outputs]:
        """A pass of what is left of the batch."""
        count = batch.inputs.size
        gone = ~self.draw(count)

        def treat(number: int, output: Any) -> Any:
            def change(z: Tensor) -> Tensor:
                each = frames_of(self.blocks.named(number), z, count)
                return z.masked_fill(by_sample(gone[number], z, each), 0.0)

            return self.blocks.with_changed(number, output, change)

        with self.blocks.treated(treat):
            outputs = self.forward(batch)
        self.blocks.check_rows(batch.inputs, outputs)
        loss = self.loss(outputs)
        run(loss)
        return loss.detach(), outputs


def _wide(logits: Any) -> Any:
    return wide(logits) if isinstance(logits, Tensor) and logits.is_floating_point() else logits
