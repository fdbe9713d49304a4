"""A training state that can be gone back to: for steps that are only tried."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aim_kernels.step import sharding
from aim_kernels.step.ownership import parts_of


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
        own = self._own = getattr(optimizer, "optim", optimizer)
        own._refuse_open_step("trying steps")
        own._refuse_averages("trying steps")
        sharding.reshard(model.modules())
        self._model = model
        groups = [*optimizer.param_groups, *(own.param_groups if own is not optimizer else ())]
        self._options = [(group, {name: v for name, v in group.items() if name != "params"}) for group in groups]
        self._parameters = list(
            dict.fromkeys([*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])])
        )
        self._buffers = [(module, dict(module._buffers)) for module in model.modules()]
        # Whatever others keep there as well: what is written in it, at any depth, and who holds what.
        self._states = dict(own.state)
        within = {id(part): part for state in self._states.values() for part in parts_of(state)}.values()
        self._containers = [(part, copy.copy(part)) for part in within if not isinstance(part, Tensor)]
        self._anchors = dict(own._anchors)
        tables = own.tables
        kept = [*self._parameters, *self._anchors.values()]
        kept += [v for _, options in self._options for v in options.values() if isinstance(v, Tensor)]  # learning rates
        kept += [part for part in within if isinstance(part, Tensor) and not part.is_meta]
        kept += [tables.rows, tables.statistics, tables.control]
        self._values = [(t, sharding.local_of(t).detach().clone()) for t in kept]
        self._buffer_values = [(t, t.detach().clone()) for t in model.buffers()]
        self._live = [dict(columns) for columns in tables._live]
        self._steps = tables.steps
        self._flags = own._holds_true_weights, own._in_true_pass
        self._grad_norm = own.grad_norm
        # The gradients are put aside, and their values kept: under DDP they may be views of buckets that others use.
        self._gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in self._parameters]
        self._training = [(module, module.training) for module in model.modules()]
        self._devices = sorted({t.device.index or 0 for t in kept if t.device.type == "cuda"})
        self._random = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._devices]
        self._elsewhere = random.getstate(), np.random.get_state()

    @torch.no_grad()
    def restore(self, gradients: bool = True) -> None:
        """Goes back. ``gradients=False``: without any, to try other steps from here."""
        sharding.reshard(self._model.modules())
        for module, buffers in self._buffers:  # some modules put another tensor there
            module._buffers.clear()
            module._buffers.update(buffers)
        for tensor, values in self._values:
            sharding.local_of(tensor).copy_(values)
        for tensor, values in self._buffer_values:
            if not torch.equal(tensor, values):  # an expanded one cannot be written
                tensor.copy_(values)
        own, tables = self._own, self._own.tables
        own.state.clear()
        own.state.update(self._states)
        for container, contents in self._containers:
            if isinstance(container, dict):
                container.clear()
                container.update(contents)
            else:
                container[... if isinstance(container, np.ndarray) else slice(None)] = contents
        own._anchors.clear()
        own._anchors.update(self._anchors)
        for group, options in self._options:
            for name in group.keys() - options.keys() - {"params"}:
                del group[name]
            group.update(options)
        tables._live, tables.steps = [dict(columns) for columns in self._live], self._steps
        own._holds_true_weights, own._in_true_pass = self._flags
        own.grad_norm = self._grad_norm
        if own._release is not None:
            own._release.forget()
        own._reset()
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
