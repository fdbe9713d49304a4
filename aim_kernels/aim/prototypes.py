"""Depth-adaptive prototypes: how well each block's features tell the classes apart.

The paper (v3) says that each depth is scored with prototypes, learnable inputs that are optimized with the trained
network frozen and then propagated through the blocks. How they start, how long they are optimized and the score's
formula are our reading.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from aim_kernels.aim.inputs import Inputs, take
from aim_kernels.step.sharding import reshard

#: Makes ``[B, C]`` features of what a block returns.
Pool = Callable[[Tensor], Tensor]


def channels_first(features: Tensor) -> Tensor:
    """``[B, C, ...]`` (convolutions) to ``[B, C]``: the mean over everything after the channels."""
    return features.flatten(2).mean(2) if features.dim() > 2 else features


def channels_last(features: Tensor) -> Tensor:
    """``[B, ..., C]`` (transformers) to ``[B, C]``: the mean over everything between batch and channels."""
    return features.flatten(1, -2).mean(1) if features.dim() > 2 else features


def sequence_first(features: Tensor) -> Tensor:
    """``[T, B, C]`` (recurrent layers and transformers by torch's default) to ``[B, C]``: the mean over the first."""
    return features.mean(0)


#: How prototypes may start.
INITS = ("noise", "mean")
POOLS: dict[str, Pool] = {
    "channels_first": channels_first,
    "channels_last": channels_last,
    "sequence_first": sequence_first,
}
#: Besides :data:`POOLS`: ``[B * T, C, ...]``, the T frames of a sample one after the other.
FRAMES = "frames"
WAYS = (*POOLS, FRAMES)


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside, every module's own training flag and the global random state are as they were.

    Flags are set one by one: ``model.train()`` would undo a block that its owner keeps in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    # The weights may have been written since these gathered them, and are written again before the next forward pass.
    reshard(model.modules())
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    # cuDNN's recurrent layers cannot go backward in evaluation mode
    recurrent = any(isinstance(module, nn.RNNBase) for module, _ in modes)
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, _ in modes:
            module.training = False
        # The fast path of torch's transformers makes nested tensors of padded ones, past hooks and other operators.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=devices), cudnn:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training
        reshard(module for module, _ in modes)


def block_features(
    model: nn.Module,
    modules: Mapping[str, Sequence[nn.Module]],
    inputs: Inputs,
    pools: Mapping[str, Pool | None],
) -> dict[str, list[Tensor]]:
    """One forward of ``model`` on ``inputs``; the pooled output ``[B, C]`` (float32) of each block of each modality. A
    pool that is None is that of frames (:data:`FRAMES`).

    A block that returns a tuple, a list or a mapping counts with its first tensor, one that is called several times
    with the mean over its calls. Raises RuntimeError, naming block and shape, where a block was not reached, returns no
    tensor, or pooling does not give one row per sample.
    """
    count = inputs.size
    caught = _outputs(model, modules, inputs)
    halved: dict[tuple[str, int], list[Tensor]] | None = None
    features: dict[str, list[Tensor]] = {}
    for modality, blocks in modules.items():
        features[modality] = []
        for depth in range(len(blocks)):
            where = f"block ({modality!r}, {depth})"
            outputs = caught[modality, depth]
            if not outputs:
                raise RuntimeError(f"{where} was not called in the model's forward")
            pool = pools[modality]
            first = outputs[0]
            if pool is not None and first.dim() > 2 and first.shape[0] == first.shape[1] == count > 1:
                # Which of two equal dimensions counts samples, one sample less tells.
                if halved is None:
                    halved = _outputs(model, modules, inputs.take(slice(count - 1), count))
                samples = [d for d in (0, 1) if halved[modality, depth][0].shape[d] != count]
                if samples != [1 if pool is sequence_first else 0] and pool in POOLS.values():
                    raise _misfit(where, first, count)
            pooled = [_frames(where, z, count) if pool is None else pool(z).float() for z in outputs]
            for before, after in zip(outputs, pooled, strict=True):
                if after.dim() != 2 or after.shape[0] != count:
                    raise _misfit(where, before, count)
            features[modality].append(pooled[0] if len(pooled) == 1 else torch.stack(pooled).mean(0))
    return features


def _outputs(
    model: nn.Module, modules: Mapping[str, Sequence[nn.Module]], inputs: Inputs
) -> dict[tuple[str, int], list[Tensor]]:
    """The outputs of every block, one per call."""
    caught: dict[tuple[str, int], list[Tensor]] = {}
    handles = []
    for modality, blocks in modules.items():
        for depth, block in enumerate(blocks):
            caught[modality, depth] = []

            def hook(_module: nn.Module, _args: Any, output: Any, key: tuple[str, int] = (modality, depth)) -> None:
                found = first_tensor(output)
                if found is None:
                    raise RuntimeError(
                        f"block {key} returns a {type(output).__name__} without a tensor; choose another module, or "
                        "give AIM a callable probe"
                    )
                caught[key].append(found)

            handles.append(block.register_forward_hook(hook))
    try:
        inputs.call(model)
    finally:
        for handle in handles:
            handle.remove()
    return caught


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of floating point in what a module returns: a tensor, a tuple, a list or a mapping of them, a
    packed sequence padded to ``[B, T, C]``."""
    if isinstance(output, PackedSequence):
        return pad_packed_sequence(output, batch_first=True)[0]
    if isinstance(output, Tensor):
        return output.to_padded_tensor(0.0) if output.is_nested else output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((z for each in output if (z := first_tensor(each)) is not None and z.is_floating_point()), None)
    return None


def _frames(where: str, z: Tensor, count: int) -> Tensor:
    """``[B * T, C, ...]`` to ``[B, C]``."""
    if z.dim() < 2 or not len(z) or len(z) % count:
        raise _misfit(where, z, count)
    return channels_first(z).float().unflatten(0, (count, -1)).mean(1)


def _misfit(where: str, z: Tensor, count: int) -> RuntimeError:
    return RuntimeError(
        f"{where} returns {list(z.shape)} for {count} samples; AIM must know which dimension counts samples: "
        f"pool='sequence_first' for [T, B, C], 'channels_last' for [B, T, C], '{FRAMES}' for [B * T, C, ...] (the "
        "frames of a sample one after the other), or a callable that returns [B, C]"
    )


def fit_prototypes(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    num_classes: int,
    *,
    steps: int,
    lr: float,
    init: str,
    loss: Callable[[Any, Tensor], Tensor],
    generator: torch.Generator,
    targets: Tensor | None = None,
    batch_size: int = 512,
) -> Inputs:
    """K inputs a modality (``[K, *shape of one input]``) that the frozen network classifies as 0..K-1.

    Minimizes ``loss(model(P[1], ..., P[M]), targets)`` (``targets``: ``[0, ..., K-1]`` unless given), a mean over
    samples, by ``steps`` Adam steps of rate ``lr``, in units of each modality's standard deviation in ``inputs``, so
    one rate serves inputs of any scale; in pieces of ``batch_size`` classes. ``init="noise"`` starts from Gaussian
    noise of the batch's mean and standard deviation, ``"mean"`` from the class means of the batch (noise for classes it
    lacks). A modality without an input has none. Only the prototypes are differentiated: no parameter gets a gradient.

    Raises TypeError for inputs that are not one tensor of floating point per modality (token ids cannot be learnt).
    """
    free: list[Tensor] = []
    scales: list[tuple[Tensor, Tensor]] = []
    given = [_learnable(number, x) for number, x in enumerate(inputs) if x is not None]
    for x in given:
        wide = x.detach().float()
        mean, std = wide.mean(), wide.std(correction=0).clamp_min(1e-6)
        # drawn on the CPU, so that a seed gives the same prototypes on every device
        shape, where = (num_classes, *x.shape[1:]), generator.device
        start = torch.randn(shape, generator=generator, dtype=torch.float32, device=where).to(x.device)
        if init == "mean":
            for k in labels.unique().tolist():
                start[k] = (wide[labels == k].mean(0) - mean) / std
        free.append(start.requires_grad_())
        scales.append((mean, std))
    shared = {name: take(x, slice(1), len(labels), whole=True) for name, x in inputs.shared.items()}

    def made(part: slice) -> Inputs:
        tensors = iter(
            (mean + std * u[part]).to(x.dtype) for u, (mean, std), x in zip(free, scales, given, strict=True)
        )
        entries = tuple(None if x is None else pytree.tree_map(lambda _: next(tensors), x) for x in inputs)
        count = len(range(num_classes)[part])
        repeated = {name: take(x, torch.zeros(count, dtype=torch.int64), 1, whole=True) for name, x in shared.items()}
        return Inputs(entries, repeated, inputs.layout)

    targets = torch.arange(num_classes, device=labels.device) if targets is None else targets
    adam = torch.optim.Adam(free, lr=lr)
    pieces = [slice(start, min(start + batch_size, num_classes)) for start in range(0, num_classes, batch_size)]
    with torch.enable_grad():
        for _ in range(steps):
            for u in free:
                u.grad = None
            for piece in pieces:
                value = loss(made(piece).call(model), targets[piece])
                if len(pieces) > 1:
                    value = value * ((piece.stop - piece.start) / num_classes)
                for u, gradient in zip(free, torch.autograd.grad(value, free, allow_unused=True), strict=True):
                    if gradient is not None:
                        u.grad = gradient if u.grad is None else u.grad + gradient
            with torch.device("cpu"):  # where it begins to count, whatever the default device is
                adam.step()
    with torch.no_grad():
        return made(slice(0, num_classes))


def _learnable(number: int, entry: Any) -> Tensor:
    """The one tensor of an entry that prototypes take the place of."""
    leaves = pytree.tree_leaves(entry)
    if len(leaves) == 1 and isinstance(leaves[0], Tensor) and leaves[0].is_floating_point():
        return leaves[0]
    what = f"dtype {leaves[0].dtype}" if len(leaves) == 1 and isinstance(leaves[0], Tensor) else f"{len(leaves)} parts"
    raise TypeError(
        f"input {number} has {what}; prototypes are learnt and need one floating-point tensor per modality: feed "
        "embeddings, or give probe='linear' or a callable"
    )


def prototype_score(features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """``softmax_k(-||z - P_k||^2 / dim)[y]`` of every sample, ``[B]``.

    ``features``: ``[B, dim]``, ``prototypes``: ``[K, dim]``, ``labels``: ``[B]``.
    """
    # the expanded square |z|^2 - 2 z.P + |P|^2 cancels badly for large features
    distance = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    probability = torch.softmax(-(distance**2) / features.shape[1], 1)
    return probability.gather(1, labels[:, None]).squeeze(1)


class RidgeReadout:
    """Linear probe of one block: ridge regression on one-hot labels; a rival of the prototypes (our choice)."""

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        z = features.double()
        self.mean, self.std = z.mean(0), z.std(0, correction=0).clamp_min(1e-6)
        z = self._augmented(z)
        targets = nn.functional.one_hot(labels, num_classes).double()
        gram = z.T @ z + 1e-2 * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        self.weights = torch.linalg.solve(gram, z.T @ targets)

    def _augmented(self, z: Tensor) -> Tensor:
        z = (z - self.mean) / self.std
        return torch.cat([z, torch.ones_like(z[:, :1])], 1)

    def score(self, features: Tensor, labels: Tensor) -> Tensor:
        """The predicted share of the true class of every sample, ``[B]``, clipped to [0, 1]."""
        predicted = self._augmented(features.double()) @ self.weights
        return predicted.gather(1, labels[:, None]).clamp(0.0, 1.0).squeeze(1)
