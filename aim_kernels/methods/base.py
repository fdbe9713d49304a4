"""One protocol for every method that balances modalities, so that all of them train the same network on the same
kernels.

A method sees a network as :class:`Blocks`: modules, never names. A training step is :meth:`Method.step`; a method
overrides the part that it changes: :meth:`Method.loss`, :meth:`Method.after_backward` (rows for the coming step), or
the whole step where it needs more than one pass.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim.inputs import Inputs, joined
from aim_kernels.aim.samples import Samples, read_held_out, read_samples
from aim_kernels.aim.statistics import SAMPLES, batches_of, layers_with_statistics, refreshed, trained_layers
from aim_kernels.methods.batches import read_batch
from aim_kernels.methods.losses import (
    Loss,
    check_logits,
    check_numbers,
    ignored_label,
    of_classes,
    refuse_one_class,
    refuse_other_losses,
)
from aim_kernels.methods.network import Blocks, Outputs
from aim_kernels.methods.trees import detached
from aim_kernels.optim.modulation import unwrapped
from aim_kernels.step.arguments import check_at_least, check_choice, check_finite, numbers_checked

__all__ = ["Blocks", "Method", "Outputs", "check_apply_to", "check_window", "gradients_of"]


class Method:
    """Joint training, and what all methods share.

    ``optimizer`` is an :class:`AIMFusedOptimizer` over :meth:`Blocks.param_groups`. ``loss(logits, labels) -> scalar``
    is what the network is trained by, of whatever the model returns and the batch brings for labels (None: cross
    entropy of class numbers); a mean over samples. In a training loop of one's own::

        method.update(inputs, labels, held_out)          # now and then, by default once an epoch
        for *inputs, labels in loader:
            method.step(inputs, labels)                  # zero_grad, forward, backward, rows, optimizer.step()

    or in parts (:meth:`backward`, :meth:`apply`); or, for methods that only write rows (``method.writes_rows_only``),
    ``method.after_backward(outputs)`` between one's own ``backward()`` and ``optimizer.step()``.

    Raises ValueError for a ``loss`` that a method cannot take (:attr:`class_scores`), and for an optimizer over other
    modalities; TypeError for another optimizer.
    """

    #: Whether :meth:`after_backward` is all that a step needs beside the joint loss, so that a user's own loop will do.
    writes_rows_only = True
    #: What of class numbers ``[B]`` the formula needs; "": nothing, so that any loss will do.
    class_scores: str = ""
    #: Whether rows of features are treated as those of samples.
    reads_rows = False
    #: Whether a step is one call of :meth:`loss` and one backward pass, which may be accumulated and scaled.
    one_pass = True
    #: Whether :meth:`after_backward` changes gradients, which a scaler's factor must have left by then.
    writes_gradients = False
    starts: int = 0
    ends: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = numbers_checked(cls.__init__)  # type: ignore[method-assign]

    @numbers_checked
    def __init__(self, blocks: Blocks, optimizer: Any, *, loss: Loss | None = None, seed: int = 0) -> None:
        optimizer = unwrapped(optimizer)
        if not hasattr(optimizer, "set_phase_rows"):
            raise TypeError(f"methods write rows of an AIMFusedOptimizer; {type(optimizer).__name__} has none")
        named = list(dict.fromkeys(g["modality"] for g in optimizer.param_groups if g.get("modality") is not None))
        if named != list(blocks.modalities):
            raise ValueError(
                f"the optimizer's groups name the modalities {named}, the blocks {list(blocks.modalities)}; "
                "make the groups with blocks.param_groups()"
            )
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be called as loss(logits, labels), got a {type(loss).__name__}")
        if loss is not None and self.class_scores:
            refuse_other_losses(type(self).__name__, self.class_scores, loss)
        self.given_loss = loss
        self.loss_function: Loss = nn.functional.cross_entropy if loss is None else loss
        self.ignored = ignored_label(self.loss_function)  # the label of samples that scores leave out
        self.blocks, self.optimizer, self.seed = blocks, optimizer, seed
        self.updates = 0  # calls of update()
        self.generator = torch.Generator().manual_seed(seed)
        # What running statistics are refreshed from; nothing is kept of a model without any.
        self._keeps_batches = bool(layers_with_statistics(blocks.model))
        self._recent: deque[Inputs] = deque()
        self._updated_on: list[Inputs] = []
        self._pending: list[Outputs] | None = None  # of the batches since the latest optimizer step

    # -- what methods override ----------------------------------------------------------------------------------------

    def _update(self, samples: Samples, held_out: Samples | None) -> Any:
        """What :meth:`update` does with what it was given; labels are None where there are none."""
        return None

    def loss(self, outputs: Outputs) -> Tensor:
        """The loss of the joint logits."""
        self.check(outputs.logits, outputs.labels)
        return self.loss_of(outputs.logits, outputs.labels)

    def after_backward(self, outputs: Outputs) -> Any:
        """Rows (or gradients) for the coming step; gradients are there."""
        return None

    def _batch(self, batch: Samples) -> Samples:
        """What a step trains on, of the batch that it is given."""
        return batch

    def _backward(self, batch: Samples, run: Callable[[Tensor], Any]) -> tuple[Tensor, Outputs]:
        """A forward pass and ``run(loss)``, which takes it backward; the loss, detached, and what the pass gave."""
        outputs = self.forward(batch)
        loss = self.loss(outputs)
        run(loss)
        return loss.detach(), outputs

    def _step_on(self, batch: Samples) -> Tensor:
        """The whole step of methods of more than one pass; returns the loss, detached."""
        self.optimizer.zero_grad()
        loss, outputs = self._backward(batch, Tensor.backward)
        self.after_backward(outputs)
        self.optimizer.step()
        return loss

    # -- what trains --------------------------------------------------------------------------------------------------

    def update(self, inputs: Any, labels: Any = None, held_out: Any = None, present: Tensor | None = None) -> Any:
        """Once an epoch, before it: a batch of training samples, and one that the network is not trained on.

        Takes what :meth:`AIM.update` takes: one input a modality, or a mapping of the model's arguments; a loader or
        its batch instead; ``held_out``: ``(inputs, labels)``, ``(inputs, labels, present)``, a loader or its batch;
        ``present``: bool ``[B, M]``, which sample has which modality. Raises ValueError for samples that do not fit.
        """
        layout = self.blocks.layout
        samples = read_samples("", layout, inputs, labels, present)
        held = None if held_out is None else read_held_out(layout, held_out)
        if self.class_scores:
            for what, each in (("", samples), ("held-out ", held)):
                if each is not None and each.labels is not None:
                    check_numbers(self._why(), each.labels, flat=True, what=what)
        found = self._update(samples, held)
        self.updates += 1
        if self._keeps_batches:
            self._updated_on = batches_of(samples.inputs, 128)
        return found

    def step(
        self,
        inputs: Any,
        labels: Any = None,
        present: Tensor | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """One training step on one batch; returns the loss, detached.

        ``inputs``: one a modality, or a mapping of the model's arguments; or a loader's batch, ``[*inputs, labels]``,
        ``(inputs, labels)``, a mapping with "labels". ``present``: bool ``[B, M]``, a keyword of models that have it.
        ``scaler``: scales the loss and takes the step; refused by methods of several passes (ValueError).

        Raises ValueError, before the network is run, for labels of a kind that the loss or the formula is not of.
        """
        self._pending = None
        if scaler is not None:
            loss = self.backward(inputs, labels, present, scaler=scaler)
            self.apply(scaler=scaler)
            return loss
        return self._step_on(self._read(inputs, labels, present))

    def backward(
        self,
        inputs: Any,
        labels: Any = None,
        present: Tensor | None = None,
        *,
        scale: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """The part of a step before the optimizer's: forward, and ``scale`` times the loss backward; gradients of
        batches add up until :meth:`apply`. Returns the loss, not scaled, detached.

        ``scale=1/n`` for n batches. Rows are those of all batches together. Raises ValueError for methods of several
        passes.
        """
        if not self.one_pass:
            raise ValueError(
                f"a step of {type(self).__name__} is several passes, which cannot be accumulated or scaled; call "
                "step(inputs, labels), with bigger batches, in bfloat16 or float32"
            )
        check_finite("scale", scale)
        batch = self._read(inputs, labels, present)
        if self._pending is None:
            self.optimizer.zero_grad()

        def run(loss: Tensor) -> None:
            scaled = loss * scale
            (scaled if scaler is None else scaler.scale(scaled)).backward()

        loss, outputs = self._backward(batch, run)
        reads = type(self).after_backward is not Method.after_backward
        kept = [_without_graph(outputs)] if reads else []
        self._pending = [*(self._pending or []), *kept]
        return loss

    def apply(self, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """The rest of a step: rows or gradients for it, and the optimizer's step, by ``scaler`` if there is one.

        Raises RuntimeError without a :meth:`backward` before.
        """
        if self._pending is None:
            raise RuntimeError("apply() takes the step of gradients that backward() left; call backward() first")
        pending, self._pending = self._pending, None
        if scaler is not None and self.writes_gradients:
            scaler.unscale_(self.optimizer)
        if pending:
            self.after_backward(_together(pending))
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()

    def forward(self, batch: Samples) -> Outputs:
        """One forward pass of a step; ValueError for logits that do not go with the labels."""
        outputs = self.blocks.forward(batch.inputs, batch.labels)
        self.check(outputs.logits, outputs.labels)
        if self.reads_rows:
            self.blocks.check_rows(batch.inputs, outputs)
        return outputs

    def check(self, logits: Any, labels: Any) -> None:
        """Raises ValueError for logits that do not go with the labels, or labels that are none of the loss's."""
        if self.class_scores or self.given_loss is None:
            flat = bool(self.class_scores)
            check_numbers(self._why(), labels, flat=flat)
            check_logits(self._why(), logits, labels, self.ignored, flat=flat)
        elif of_classes(self.loss_function):
            refuse_one_class(self._why(), logits)

    def _read(self, inputs: Any, labels: Any, present: Tensor | None) -> Samples:
        batch = read_batch(self.blocks.layout, inputs, labels, present)
        if self.class_scores or self.given_loss is None:
            check_numbers(self._why(), batch.labels, flat=bool(self.class_scores))
        batch = self._batch(batch)
        self.note_batch(batch.inputs)
        return batch

    def _why(self) -> str:
        if self.class_scores:
            return f"{type(self).__name__} needs {self.class_scores}"
        return f"the loss of {type(self).__name__} is cross entropy"

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the module holds the weights to be judged; after, those to be trained on, to the bit.

        Where live weights are degraded (:attr:`degrades`), running statistics (BatchNorm) are inside those of the
        weights to be judged (:func:`aim_kernels.refresh_statistics`), from the latest batches of :meth:`step`, up to
        512 samples; before the first step, from samples of the latest :meth:`update`; without either, those of
        training. With SyncBatchNorm all processes must enter.
        """
        return self._evaluating()

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        batches = list(self._recent) or self._updated_on
        layers = trained_layers(self.blocks.model) if batches and self.degrades else {}
        with self.optimizer.true_parameters(), refreshed(self.blocks.model, layers, batches):
            yield

    def state_dict(self) -> dict[str, Any]:
        """What the method itself needs to go on bit for bit; rows are in the optimizer's state."""
        return {"updates": self.updates, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        self.generator.set_state(state["generator"].cpu())

    # -- what methods use ---------------------------------------------------------------------------------------------

    def loss_of(self, logits: Any, labels: Any) -> Tensor:
        """What the network is trained by, of any logits. Raises ValueError for anything but a scalar."""
        value = self.loss_function(logits, labels)
        if not isinstance(value, Tensor) or value.dim():
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"loss must return a scalar tensor, the mean over samples; it returned {got}")
        return value

    def unimodal_losses(self, outputs: Outputs) -> Tensor:
        """The loss of each modality's own logits, ``[M]``, differentiable."""
        return torch.stack([self.loss_of(x, outputs.labels) for x in outputs.unimodal()])

    def note_batch(self, inputs: Any) -> None:
        """Keeps the inputs of the latest steps, 512 samples or one batch, for :meth:`evaluating`. A step of one's own
        calls it; without running statistics it does nothing."""
        if not self._keeps_batches:
            return
        read = self.blocks.layout.read("", inputs)
        if read.size < 2:
            return
        self._recent.append(read)
        kept = sum(each.size for each in self._recent)
        while len(self._recent) > 1 and kept > SAMPLES:
            kept -= self._recent.popleft().size

    @property
    def degrades(self) -> bool:
        """Whether training sees degraded weights."""
        return any(map(self.optimizer.tables.degrades, range(len(self.optimizer.param_groups))))

    @property
    def epoch(self) -> int:
        """Number of the epoch that :meth:`update` began, from 0; 0 without updates."""
        return max(self.updates - 1, 0)

    @property
    def active(self) -> bool:
        """Whether this epoch lies between ``starts`` and ``ends``, of methods that have them."""
        return self.starts <= self.epoch and (self.ends is None or self.epoch <= self.ends)

    @property
    def device(self) -> torch.device:
        """Where the optimizer keeps its tables."""
        return self.optimizer.tables.rows.device

    def uniform(self, *shape: int) -> Tensor:
        """Draws in [0, 1), float32. From a generator on the CPU, so that a seed gives the same ones on every device."""
        draws = torch.rand(*shape, generator=self.generator, dtype=torch.float32, device=self.generator.device)
        # From ordinary memory the copy would wait for the device.
        return (draws.pin_memory() if self.device.type == "cuda" else draws).to(self.device, non_blocking=True)

    def scale(self, coefficients: Tensor, *, apply_to: str, noise: float = 0.0, biases: bool = False) -> None:
        """One factor a modality (``[M]``, on any device, never waited for) into the rows of its modulated groups; with
        ``biases`` also into those of its biases and normalization parameters, which get no noise."""
        for index, group in enumerate(self.optimizer.param_groups):
            modulated = bool(group.get("modulated"))
            if group.get("modality") is None or not (modulated or biases):
                continue
            factor = coefficients[self.blocks.modalities.index(group["modality"])]
            columns: dict[str, Any] = {f"{apply_to}_under": factor, f"{apply_to}_well": factor}
            self.optimizer.set_modulation(index, **columns, noise=noise if modulated else 0.0)


