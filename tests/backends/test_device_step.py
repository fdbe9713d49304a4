"""The whole optimizer over the device backends, on this machine's processor (backends_under_test.py): against the
float64 oracle, and bit for bit against the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable

import helpers
import numpy as np
import pytest
import tolerances as tol
import torch
from backends_under_test import CHUNK, DEVICE_BACKENDS, enter
from helpers import (
    DTYPES,
    ROWS,
    RULES,
    Gradients,
    assign,
    build,
    frozen,
    parameters_of,
    same_bits,
    same_numbers,
    set_row,
)
from lockstep import Twin, run_twin

import aim_kernels as ak
from aim_kernels.backends import device
from aim_kernels.step.inputs import StepInputs
from aim_kernels.step.layout import STATISTIC

SHAPES = (((5, 7), (33,), (0,), ()), ((3, 4, 2), (16,)))
LAYOUTS = ("contiguous", "transposed", "offset")
#: Tails, chunk edges, several chunks a tensor; the interpreter is slow, so only a few.
EDGES = (((1,), (CHUNK + 5,), (63,)), ((2 * CHUNK,), (0,), (CHUNK - 1,)))


@pytest.fixture(params=DEVICE_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return enter(request.param, monkeypatch)


def interpreted(backend: str) -> bool:
    """Whether steps are slow: Triton's interpreter takes about ten milliseconds a chunk."""
    return backend == "triton" and helpers.DEVICE == "cpu"


def twin(backend: str, rule: str, row: str, dtype: str, free: bool) -> None:
    optimizer = build(rule, SHAPES, dtype, LAYOUTS, backend=backend)
    set_row(optimizer, 0, row)
    made = Twin(optimizer, RULES[rule]["rule"], free=free)
    run_twin(
        made, Gradients(parameters_of(optimizer), layouts=("contiguous", "sliced")), 5 if interpreted(backend) else 20
    )
    assert min(made.masks.values()) > 20, "one class only: nothing was tested"


#: These meet every row; the others, which differ in their moments only, meet the rows that have every column.
EVERY_ROW = ("adamw", "sgd", "sgd-momentum", "lion")


FULL_ROWS = ("all", "alternate", "held")


@pytest.mark.parametrize(
    ("rule", "row"), [(rule, row) for rule in RULES for row in (ROWS if rule in EVERY_ROW else FULL_ROWS)]
)
def test_oracle_in_lock_step(backend: str, rule: str, row: str) -> None:
    if interpreted(backend) and rule not in EVERY_ROW and row != "all":
        pytest.skip("the interpreter is slow: one row of these there")
    twin(backend, rule, row, "float32", free=False)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("rule", "row"),
    [
        *((rule, row) for rule in ("adamw", "sgd-nesterov") for row in ("all", "alternate")),
        *((rule, "all") for rule in ("amsgrad", "adagrad", "rmsprop-momentum", "lion")),
    ],
)
def test_oracle_with_other_dtypes(backend: str, rule: str, row: str, dtype: str) -> None:
    twin(backend, rule, row, dtype, free=False)


@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum", "adagrad", "rmsprop-momentum", "lion"])
def test_oracle_running_free(backend: str, rule: str) -> None:
    twin(backend, rule, "all", "float32", free=True)


def run(optimizer: ak.AIMFusedOptimizer, steps: int, missing: int | None = None) -> None:
    """Steps; parameter ``missing`` gets no gradient in every second one."""
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    for number in range(steps):
        assign(params, gradients())
        if missing is not None and number % 2:
            params[missing].grad = None
        optimizer.step()


def agree(cpu: ak.AIMFusedOptimizer, device: ak.AIMFusedOptimizer, noise: bool = False) -> None:
    """Everything to the bit, but the sums: those are added up in another order."""
    one, other = frozen(cpu), frozen(device)
    sums, others = one.pop("statistics").cpu(), other.pop("statistics").cpu()
    exact = [STATISTIC[name] for name in ("numel", "under", "nonfinite")]
    if not noise:  # whose deviation comes from the sums
        same_bits(one, other)
        same_numbers(sums[:, exact], others[:, exact])
    # Float32 partial sums of at most 258 terms on one side, fewer on the other; what cancels is judged by its terms.
    scale = (sums[:, STATISTIC["numel"]] * sums[:, STATISTIC["grad_sq"]]).sqrt()
    slack = 2 * tol.SUM_ROUNDOFFS * tol.UNIT["float32"]
    for name, column in STATISTIC.items():
        bound = slack * (scale if name == "grad_sum" else sums[:, column].abs())
        if noise:
            bound = 1e-3 * sums[:, column].abs() + 1e-3 * scale
        difference = (sums[:, column] - others[:, column]).abs()
        good = (difference <= bound) | (sums[:, column].isnan() & others[:, column].isnan())
        assert good.all(), f"{name}: {sums[:, column]}, {others[:, column]}"


