"""A training state that can be gone back to: for steps that are only tried."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from aim_kernels.optim.snapshot import options_of, values_of
from aim_kernels.step import sharding


class Snapshot:
    """What training steps change: weights, buffers, states, rows, gradients, options of groups, training flags, and the
    random states of torch, numpy and Python.

    :meth:`restore` copies values back into the tensors in which they were, so that graphs, views and whoever else holds
    one of them go on; tensors that came since are let go of. Takes a copy of all weights and states.

    ``optimizer``: an ``AIMFusedOptimizer``, or an ``AIMZeroRedundancyOptimizer`` around one. Raises RuntimeError where
    backward has stepped some parameters already, or the module holds averages.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        # ZeRO keeps the states of some parameters in an optimizer of its own, and all parameters in its groups.
        own = getattr(optimizer, "optim", optimizer)
        self._restore_optimizer = own.snapshot()
        self._restore_options = options_of(optimizer.param_groups if own is not optimizer else [])
        sharding.reshard(model.modules())
        self._model = model
        self._parameters = list(
            dict.fromkeys([*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])])
        )
        self._buffers = [(module, dict(module._buffers)) for module in model.modules()]
        self._restore_weights = values_of(self._parameters)
        self._buffer_values = [(t, t.detach().clone()) for t in model.buffers()]
        # The gradients are put aside, and their values kept: under DDP they may be views of buckets that others use.
        self._gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in self._parameters]
        self._training = [(module, module.training) for module in model.modules()]
        self._devices = sorted({p.device.index or 0 for p in self._parameters if p.device.type == "cuda"})
        self._random = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._devices]
        self._elsewhere = random.getstate(), np.random.get_state()

    @torch.no_grad()
    def restore(self, gradients: bool = True) -> None:
        """Goes back. ``gradients=False``: without any, to try other steps from here."""
        sharding.reshard(self._model.modules())
        for module, buffers in self._buffers:  # some modules put another tensor there
            module._buffers.clear()
            module._buffers.update(buffers)
        self._restore_weights()
        for tensor, values in self._buffer_values:
            if not torch.equal(tensor, values):  # an expanded one cannot be written
                tensor.copy_(values)
        self._restore_options()
        self._restore_optimizer()
        for p, grad, kept in self._gradients:
            p.grad = grad if gradients else None
            if gradients and grad is not None and kept is not None:
                grad.copy_(kept)
        for module, training in self._training:
            module.training = training
        torch.set_rng_state(self._random[0])
        for device, state in zip(self._devices, self._random[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._elsewhere[0])
        np.random.set_state(self._elsewhere[1])
