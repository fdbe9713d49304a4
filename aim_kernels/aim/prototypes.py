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

from aim_kernels.step.sharding import reshard

#: Makes ``[B, C]`` features of what a block returns.
Pool = Callable[[Tensor], Tensor]


def channels_first(features: Tensor) -> Tensor:
    """``[B, C, ...]`` (convolutions) to ``[B, C]``: the mean over everything after the channels."""
    return features.flatten(2).mean(2) if features.dim() > 2 else features


def channels_last(features: Tensor) -> Tensor:
    """``[B, ..., C]`` (transformers) to ``[B, C]``: the mean over everything between batch and channels."""
    return features.flatten(1, -2).mean(1) if features.dim() > 2 else features


#: How prototypes may start.
INITS = ("noise", "mean")
POOLS: dict[str, Pool] = {"channels_first": channels_first, "channels_last": channels_last}


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
    try:
        for module, _ in modes:
            module.training = False
        with torch.random.fork_rng(devices=devices), cudnn:
            yield
    finally:
        for module, training in modes:
            module.training = training
        reshard(module for module, _ in modes)


def block_features(
    model: nn.Module,
    modules: Mapping[str, Sequence[nn.Module]],
    inputs: Sequence[Tensor | None],
    pools: Mapping[str, Pool],
) -> dict[str, list[Tensor]]:
    """One forward of ``model(*inputs)``; the pooled output ``[B, C]`` (float32) of each block of each modality.

    A block that returns a tuple counts with its first tensor. Raises RuntimeError, naming the block, where a block was
    not reached or pooling does not give two dimensions.
    """
    caught: dict[tuple[str, int], Tensor] = {}
    handles = []
    for modality, blocks in modules.items():
        for depth, block in enumerate(blocks):

            def hook(_module: nn.Module, _args: Any, output: Any, key: tuple[str, int] = (modality, depth)) -> None:
                caught[key] = output[0] if isinstance(output, (tuple, list)) else output

            handles.append(block.register_forward_hook(hook))
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    features: dict[str, list[Tensor]] = {}
    for modality, blocks in modules.items():
        features[modality] = []
        for depth in range(len(blocks)):
            if (modality, depth) not in caught:
                raise RuntimeError(f"block ({modality!r}, {depth}) was not called in the model's forward")
            pooled = pools[modality](caught[modality, depth]).float()
            if pooled.dim() != 2:
                raise RuntimeError(
                    f"features of block ({modality!r}, {depth}) have shape {tuple(pooled.shape)} after pooling; "
                    "give AIM a pool that returns [B, C]"
                )
            features[modality].append(pooled)
    return features


def fit_prototypes(
    model: nn.Module,
    inputs: Sequence[Tensor | None],
    labels: Tensor,
    num_classes: int,
    *,
    steps: int,
    lr: float,
    init: str,
    loss: Callable[[Any, Tensor], Tensor],
    generator: torch.Generator,
    targets: Tensor | None = None,
) -> list[Tensor | None]:
    """K inputs a modality (``[K, *shape of one input]``) that the frozen network classifies as 0..K-1.

    Minimizes ``loss(model(P[1], ..., P[M]), targets)`` (``targets``: ``[0, ..., K-1]`` unless given) by ``steps`` Adam
    steps of rate ``lr``, in units of each modality's standard deviation in ``inputs``, so one rate serves inputs of any
    scale. ``init="noise"`` starts from Gaussian noise of the batch's mean and standard deviation, ``"mean"`` from the
    class means of the batch (noise for classes it lacks). An input that is None has none, and the model is called with
    None there. Only the prototypes are differentiated: no parameter gets a gradient.

    Raises TypeError for inputs that are not floating point (token ids cannot be learnt).
    """
    for number, x in enumerate(inputs):
        if x is not None and not x.is_floating_point():
            raise TypeError(
                f"input {number} has dtype {x.dtype}; prototypes are learnt and need floating-point inputs: "
                "feed embeddings, or give probe='linear' or a callable"
            )
    free: list[Tensor] = []
    scales: list[tuple[Tensor, Tensor]] = []
    given = [x for x in inputs if x is not None]
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

    def inputs_of() -> list[Tensor | None]:
        made = iter((mean + std * u).to(x.dtype) for u, (mean, std), x in zip(free, scales, given, strict=True))
        return [None if x is None else next(made) for x in inputs]

    targets = torch.arange(num_classes, device=labels.device) if targets is None else targets
    adam = torch.optim.Adam(free, lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            gradients = torch.autograd.grad(loss(model(*inputs_of()), targets), free, allow_unused=True)
            for u, gradient in zip(free, gradients, strict=True):
                u.grad = gradient
            with torch.device("cpu"):  # where it begins to count, whatever the default device is
                adam.step()
    return [None if p is None else p.detach() for p in inputs_of()]


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
