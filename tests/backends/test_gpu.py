"""What only a GPU can show: streams, graphs, waiting, memory. The arithmetic is tested by test_device_step.py, whose
cases run there as well. `make gpu-test` runs all of it but the sanitizers, which `make gpu-sanitizer` does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import helpers
import pytest
import torch
from backends_under_test import ON_GPU, enter
from helpers import Gradients, assign, build, frozen, parameters_of, same_bits, set_row

import aim_kernels as ak

pytestmark = pytest.mark.gpu

SHAPES = (((5, 7), (3000,), (0,), ()), ((129, 65), (16,)))
#: 8 bits for the parameter that has elements enough, an average, gradients cleared.
PACKED: dict[str, object] = {"state_dtype": "int8", "ema_decay": 0.9, "zero_grad_in_step": True}
TOOL_CASE = Path(__file__).parents[1] / "support" / "gpu_case.py"


@pytest.fixture(params=ON_GPU)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return enter(request.param, monkeypatch)


def drawn(optimizer: ak.AIMFusedOptimizer, steps: int) -> list[list[torch.Tensor]]:
    """Gradients of so many steps, on the device."""
    gradients = Gradients(parameters_of(optimizer))
    return [gradients() for _ in range(steps)]


def run(optimizer: ak.AIMFusedOptimizer, steps: list[list[torch.Tensor]]) -> None:
    for grads in steps:
        assign(parameters_of(optimizer), [grad.clone() for grad in grads])
        optimizer.step()


def pair(backend: str, row: str = "alternate", **options: object) -> list[ak.AIMFusedOptimizer]:
    made = [build("adamw", SHAPES, backend=backend, **options) for _ in range(2)]
    for optimizer in made:
        set_row(optimizer, 0, row)
    return made


@contextmanager
def never_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_automatic_choice(backend: str) -> None:
    assert ak.backends()[backend].available, ak.backends()[backend].reason
    optimizer = build("adamw", SHAPES, backend="auto")
    run(optimizer, drawn(optimizer, 2))
    assert all(optimizer.state[p]["step"].device == p.device for p in parameters_of(optimizer))


@pytest.mark.parametrize("options", [{}, PACKED], ids=["plain", "packed"])
def test_a_step_never_waits(backend: str, options: dict[str, object]) -> None:
    """Neither for a learning rate, a strength, a scale nor a statistic that lives on the device."""
    optimizer = build("adamw", SHAPES, backend=backend, lr=torch.tensor(0.01, device="cuda"), **options)
    set_row(optimizer, 0, "alternate")
    kappa = torch.tensor(0.5, device="cuda")
    optimizer.set_strength("audio", 1, kappa)
    steps = drawn(optimizer, 6)
    run(optimizer, steps[:2])
    optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device="cuda") for x in (2.0, 0.0))
    params = parameters_of(optimizer)
    for grads in steps[2:]:
        with never_waiting():
            assign(params, grads)
            optimizer.set_strength("audio", 1, kappa)
            optimizer.param_groups[0]["lr"].mul_(0.5)
            optimizer.step()
    assert int(optimizer.tables.control[1]) == 6


def test_the_caller_s_stream(backend: str) -> None:
    """A step is ordered after what the stream did before it, and before what comes after."""
    plain, streamed = pair(backend)
    steps = drawn(plain, 4)
    run(plain, steps)
    stream = torch.cuda.Stream()
    params = parameters_of(streamed)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for grads in steps:
            assign(params, [torch.full_like(grad, float("nan")) for grad in grads])
            torch.cuda._sleep(20_000_000)  # the gradients arrive late
            for p, grad in zip(params, grads, strict=True):
                p.grad.copy_(grad)
            streamed.step()
            copies = [p.detach().clone() for p in params]
    torch.cuda.current_stream().wait_stream(stream)
    same_bits(frozen(plain), frozen(streamed))
    same_bits(copies, [p.detach() for p in params])


@pytest.mark.parametrize("options", [{}, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("row", ["step", "alternate"])
def test_a_captured_step_replays_as_it_would_run(backend: str, row: str, options: dict[str, object]) -> None:
    eager, captured = pair(backend, row, **options)
    steps = drawn(eager, 6)
    run(eager, steps)
    params = parameters_of(captured)
    static = [grad.clone() for grad in steps[0]]
    assign(params, static)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for grads in steps[1:]:
        for buffer, grad in zip(static, grads, strict=True):
            buffer.copy_(grad)
        graph.replay()
    same_bits(frozen(eager), frozen(captured))


def test_learning_rate_and_strength_change_between_replays(backend: str) -> None:
    rates, kappas = [0.01, 0.02, 0.005, 0.02], [0.0, 0.25, 0.5, 0.125]
    made = []
    for graphed in (False, True):
        lr, kappa = torch.tensor(rates[0], device="cuda"), torch.tensor(kappas[0], device="cuda")
        optimizer = build("adamw", SHAPES, backend=backend, lr=lr)
        optimizer.set_strength("audio", 0, kappa)
        params = parameters_of(optimizer)
        steps = drawn(optimizer, 5)
        static = [grad.clone() for grad in steps[0]]
        assign(params, static)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if graphed:
            with torch.cuda.graph(graph):
                optimizer.step()
        for number, grads in enumerate(steps[1:]):
            lr.fill_(rates[number])
            kappa.fill_(kappas[number])
            optimizer.set_strength("audio", 0, kappa)
            for buffer, grad in zip(static, grads, strict=True):
                buffer.copy_(grad)
            graph.replay() if graphed else optimizer.step()
        made.append(frozen(optimizer))
    same_bits(*made)


def test_eager_steps_and_replays_take_turns(backend: str) -> None:
    """Each has tables of its own: neither sees where the other's gradients lay."""
    eager, mixed = pair(backend, "step")
    steps = drawn(eager, 7)
    run(eager, steps)
    params = parameters_of(mixed)
    assign(params, [grad.clone() for grad in steps[0]])
    mixed.step()
    static = [grad.clone() for grad in steps[0]]
    assign(params, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed.step()
    for number, grads in enumerate(steps[1:]):
        if number % 2:
            assign(params, [grad.clone() for grad in grads])
            mixed.step()
        else:
            for buffer, grad in zip(static, grads, strict=True):
                buffer.copy_(grad)
            graph.replay()
    same_bits(frozen(eager), frozen(mixed))


def test_a_whole_training_step_in_a_graph(backend: str) -> None:
    """Forward, backward and step, with gradients in the graph's own memory."""
    losses = []
    for graphed in (False, True):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).cuda()
        optimizer = ak.AIMFusedOptimizer(model.parameters(), lr=0.01, backend=backend)
        x, y = torch.randn(64, 16, device="cuda"), torch.randn(64, 1, device="cuda")

        def work(model: torch.nn.Module = model, optimizer: ak.AIMFusedOptimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.mse_loss(model(x), y)  # noqa: B023
            loss.backward()
            optimizer.step()
            return loss

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = work()
            for _ in range(10):
                graph.replay()
        else:
            for _ in range(10):
                loss = work()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_capture_needs_a_step_before(backend: str) -> None:
    optimizer = build("adamw", SHAPES, backend=backend)
    assign(parameters_of(optimizer), drawn(optimizer, 1)[0])
    with pytest.raises(RuntimeError, match=r"captured|side stream"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_several_storage_types_in_one_launch(backend: str) -> None:
    made = []
    for name, device in (("cpu", "cpu"), (backend, "cuda")):
        params = [
            torch.full((n,), 1.0, dtype=t) for n, t in zip((70, 1300, 9, 33), helpers.DTYPES.values(), strict=True)
        ]
        for number, p in enumerate(params):
            p.add_(torch.linspace(0, number + 1.0, p.numel()).to(p.dtype))
        params = [p.to(device).requires_grad_() for p in params]
        groups = [{"params": params[:3], "rule": "adamw", "modulated": True}, {"params": params[3:], "rule": "sgd"}]
        optimizer = ak.AIMFusedOptimizer(groups, lr=0.05, backend=name)
        optimizer.set_modulation(0, live_well=0.5)
        for number in range(4):
            assign(params, [(p.detach() * (0.3 - 0.1 * number)).clone() for p in params])
            optimizer.step()
        state = frozen(optimizer)
        del state["statistics"]
        made.append(state)
    same_bits(*made)


def test_unwritten_memory_is_never_read(backend: str) -> None:
    """What the allocator hands out is full of NaN."""
    plain, poisoned = pair(backend)
    steps = drawn(plain, 4)
    run(plain, steps)
    torch.cuda.synchronize()
    for size in (1 << 12, 1 << 18, 1 << 22, 1 << 26):
        blocks = [torch.full((size // 4,), float("nan"), device="cuda") for _ in range(8)]
        del blocks
    run(poisoned, steps)
    same_bits(frozen(plain), frozen(poisoned))


def test_reruns_give_the_same_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of blocks, which the device runs in whatever order."""
    shape = (((1031, 517), (70001,)), ((300, 300),))
    made = []
    for _ in range(3):
        optimizer = build("adamw", shape, backend=backend)
        set_row(optimizer, 0, "all")
        run(optimizer, drawn(optimizer, 3))
        made.append(frozen(optimizer))
    same_bits(made[0], made[1])
    same_bits(made[0], made[2])


def test_the_module_moves_after_the_optimizer_was_made(backend: str) -> None:
    model = torch.nn.Linear(5, 3)
    optimizer = ak.AIMFusedOptimizer(model.parameters(), lr=0.1)
    model.cuda()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.backend = backend
    optimizer.step()
    assert optimizer.tables.rows.is_cuda
    assert optimizer.statistics()[0]["grad_norm"] == pytest.approx(18**0.5)


def test_checkpoints_move_between_devices(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved on the GPU, resumed on the CPU and back, bit for bit."""
    whole = build("adamw", SHAPES, backend=backend)
    set_row(whole, 0, "step")
    steps = drawn(whole, 6)
    run(whole, steps)
    previous = None
    for number, (name, device) in enumerate(((backend, "cuda"), ("cpu", "cpu"), (backend, "cuda"))):
        monkeypatch.setattr(helpers, "DEVICE", device)
        part = build("adamw", SHAPES, backend=name)
        if previous is None:
            set_row(part, 0, "step")
        else:
            for p, q in zip(parameters_of(part), parameters_of(previous), strict=True):
                p.data.copy_(q.detach())
            part.load_state_dict(previous.state_dict())
        run(part, [[g.to(device) for g in grads] for grads in steps[2 * number : 2 * number + 2]])
        previous = part
    one, other = frozen(whole), frozen(previous)
    for each in (one, other):
        del each["statistics"]
    same_bits(one, other)


def test_gradients_elsewhere_are_refused(backend: str) -> None:
    optimizer = build("adamw", SHAPES, backend=backend)
    run(optimizer, drawn(optimizer, 1))
    before = frozen(optimizer)
    with pytest.raises(ValueError, match="cpu"):
        ak.AIMFusedOptimizer([torch.zeros(3, device="cuda"), torch.zeros(3)])
    with pytest.raises(ValueError, match=r"lr.*float32 or float64"):
        ak.AIMFusedOptimizer([torch.zeros(3, device="cuda")], lr=torch.tensor(1.0, device="cuda", dtype=torch.float16))
    same_bits(before, frozen(optimizer))


def test_more_than_two_to_the_31_elements(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # chunks as users have them
    numel = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free memory on the device")
    p = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.full((numel,), 2.0, dtype=torch.bfloat16, device="cuda")
    p.grad[-3:] = 4.0
    p.grad[2**31 - 1 : 2**31 + 1] = -2.0
    optimizer = ak.AIMFusedOptimizer([p], lr=0.25, rule="sgd", backend=backend)
    optimizer.step()
    values = p.detach()
    assert values[2**31 - 2 : 2**31 + 2].tolist() == [0.5, 1.5, 1.5, 0.5]
    assert values[-4:].tolist() == [0.5, 0.0, 0.0, 0.0]
    assert sum(int((part != 0.5).sum()) for part in values.split(2**28)) == 5
    assert optimizer.statistics()[0]["grad_norm"] ** 2 == pytest.approx(4 * (numel - 3) + 16 * 3, rel=1e-6)


def test_several_devices_in_one_optimizer(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices; test_device_step.py splits one")
    one, two = pair(backend)
    params = parameters_of(two)
    for p in params[1::2]:
        p.data = p.data.to("cuda:1")
    steps = drawn(one, 4)
    run(one, steps)
    run(two, [[grad.to(p.device) for grad, p in zip(grads, params, strict=True)] for grads in steps])
    same_bits([p.detach() for p in parameters_of(one)], [p.detach() for p in params])


#: What each of NVIDIA's checkers is asked. The first two look at this library's kernels only. initcheck must see who
#: wrote the memory, PyTorch's kernels included, so there the reports are sorted afterwards.
ONLY_OURS = ("--kernel-name", "kernel_substring=aim")
TOOLS = {
    "memcheck": ("--report-api-errors", "no", *ONLY_OURS),
    "racecheck": ONLY_OURS,
    "synccheck": ONLY_OURS,
    "initcheck": (),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer(tool: str) -> None:
    """A small case of the CUDA kernels, looked at by NVIDIA's checkers."""
    if os.environ.get("AIM_KERNELS_NO_SANITIZER"):
        pytest.skip("AIM_KERNELS_NO_SANITIZER is set")
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    assert found, (
        "compute-sanitizer is needed (it comes with the CUDA toolkit); AIM_KERNELS_NO_SANITIZER=1 does without"
    )
    command = [found, "--tool", tool, "--error-exitcode", "86", *TOOLS[tool], sys.executable, str(TOOL_CASE)]
    # Without the caching allocator every tensor is an allocation of its own, with bounds that can be checked.
    settings = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=settings, timeout=240)
    told = ran.stdout + ran.stderr
    assert "steps taken" in told, told[-4000:]
    ours = [line for line in told.splitlines() if line.startswith("=========") and "aim::" in line]
    assert not ours, "\n".join(ours[:10]) + told[-4000:]
    assert ran.returncode == 0 or (tool == "initcheck" and ran.returncode == 86), told[-4000:]
