"""What the optimizer tests share: tensors in every layout, rows, gradients, and the comparison with the oracle."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

import aim_kernels as ak

#: Where parameters are made; tests on a GPU change it.
DEVICE = "cpu"

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: The optimizers that have our rules.
TORCH_CLASSES = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}

#: Our classes of one rule each.
CLASSES: dict[str, Any] = {
    "adamw": ak.AdamW,
    "adam": ak.Adam,
    "sgd": ak.SGD,
    "adagrad": ak.Adagrad,
    "rmsprop": ak.RMSprop,
    "lion": ak.Lion,
}

#: Rules in all their variants: options of the optimizer. Decay is never zero, so that its place in the step shows.
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"rule": "adamw", "lr": 3e-2, "betas": (0.85, 0.98), "weight_decay": 0.1},
    "adam": {"rule": "adam", "lr": 3e-2, "betas": (0.85, 0.98), "weight_decay": 0.1},
    "adam-maximize": {"rule": "adam", "lr": 3e-2, "weight_decay": 0.05, "maximize": True, "eps": 1e-3},
    "sgd": {"rule": "sgd", "lr": 3e-2, "betas": (0.85, 0.98), "weight_decay": 0.1},
    "sgd-momentum": {"rule": "sgd", "lr": 2e-2, "betas": (0.85, 0.98), "momentum": 0.8, "weight_decay": 0.1},
    "sgd-dampening": {
        "rule": "sgd",
        "lr": 2e-2,
        "momentum": 0.7,
        "dampening": 0.4,
        "weight_decay": 0.1,
        "maximize": True,
    },
    "sgd-nesterov": {"rule": "sgd", "lr": 2e-2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    # A short memory, so that the maximum is often an earlier second moment.
    "amsgrad": {"rule": "adamw", "lr": 3e-2, "betas": (0.85, 0.7), "weight_decay": 0.1, "amsgrad": True},
    "adagrad": {
        "rule": "adagrad",
        "lr": 0.1,
        "betas": (0.85, 0.98),
        "lr_decay": 0.05,
        "initial_accumulator_value": 0.1,
        "weight_decay": 0.1,
    },
    "rmsprop": {"rule": "rmsprop", "lr": 1e-2, "betas": (0.85, 0.98), "alpha": 0.9, "weight_decay": 0.1},
    # Alpha is none of the betas, which centered groups have no use for.
    "rmsprop-centered": {"rule": "rmsprop", "lr": 1e-2, "alpha": 0.85, "centered": True, "weight_decay": 0.1},
    "rmsprop-momentum": {
        "rule": "rmsprop",
        "lr": 1e-2,
        "alpha": 0.85,
        "centered": True,
        "momentum": 0.7,
        "weight_decay": 0.1,
        "maximize": True,
    },
    "lion": {"rule": "lion", "lr": 1e-2, "betas": (0.85, 0.95), "weight_decay": 0.1},
    "adamw-decoupled-lr": {
        "rule": "adamw",
        "lr": 3e-2,
        "betas": (0.85, 0.98),
        "weight_decay": 0.02,
        "decouple_lr": True,
    },
}

#: Rows by name: columns of ``set_modulation``. "alternate" and "held" differ between the phases, see ``set_row``.
ROWS: dict[str, dict[str, float]] = {
    "ones": {},
    "chain": {"grad_well": 0.7, "live_well": 0.7},
    "straight-through": {"live_well": 0.3},
    "step": {"step_under": 1.5, "step_well": 0.25},
    "grad": {"grad_under": 0.5, "grad_well": 2.0},
    "whole": {"grad_under": 0.5, "grad_well": 0.5, "step_under": 0.75, "step_well": 0.75},
    "noise": {"noise": 0.5},
    "all": {
        "grad_under": 1.25,
        "grad_well": 0.5,
        "step_under": 1.5,
        "step_well": 0.5,
        "live_under": 0.9,
        "live_well": 0.4,
        "noise": 0.3,
    },
    "alternate": {},
    "held": {},
}
TRUE_PHASE = {
    "grad_under": 1.0,
    "grad_well": 1.0,
    "step_under": 1.0,
    "step_well": 0.8,
    "live_under": 1.0,
    "live_well": 1.0,
}
AUX_PHASE = {
    "grad_under": 0.5,
    "grad_well": 0.0,
    "step_under": 1.25,
    "step_well": 1.0,
    "live_under": 1.0,
    "live_well": 0.4,
}


#: Stays as it is in the auxiliary phase, but for what the module holds.
HELD_PHASE = {"grad_under": 0.0, "grad_well": 0.0, "step_under": 0.0, "step_well": 0.0, "live_well": 0.4}


def set_row(optimizer: ak.AIMFusedOptimizer, group: int, name: str) -> None:
    """Sets a row of ROWS; "alternate" and "held" also make the phase a fair draw."""
    if name in ("alternate", "held"):
        optimizer.set_phases(0.5)
        optimizer.set_phase_rows(group, true=TRUE_PHASE, aux=AUX_PHASE if name == "alternate" else HELD_PHASE)
    elif ROWS[name]:
        optimizer.set_modulation(group, **ROWS[name])


def layout(values: torch.Tensor, name: str) -> torch.Tensor:
    """The same values in another memory layout, never aliasing ``values``."""

    def sevens(shape: Sequence[int]) -> torch.Tensor:
        return torch.full(tuple(shape), 7.0, dtype=values.dtype, device=values.device)

    if name == "transposed":
        order = list(reversed(range(values.dim())))
        return values.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if name == "channels_last":
        form = torch.channels_last if values.dim() == 4 else torch.contiguous_format
        return values.clone(memory_format=form)
    if name == "sliced":
        base = sevens((*values.shape[:-1], 2 * values.shape[-1]) if values.dim() else (2,))
        view = base[..., ::2] if values.dim() else base[0]
        return view.copy_(values)
    if name == "rows":
        base = sevens((2 * values.shape[0], *values.shape[1:]) if values.dim() else (2,))
        view = base[::2] if values.dim() else base[1]
        return view.copy_(values)
    if name == "offset":
        return sevens((values.numel() + 3,))[1:-2].view(values.shape).copy_(values)
    if name == "expanded":
        return (
            values.flatten()[:1].clone().reshape([1] * values.dim()).expand(values.shape)
            if values.numel()
            else values.clone()
        )
    assert name == "contiguous", name
    return values.clone(memory_format=torch.contiguous_format)


PARAMETER_LAYOUTS = ("contiguous", "transposed", "channels_last", "sliced", "rows", "offset")
GRADIENT_LAYOUTS = (*PARAMETER_LAYOUTS, "expanded")


def parameter(
    shape: Sequence[int], dtype: str = "float32", memory: str = "contiguous", seed: int = 0, device: str | None = None
) -> torch.Tensor:
    """A leaf that requires a gradient, standard normal, in the given layout."""
    values = torch.from_numpy(np.asarray(np.random.default_rng(seed).standard_normal(tuple(shape)))).to(DTYPES[dtype])
    return layout(values.to(device or DEVICE), memory).requires_grad_()


class Gradients:
    """Gradients with a persistent part, so that some elements stay under-optimized and others do not; some are zero."""

    def __init__(self, params: Sequence[torch.Tensor], seed: int = 1, layouts: Sequence[str] = ("contiguous",)) -> None:
        self.random = np.random.default_rng(seed)
        self.params, self.layouts = params, layouts
        self.signal = [self._scale(p) * self.random.standard_normal(p.shape) for p in params]

    def _scale(self, p: torch.Tensor) -> np.ndarray:
        return 10.0 ** self.random.uniform(-2, 0.5, p.shape)

    def __call__(self) -> list[torch.Tensor]:
        made = []
        for index, (p, signal) in enumerate(zip(self.params, self.signal, strict=True)):
            values = np.asarray(
                signal + 0.7 * np.abs(signal).mean() * self.random.standard_normal(p.shape) if p.numel() else signal
            )
            values = values * (self.random.uniform(size=p.shape) > 0.02)
            name = self.layouts[index % len(self.layouts)]
            made.append(layout(torch.from_numpy(np.asarray(values)).to(p.device, p.dtype), name))
        return made


def assign(params: Iterable[torch.Tensor], grads: Iterable[torch.Tensor | None]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory."""
    return sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride(dim), dim))


