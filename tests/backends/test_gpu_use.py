"""On a GPU, as users have it: chunks and blocks as they come, streams side by side, GradScaler, the method itself."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import helpers
import pytest
import torch
from aim_helpers import CLASSES, Net, batch
from helpers import DTYPES, Gradients, assign, build, frozen, parameters_of, same_bits, set_row
from test_device_step import agree
from test_gpu import drawn, never_waiting, pair, run
from test_packed_device import agree as agree_packed
from test_packed_device import run as run_packed

import aim_kernels as ak

pytestmark = pytest.mark.gpu

SHAPES = (((5, 7), (3000,), (0,), ()), ((129, 65), (16,)))


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend with its own chunk and block size; parameters are made on the device."""
    assert torch.cuda.is_available(), "PyTorch finds no GPU"
    monkeypatch.setattr(helpers, "DEVICE", "cuda")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ["ones", "step", "chain", "alternate"])
@pytest.mark.parametrize("rule", ["adamw", "sgd-nesterov"])
def test_the_bits_of_the_cpu_kernels(
    backend: str, rule: str, row: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps of several chunks, in every layout."""
    chunk = importlib.import_module(f"aim_kernels.backends.{backend}").CHUNK
    shapes = (((4, 6, 5, 3), (2 * chunk + 5,), (63,), (37, 129)), ((chunk,), (1,), (3, 4, 2), (4097,)))
    layouts = ("channels_last", "contiguous", "offset", "transposed")
    made = []
    for name, device in (("cpu", "cpu"), (backend, "cuda")):
        monkeypatch.setattr(helpers, "DEVICE", device)
        optimizer = build(rule, shapes, dtype, layouts, backend=name)
        set_row(optimizer, 0, row)
        params = parameters_of(optimizer)
        gradients = Gradients(params, layouts=("contiguous", "sliced", "channels_last"))
        for _ in range(10):
            assign(params, gradients())
            optimizer.step()
        made.append(optimizer)
    agree(*made)


#: Rules of the family "other", and what is stored in fewer bytes.
OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("amsgrad", "float32", {}),
    ("rmsprop-momentum", "bfloat16", {}),
    ("adamw", "float32", {"state_dtype": "int8"}),
    ("adamw", "bfloat16", {"state_dtype": "int8", "master": "stochastic"}),
    ("lion", "bfloat16", {"state_dtype": "bfloat16", "master": "split", "ema_decay": 0.9, "zero_grad_in_step": True}),
]


@pytest.mark.parametrize("row", ["chain", "alternate"])
@pytest.mark.parametrize(("rule", "dtype", "options"), OTHERS, ids=[f"{r}-{d}-{len(o)}" for r, d, o in OTHERS])
def test_the_bits_of_the_cpu_kernels_of_other_families(
    backend: str, rule: str, dtype: str, options: dict[str, Any], row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks as users have them: loops go round several times, and rows of 128 elements follow each other in a warp."""
    chunk = importlib.import_module(f"aim_kernels.backends.{backend}").CHUNK
    shapes = (((2 * chunk + 4,), (63,), (70, 64)), ((chunk,), (4097,)))
    made = []
    for name, device in (("cpu", "cpu"), (backend, "cuda")):
        monkeypatch.setattr(helpers, "DEVICE", device)
        optimizer = build(rule, shapes, dtype, ("contiguous", "offset", "transposed"), backend=name, **options)
        set_row(optimizer, 0, row)
        run_packed(optimizer, 4, missing=1)
        made.append(optimizer)
    agree_packed(*made)


def test_two_optimizers_on_two_streams_at_once(backend: str) -> None:
    made = []
    for together in (False, True):
        optimizers = pair(backend)
        steps = [drawn(optimizer, 4) for optimizer in optimizers]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() if together else torch.cuda.current_stream() for _ in optimizers]
        for number in range(4):
            for optimizer, stream, grads in zip(optimizers, streams, steps, strict=True):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(1_000_000)  # so that the host is ahead of both
                    run(optimizer, grads[number : number + 1])
        torch.cuda.synchronize()
        made.append([frozen(optimizer) for optimizer in optimizers])
    same_bits(*made)


