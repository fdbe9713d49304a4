"""Default devices and default types are of the user's own tensors: an optimizer's life is the same under any."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import aim_helpers
import pytest
import torch
from backends_under_test import enter
from helpers import Gradients, assign, build, frozen, parameters_of, same_bits, set_row
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels.aim import Prototypes, Trial
from aim_kernels.methods.controls import DropFeatures


@contextlib.contextmanager
def _device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "with meta": lambda: torch.device("meta"),
    "meta": lambda: _device("meta"),
    "float64": lambda: _dtype(torch.float64),
    "bfloat16": lambda: _dtype(torch.bfloat16),
}
SHAPES = (((65, 67), (33,), ()), ((6, 2),))
LIVES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("adamw", "float32", "cpu", {"anchor": "init"}),
    ("adamw", "bfloat16", "cpu", {"state_dtype": "int8", "master": "split", "ema_decay": 0.75}),
    ("adamw", "bfloat16", "reference", {"state_dtype": "int8", "master": "kahan", "ema_decay": 0.75}),
    ("adamw", "float16", "cpu", {"state_dtype": "bfloat16", "master": "float32", "max_grad_norm": 0.5}),
    ("amsgrad", "float64", "reference", {"max_grad_norm": 0.5}),
    ("adagrad", "float32", "cpu", {"state_dtype": "bfloat16"}),
    ("sgd-nesterov", "float32", "reference", {"sync_every": 2}),
    ("rmsprop-momentum", "float32", "cpu", {"zero_grad_in_step": True}),
    ("lion", "float64", "cpu", {}),
    ("adamw", "float32", "reference", {"measure": "random"}),
    ("adam", "float32", "reference", {"measure": "grad"}),
    ("adamw", "bfloat16", "cuda", {"state_dtype": "int8", "master": "split", "max_grad_norm": 0.5}),
]


def step(optimizer: Any, gradients: Gradients, count: int = 1) -> None:
    for _ in range(count):
        assign(parameters_of(optimizer), gradients())
        optimizer.step()


def life(rule: str, dtype: str, backend: str, options: dict[str, Any]) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        return lived(rule, dtype, enter(backend, patch), options)


def lived(rule: str, dtype: str, backend: str, options: dict[str, Any]) -> list[Any]:
    """Everything that an optimizer is called for, with what it holds after each part."""
    seen: list[Any] = []
    optimizer = build(rule, SHAPES, dtype, ("contiguous", "transposed", "sliced"), backend=backend, **options)
    gradients = Gradients(parameters_of(optimizer))
    step(optimizer, gradients, 2)
    seen.append(frozen(optimizer))
    set_row(optimizer, 0, "alternate")
    optimizer.set_strength("audio", 1, 0.5)
    optimizer.set_modulation(0, noise=0.25)
    step(optimizer, gradients, 3)
    seen += [frozen(optimizer), optimizer.statistics(), optimizer.modulation(), repr(optimizer)]
    optimizer.eval()
    seen.append(frozen(optimizer))
    optimizer.train()
    seen.append(frozen(optimizer))
    if options.get("ema_decay"):
        with optimizer.ema_parameters():
            seen.append([p.detach().clone() for p in parameters_of(optimizer)])
    kept = frozen(optimizer)
    snapshot = ak.aim.snapshot.Snapshot(nn.ParameterList(parameters_of(optimizer)), optimizer)
    step(optimizer, Gradients(parameters_of(optimizer), seed=3))
    snapshot.restore()
    same_bits(kept, frozen(optimizer))

    extra = build(rule, (((5, 4),),), dtype, modulated=False)
    optimizer.add_param_group({"params": parameters_of(extra)})
    gradients = Gradients(parameters_of(optimizer), seed=2)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    loaded = copy.deepcopy(optimizer)
    step(loaded, Gradients(parameters_of(loaded), seed=4), 2)
    for p, q in zip(parameters_of(loaded), parameters_of(optimizer), strict=True):
        p.data.copy_(q.detach())
    loaded.load_state_dict(saved)
    optimizer.state[parameters_of(optimizer)[0]]["step"] = 5  # a plain number
    for other in (*copies, loaded):
        other.state[parameters_of(other)[0]]["step"] = 5
    for number, each in enumerate((optimizer, *copies, loaded)):
        step(each, copy.deepcopy(gradients), 2)
        seen.append(frozen(each))
        same_bits(seen[-1], frozen(optimizer), f"copy {number}")
    for group in optimizer.param_groups:
        group["state_dtype"], group["master"] = None, None
    step(optimizer, gradients, 2)
    seen += [frozen(optimizer), optimizer.grad_norm]
    return seen


@functools.cache
def undisturbed(number: int) -> list[Any]:
    return life(*LIVES[number])


@pytest.mark.parametrize(
    "default", ["with meta", "float64", *(pytest.param(each, marks=pytest.mark.slow) for each in ("meta", "bfloat16"))]
)
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id="-".join(map(str, each)), marks=[pytest.mark.slow] if "cuda" in each else [])
        for number, each in enumerate(LIVES)
    ],
)
def test_a_whole_life(number: int, default: str) -> None:
    expected = undisturbed(number)
    with DEFAULTS[default]():
        found = life(*LIVES[number])
    same_bits(expected, found)


@pytest.mark.parametrize("default", DEFAULTS)
def test_a_compiled_step(default: str) -> None:
    def compiled(under: Callable[[], Any]) -> list[Any]:
        torch._dynamo.reset()
        optimizer = build("adamw", (((5, 7), (33,), ()), ((6, 2),)))
        gradients, seen = Gradients(parameters_of(optimizer)), []
        run = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")
        with under():
            for number in range(4):
                if number == 2:
                    optimizer.set_strength("audio", 0, 0.5)
                assign(parameters_of(optimizer), gradients())
                run()
                seen.append(frozen(optimizer))
        return seen

    same_bits(compiled(contextlib.nullcontext), compiled(DEFAULTS[default]))


@pytest.mark.parametrize("default", DEFAULTS)
def test_steps_in_backward(default: str) -> None:
    def released(under: Callable[[], Any]) -> list[Any]:
        model, optimizer = aim_helpers.build()
        model.eval()  # no dropout
        inputs, labels = aim_helpers.batch()
        with under():
            ak.step_in_backward(optimizer, model)
            optimizer.set_strength("a", 0, 0.5)
            for _ in range(3):
                nn.functional.cross_entropy(model(*inputs), labels).backward()
                optimizer.step()
        return [frozen(optimizer)]

    same_bits(released(contextlib.nullcontext), released(DEFAULTS[default]))


PARTS: dict[str, dict[str, Any]] = {
    "prototypes": {"probe": Prototypes(steps=4)},
    "linear": {"probe": "linear"},
    "trial": {"rule": Trial(steps=3, confidence=0.0)},
    "drop": {"probe": aim_helpers.DOMINANT_A, "alpha": 0.5, "mixing": DropFeatures()},
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("part", PARTS)
def test_the_method(part: str, default: str) -> None:
    def trained(under: Callable[[], Any]) -> list[Any]:
        model, optimizer = aim_helpers.build(normalization=nn.Identity())
        inputs, labels = aim_helpers.batch(48)
        held_out = None if part == "drop" else aim_helpers.batch(48, seed=1)
        found: list[Any] = []
        with under():
            aim = ak.AIM(model, optimizer, aim_helpers.CLASSES, **PARTS[part])

            def train(xs: Any, ys: Tensor) -> None:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(*xs), ys).backward()
                optimizer.step()

            for _ in range(3):
                table = aim.update(inputs, labels, held_out=held_out, train=train if part == "trial" else None)
                found.append(repr(table))
                train(inputs, labels)
                found.append(frozen(optimizer))
        assert part != "drop" or max(aim.mixing_state["drop"].values()) > 0.1, (
            "nothing is dropped: this test tells little"
        )
        return found

    same_bits(trained(contextlib.nullcontext), trained(DEFAULTS[default]))