def flat(tensor: torch.Tensor, like: torch.Tensor) -> np.ndarray:
    """Elements as float64 in the memory order of ``like``."""
    return tensor.detach().permute(memory_order(like)).reshape(-1).to(torch.float64).cpu().numpy().copy()


def frozen(optimizer: ak.AIMFusedOptimizer) -> dict[str, Any]:
    """Everything a step may write, copied: for "nothing changed" and bitwise comparisons."""
    params = parameters_of(optimizer)
    return {
        "params": [p.detach().clone() for p in params],
        "state": [
            {k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} if p in optimizer.state else {} for p in params
        ],
        **{name: getattr(optimizer.tables, name).clone() for name in ("rows", "statistics", "control")},
    }


def same_bits(a: Any, b: Any, where: str = "") -> None:
    """Asserts that two trees of tensors agree bit for bit (NaN included)."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {sorted(map(str, a))} and {sorted(map(str, b))}"
        for key in a:
            same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            same_bits(x, y, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{where}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        x, y = (
            t.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b)
        )
        unequal = int((x != y).sum())
        assert not unequal, f"{where}: {unequal} bytes differ: {a.flatten()[:8]} and {b.flatten()[:8]}"
    else:
        assert a == b, f"{where}: {a} and {b}"


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> None:
    """Asserts that two tensors hold equal numbers, wherever they are. NaN equals NaN: it has many bit patterns, and a
    device may make another than a CPU."""
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def build(
    rule: str = "adamw",
    shapes: Sequence[Sequence[Sequence[int]]] = (((5, 7), (33,), (), (0,)),),
    dtype: str = "float32",
    layouts: Sequence[str] = ("contiguous",),
    modulated: bool = True,
    **options: Any,
) -> ak.AIMFusedOptimizer:
    """An optimizer with one modulated group for each list of shapes; layouts cycle through ``layouts``."""
    groups, seed = [], 0
    device = "cpu" if options.get("backend", "cpu") == "cpu" else DEVICE
    for depth, members in enumerate(shapes):
        params = []
        for shape in members:
            params.append(parameter(shape, dtype, layouts[seed % len(layouts)], seed, device))
            seed += 1
        groups.append({"params": params, "modality": "audio", "depth": depth, "modulated": modulated})
    options = {
        "backend": "cpu",
        "under_optimized": ("fraction", 0.4),
        "threshold_rate": 0.3,
        "seed": 1234567890123,
    } | options
    return ak.AIMFusedOptimizer(groups, **(RULES[rule] | options))
