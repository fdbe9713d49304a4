"""Compiled steps in use: more than a step in a graph, what changes between steps, copies and lifetimes."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from compile_helpers import (
    SHAPES,
    Pair,
    compile_step,
    count_copies,
    graphs,
)
from helpers import (
    Gradients,
    assign,
    build,
    frozen,
    parameters_of,
    same_bits,
    set_row,
)

import aim_kernels as ak
from aim_kernels.optim import torch_compile

pytestmark = pytest.mark.usefixtures("own_graphs")

# -- more than a step in a graph ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_else_the_graph_does_with_a_parameter(backend: str) -> None:
    def around(optimizer: ak.AIMFusedOptimizer) -> Callable[[], Any]:
        p = parameters_of(optimizer)[0]

        def step() -> Any:
            with torch.no_grad():
                before = p.abs().max()
                p.mul_(0.9)
            optimizer.step()
            return before, p.detach().abs().max()

        return step

    pair = Pair(lambda: build("adamw", SHAPES), backend, around)
    for number in range(4):
        pair.each(lambda o, n=number: o.set_strength("audio", 0, (0, 0.3, 0.6, 0)[n]))
        pair.step()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_steps_in_a_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def around(optimizer: ak.AIMFusedOptimizer) -> Callable[[], None]:
        def step() -> None:
            optimizer.step()
            optimizer.step()

        return step

    copies = count_copies(monkeypatch)
    pair = Pair(lambda: build("adamw", SHAPES, "bfloat16"), backend, around)
    for strengths in ((0, 0), (0.3, 0), (0.3, 0.5), (0.3, 0.5), (0, 0.5), (0.2, 0.7), (0, 0)):
        pair.each(lambda o, s=strengths: [o.set_strength("audio", depth, k) for depth, k in enumerate(s)])
        pair.step()
    assert bool(copies) == (backend == "aot_eager")  # both ways of being called are seen


def test_two_optimizers_in_a_graph() -> None:
    optimizers = [[build("adamw", SHAPES), build("sgd-momentum", SHAPES)] for _ in range(2)]

    def both(pair: list[ak.AIMFusedOptimizer]) -> None:
        for optimizer in pair:
            optimizer.step()

    step = torch.compile(both, fullgraph=True, backend="aot_eager")
    gradients = Gradients(parameters_of(optimizers[0][0]))
    for _ in range(3):
        grads = gradients()
        for pair in optimizers:
            for optimizer in pair:
                assign(parameters_of(optimizer), [g.clone() for g in grads])
        both(optimizers[0])
        step(optimizers[1])
        for a, b in zip(*optimizers, strict=True):
            same_bits(frozen(a), frozen(b))


def test_step_hooks() -> None:
    def around(optimizer: ak.AIMFusedOptimizer) -> Callable[[], None]:
        def hook(optimizer: Any, *_: Any) -> None:
            with torch.no_grad():
                parameters_of(optimizer)[0].mul_(0.5)

        optimizer.register_step_post_hook(hook)
        return lambda: optimizer.step()

    pair = Pair(lambda: build("adamw", SHAPES), "aot_eager", around)
    for _ in range(3):
        pair.step()


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def trained(backend: str | None, steps: int = 20, replay: list[Any] | None = None) -> tuple[Any, list[Any]]:
    """A network trained by a whole training step, compiled or not; or stepped with the gradients of another run."""
    net = Net()
    optimizer = ak.AIMFusedOptimizer(ak.block_param_groups(net, {"x": [net.first, net.second]}), lr=1e-2, backend="cpu")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data, grads = torch.Generator().manual_seed(5), []

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        return loss

    run = step if backend is None else torch.compile(step, backend=backend)
    for number in range(steps):
        optimizer.set_strength("x", 0, 0.1 * (number % 4))
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            if replay is None:
                run(torch.randn(16, 6, generator=data), torch.randn(16, 3, generator=data))
            else:
                assign(net.parameters(), replay[number])
                optimizer.step()
        grads.append([p.grad.clone() for p in net.parameters()])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler.step()
    return frozen(optimizer), grads


def test_a_whole_training_step() -> None:
    same_bits(trained("aot_eager"), trained(None))


@pytest.mark.slow
def test_a_whole_training_step_of_inductor() -> None:
    state, grads = trained("inductor")  # whose gradients are rounded in its own way
    same_bits(state, trained(None, replay=grads)[0])


ONE_GRAPH = """
import torch
import test_compile_use
from helpers import frozen, same_bits
from torch._dynamo.utils import counters
import aim_kernels as ak

results = []
for backend in (None, "aot_eager"):
    net = test_compile_use.Net()
    params = list(net.parameters())
    optimizer = ak.AIMFusedOptimizer(ak.block_param_groups(net, {"x": [net.first, net.second]}), lr=1e-2, backend="cpu")

    def step(x, y):
        for p in params:
            p.grad = None
        loss = torch.nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    torch._dynamo.config.trace_autograd_ops = True
    run = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
    data = torch.Generator().manual_seed(5)
    for number in range(6):
        torch._dynamo.config.error_on_recompile = number > 1
        optimizer.set_strength("x", 0, 0.1 * (number % 3))
        run(torch.randn(16, 6, generator=data), torch.randn(16, 3, generator=data))
    results.append(frozen(optimizer))
