"""Running statistics (BatchNorm) of the weights that are judged: estimated anew from batches, and put back."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from aim_kernels.aim.inputs import Inputs
from aim_kernels.aim.prototypes import probing

#: So many training samples are enough for a mean and a variance per channel (an error of 1/16 of the variance).
SAMPLES = 512
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def refresh_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    layers: Iterable[str | nn.Module] | None = None,
    exclude: Iterable[str | nn.Module] = (),
) -> list[str]:
    """Estimates running means and variances anew, with the weights that the model holds.

    Running statistics belong to the weights under which they were collected: refresh them after ``optimizer.eval()``,
    which puts other weights into the model::

        optimizer.eval()
        ak.refresh_statistics(model, (inputs for *inputs, labels in loader))
        validate(model)

    ``running_mean = sum_c n_c mean_c / sum_c n_c``, and ``running_var`` alike of the unbiased variances, over the calls
    c of a layer, with ``n_c`` values per channel: the cumulative average of ``momentum=None``, except that a smaller
    batch counts less. ``num_batches_tracked`` becomes the number of calls. A layer that no batch reaches keeps its
    statistics.

    Meanwhile these layers alone are in training mode, and all others in evaluation mode (no dropout), without
    gradients. Training flags, ``momentum``, gradients and the random states of torch, numpy and Python are as before
    afterwards; where the model raises, the statistics too.

    Refreshed is every layer with ``running_mean``, ``running_var`` and a ``momentum`` in torch's sense (BatchNorm,
    SyncBatchNorm, InstanceNorm with ``track_running_stats``) that is not frozen. A layer is frozen if its momentum is
    0; in a model in training mode, if it is in evaluation mode itself; in a model in evaluation mode, if it has affine
    parameters and none of them requires a gradient.

    Under DistributedDataParallel each process takes its own batches; the next training pass hands on those of rank 0.
    SyncBatchNorm exchanges by itself: every process then needs equally many batches.

    Args:
        model: in training or evaluation mode.
        batches: on the model's device. A tensor is passed as ``model(batch)``, a tuple or list as ``model(*batch)``
            (None for a missing input), a mapping as ``model(**batch)``. At least one.
        forward: ``forward(batch)`` takes the place of these calls.
        layers: names or modules, whose layers are refreshed, frozen or not, and no others. None: see above.
        exclude: names or modules whose layers keep their statistics.

    Returns:
        The names of the layers that were refreshed; empty, without a look at ``batches``, if the model has none.

    Raises:
        ValueError: no batches, a module that is not in the model or has no such layer, a lazy layer that no batch has
            reached yet, and what such a layer says to a batch of one value per channel.
        TypeError: a batch of another kind without ``forward``.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # a pass of the wrapper would wait for the other processes
    chosen = trained_layers(model) if layers is None else _within(model, layers)
    left_out = _within(model, exclude)
    chosen = {name: layer for name, layer in chosen.items() if name not in left_out}
    for name, layer in chosen.items():
        if is_lazy(layer.running_mean):
            raise ValueError(f"{name!r} is a lazy layer without a shape; call the model once before")
    return _collect(model, chosen, batches, forward) if chosen else []


