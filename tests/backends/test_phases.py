"""Phases, latches and noise: what the row of one step has to do with the forward of the next."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import tolerances as tol
import torch
from backends_under_test import BACKENDS, enter
from helpers import (
    AUX_PHASE,
    RULES,
    TRUE_PHASE,
    Gradients,
    assign,
    build,
    frozen,
    parameters_of,
    same_bits,
    set_row,
)
from lockstep import Twin, run_twin

import aim_kernels as ak
from aim_kernels import _C
from aim_kernels.step.layout import STATISTIC


def plain(size: int, seed: int = 0, value: float = 0.0, **options: object) -> tuple[ak.AIMFusedOptimizer, torch.Tensor]:
    p = torch.full((size,), value, requires_grad=True)
    options = {"rule": "sgd", "lr": 1.0, "weight_decay": 0.0, "backend": "cpu", "seed": seed} | options
    return ak.AIMFusedOptimizer([p], **options), p


def test_the_oracle_s_philox_is_the_kernel_s() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        seed = int(random.integers(0, 2**64, dtype=np.uint64))
        counter = [int(x) for x in random.integers(0, 2**32, 4)]
        assert _C.philox(seed, counter) == oracle.philox(seed, tuple(counter)).reshape(4).tolist()


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_phase_draw(probability: float) -> None:
    """The sequence of phases is the oracle's, its share is the probability, and 0 and 1 are certain."""
    optimizer, p = plain(1, seed=987654321987)
    optimizer.set_phases(probability)
    assert int(optimizer.tables.control[2]) == round(probability * 2**32)
    found, steps = [], 400
    for _ in range(steps):
        p.grad = torch.ones(1)
        optimizer.step()
        found.append(int(optimizer.tables.control[3]))
    threshold = round(probability * 2**32)
    assert found == [oracle.draw_phase(987654321987, counter, threshold) for counter in range(steps)]
    assert abs(np.mean(found) - probability) <= 4 * math.sqrt(probability * (1 - probability) / steps)


def test_seeds_differ() -> None:
    sequences = set()
    for seed in (0, 1, 2**32, 2**40 + 1):
        optimizer, p = plain(1, seed=seed)
        optimizer.set_phases(0.5)
        phases = []
        for _ in range(40):
            p.grad = torch.ones(1)
            optimizer.step()
            phases.append(int(optimizer.tables.control[3]))
        sequences.add(tuple(phases))
    assert len(sequences) == 4


def test_gradient_coefficients_are_latched_at_emission() -> None:
    """In a step: grad_* of the phase whose live weights the forward saw, step_* of that phase, live_* of the next."""
    optimizer = build("adamw", (((60,),),))
    set_row(optimizer, 0, "alternate")
    made = Twin(optimizer, "adamw")
    gradients = Gradients(parameters_of(optimizer))
    seen = set()
    for _ in range(30):
        made.step(gradients())
        row = dict(zip(oracle.COLUMNS, optimizer.tables.rows[0].tolist(), strict=True))
        columns = AUX_PHASE if int(optimizer.tables.control[3]) else TRUE_PHASE
        for side in ("under", "well"):
            assert row[f"grad_{side}"] == columns[f"grad_{side}"]
            assert row[f"emitted_{side}"] == columns[f"live_{side}"]
        seen.add(int(optimizer.tables.control[3]))
    assert seen == {0, 1}
    made.finish()


