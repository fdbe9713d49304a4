"""Makes the golden checkpoints: what this version saved in the middle of a run, and how the run went on.

    python tests/golden/make.py NAME ...        writes NAME.pt beside this file

A file is never made anew to please a test: a checkpoint that stops loading, or continues otherwise, is a break of
compatibility for everybody who has one. Starting weights and gradients are small exact fractions of a formula, so the
whole run is defined to the bit, on every machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import aim_kernels as ak

HERE = Path(__file__).resolve().parent

#: Options of the optimizer by file name. "shrinking" halves the learning rate every third step.
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"rule": "adamw", "lr": 0.03, "betas": (0.85, 0.98), "weight_decay": 0.1, "anchor": "init"},
    "adam": {"rule": "adam", "lr": 0.03, "betas": (0.85, 0.98), "weight_decay": 0.05, "maximize": True},
    "sgd": {"rule": "sgd", "lr": 0.02, "betas": (0.85, 0.98), "weight_decay": 0.1},
    "sgd-momentum": {"rule": "sgd", "lr": 0.02, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    "amsgrad": {"rule": "adamw", "lr": 0.03, "betas": (0.85, 0.7), "weight_decay": 0.1, "amsgrad": True},
    "adagrad": {
        "rule": "adagrad",
        "lr": 0.1,
        "lr_decay": 0.05,
        "initial_accumulator_value": 0.125,
        "weight_decay": 0.1,
        "maximize": True,
    },
    "rmsprop": {"rule": "rmsprop", "lr": 0.01, "alpha": 0.9, "momentum": 0.8, "weight_decay": 0.1},
    "rmsprop-centered": {
        "rule": "rmsprop",
        "lr": 0.01,
        "alpha": 0.85,
        "centered": True,
        "momentum": 0.7,
        "weight_decay": 0.1,
    },
    "lion": {"rule": "lion", "lr": 0.01, "betas": (0.85, 0.95), "weight_decay": 0.05, "decouple_lr": True},
}
#: Moments and weights in fewer bytes.
PACKED: dict[str, dict[str, Any]] = {
    "int8": {"state_dtype": "int8", "master": "kahan"},
    "bfloat16": {"state_dtype": "bfloat16", "ema_decay": 0.75},
}
CASES |= {f"adamw-{name}": CASES["adam"] | {"rule": "adamw"} | options for name, options in PACKED.items()}
#: Options that came after a case did: its file lacks them, as the checkpoints lack them that somebody has from then.
_FROM_MEASURES = ("measure",)
_FROM_FEWER_BYTES = ("state_dtype", "rounding", "master", "ema_decay", *_FROM_MEASURES)
_FROM_NEW_RULES = (
    "amsgrad",
    "alpha",
    "centered",
    "lr_decay",
    "initial_accumulator_value",
    "decouple_lr",
    "reference_lr",
)
LACKING = (
    dict.fromkeys(("adamw", "adam", "sgd", "sgd-momentum"), (*_FROM_NEW_RULES, *_FROM_FEWER_BYTES))
    | dict.fromkeys(("amsgrad", "rmsprop", "rmsprop-centered", "lion"), _FROM_FEWER_BYTES)
    | dict.fromkeys(("adamw-int8", "adamw-bfloat16"), _FROM_MEASURES)
)
SHRINKING = ("adam", "adagrad", "lion")
BEFORE, AFTER = 6, 5
#: Shapes and types of each group: vectors with tails, a scalar, every storage type.
GROUPS = (
    (((3, 6), torch.float32), ((9,), torch.bfloat16)),
    (((17,), torch.float32), ((), torch.float64), ((4,), torch.float16)),
    (((5,), torch.float32),),
)
#: For those: no float64, a parameter that is large enough for 8 bits, blocks of 128 with an end.
PACKED_GROUPS = (
    (((4097,), torch.float32), ((9,), torch.bfloat16)),
    (((17,), torch.float32), ((133,), torch.bfloat16), ((4,), torch.float16)),
    (((5,), torch.float32),),
)
ALL = {
    "grad_under": 1.25,
    "grad_well": 0.5,
    "step_under": 1.5,
    "step_well": 0.5,
    "live_under": 0.9,
    "live_well": 0.4,
    "noise": 0.3,
}
TRUE = {"step_well": 0.8}
AUXILIARY = {"grad_under": 0.5, "grad_well": 0.0, "step_under": 1.25, "live_well": 0.4}


def fractions(number: int, salt: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Multiples of 1/16 of up to six bits: exact in every type."""
    size = torch.Size(shape).numel()
    signal = torch.tensor([(29 * i + 13 * number) % 31 - 15 for i in range(size)])
    wobble = torch.tensor([(17 * i + 7 * salt * salt + 5 * number) % 37 - 18 for i in range(size)])
    return ((signal + wobble) / 16.0).reshape(shape).to(dtype)