def layers_with_statistics(model: nn.Module) -> dict[str, Any]:
    """All layers that keep running statistics with a momentum, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
        and getattr(module, "track_running_stats", True)
        and isinstance(getattr(module, "momentum", ""), (float, int, type(None)))
    }


def trained_layers(model: nn.Module) -> dict[str, Any]:
    """Those of :func:`layers_with_statistics` that are not frozen (:func:`refresh_statistics`)."""

    def frozen(layer: Any) -> bool:
        affine = list(layer.parameters(recurse=False))
        at_rest = not layer.training if model.training else bool(affine) and not any(p.requires_grad for p in affine)
        return at_rest or bool(layer.momentum == 0)

    return {name: layer for name, layer in layers_with_statistics(model).items() if not frozen(layer)}


@contextlib.contextmanager
def refreshed(model: nn.Module, layers: Mapping[str, Any], batches: Sequence[Any]) -> Iterator[None]:
    """Inside, these layers have the statistics of ``batches`` (inputs of one call each) and the weights that the model
    holds; after, those of before, to the bit. Nothing is done without layers or batches, nor to lazy layers without a
    shape."""
    layers = {name: layer for name, layer in layers.items() if not is_lazy(layer.running_mean)}
    if not layers or not batches:
        yield
        return
    kept = Kept(layers.values())
    _collect(model, layers, batches, None)
    try:
        yield
    finally:
        kept.restore()


def batches_of(inputs: Inputs, batch_size: int) -> list[Inputs]:
    """Batches for :func:`refreshed`: at most ``SAMPLES`` samples, evenly from all, since they may be sorted; none of
    fewer than two samples."""
    count = inputs.size
    stride = max(-(-count // SAMPLES), 1)
    taken = -(-count // stride)
    if taken < 2:
        return []
    pieces = min(-(-taken // batch_size), taken // 2)
    return [inputs.take(slice(stride * number, count, stride * pieces), count) for number in range(pieces)]


class Kept:
    """The statistics that layers have now; :meth:`restore` puts them back into the tensors in which they were."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._rows = [
            (layer, name, buffer, buffer.detach().clone())
            for layer in layers
            for name in BUFFERS
            if isinstance(buffer := getattr(layer, name, None), Tensor)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Goes back, to the bit."""
        for layer, name, buffer, values in self._rows:
            if getattr(layer, name) is not buffer:  # some layers put another tensor there
                setattr(layer, name, buffer)
            buffer.copy_(values)


class _Average:
    """Weighted means of what the calls of one layer collect; a forward hook."""

    def __init__(self) -> None:
        self.calls = self.values = 0
        self.mean = self.var = torch.empty(0, device="cpu")

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        mean, var = _wide(layer.running_mean), _wide(layer.running_var)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), mean)
        values = x.numel() // mean.numel()  # per channel
        if not values:
            return
        self.calls, self.values = self.calls + 1, self.values + values
        share = values / self.values
        self.mean = mean.clone() if self.calls == 1 else self.mean.lerp(mean, share)
        self.var = var.clone() if self.calls == 1 else self.var.lerp(var, share)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _collect(
    model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Any], forward: Callable[[Any], Any] | None
) -> list[str]:
    """:func:`refresh_statistics` of these layers."""
    kept, averages = Kept(layers.values()), {name: _Average() for name in layers}
    momenta = {name: layer.momentum for name, layer in layers.items()}
    elsewhere, handles, given = (random.getstate(), np.random.get_state()), [], False
    try:
        with torch.no_grad(), probing(model), _eager():
            for name, layer in layers.items():
                layer.training = True
                layer.momentum = 1.0  # each call then leaves its own statistics, nothing of those before
                layer.running_mean.zero_()  # 0 * NaN would stay
                layer.running_var.fill_(1.0)
                handles.append(layer.register_forward_hook(averages[name], with_kwargs=True))
            for batch in batches:
                given = True
                _call(model, batch) if forward is None else forward(batch)
        if not given:
            raise ValueError("batches is empty; statistics need at least one batch of inputs")
    except BaseException:
        averages = {}
        raise
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.momentum = momenta[name]
        random.setstate(elsewhere[0])
        np.random.set_state(elsewhere[1])
        kept.restore()
        reached = [name for name, average in averages.items() if average.calls]
        for name in reached:
            _write(layers[name], averages[name])
    return reached


@torch.no_grad()
def _write(layer: Any, average: _Average) -> None:
    layer.running_mean.copy_(average.mean)
    layer.running_var.copy_(average.var)
    if isinstance(getattr(layer, "num_batches_tracked", None), Tensor):
        layer.num_batches_tracked.fill_(average.calls)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Inputs):
        return batch.call(model)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    raise TypeError(
        f"a batch is a tensor, a tuple or list of inputs, or a mapping, got {type(batch).__name__}; give "
        "forward=, called as forward(batch)"
    )


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled models run as they were written: compiled code may pass by hooks that came after it."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _within(model: nn.Module, chosen: Iterable[str | nn.Module]) -> dict[str, Any]:
    """Layers with statistics in these modules of the model, themselves included."""
    chosen = [chosen] if isinstance(chosen, (str, nn.Module)) else list(chosen)
    named, keeping = dict(model.named_modules()), layers_with_statistics(model)
    inside: set[nn.Module] = set()
    for each in chosen:
        module = named.get(each) if isinstance(each, str) else each
        if module is None or not any(module is other for other in named.values()):
            raise ValueError(f"the model has no module {each!r}")
        found = set(module.modules()) & set(keeping.values())
        if not found:
            raise ValueError(f"{each!r} has no layer that keeps running statistics")
        inside |= found
    return {name: layer for name, layer in keeping.items() if layer in inside}
