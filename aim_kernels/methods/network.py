"""A multimodal network as methods see it: modules, never names; and what one forward pass of a batch gave."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim.blocks import block_param_groups
from aim_kernels.aim.inputs import Inputs, Layout, count_of
from aim_kernels.aim.prototypes import first_tensor, probing
from aim_kernels.methods.trees import changed, frames_of, per_sample, zeroed


@dataclass(frozen=True)
class Outputs:
    """What one forward pass of a batch gave.

    ``features``: the output of every encoder, in the order of the modalities, of a tuple, list or dict its first
    tensor; ``logits``: whatever the whole network returns, ``[B, K]`` for class numbers; ``labels``: as given;
    ``returned``: what the last blocks returned, which is what ``fuse`` takes; ``count``: B.
    """

    blocks: Blocks
    features: list[Tensor]
    logits: Any
    labels: Any
    returned: Sequence[Any] = field(default=())
    count: int = 0

    def __post_init__(self) -> None:
        if not self.returned:
            object.__setattr__(self, "returned", self.features)
        if not self.count:
            object.__setattr__(self, "count", count_of(self.labels) or len(self.features[0]))

    def unimodal(self) -> list[Any]:
        """Logits of each modality alone, differentiable: see :meth:`Blocks.unimodal`."""
        return self.blocks.unimodal(self.returned)

    def per_sample(self, number: int) -> Tensor:
        """Features ``[B, ...]`` of one modality, the mean over frames that are folded into the batch. Raises
        ValueError, naming it, for rows that belong to no sample."""
        return per_sample(self.blocks.named(number), self.features[number], self.count)


class Blocks:
    """A multimodal network as methods see it: encoders made of blocks, and what turns their features into logits.

    Args:
        model: called as ``model(*inputs)``, one input a modality, or as ``arguments`` say; returns logits.
        encoders: modality to its blocks, shallow to deep, as for :func:`block_param_groups`.
        fuse: ``fuse(features) -> logits``: everything behind the encoders, of the list of what their last blocks
            return. ``model(*inputs)`` must equal ``fuse`` of the encoders' outputs.
        unimodal: ``unimodal(features) -> [logits of each modality alone]``. None: ``fuse`` with the features of all
            other modalities at zero. A linear head on concatenated features has a sharper answer:
            ``lambda z: late_fusion_logits(head, z)`` (methods.scores), whose parts add up to the joint logits.
        encode: ``encode(*inputs) -> features`` for networks that do more than call block after block, such as putting
            something in the place of a missing input (None), or calling the last block several times. ``fuse`` must
            then be a module of ``model``: what it is called with are the features.
        num_classes: K, for methods that need it before they see labels.
        arguments: modality to the model's arguments that belong to it, names of keywords or numbers of positions (see
            :class:`AIM`); None: one positional argument per modality, or keywords with the modalities' names.

    Raises ValueError for fewer than two modalities and what :func:`block_param_groups` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        encoders: Mapping[str, Sequence[nn.Module]],
        fuse: Callable[[list[Any]], Any],
        unimodal: Callable[[list[Any]], list[Any]] | None = None,
        encode: Callable[..., list[Any]] | None = None,
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
        self.layout = Layout.of(self.modalities, arguments, model)
        self._rows_first: set[int] = set()  # modalities of which the first dimension counts samples for sure

    def named(self, number: int) -> str:
        """What a message calls the last block of the modality with this number."""
        return f"the last block of {self.modalities[number]!r}"

    def forward(self, inputs: Any, labels: Any = None, present: Tensor | None = None) -> Outputs:
        """One pass of the model; the features are caught on their way.

        Raises RuntimeError, naming the block, for a last block that is not called, that is called more than once, or
        that returns no tensor.
        """
        read = self.layout.read("", inputs, present)
        caught: dict[int, Any] = {}

        def catch(number: int, output: Any) -> None:
            if number in caught:
                raise RuntimeError(
                    "fuse is called more than once in a forward pass of the model; make it a module that is called once"
                    if self._encode is not None
                    else f"{self.named(number)} is called more than once in a forward pass of the model, and nobody "
                    "says which call gives the features; give Blocks encode= and a fuse that is a module of the model"
                )
            caught[number] = output

        with self._hooked(catch):
            logits = read.call(self.model)
        missing = [m for number, m in enumerate(self.modalities) if number not in caught]
        if missing:
            raise RuntimeError(f"the last block of {missing} was not called in the model's forward")
        returned = [caught[number] for number in range(len(self.modalities))]
        features = []
        for number, output in enumerate(returned):
            found = output if isinstance(output, Tensor) else first_tensor(output)
            if found is None:
                raise RuntimeError(f"{self.named(number)} returns a {type(output).__name__} without a tensor")
            features.append(found)
        return Outputs(self, features, logits, labels, returned, read.size)

    @torch.no_grad()
    def check_rows(self, inputs: Inputs, outputs: Outputs) -> None:
        """Raises ValueError for features ``[T, B, C]``, also where T is B: then one sample less tells, once for every
        modality (a forward pass in evaluation mode, of which random states are as before)."""
        count = outputs.count
        unclear = {
            number: z
            for number, z in enumerate(outputs.features)
            if frames_of(self.named(number), z, count) == 1 and z.dim() > 2 and z.shape[1] == count > 1
        }
        if unclear.keys() <= self._rows_first:
            return
        with probing(self.model):
            fewer = self.forward(inputs.take(slice(count - 1), count)).features
        for number, z in unclear.items():
            frames_of(self.named(number), fewer[number], count - 1)
            if fewer[number].shape[0] == z.shape[0]:
                raise ValueError(
                    f"{self.named(number)} has features of shape {list(z.shape)}, of which the second dimension counts "
                    "samples; it must return [B, ...]"
                )
            self._rows_first.add(number)

    def treated(self, treat: Callable[[int, Any], Any]) -> contextlib.AbstractContextManager[None]:
        """Inside, ``treat(number, output)`` takes the place of what each modality's last block returns in passes of the
        model.

        By hooks, so that a step still is one pass of the model, which a wrapper such as DistributedDataParallel sees.
        """
        return self._hooked(treat)

    @contextlib.contextmanager
    def _hooked(self, hook: Callable[[int, Any], Any]) -> Iterator[None]:
        """Inside, ``hook(number, output)`` is called with what each last block returns; another output, or None."""
        if self._encode is not None and isinstance(self.fuse, nn.Module):

            def before(_module: nn.Module, args: Any) -> Any:
                found = [hook(number, z) for number, z in enumerate(args[0])]
                return None if all(z is None for z in found) else (found, *args[1:])

            handles = [self.fuse.register_forward_pre_hook(before)]
        else:
            handles = [
                blocks[-1].register_forward_hook(lambda _module, _args, z, m=number: hook(m, z))
                for number, blocks in enumerate(self.encoders.values())
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def encode(self, inputs: Any) -> list[Any]:
        """What the encoders return, block by block, without the rest of the model."""
        read = self.layout.read("", inputs)
        if self._encode is not None:
            encoded: list[Any] = read.call(self._encode)
            return encoded
        return [self.encode_one(number, x) for number, x in enumerate(read)]

    def encode_one(self, number: int, x: Any) -> Any:
        """What the encoder of the modality with this number returns. Raises TypeError for an input of several
        arguments, which only the model puts together."""
        if isinstance(x, Mapping):
            if len(x) != 1:
                raise TypeError(
                    f"the input of {self.modalities[number]!r} has several arguments ({', '.join(map(str, x))}); block "
                    "after block takes one"
                )
            (x,) = x.values()
        for block in self.encoders[self.modalities[number]]:
            x = block(x)
        return x

    def unimodal(self, features: Sequence[Any]) -> list[Any]:
        """Logits of each modality alone, of what the last blocks return."""
        if self._unimodal is not None:
            return self._unimodal(list(features))
        zeros = [zeroed(z) for z in features]
        return [
            self.fuse([z if own == other else zeros[other] for other, z in enumerate(features)])
            for own in range(len(features))
        ]

    def with_changed(self, number: int, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """What a last block returned, its one tensor changed; see :func:`~aim_kernels.methods.trees.changed`."""
        return changed(self.named(number), output, change)

    def parameters(self, modality: str) -> list[nn.Parameter]:
        """All parameters of one encoder, shallow to deep."""
        return [p for block in self.encoders[modality] for p in block.parameters()]

    def param_groups(self, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Groups for :class:`AIMFusedOptimizer`."""
        return block_param_groups(self.model, self.encoders, weight_decay)
