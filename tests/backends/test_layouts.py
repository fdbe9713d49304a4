"""Sizes, strides, offsets and the bytes around them."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DTYPES,
    GRADIENT_LAYOUTS,
    PARAMETER_LAYOUTS,
    RULES,
    Gradients,
    assign,
    build,
    frozen,
    layout,
    parameters_of,
    same_bits,
    set_row,
)
from lockstep import Twin, run_twin

import aim_kernels as ak
from aim_kernels import _C

CHUNK = _C.CHUNK


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["adamw", "sgd-nesterov", "amsgrad", "adagrad", "rmsprop-momentum", "lion"])
def test_sizes_1_to_70(rule: str, dtype: str) -> None:
    optimizer = build(rule, ([(size,) for size in range(1, 71)],), dtype)
    set_row(optimizer, 0, "all")
    run_twin(Twin(optimizer, RULES[rule]["rule"]), Gradients(parameters_of(optimizer)), 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum", "rmsprop-momentum", "lion"])
def test_chunk_edges(rule: str, dtype: str) -> None:
    sizes = [4097, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7]
    optimizer = build(rule, ([(size,) for size in sizes],), dtype)
    set_row(optimizer, 0, "all")
    run_twin(Twin(optimizer, RULES[rule]["rule"]), Gradients(parameters_of(optimizer)), 3)


@pytest.mark.parametrize("row", ["ones", "all"])
@pytest.mark.parametrize("memory", PARAMETER_LAYOUTS)
def test_parameter_layouts(memory: str, row: str) -> None:
    """Each layout of parameters under each layout of gradients, none of them changing a bit beside what it holds."""
    shapes = ((6, 5), (4, 3, 2, 5), (7,), (2, 1, 3))
    optimizer = build("adamw", (shapes,), layouts=(memory,))
    set_row(optimizer, 0, row)
    made = Twin(optimizer, "adamw")
    params = parameters_of(optimizer)
    for number, grad_layout in enumerate(GRADIENT_LAYOUTS):
        made.step(Gradients(params, seed=number, layouts=(grad_layout,))())
    made.finish()
    for p, shape in zip(params, shapes, strict=True):
        assert p.shape == torch.Size(shape)


@pytest.mark.parametrize("memory", ["sliced", "rows"])
@pytest.mark.parametrize("row", ["ones", "all"])
def test_elements_between_those_of_a_slice_stay(memory: str, row: str) -> None:
    optimizer = build("sgd-momentum", (((6, 5), (9,)),), layouts=(memory,))
    set_row(optimizer, 0, row)
    run_twin(Twin(optimizer, "sgd"), Gradients(parameters_of(optimizer)), 3)
    for p in parameters_of(optimizer):
        base = p._base
        assert int((base.detach() == 7.0).sum()) == base.numel() - p.numel()


@pytest.mark.parametrize("rule", ["adamw", "sgd-nesterov", "adagrad", "rmsprop-momentum", "lion"])
def test_layout_does_not_change_the_bits(rule: str) -> None:
    """Without noise a trajectory depends on the values, not on where they lie."""
    shape, results = (4, 3, 2, 6), []
    for memory in PARAMETER_LAYOUTS:
        optimizer = build(rule, ((shape,),))
        source = parameters_of(optimizer)[0]
        p = layout(source.detach(), memory).requires_grad_()
        optimizer = ak.AIMFusedOptimizer(
            [{"params": [p], "modality": "a", "depth": 0, "modulated": True}], backend="cpu", **RULES[rule]
        )
        optimizer.set_modulation(0, grad_well=0.5, live_well=0.5, step_under=1.5)
        gradients = Gradients([p])
        for _ in range(5):
            assign([p], gradients())
            optimizer.step()
        state = optimizer.state[p]
        results.append([p.detach().contiguous().clone(), *(state[name].contiguous() for name in sorted(state))])
    for other in results[1:]:
        same_bits(results[0], other)


@pytest.mark.parametrize("at", range(4))
def test_empty_tensors_anywhere(at: int) -> None:
    shapes: list[tuple[int, ...]] = [(5,), (3, 3), (1,)]
    shapes.insert(at, (0, 4))
    optimizer = build("adamw", (shapes, [(0,)]))
    for group in (0, 1):
        set_row(optimizer, group, "all")
    run_twin(Twin(optimizer, "adamw"), Gradients(parameters_of(optimizer)), 4)


def test_only_empty_tensors() -> None:
    optimizer = build("adamw", ([(0,), (3, 0)],))
    set_row(optimizer, 0, "all")
    run_twin(Twin(optimizer, "adamw"), Gradients(parameters_of(optimizer)), 3)


def test_empty_tensors_with_strides_of_zero() -> None:
    """An empty channels_last tensor looks expanded, and is not."""
    optimizer = build("adamw", ([(8, 0, 0, 0), (5,)],), layouts=("channels_last",))
    assert 0 in parameters_of(optimizer)[0].stride()
    set_row(optimizer, 0, "all")
    run_twin(Twin(optimizer, "adamw"), Gradients(parameters_of(optimizer)), 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("size", [1, 7, 64, 67, CHUNK + 3])
@pytest.mark.parametrize("rule", ["adamw", "rmsprop-momentum"])
def test_guard_bytes(rule: str, size: int, dtype: str) -> None:
    """Parameters, gradients, states inside larger buffers: not a byte around them is written; the bits are the same."""
    plain, guarded = (build(rule, (((size,),),), dtype) for _ in range(2))
    for optimizer in (plain, guarded):
        set_row(optimizer, 0, "all")
    buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def guard(tensor: torch.Tensor, pad: int) -> torch.Tensor:
        base = torch.full((tensor.numel() + 2 * pad + 1,), -77.0, dtype=tensor.dtype)
        view = base[pad : pad + tensor.numel()].view(tensor.shape)
        view.copy_(tensor.detach())
        buffers.append((base, view))
        return view

    (p,), (q,) = parameters_of(plain), parameters_of(guarded)
    q.data = guard(q, 19)
    gradients = Gradients([p])
    for number in range(4):
        (grad,) = gradients()
        assign([p, q], [grad, guard(grad, 5 + number)])
        plain.step()
        guarded.step()
        state = guarded.state[q]
        for position, name in enumerate(sorted(state.keys() - {"step"})):
            state[name] = guard(state[name], 3 + 2 * number + position)
    same_bits(frozen(plain), frozen(guarded))
    for base, view in buffers:
        assert int((base == -77.0).sum()) >= base.numel() - view.numel()
        start = view.storage_offset()
        assert (base[:start] == -77.0).all() and (base[start + view.numel() :] == -77.0).all()


def test_gradients_are_read_only() -> None:
    optimizer = build("adamw", (((9, 4), (70,)),))
    set_row(optimizer, 0, "all")
    gradients = Gradients(parameters_of(optimizer), layouts=("transposed", "sliced"))
    for _ in range(3):
        grads = gradients()
        copies = [g.clone() for g in grads]
        assign(parameters_of(optimizer), grads)
        optimizer.step()
        same_bits(grads, copies)


def test_aliased_gradient_storage() -> None:
    """Views of one flat gradient buffer, as in distributed training."""
    shapes = [(5,), (3, 4), (17,)]
    results = []
    for shared in (False, True):
        optimizer = build("adamw", (shapes,))
        params = parameters_of(optimizer)
        gradients = Gradients(params)
        for _ in range(3):
            grads = gradients()
            if shared:
                pool = torch.cat([g.flatten() for g in grads])
                sizes = [g.numel() for g in grads]
                grads = [part.view(g.shape) for part, g in zip(pool.split(sizes), grads, strict=True)]
            assign(params, grads)
            optimizer.step()
        results.append(frozen(optimizer))
    same_bits(*results)


@pytest.mark.parametrize("shape", [(2, 0, 3, 3), (2, 3, 0, 3), (3, 2, 2, 0), (0, 3, 2, 2)])
def test_empty_tensors_in_channels_last(shape: tuple[int, ...]) -> None:
    """Some strides of theirs are zero, as those of expanded tensors are."""
    optimizer = build("adamw", (((4,), shape),), layouts=("contiguous", "channels_last"))
    set_row(optimizer, 0, "all")
    run_twin(Twin(optimizer, "adamw"), Gradients(parameters_of(optimizer), layouts=("contiguous", "channels_last")), 2)
