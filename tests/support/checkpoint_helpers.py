"""What the tests of checkpoints share: shapes, runs, and a new process."""

from __future__ import annotations

import io
from typing import Any

import torch
from helpers import (
    Gradients,
    assign,
    parameters_of,
)

import aim_kernels as ak

SHAPES = (((5, 7), (33,), ()), ((6, 2),))
PEERS = {
    "adamw": (torch.optim.AdamW, {"rule": "adamw", "lr": 0.01, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"rule": "adam", "lr": 0.01, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"rule": "sgd", "lr": 0.01, "weight_decay": 0.1}),
    "sgd-momentum": (torch.optim.SGD, {"rule": "sgd", "lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}),
    "adamw-amsgrad": (
        torch.optim.AdamW,
        {"rule": "adamw", "lr": 0.01, "betas": (0.9, 0.7), "weight_decay": 0.1, "amsgrad": True},
    ),
    "adam-amsgrad": (torch.optim.Adam, {"rule": "adam", "lr": 0.01, "betas": (0.9, 0.7), "amsgrad": True}),
    "adagrad": (
        torch.optim.Adagrad,
        {"rule": "adagrad", "lr": 0.01, "weight_decay": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
    "rmsprop": (torch.optim.RMSprop, {"rule": "rmsprop", "lr": 0.01, "weight_decay": 0.1, "alpha": 0.9}),
    "rmsprop-both": (
        torch.optim.RMSprop,
        {"rule": "rmsprop", "lr": 0.01, "weight_decay": 0.1, "alpha": 0.8, "centered": True, "momentum": 0.9},
    ),
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def drive(optimizer: torch.optim.Optimizer, batches: list[list[torch.Tensor]]) -> None:
    for grads in batches:
        assign(parameters_of(optimizer), [g.clone() for g in grads])
        optimizer.step()


def batches(optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> list[list[torch.Tensor]]:
    gradients = Gradients(parameters_of(optimizer), seed)
    return [gradients() for _ in range(steps)]


def transplant(source: ak.AIMFusedOptimizer, target: ak.AIMFusedOptimizer, state: dict[str, Any]) -> None:
    """A new process: parameters from the model's checkpoint (live weights), everything else from the optimizer's."""
    for old, new in zip(parameters_of(source), parameters_of(target), strict=True):
        new.data.copy_(old.detach())
    target.load_state_dict(state)