same_bits(*results)
assert torch._dynamo.utils.counters["frames"]["ok"] <= 2, counters
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch breaks graphs at every backward()"
)
def test_forward_backward_and_step_in_one_graph() -> None:
    # In a process of its own: what torch 2.13 traces after it, in the same process, fails (ours or not).
    where = Path(__file__).parent
    command = [sys.executable, "-c", ONE_GRAPH]
    paths = os.pathsep.join([*map(str, sys.path), os.environ.get("PYTHONPATH", "")])  # helpers among them
    done = subprocess.run(
        command,
        cwd=where,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_closure() -> None:
    states = []
    for backend in (None, "aot_eager"):
        net = Net()
        optimizer = ak.AIMFusedOptimizer(net.parameters(), backend="cpu")
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

        def closure(net: Net = net, x: torch.Tensor = x, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        step = lambda o=optimizer, c=closure: o.step(c)  # noqa: E731
        run = step if backend is None else torch.compile(step, backend=backend)
        losses = [run().item() for _ in range(3)]
        states.append((frozen(optimizer), losses))
    same_bits(*states)
    assert states[0][1][0] > states[0][1][-1]


def test_gradient_scaling() -> None:
    pair = Pair(lambda: build("adamw", SHAPES, fused_scaling=True), "aot_eager")
    for number in range(4):
        for optimizer in pair.optimizers:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**number), torch.tensor(float(number == 2))
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            pair.step()
    assert int(pair.optimizers[1].state[pair.params[1][0]]["step"]) == 3


# -- what changes between steps ----------------------------------------------------------------------------------------


def replace_state(name: str) -> Callable[[ak.AIMFusedOptimizer], None]:
    def change(optimizer: ak.AIMFusedOptimizer) -> None:
        state = optimizer.state[parameters_of(optimizer)[0]]
        state[name] = state[name].clone() + 1

    return change


def replace_data(optimizer: ak.AIMFusedOptimizer) -> None:
    p = parameters_of(optimizer)[0]
    p.data = p.data.clone() + 1


def forget_state(optimizer: ak.AIMFusedOptimizer) -> None:
    del optimizer.state[parameters_of(optimizer)[2]]


def reload(optimizer: ak.AIMFusedOptimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def step_eagerly(optimizer: ak.AIMFusedOptimizer) -> None:
    optimizer.set_strength("audio", 1, 0.5)
    assign(parameters_of(optimizer), [torch.ones_like(p) for p in parameters_of(optimizer)])
    optimizer.step()
    optimizer.set_strength("audio", 0, 0.5)


def to_true_and_back(optimizer: ak.AIMFusedOptimizer) -> None:
    with optimizer.true_parameters():
        pass


CHANGES: dict[str, Callable[[ak.AIMFusedOptimizer], None]] = {
    "moment": replace_state("exp_avg"),
    "second moment": replace_state("exp_avg_sq"),
    "step": replace_state("step"),
    "master": replace_state("master"),
    "data": replace_data,
    "state forgotten": forget_state,
    "checkpoint": reload,
    "eager step": step_eagerly,
    "eval and train": to_true_and_back,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_moves_behind_a_graph(change: str) -> None:
    backend = "aot_eager" if len(change) % 2 else "eager"  # copies, or the tensors themselves
    pair = Pair(lambda: build("adamw", SHAPES), backend)
    pair.each(lambda o: set_row(o, 0, "all"))
    for _ in range(2):
        pair.step()
    pair.each(CHANGES[change])
    for _ in range(2):
        pair.step()


def test_an_added_group() -> None:
    pair = Pair(lambda: build("adamw", SHAPES), "aot_eager")
    pair.step()
    for optimizer, params in zip(pair.optimizers, pair.params, strict=True):
        optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)]})
        params[:] = parameters_of(optimizer)
    pair.gradients = Gradients(pair.params[0])
    for _ in range(2):
        pair.step()


def test_an_edited_list_of_parameters_is_refused_once() -> None:
    pair = Pair(lambda: build("adamw", SHAPES), "aot_eager")
    pair.step()
    for optimizer, params in zip(pair.optimizers, pair.params, strict=True):
        optimizer.param_groups[1]["params"].pop()
        params.pop()
    before = frozen(pair.optimizers[1])
    with pytest.raises(RuntimeError, match="lists of parameters were edited"):
        pair.steps[1]()
    same_bits(before, frozen(pair.optimizers[1]))
    pair.gradients = Gradients(pair.params[0])
    for _ in range(2):
        pair.step()


def test_true_weights_in_the_module_are_an_error() -> None:
    pair = Pair(lambda: build("adamw", SHAPES), "aot_eager")
    pair.each(lambda o: set_row(o, 0, "all"))
    pair.step()
    optimizer = pair.optimizers[1]
    optimizer.eval()
    before = frozen(optimizer)
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) before step"):
        pair.steps[1]()
    same_bits(before, frozen(optimizer))
    optimizer.train()
    pair.step()