@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_held_block_stays_as_it_is(backend: str, rule: str, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whatever noise, decay and momentum it has; its gradients are measured all the same, and when it is
    let go it goes on as if nothing had been."""
    if backend == "triton" and rule not in ("adamw", "sgd-momentum", "rmsprop-momentum", "lion"):
        pytest.skip("the interpreter is slow: one rule of each kind there")
    name = enter(backend, monkeypatch)
    held, free = (build(rule, (((5, 7), (33,)), ((16,),)), backend=name) for _ in range(2))
    gradients = Gradients(parameters_of(held))
    first = [gradients() for _ in range(before)]
    for optimizer in (held, free):
        for grads in first:
            assign(parameters_of(optimizer), [g.clone() for g in grads])
            optimizer.step()
    then = frozen(held)
    zeros = dict.fromkeys(("grad_under", "grad_well", "step_under", "step_well"), 0.0)
    for group in range(2):
        held.set_modulation(group, **zeros, noise=0.5)
    for _ in range(3):
        grads = gradients()
        assign(parameters_of(held), grads)
        held.step()
        squares = [sum(float(g.double().square().sum()) for g in part) for part in (grads[:2], grads[2:])]
        sums = held.tables.statistics[:, [STATISTIC["grad_sq"], STATISTIC["update_sq"]]].tolist()
        assert [row[0] for row in sums] == pytest.approx(squares, rel=1e-5)
        assert [row[1] for row in sums] == [0.0, 0.0]
    now = frozen(held)
    same_bits(then["params"], now["params"])
    if before:
        same_bits(then["state"], now["state"])
    for group in range(2):
        held.set_modulation(group, **dict.fromkeys(zeros, 1.0), noise=0.0)
    last = gradients()
    for optimizer in (held, free):
        assign(parameters_of(optimizer), [g.clone() for g in last])
        optimizer.step()
    for p, q in zip(parameters_of(held), parameters_of(free), strict=True):
        same_bits(p, q)
        same_bits(dict(held.state[p]), dict(free.state[q]))
    same_bits(held.tables.rows, free.tables.rows)


def test_set_strength_shapes_the_next_emission_and_the_gradient_after_it() -> None:
    optimizer = build("adamw", (((60,),), ((8,),)))
    made = Twin(optimizer, "adamw")
    gradients = Gradients(parameters_of(optimizer))
    run_twin(made, gradients, 6)
    optimizer.set_strength("audio", 0, 0.75)
    row = dict(zip(oracle.COLUMNS, optimizer.tables.rows[0].tolist(), strict=True))
    assert (row["grad_well"], row["true_live_well"], row["aux_live_well"], row["true_live_under"]) == (
        1.0,
        0.25,
        0.25,
        1.0,
    )
    assert row["emitted_well"] == 1.0
    made.step(gradients())
    row = dict(zip(oracle.COLUMNS, optimizer.tables.rows[0].tolist(), strict=True))
    assert (row["grad_under"], row["grad_well"], row["emitted_under"], row["emitted_well"]) == (1.0, 0.25, 1.0, 0.25)
    run_twin(made, gradients, 3)
    assert optimizer.modulation()[1]["live_well"] == 1.0
    optimizer.set_strength("audio", 0, 0.0)
    row = dict(zip(oracle.COLUMNS, optimizer.tables.rows[0].tolist(), strict=True))
    assert (row["grad_well"], row["emitted_well"], row["true_live_well"]) == (0.25, 0.25, 1.0)
    run_twin(made, gradients, 3)
    assert optimizer.modulation()[0]["grad_well"] == 1.0


@pytest.mark.parametrize(
    ("coefficients", "columns"),
    [("chain", ("live_well", "grad_well")), ("straight-through", ("live_well",)), ("step", None)],
)
def test_coefficients_of_set_strength(coefficients: str, columns: tuple[str, ...] | None) -> None:
    optimizer = build()
    optimizer.set_strength("audio", 0, 0.5, coefficients=coefficients)
    row = dict(zip(oracle.COLUMNS, optimizer.tables.rows[0].tolist(), strict=True))
    changed = {name for name in TRUE_PHASE if row[f"true_{name}"] != 1.0}
    assert changed == {name for name in TRUE_PHASE if row[f"aux_{name}"] != 1.0}
    if columns is None:
        assert changed and all(name.startswith(("step", "live")) for name in changed)
    else:
        assert changed == set(columns)
        assert all(row[f"true_{name}"] == row[f"aux_{name}"] == 0.5 for name in columns)


def test_kappa_as_a_tensor() -> None:
    one, two = build(), build()
    one.set_strength("audio", 0, 0.5)
    two.set_strength("audio", 0, torch.tensor(0.5))
    same_bits(one.tables.rows, two.tables.rows)
    gradients = Gradients(parameters_of(one))
    for _ in range(5):
        grads = gradients()
        for optimizer in (one, two):
            assign(parameters_of(optimizer), [g.clone() for g in grads])
            optimizer.step()
    same_bits(frozen(one), frozen(two))


def test_chain_rule_is_exact_while_kappa_changes() -> None:
    """With SGD, the step of theta is lr * dL/dlive * dlive/dtheta of the very forward that was run."""
    optimizer = build("sgd", (((200,),),), weight_decay=0.0, lr=0.1)
    (p,) = parameters_of(optimizer)
    gradients = Gradients([p])
    for number in range(12):
        optimizer.set_strength("audio", 0, [0.0, 0.5, 0.25, 0.75][number % 4])
        state = optimizer.state.get(p, {})
        theta = state.get("master", p).detach().clone()
        factor = torch.where(p.detach() == theta, 1.0, float(optimizer.tables.rows[0, 6]))
        (grad,) = gradients()
        assign([p], [grad])
        optimizer.step()
        theta_now = optimizer.state[p].get("master", p).detach()
        torch.testing.assert_close(theta - theta_now, 0.1 * factor * grad, rtol=1e-5, atol=1e-6)


def test_set_modulation_is_taken_as_it_is() -> None:
    """A gradient coefficient set by hand holds in the very next step."""
    optimizer, p = plain(4)
    optimizer.set_modulation(0, grad_under=0.5, grad_well=0.5)
    p.grad = torch.ones(4)
    optimizer.step()
    assert p.tolist() == [-0.5] * 4
    assert optimizer.modulation()[0]["grad_well"] == 0.5


def test_modulation_reports_what_was_set() -> None:
    optimizer = build()
    columns = {"grad_well": 0.5, "step_under": 2.0, "live_well": 0.25, "tau_prev": 0.1, "tau": 0.2, "noise": 0.3}
    optimizer.set_modulation(("audio", 0), **columns)
    expected = (
        dict.fromkeys(("grad_under", "grad_well", "step_under", "step_well", "live_under", "live_well"), 1.0) | columns
    )
    (found,) = optimizer.modulation()
    assert {name: found[name] for name in expected} == expected
    assert (found["modality"], found["depth"]) == ("audio", 0)


def noise_of(
    size: int, steps: int, dtype: torch.dtype = torch.float32, seed: int = 77, **options: object
) -> list[np.ndarray]:
    """What SGD with lr 1 adds to weights whose gradients are +-1 (standard deviation 1 for an even size), by step."""
    optimizer, p = plain(size, seed=seed, **options)
    p.data = p.data.to(dtype)
    optimizer.set_modulation(0, noise=1.0)
    grad = torch.ones(size, dtype=dtype)
    grad[::2] = -1
    made = []
    for _ in range(steps):
        p.data.zero_()
        p.grad = grad.clone()
        optimizer.step()
        made.append((-p.detach() - grad).double().numpy())
    return made


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_philox_and_box_muller(dtype: torch.dtype, backend: str) -> None:
    seed = 2**63 - 12345
    made = noise_of(20_002, 4, dtype, seed, backend=backend)
    assert not made[0].any(), "noise before there were statistics"
    for counter in (1, 2, 3):
        z, radius = oracle.normals(seed, counter, 0, 20_002)
        # The sum of gradient and noise is rounded to the parameter's type as well.
        bound = tol.NORMAL_ROUNDOFFS * tol.NORMAL_UNIT * radius + 4 * tol.NORMAL_UNIT * (1 + np.abs(z))
        assert (np.abs(made[counter] - z) <= tol.SAFETY * bound).all()


def test_noise_moments_and_independence() -> None:
    n = 200_000
    _, first, second = noise_of(n, 3)
    for z in (first, second):
        assert abs(z.mean()) < 4 / math.sqrt(n)
        assert abs(z.std() - 1) < 4 / math.sqrt(2 * n)
        assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
        assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
        for lag in (1, 2, 3, 4):
            assert abs((z[lag:] * z[:-lag]).mean()) < 4 / math.sqrt(n)
    assert abs((first * second).mean()) < 4 / math.sqrt(n)


def test_noise_scales_with_the_gradient_of_its_group() -> None:
    optimizer = build("sgd", (((64,),), ((64,),)), weight_decay=0.0, lr=1.0)
    for group in (0, 1):
        optimizer.set_modulation(group, noise=0.25)
    params = parameters_of(optimizer)
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        for p, scale in zip(params, (1.0, 100.0), strict=True):
            p.grad = torch.linspace(-scale, scale, 64)
        optimizer.step()
    for index, (p, old) in enumerate(zip(params, before, strict=True)):
        z, _ = oracle.normals(optimizer.tables.control[0].item(), 1, 64 * index, 64)
        expected = torch.from_numpy(0.25 * z) * p.grad.double().std(correction=0)
        torch.testing.assert_close((old - p.detach() - p.grad).double(), expected, rtol=1e-3, atol=1e-4)


def test_noise_does_not_depend_on_how_parameters_are_split() -> None:
    """The global element index numbers the draws: one tensor of 103 or five tensors, the same noise."""
    results = []
    for sizes in ((103,), (1, 2, 30, 67, 3)):
        params = [torch.zeros(size, requires_grad=True) for size in sizes]
        optimizer = ak.AIMFusedOptimizer(params, rule="sgd", lr=1.0, weight_decay=0.0, backend="cpu", seed=5)
        optimizer.set_modulation(0, noise=1.0)
        values = torch.linspace(-1, 1, 103)
        for _ in range(2):
            for p, part in zip(params, values.split(sizes), strict=True):
                p.grad = part.clone()
            optimizer.step()
        results.append(torch.cat([p.detach() for p in params]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_noise_after_gradients_that_were_not_finite(backend: str) -> None:
    """Their standard deviation is not a number: no noise for a step, and nothing beside them is spoilt."""
    optimizer, p = plain(8, backend=backend)
    optimizer.set_modulation(0, noise=0.5)
    for number in range(4):
        p.grad = torch.linspace(-1, 1, 8)
        if number == 1:
            p.grad[0], p.grad[1] = float("nan"), float("inf")
        optimizer.step()
    assert torch.isfinite(p[2:]).all()
