"""The plan of a step: which memory it touches. Built once, rebuilt when something moved, otherwise only re-read.

A plan holds references to all state tensors whose addresses stand in its records, so none can be freed under the
kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, compress
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels.rows import DTYPES, GROUP_RECORD, RULES, TENSOR_RECORD

if TYPE_CHECKING:
    from aim_kernels.optimizer import AIMFusedOptimizer

# Unbound C methods: map() over them costs half of a Python loop, and a step reads thousands.
_data_ptr = Tensor.data_ptr
_is_contiguous = Tensor.is_contiguous
_numel = Tensor.numel
_stride = Tensor.stride
_EVERYTHING = slice(None)

DTYPE_NUMBER = {getattr(torch, name): number for number, name in enumerate(DTYPES)}


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of moments, masters and arithmetic for parameters of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def first_moment_name(group: dict[str, Any]) -> str:
    """State key of a group's first moment: torch.optim's names."""
    return "momentum_buffer" if group["rule"] == "sgd" and group["momentum"] else "exp_avg"


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of the dimensions."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _read(method: Any, tensors: list[Tensor], dtype: Any) -> np.ndarray[Any, Any]:
    return np.fromiter(map(method, tensors), dtype, len(tensors))


class StepPlan:
    """All parameters of an optimizer, in group order, as the kernel's tables.

    Attributes:
        params, group_of: parameters and their group numbers.
        grads: this step's gradients as the user's tensors; None where there is none.
        records: ``rows.TENSOR_RECORD``, one a parameter; groups: ``rows.GROUP_RECORD``, one a group.
    """

    def __init__(self, optimizer: AIMFusedOptimizer) -> None:
        self.tables = optimizer.tables
        self.state = optimizer.state
        self.param_groups = optimizer.param_groups
        self.params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self.group_of = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        self.grads: list[Tensor | None] = [None] * len(self.params)
        self.records = np.zeros(len(self.params), TENSOR_RECORD)
        self.groups = np.zeros(len(self.param_groups), GROUP_RECORD)
        self._hyperparameters: list[Any] = [None] * len(self.param_groups)
        self._states: list[Tensor] = []
        self._anchors: list[Tensor] = []
        # Parameters whose elements do not fill one aligned block are stepped in a contiguous copy.
        self._staged: dict[int, Tensor] = {}
        # Gradients copied into the memory order of their parameters, alive until the next step.
        self._matched: list[Tensor] = []
        self._written: list[Tensor] = []
        # Where the gradients were in the latest step, and which parameters had one.
        self._grad_addresses: Any = None
        self._index: Any = _EVERYTHING
        self._build()

    def _build(self) -> None:
        records, params = self.records, self.params
        self._numel = _read(_numel, params, np.int64)
        records["numel"] = self._numel
        records["first"] = np.cumsum(self._numel) - self._numel
        records["group"] = self.group_of
        records["dtype"] = [DTYPE_NUMBER[p.dtype] for p in params]
        self._itemsize = np.array([p.element_size() for p in params], np.uint64)
        self._addresses = list(map(_data_ptr, params))
        records["param"] = self._addresses
        for index, p in enumerate(params):
            if not is_dense(p) or p.data_ptr() % p.element_size():
                buffer = torch.empty(p.shape, dtype=p.dtype, device=p.device)
                self._staged[index] = buffer
                records["param"][index] = buffer.data_ptr()
            self._read_state(index)
        self._kinds = [(p.shape, p.dtype) for p in params]
        self._flat = list(map(_is_contiguous, params))
        self._all_flat = all(self._flat)
        # The strides of a gradient that can be read as it is.
        self._strides = [self._staged.get(index, p).stride() for index, p in enumerate(params)]
        self._held = self._everything_held()
        # Views of one buffer share its version counter, so the buffer stands for them all.
        bases = (t if t._base is None else t._base for t in self._states)
        self._written = list({id(t): t for t in bases}.values())

    def _read_state(self, index: int) -> None:
        state = self.state.get(self.params[index])
        if not state:
            return
        group = self.param_groups[self.group_of[index]]
        fields = {"exp_avg": first_moment_name(group), "exp_avg_sq": "exp_avg_sq", "master": "master"}
        for field, name in (fields | {"anchor": "anchor", "step": "step"}).items():
            tensor = state.get(name)
            if tensor is not None:
                if name != "step":
                    tensor = state[name] = self._in_order(index, tensor)
                self.records[field][index] = tensor.data_ptr()
                # An anchor is only read: held, but its version stays.
                (self._anchors if name == "anchor" else self._states).append(tensor)

    def _in_order(self, index: int, tensor: Tensor) -> Tensor:
        """A state in the type and memory order that the kernel reads: itself, or a copy where the parameter was laid
        out anew."""
        p, kind = self.params[index], arithmetic_dtype(self.params[index].dtype)
        flat = index in self._staged or p.is_contiguous()
        if tensor.dtype == kind and (tensor.is_contiguous() if flat else tensor.stride() == p.stride()):
            return tensor
        strides = torch.empty(p.shape, device="meta").stride() if flat else p.stride()
        return torch.empty_strided(p.shape, strides, dtype=kind, device=p.device).copy_(tensor)

    def _everything_held(self) -> list[Any]:
        """All state tensors of the optimizer, in an order that changes when one is replaced."""
        return list(chain.from_iterable(map(dict.values, self.state.values())))

    # -- before a step -----------------------------------------------------------------------------------------------

    def read(self, grads: list[Tensor | None]) -> bool:
        """Takes this step's addresses. False where something has to be built anew, or is wrong, first.

        What autograd guarantees of a gradient when it is set (shape, dtype, device) is looked at only where the
        gradient has moved since; its strides, which autograd does not guarantee, at every step.
        """
        records = self.records
        present = [g for g in grads if g is not None]
        index: Any = _EVERYTHING
        strides = self._strides
        if len(present) != len(grads):
            index = np.array([g is not None for g in grads], bool)
            strides = list(compress(strides, index))
        try:
            if list(map(_data_ptr, self.params)) != self._addresses or not self._same_layouts():
                return False
            addresses = _read(_data_ptr, present, np.uint64)
        except RuntimeError:  # a gradient without plain memory (sparse, meta, ...)
            return False
        if index is not self._index and not np.array_equal(index, self._index):
            self._grad_addresses = None
        if not np.array_equal(addresses, self._grad_addresses):
            kinds = self._kinds if index is _EVERYTHING else list(compress(self._kinds, index))
            if [(g.shape, g.dtype) for g in present] != kinds or not records["step"][index].all():
                return False
        held = self._everything_held()
        if len(held) != len(self._held) or not all(map(is_, held, self._held)):
            return False
        self._grad_addresses, self._index = addresses, index
        self.grads, self._matched = grads, []
        odd = addresses % self._itemsize[index] != 0
        found = list(map(_stride, present))
        if found != strides or odd.any():
            addresses = addresses.copy()
            for at, where in enumerate(np.arange(len(grads))[index]):
                if odd[at] or found[at] != strides[at]:
                    addresses[at] = self._match(int(where), present[at])
        records["grad"] = 0
        # An empty gradient has no address, but it is there; nothing reads it.
        records["grad"][index] = np.where(self._numel[index] == 0, 8, addresses)
        return True

    def _same_layouts(self) -> bool:
        flat = map(_is_contiguous, self.params)
        return all(flat) if self._all_flat else list(flat) == self._flat

    def _match(self, index: int, grad: Tensor) -> int:
        """Address of the gradient's values in the memory order of its parameter."""
        p = self.params[index]
        staged = index in self._staged
        same = grad.is_contiguous() if staged or p.is_contiguous() else grad.stride() == p.stride()
        if same and grad.data_ptr() % grad.element_size() == 0:
            return grad.data_ptr()
        if staged or p.is_contiguous():
            copy = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        else:
            copy = torch.empty_strided(p.shape, p.stride(), dtype=grad.dtype, device=grad.device)
        self._matched.append(copy.copy_(grad))
        return copy.data_ptr()

    def has_gradients(self) -> bool:
        return bool(self.records["grad"].any())

    def read_hyperparameters(self) -> None:
        """Takes the groups' hyperparameters, which schedulers change between steps."""
        for number, group in enumerate(self.param_groups):
            rule = group["rule"]
            kind, target = group["under_optimized"]
            values = (
                float(group["lr"]),
                float(group["betas"][0]),
                float(group["betas"][1]),
                group["eps"],
                group["weight_decay"],
                group["momentum"] if rule == "sgd" else 0.0,
                group["dampening"],
                -1.0 if group["maximize"] else 1.0,
                target,
                group["threshold_rate"] if kind == "fraction" else 0.0,
                RULES.index(rule),
                bool(group["nesterov"]),
            )
            if values != self._hyperparameters[number]:
                self.groups[number] = self._hyperparameters[number] = values

    # -- around the kernel -------------------------------------------------------------------------------------------

    def load_staged(self) -> None:
        for index, buffer in self._staged.items():
            buffer.copy_(self.params[index])

    def store_staged(self) -> None:
        for index, buffer in self._staged.items():
            self.params[index].copy_(buffer)

    def bump_versions(self) -> None:
        """Tells autograd which tensors changed under it: a backward through old values must fail, not be wrong."""
        changed: Iterable[Tensor] = self.params
        if not self.records["grad"].all():
            touched = (self.records["grad"] != 0) | (self.records["master"] != 0)
            changed = [self.params[i] for i in touched.nonzero()[0]]
        torch.autograd.graph.increment_version([*changed, *self._written])

    def masters(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, master) of every parameter that has live weights."""
        return [(p, self.state[p]["master"]) for p in self.params if "master" in self.state.get(p, ())]
