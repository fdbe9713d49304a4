"""A training state that can be gone back to: for steps that are only tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from aim_kernels import distributed

if TYPE_CHECKING:
    from aim_kernels.optimizer import AIMFusedOptimizer


class Snapshot:
    """What training steps change: weights, buffers, states, rows, gradients, training flags, and torch's random state.

    :meth:`restore` copies values back into the tensors in which they were, so that graphs, views and whoever else holds
    one of them go on; tensors that came since are let go of. Takes a copy of all weights and states.
    """

    def __init__(self, model: nn.Module, optimizer: AIMFusedOptimizer) -> None:
        optimizer._refuse_open_step("trying steps")
        optimizer._refuse_averages("trying steps")
        distributed.reshard(model.modules())
        self._model, self._optimizer = model, optimizer
        self._parameters = list(
            dict.fromkeys([*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])])
        )
        self._states = {p: dict(state) for p, state in optimizer.state.items()}
        self._anchors = dict(optimizer._anchors)
        tables = optimizer.tables
        kept = [*self._parameters, *model.buffers(), *self._anchors.values()]
        kept += [value for state in self._states.values() for value in state.values() if isinstance(value, Tensor)]
        kept += [tables.rows, tables.statistics, tables.control]
        self._values = [(t, distributed.local_of(t).detach().clone()) for t in kept]
        self._live = [dict(columns) for columns in tables._live]
        self._steps = tables.steps
        self._flags = optimizer._holds_true_weights, optimizer._in_true_pass
        self._grad_norm = optimizer.grad_norm
        # The gradients themselves are put away; steps make their own.
        self._gradients = [p.grad for p in self._parameters]
        self._training = [(module, module.training) for module in model.modules()]
        self._devices = sorted({t.device.index or 0 for t in kept if t.device.type == "cuda"})
        self._random = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._devices]

    @torch.no_grad()
    def restore(self, gradients: bool = True) -> None:
        """Goes back. ``gradients=False``: without any, to try other steps from here."""
        distributed.reshard(self._model.modules())
        for tensor, values in self._values:
            distributed.local_of(tensor).copy_(values)
        optimizer, tables = self._optimizer, self._optimizer.tables
        optimizer.state.clear()
        optimizer.state.update({p: dict(state) for p, state in self._states.items()})
        optimizer._anchors.clear()
        optimizer._anchors.update(self._anchors)
        tables._live, tables.steps = [dict(columns) for columns in self._live], self._steps
        optimizer._holds_true_weights, optimizer._in_true_pass = self._flags
        optimizer.grad_norm = self._grad_norm
        optimizer._reset()
        for p, grad in zip(self._parameters, self._gradients, strict=True):
            p.grad = grad if gradients else None
        for module, training in self._training:
            module.training = training
        torch.set_rng_state(self._random[0])
        for device, state in zip(self._devices, self._random[1], strict=True):
            torch.cuda.set_rng_state(state, device)