def test_steps_that_change_streams(backend: str) -> None:
    """Tables that one stream sent are there for the next, where the user orders the streams."""
    plain, moving = pair(backend)
    steps = drawn(plain, 6)
    run(plain, steps)
    torch.cuda.synchronize()
    last = torch.cuda.current_stream()
    for grads in steps:
        stream = torch.cuda.Stream()
        stream.wait_stream(last)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            run(moving, [grads])
        last = stream
    torch.cuda.synchronize()
    same_bits(frozen(plain), frozen(moving))


@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum"])
def test_grad_scaler_on_the_device(backend: str, rule: str) -> None:
    """A fused step equals unscaling first; an overflow is skipped and not counted, and nobody waits for it."""
    one, other = (build(rule, SHAPES, backend=backend, fused_scaling=fused) for fused in (False, True))
    for fused, optimizer in ((False, one), (True, other)):
        scaler = torch.amp.GradScaler("cuda", init_scale=4.0, growth_interval=100)
        scaler.scale(torch.ones((), device="cuda"))  # starts the scaler
        params = parameters_of(optimizer)
        steps = drawn(optimizer, 5)
        scale = 4.0
        for number, grads in enumerate(steps):
            scaled = [grad * scale for grad in grads]
            if number == 2:
                scaled[1][3] = float("inf")
                scale = 2.0
            assign(params, scaled)
            if fused and number:
                with never_waiting():
                    scaler.step(optimizer)
                    scaler.update()
            else:
                scaler.step(optimizer)
                scaler.update()
        assert scaler.get_scale() == 2.0
        assert int(optimizer.tables.control[1]) == 4
        assert {int(optimizer.state[p]["step"]) for p in params} == {4}
    same_bits(frozen(one), frozen(other))


def test_a_replayed_step_heeds_scale_and_infinities(backend: str) -> None:
    """Both are read on the device in every replay."""
    plain, captured = pair(backend, "step")
    steps = drawn(plain, 3)
    run(plain, steps)
    scale, found = (torch.tensor(value, device="cuda") for value in (1.0, 0.0))
    captured.grad_scale, captured.found_inf = scale, found
    params = parameters_of(captured)
    static = [grad.clone() for grad in steps[0]]
    assign(params, static)
    captured.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    before = frozen(captured)
    for buffer in static:
        buffer.fill_(float("nan"))
    found.fill_(1.0)
    graph.replay()
    same_bits(before, frozen(captured))
    found.fill_(0.0)
    for number in (1, 2):
        scale.fill_(2.0**number)
        for buffer, grad in zip(static, steps[number], strict=True):
            buffer.copy_(grad * 2.0**number)
        graph.replay()
    same_bits(frozen(plain), frozen(captured))


def test_eval_and_train_between_replays(backend: str) -> None:
    """Validation with the true weights leaves a captured run as it was."""
    plain, visited = pair(backend, "chain")
    steps = drawn(plain, 5)
    run(plain, steps)
    params = parameters_of(visited)
    static = [grad.clone() for grad in steps[0]]
    assign(params, static)
    visited.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        visited.step()
    for grads in steps[1:]:
        with visited.true_parameters():
            true = [visited.state[p].get("master", p.detach()) for p in params]
            same_bits([p.detach() for p in params], true)
        for buffer, grad in zip(static, grads, strict=True):
            buffer.copy_(grad)
        graph.replay()
    same_bits(frozen(plain), frozen(visited))


def test_the_method(backend: str) -> None:
    """Scores and strengths are those that the CPU finds, and the training that follows them runs."""
    made = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = Net().to(device)
        groups = ak.block_param_groups(model, {"a": list(model.a), "b": list(model.b)})
        name = "cpu" if device == "cpu" else backend
        optimizer = ak.AIMFusedOptimizer(groups, lr=1e-2, betas=(0.9, 0.99), backend=name)
        inputs, labels = (
            [x.to(device) for x in part] if isinstance(part, list) else part.to(device) for part in batch()
        )
        aim = ak.AIM(model, optimizer, CLASSES)
        made.append((model, optimizer, aim.update(inputs, labels), inputs, labels))
    (_, _, expected, _, _), (model, optimizer, table, inputs, labels) = made
    assert (table.dominant, table.weak) == (expected.dominant, expected.weak)
    for modality, row in expected.scores.items():
        assert table.scores[modality] == pytest.approx(row, rel=1e-2), modality
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(*inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(row["nonfinite"] == 0 for row in optimizer.statistics())
    with optimizer.true_parameters():
        true = copy.deepcopy(model.state_dict())
    assert all(bool(torch.isfinite(value).all()) for value in true.values())