ONE_PROCESS = """
import sys
import torch
import torch.distributed as dist
import aim_kernels as ak

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
results = []
for backend in (None, "aot_eager"):
    p = torch.ones(5, requires_grad=True)
    optimizer = ak.AIMFusedOptimizer([p], lr=0.1, process_group=dist.group.WORLD, sync_every=2, backend="cpu")
    step = optimizer.step
    if backend is not None:
        step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend=backend)
    for grad in (None, torch.ones(5), None, torch.ones(5)):
        p.grad = None if grad is None else grad.clone()
        step()
    results.append((p.tolist(), optimizer.tables.steps, optimizer.tables.control.tolist()))
dist.destroy_process_group()
assert results[0] == results[1], results
assert results[1][1] == 4, results
"""


@pytest.mark.slow
def test_a_process_without_gradients_takes_its_step(tmp_path: Path) -> None:
    """Others of its group may have some, and wait for it."""
    command = [sys.executable, "-W", "ignore", "-c", ONE_PROCESS, str(tmp_path / "rendezvous")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_distributed_parameters_are_refused() -> None:
    optimizer = build("adamw", SHAPES)
    p = parameters_of(optimizer)[0]
    p.grad, p.device_mesh = torch.ones_like(p), None  # what tells a DTensor
    with pytest.raises(RuntimeError, match="DTensors cannot be stepped inside of a compiled function"):
        compile_step(optimizer, "eager")()


def test_strengths_set_inside_of_a_compiled_function_break_the_graph() -> None:
    states = []
    for backend in (None, "aot_eager"):
        optimizer = build("adamw", SHAPES)
        params = parameters_of(optimizer)
        gradients = Gradients(params)

        def step(o: ak.AIMFusedOptimizer = optimizer) -> None:
            o.set_strength("audio", 0, 0.3)
            o.step()
            o.eval()
            o.train()

        run = step if backend is None else torch.compile(step, backend=backend)
        for _ in range(3):
            assign(params, gradients())
            run()
        states.append(frozen(optimizer))
    same_bits(*states)
    assert graphs() == 1  # of the step alone
    with pytest.raises(torch._dynamo.exc.Unsupported, match="set_strength"):
        torch.compile(step, fullgraph=True, backend="eager")()


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_other_backends(name: str) -> None:
    if reason := ("" if (found := ak.backends()[name]).available else found.reason):
        pytest.skip(reason)
    pair = Pair(lambda: build("adamw", (((5, 7), (33,)),), backend=name), "aot_eager")
    pair.step()
    pair.each(lambda o: set_row(o, 0, "all"))
    for _ in range(2):
        pair.step()


# -- lifetimes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_of_a_compiled_optimizer(again: Callable[[Any], Any]) -> None:
    pair = Pair(lambda: build("adamw", SHAPES), "aot_eager")
    pair.each(lambda o: set_row(o, 0, "all"))
    for _ in range(2):
        pair.step()
    before = frozen(pair.optimizers[1])
    twins = Pair(lambda: again(pair.optimizers[1]), "aot_eager")
    for _ in range(2):
        twins.step()
    same_bits(before, frozen(pair.optimizers[1]))
    pair.step()


def test_an_optimizer_that_was_compiled_can_be_collected() -> None:
    optimizer = build("adamw", SHAPES)
    params = parameters_of(optimizer)

    def steps(o: ak.AIMFusedOptimizer) -> None:
        o.step()

    run = torch.compile(steps, fullgraph=True, backend="aot_eager")
    for strength in (0.0, 0.5, 0.0):
        optimizer.set_strength("audio", 0, strength)
        assign(params, Gradients(params)())
        run(optimizer)
    dead = [weakref.ref(optimizer), weakref.ref(params[0]), weakref.ref(optimizer.state[params[0]]["exp_avg"])]
    del optimizer, params
    gc.collect()
    assert [reference() for reference in dead] == [None] * 3


@pytest.mark.slow
def test_nothing_accumulates() -> None:
    pair = Pair(lambda: build("adamw", SHAPES), "aot_eager")
    counts = []
    for number in range(8):
        pair.each(lambda o, n=number: o.set_strength("audio", 0, 0.5 * (n % 2)))
        pair.step()
        if number in (3, 7):
            gc.collect()
            inputs = sum(i.optimizer() is pair.optimizers[1] for i in list(torch_compile._INPUTS.values()))
            counts.append((inputs, sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())))
    assert counts[0][0] <= 2 and counts[1] <= counts[0]


def test_gradients_of_a_graph_are_not_cleared() -> None:
    """They may be copies, of which nobody hears that they were written."""
    optimizer = build("adamw", SHAPES, zero_grad_in_step=True)
    params = parameters_of(optimizer)
    assign(params, [torch.ones_like(p) for p in params])
    before = frozen(optimizer)
    with pytest.raises(Exception, match="zero_grad_in_step=True has no place inside of a compiled function"):
        compile_step(optimizer, "eager")()
    same_bits(before, frozen(optimizer))