def _without_graph(outputs: Outputs) -> Outputs:
    return Outputs(
        outputs.blocks,
        [z.detach() for z in outputs.features],
        detached(outputs.logits),
        outputs.labels,
        [detached(each) for each in outputs.returned],
        outputs.count,
    )


def _together(several: Sequence[Outputs]) -> Outputs:
    """What one forward pass of all the batches would have given. Raises ValueError for batches of other shapes."""
    if len(several) == 1:
        return several[0]
    counts = [each.count for each in several]

    def join(parts: Sequence[Any]) -> Any:
        try:
            return joined(parts, counts)
        except ValueError as error:
            raise ValueError(f"the batches that are accumulated differ: {error}") from error

    return Outputs(
        several[0].blocks,
        [join(parts) for parts in zip(*(each.features for each in several), strict=True)],
        join([each.logits for each in several]),
        join([each.labels for each in several]),
        [join(parts) for parts in zip(*(each.returned for each in several), strict=True)],
        sum(counts),
    )


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of parameters that have one. Raises RuntimeError where one has none."""
    found = [p.grad for p in parameters if p.grad is not None]
    if len(found) != len(parameters):
        raise RuntimeError(f"{len(parameters) - len(found)} of {len(parameters)} parameters have no gradient")
    return found


def check_apply_to(apply_to: str) -> None:
    """``apply_to``: "grad" scales gradients as published (a constant factor nearly cancels under Adam-like rules),
    "step" the updates."""
    check_choice("apply_to", apply_to, ("grad", "step"))


def check_window(starts: int, ends: int | None) -> None:
    """``starts``, ``ends``: first and last epoch (of :meth:`Method.update`) in which a method acts; None: no end."""
    check_at_least("starts", starts, 0)
    if ends is not None:
        check_at_least("ends", ends, starts)
