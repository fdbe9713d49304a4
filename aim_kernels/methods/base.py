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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim.blocks import block_param_groups
from aim_kernels.aim.inputs import Inputs, Layout
from aim_kernels.aim.statistics import SAMPLES, batches_of, layers_with_statistics, refreshed, trained_layers
from aim_kernels.optim.modulation import unwrapped
from aim_kernels.step.arguments import check_at_least, check_choice, numbers_checked


@dataclass(frozen=True)
class Outputs:
    """What one forward pass of a batch gave.

    ``features``: the output of every encoder, in the order of the modalities; ``logits``: ``[B, K]`` of the whole
    network; ``labels``: ``[B]`` (int64).
    """

    blocks: Blocks
    features: list[Tensor]
    logits: Tensor
    labels: Tensor

    def unimodal(self) -> list[Tensor]:
        """``[B, K]`` of each modality alone, differentiable: see :meth:`Blocks.unimodal`."""
        return self.blocks.unimodal(self.features)


class Blocks:
    """A multimodal network as methods see it: encoders made of blocks, and what turns their features into logits.

    Args:
        model: called as ``model(*inputs)``, one input a modality; returns logits.
        encoders: modality to its blocks, shallow to deep, as for :func:`block_param_groups`.
        fuse: ``fuse(features) -> logits``: everything behind the encoders, of the list of what their last blocks
            return. ``model(*inputs)`` must equal ``fuse`` of the encoders' outputs.
        unimodal: ``unimodal(features) -> [logits of each modality alone]``. None: ``fuse`` with the features of all
            other modalities at zero. A linear head on concatenated features has a sharper answer:
            ``lambda z: late_fusion_logits(head, z)`` (methods.scores), whose parts add up to the joint logits.
        encode: ``encode(*inputs) -> features`` for networks that do more than call block after block, such as putting
            something in the place of a missing input (None). ``fuse`` must then be a module of ``model``: what it is
            called with are the features.
        num_classes: K, for methods that need it before they see labels.
        arguments: modality to the model's arguments that belong to it, names of keywords or numbers of positions (see
            :class:`AIM`); None: one positional argument per modality, or keywords with the modalities' names.

    Raises ValueError for fewer than two modalities and what :func:`block_param_groups` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        encoders: Mapping[str, Sequence[nn.Module]],
        fuse: Callable[[list[Tensor]], Tensor],
        unimodal: Callable[[list[Tensor]], list[Tensor]] | None = None,
        encode: Callable[..., list[Tensor]] | None = None,
        num_classes: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        if len(encoders) < 2:
            raise ValueError(f"encoders must name at least two modalities, got {list(encoders)}")
        if encode is not None and not any(fuse is module for module in model.modules()):
            raise ValueError("encode needs a fuse that is a module of the model")
        block_param_groups(model, encoders)  # for its checks
        self.model, self.fuse, self._unimodal, self._encode = model, fuse, unimodal, encode
        self.num_classes = num_classes
        self.encoders = {modality: list(modules) for modality, modules in encoders.items()}
        self.modalities = tuple(self.encoders)
        self.arguments = None if arguments is None else dict(arguments)
        self.layout = Layout.of(self.modalities, arguments)

    def forward(self, inputs: Any, labels: Any, present: Tensor | None = None) -> Outputs:
        """One pass of the model; the features are caught on their way."""
        read = self.layout.read("", inputs, present)
        caught: dict[int, Tensor] = {}
        if self._encode is not None and isinstance(self.fuse, nn.Module):
            handles = [self.fuse.register_forward_pre_hook(lambda _module, args: caught.update(enumerate(args[0])))]
        else:
            handles = [
                blocks[-1].register_forward_hook(lambda _module, _args, z, m=number: caught.__setitem__(m, z))
                for number, blocks in enumerate(self.encoders.values())
            ]
        try:
            logits = read.call(self.model)
        finally:
            for handle in handles:
                handle.remove()
        missing = [m for number, m in enumerate(self.modalities) if number not in caught]
        if missing:
            raise RuntimeError(f"the last block of {missing} was not called in the model's forward")
        return Outputs(self, [caught[number] for number in range(len(self.modalities))], logits, labels)

    @contextlib.contextmanager
    def treated(self, treat: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """Inside, ``treat(number, features)`` takes the place of each modality's features in passes of the model.

        By hooks, so that a step still is one pass of the model, which a wrapper such as DistributedDataParallel sees.
        """
        if self._encode is not None and isinstance(self.fuse, nn.Module):
            handles = [
                self.fuse.register_forward_pre_hook(
                    lambda _module, args: ([treat(number, z) for number, z in enumerate(args[0])], *args[1:])
                )
            ]
        else:
            handles = [
                blocks[-1].register_forward_hook(lambda _module, _args, z, m=number: treat(m, z))
                for number, blocks in enumerate(self.encoders.values())
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def encode(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The encoders' features, block by block, without the rest of the model."""
        if self._encode is not None:
            return self._encode(*inputs)
        return [self.encode_one(number, x) for number, x in zip(range(len(self.modalities)), inputs, strict=True)]

    def encode_one(self, number: int, x: Tensor) -> Tensor:
        """Features of the modality with this number alone."""
        for block in self.encoders[self.modalities[number]]:
            x = block(x)
        return x

    def unimodal(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits ``[B, K]`` of each modality alone."""
        if self._unimodal is not None:
            return self._unimodal(list(features))
        return [
            self.fuse([z if own == other else torch.zeros_like(z) for other, z in enumerate(features)])
            for own in range(len(features))
        ]

    def parameters(self, modality: str) -> list[nn.Parameter]:
        """All parameters of one encoder, shallow to deep."""
        return [p for block in self.encoders[modality] for p in block.parameters()]

    def param_groups(self, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Groups for :class:`AIMFusedOptimizer`."""
        return block_param_groups(self.model, self.encoders, weight_decay)


class Method:
    """Joint training, and what all methods share.

    ``optimizer`` is an :class:`AIMFusedOptimizer` over :meth:`Blocks.param_groups`. In a training loop of one's own::

        method.update(inputs, labels, held_out)          # now and then, by default once an epoch
        for *inputs, labels in loader:
            method.step(inputs, labels)                  # zero_grad, forward, backward, rows, optimizer.step()

    or, for methods that only write rows (``method.writes_rows_only``), ``method.after_backward(outputs)`` between one's
    own ``backward()`` and ``optimizer.step()``.
    """

    #: Whether :meth:`after_backward` is all that a step needs beside the joint loss, so that a user's own loop will do.
    writes_rows_only = True
    starts: int = 0
    ends: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = numbers_checked(cls.__init__)  # type: ignore[method-assign]

    @numbers_checked
    def __init__(self, blocks: Blocks, optimizer: Any, *, seed: int = 0) -> None:
        optimizer = unwrapped(optimizer)
        if not hasattr(optimizer, "set_phase_rows"):
            raise TypeError(f"methods write rows of an AIMFusedOptimizer; {type(optimizer).__name__} has none")
        named = list(dict.fromkeys(g["modality"] for g in optimizer.param_groups if g.get("modality") is not None))
        if named != list(blocks.modalities):
            raise ValueError(
                f"the optimizer's groups name the modalities {named}, the blocks {list(blocks.modalities)}; "
                "make the groups with blocks.param_groups()"
            )
        self.blocks, self.optimizer, self.seed = blocks, optimizer, seed
        self.updates = 0  # calls of update()
        self.generator = torch.Generator().manual_seed(seed)
        # What running statistics are refreshed from; nothing is kept of a model without any.
        self._keeps_batches = bool(layers_with_statistics(blocks.model))
        self._recent: deque[Inputs] = deque()
        self._updated_on: list[Inputs] = []

    # -- what methods override ----------------------------------------------------------------------------------------

    def update(
        self,
        inputs: Sequence[Tensor],
        labels: Tensor | None = None,
        held_out: tuple[Sequence[Tensor], Tensor | None] | None = None,
    ) -> Any:
        """Once an epoch, before it: a batch of training samples, and one that the network is not trained on."""
        self.updates += 1
        if self._keeps_batches:
            self._updated_on = batches_of(self.blocks.layout.read("", inputs), 128)
        return None

    def loss(self, outputs: Outputs) -> Tensor:
        """Cross entropy of the joint logits."""
        return nn.functional.cross_entropy(outputs.logits, outputs.labels)

    def after_backward(self, outputs: Outputs) -> Any:
        """Rows (or gradients) for the coming step; gradients are there."""
        return None

    def step(self, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """One training step on one batch; returns the loss, detached."""
        self.note_batch(inputs)
        self.optimizer.zero_grad()
        outputs = self.blocks.forward(inputs, labels)
        loss = self.loss(outputs)
        loss.backward()
        self.after_backward(outputs)
        self.optimizer.step()
        return loss.detach()

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