BITS_OF_EVERY_ROW = ("adamw", "adam-maximize", "sgd", "sgd-dampening", "sgd-nesterov")
BITS_OF_ONE_ROW = {
    "amsgrad": "chain",
    "adagrad": "alternate",
    "rmsprop": "chain",
    "rmsprop-centered": "step",
    "rmsprop-momentum": "alternate",
    "lion": "alternate",
    "adamw-decoupled-lr": "ones",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rule", "row"),
    [
        *((rule, row) for rule in BITS_OF_EVERY_ROW for row in ("ones", "step", "chain", "alternate")),
        *BITS_OF_ONE_ROW.items(),
    ],
)
def test_the_bits_of_the_cpu_kernels(backend: str, rule: str, row: str, dtype: str) -> None:
    if interpreted(backend) and (rule, row) not in {
        ("adamw", "chain"),
        ("adam-maximize", "alternate"),
        ("sgd", "step"),
        ("adagrad", "alternate"),
        ("rmsprop-momentum", "alternate"),
        ("lion", "alternate"),
    }:
        pytest.skip("the interpreter is slow: six of the combinations there")
    made = []
    for name in ("cpu", backend):
        optimizer = build(rule, EDGES, dtype, LAYOUTS, backend=name)
        set_row(optimizer, 0, row)
        run(optimizer, 3 if interpreted(backend) else 6, missing=1)
        made.append(optimizer)
    agree(*made)