def build(name: str) -> tuple[ak.AIMFusedOptimizer, Any, list[torch.Tensor]]:
    """The optimizer before its first step, its schedule (or None), and its parameters: one group with every column
    set, one whose phases alternate, one plain."""
    params, groups = [], []
    shapes = {"int8": PACKED_GROUPS, "bfloat16": PACKED_GROUPS[1:]}.get(CASES[name].get("state_dtype", ""), GROUPS)
    for depth, members in enumerate(shapes):
        made = [fractions(len(params) + i, 0, *member).requires_grad_() for i, member in enumerate(members)]
        params += made
        groups.append({"params": made, "modality": "audio", "depth": depth, "modulated": depth < 2})
    options = {"backend": "cpu", "under_optimized": ("fraction", 0.4), "threshold_rate": 0.3, "seed": 2**62 + 12345}
    optimizer = ak.AIMFusedOptimizer(groups, **options | CASES[name])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5) if name in SHRINKING else None
    optimizer.set_modulation(0, **ALL)
    optimizer.set_phases(0.5)
    optimizer.set_phase_rows(1, true=TRUE, aux=AUXILIARY)
    return optimizer, schedule, params


def run(optimizer: ak.AIMFusedOptimizer, schedule: Any, params: list[torch.Tensor], steps: range) -> None:
    """Steps by number, so that a run can be picked up anywhere; every fourth misses a gradient."""
    for number in steps:
        for index, p in enumerate(params):
            absent = number % 4 == 1 and index == 1
            p.grad = None if absent else fractions(index, number + 1, tuple(p.shape), p.dtype)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def packed(tree: Any) -> Any:
    """The same tree with the tensors of each type as views of one buffer: a file keeps some 250 bytes a buffer."""
    found: list[torch.Tensor] = []

    def collect(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            found.append(node)
        elif isinstance(node, (dict, list, tuple)):
            for child in node.values() if isinstance(node, dict) else node:
                collect(child)

    collect(tree)
    views: dict[int, torch.Tensor] = {}
    for dtype in {t.dtype for t in found}:
        members = {id(t): t for t in found if t.dtype == dtype}
        buffer = torch.cat([t.detach().reshape(-1) for t in members.values()])
        parts = buffer.split([t.numel() for t in members.values()])
        views |= {key: part.view(t.shape) for (key, t), part in zip(members.items(), parts, strict=True)}

    def rebuild(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            return views[id(node)]
        if isinstance(node, dict):
            return {key: rebuild(child) for key, child in node.items()}
        return type(node)(map(rebuild, node)) if isinstance(node, (list, tuple)) else node

    return rebuild(tree)


def weights(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def saved_by(optimizer: ak.AIMFusedOptimizer, name: str) -> dict[str, Any]:
    """The optimizer's part of a checkpoint, with the options that there were when the case was new."""
    made = optimizer.state_dict()
    for group in made["param_groups"]:
        for option in LACKING.get(name, ()):
            del group[option]
    return made


def checkpoint(name: str) -> dict[str, Any]:
    """The whole file."""
    optimizer, schedule, params = build(name)
    run(optimizer, schedule, params, range(BEFORE))
    saved = {
        "version": ak.__version__,
        "weights": weights(params),
        "optimizer": saved_by(optimizer, name),
    }
    other, other_schedule, other_params = build(name)
    run(other, other_schedule, other_params, range(BEFORE + AFTER))
    saved["continued"] = {"weights": weights(other_params), "optimizer": saved_by(other, name)}
    return saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="+", choices=list(CASES))
    for name in parser.parse_args().names:
        path = HERE / f"{name}.pt"
        if path.exists():
            sys.exit(f"{path} is there; a golden checkpoint is not made twice")
        torch.save(packed(checkpoint(name)), path)
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