@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum"])
def test_noise_is_drawn_by_global_index(backend: str, rule: str) -> None:
    """The same normals as on the CPU; only their deviation, which comes from float sums, may round differently."""
    made = []
    for name in ("cpu", backend):
        optimizer = build(rule, EDGES, backend=name)
        set_row(optimizer, 0, "noise")
        run(optimizer, 2)
        made.append(optimizer)
    for p, q in zip(*map(parameters_of, made), strict=True):
        # lr 0.03 times a direction of order one whose noise is off by some 1e-5 of itself
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=1e-4, atol=1e-4)
    agree(*made, noise=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row", ["chain", "alternate"])
def test_live_and_true_weights(backend: str, row: str, dtype: str) -> None:
    """eval() and train() are exact, as on the CPU."""
    cpu, device = (build("adamw", SHAPES, dtype, LAYOUTS, backend=name) for name in ("cpu", backend))
    for optimizer in (cpu, device):
        set_row(optimizer, 0, row)
        run(optimizer, 3)
    live = [p.detach().clone() for p in parameters_of(device)]
    device.eval()
    cpu.eval()
    same_bits([p.detach() for p in parameters_of(cpu)], [p.detach() for p in parameters_of(device)])
    device.train()
    same_bits(live, [p.detach() for p in parameters_of(device)])


def test_checkpoints_go_on_under_another_backend(backend: str) -> None:
    """Bit for bit, either way."""
    whole = build("adamw", SHAPES, backend="cpu")
    set_row(whole, 0, "alternate")
    params = parameters_of(whole)
    gradients = Gradients(params)
    made = [gradients() for _ in range(6)]

    def go(optimizer: ak.AIMFusedOptimizer, steps: range) -> None:
        for number in steps:
            params = parameters_of(optimizer)
            assign(params, [g.clone().to(p.device) for g, p in zip(made[number], params, strict=True)])
            optimizer.step()

    parts = [build("adamw", SHAPES, backend=name) for name in (backend, "cpu", backend)]
    set_row(parts[0], 0, "alternate")
    go(whole, range(6))
    previous = None
    for number, part in enumerate(parts):
        if previous is not None:
            for p, q in zip(parameters_of(part), parameters_of(previous), strict=True):
                p.data.copy_(q.detach())
            part.load_state_dict(previous.state_dict())
        go(part, range(2 * number, 2 * number + 2))
        previous = part
    agree(whole, parts[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_tensors_on_the_device(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads the number itself: a change needs no new tables."""
    plain = build("adamw", SHAPES, backend=backend)
    on_device = build("adamw", SHAPES, backend=backend)
    rate = torch.tensor(0.5, dtype=dtype)
    launched: list[device.Launch] = []
    send = device.Launch.send

    def with_tensors(self: device.Launch, inputs: StepInputs) -> None:
        if self.plan.param_groups is on_device.param_groups:  # as StepPlan does with tensors in a device's memory
            self.plan.lr_tensors = dict.fromkeys(range(len(self.plan.groups)), rate)
            launched.append(self)
        send(self, inputs)

    monkeypatch.setattr(device.Launch, "send", with_tensors)
    gradients = [Gradients(parameters_of(o)) for o in (plain, on_device)]
    for value in (0.5, 0.03125, 0.25):
        rate.fill_(value)
        for group in plain.param_groups:
            group["lr"] = value
        for optimizer, draw in zip((plain, on_device), gradients, strict=True):
            assign(parameters_of(optimizer), draw())
            optimizer.step()
    assert len(launched) == 3
    same_bits(frozen(plain), frozen(on_device))


@pytest.mark.parametrize("row", ["chain", "alternate"])
@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum"])
def test_tensors_in_several_places_are_one_optimizer(
    backend: str, rule: str, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards, as of two devices, neither with whole groups: thresholds and statistics are those of the groups."""
    one, two = (build(rule, EDGES, backend=backend) for _ in range(2))
    launches = []

    def of(plan: device.StepPlan, kernels: device.Kernels) -> device.Launch:
        if plan.launch is None:
            numbers, where = np.arange(len(plan.params)), plan.params[0].device
            split = plan.param_groups is two.param_groups
            assignments = [(where, numbers[number::2]) for number in range(2)] if split else [(where, numbers)]
            plan.launch = device.Launch(plan, kernels.CHUNK, assignments)
            launches.append(plan.launch)
        return plan.launch

    monkeypatch.setattr(device, "_launch_of", of)
    for optimizer in (one, two):
        set_row(optimizer, 0, row)
        run(optimizer, 4, missing=1)
    assert {len(made.shards) for made in launches} == {1, 2}
    agree(one, two)
    for optimizer in (one, two):
        optimizer.eval()
        optimizer.train()
    agree(one, two)


def test_groups_without_gradients_keep_their_statistics(backend: str) -> None:
    """They measure nothing in that step, and the deviation of their noise is that of their last one."""
    optimizer = build("adamw", (((9,),), ((7,), (3,))), backend=backend)
    set_row(optimizer, 1, "noise")
    params = parameters_of(optimizer)
    made, gradients = Twin(optimizer, "adamw"), Gradients(params)
    made.step(gradients())
    kept = optimizer.tables.statistics[1].clone()
    made.step([gradients()[0], None, None])
    assert torch.equal(kept, optimizer.tables.statistics[1])
    made.step(gradients())


def test_reruns_give_the_same_bits(backend: str) -> None:
    """Statistics too, though blocks run in another order every time."""
    made = []
    for _ in range(2):
        optimizer = build("adamw", EDGES, backend=backend)
        set_row(optimizer, 0, "all")
        run(optimizer, 3)
        made.append(frozen(optimizer))
    same_bits(*made)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, 1e-30])
def test_gradients_out_of_range(backend: str, value: float) -> None:
    """Counted where they are not finite; squares beyond float32 still add up."""
    cpu, device = (build("sgd-momentum", EDGES, backend=name, weight_decay=0.0) for name in ("cpu", backend))
    for optimizer in (cpu, device):
        params = parameters_of(optimizer)
        gradients = Gradients(params)()
        if value == 1e-30:
            gradients = [torch.full_like(g, value) for g in gradients]
        else:
            gradients[1][7] = gradients[1][-1] = value
        assign(params, gradients)
        optimizer.step()
    first, second = (optimizer.statistics()[0] for optimizer in (cpu, device))
    assert first["nonfinite"] == second["nonfinite"] == (0 if abs(value) < 4e38 else 2)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5, nan_ok=True)


def refused(change: Callable[[torch.Tensor], None], backend: str, match: str) -> None:
    optimizer = build("adamw", SHAPES, backend=backend)
    run(optimizer, 2)
    before = frozen(optimizer)
    params = parameters_of(optimizer)
    assign(params, Gradients(params)())
    change(params[0])
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    same_bits(before, frozen(optimizer))


def test_bad_gradients_are_refused_before_anything_is_written(backend: str) -> None:
    def sparse(p: torch.Tensor) -> None:
        p.grad = p.grad.to_sparse()

    refused(sparse, backend, "parameter 0 of group 0.*sparse")
