"""What surrounds steps with fewer bytes: true, live and averaged weights, skipped and clipped steps, gradients that are
not finite, instruction sets, threads, compiled steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tolerances as tol
import torch
from compile_helpers import Pair
from helpers import GRADIENT_LAYOUTS, Gradients, assign, build, frozen, parameters_of, same_bits, set_row
from lockstep import Twin, run_twin, true_weights

from aim_kernels import _C
from aim_kernels.step import states

ISAS = [name for name, _, supported in _C.isas() if supported]
SHAPES = (((4103,), (37,), ()), ((67, 65), (9,)))
MASTERS = (None, "stochastic", "kahan", "split", "float32")

#: Type of the parameters and options: one of each way to store moments and weights.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("float32", {"state_dtype": "int8", "ema_decay": 0.9}),
    ("float32", {"state_dtype": "bfloat16", "rounding": "nearest"}),
    ("float16", {"state_dtype": "bfloat16", "master": "kahan", "ema_decay": 0.75}),
    ("bfloat16", {"state_dtype": "int8", "master": "split", "ema_decay": 0.75}),
    ("bfloat16", {"state_dtype": "bfloat16", "master": "stochastic"}),
    ("bfloat16", {"state_dtype": "int8", "master": "float32"}),
]


def drive(optimizer: Any, steps: int, seed: int = 1) -> None:
    params = parameters_of(optimizer)
    gradients = Gradients(params, seed)
    for _ in range(steps):
        assign(params, gradients())
        optimizer.step()


# -- true, live and averaged weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["ones", "all", "alternate"])
@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_exchanging_weights_leaves_no_trace(dtype: str, options: dict[str, Any], row: str) -> None:
    optimizer = build("adamw", SHAPES, dtype, ("contiguous", "transposed"), **options)
    set_row(optimizer, 0, row)
    drive(optimizer, 3)
    before, params = frozen(optimizer), parameters_of(optimizer)
    optimizer.eval()
    for p in params:
        if "master" in optimizer.state[p]:
            same_bits(p.detach(), optimizer.state[p]["master"].to(p.dtype))
    optimizer.train()
    same_bits(before, frozen(optimizer))
    with optimizer.true_parameters():
        pass
    same_bits(before, frozen(optimizer))
    with optimizer.ema_parameters():
        for p in params:
            if "ema" in optimizer.state[p]:
                same_bits(p.detach(), optimizer.state[p]["ema"].to(p.dtype))
        with pytest.raises(RuntimeError, match="averages"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="holds averages"), optimizer.ema_parameters():
            pass
    same_bits(before, frozen(optimizer))
    averaged = any("ema" in optimizer.state[p] for p in params)
    assert averaged == ("ema_decay" in options)
    optimizer.eval()
    held = frozen(optimizer)
    with optimizer.ema_parameters():
        assert not averaged or not torch.equal(params[0], held["params"][0])
    same_bits(held, frozen(optimizer))


@pytest.mark.parametrize("states", [None, "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("dtype", "master"), [*(("bfloat16", m) for m in MASTERS), ("float16", "kahan"), ("float16", "float32")]
)
def test_live_weights_come_and_go(dtype: str, master: str | None, states: str | None) -> None:
    optimizer = build("adamw", SHAPES, dtype, master=master, state_dtype=states, ema_decay=0.9)
    made, params = Twin(optimizer, "adamw"), parameters_of(optimizer)
    gradients = Gradients(params)
    rest = {"split": "remainder", "kahan": "compensation"}.get(master or "")
    for strength in (0.0, 0.5, 0.25, 0.0, 0.0, 0.7):
        before = [true_weights(optimizer.state[p], p) for p in params]
        optimizer.set_strength("audio", 0, strength)
        assert all((a == true_weights(optimizer.state[p], p)).all() for a, p in zip(before, params, strict=True))
        made.step(gradients())
        for group in optimizer.param_groups:
            degraded = group["depth"] == 0 and strength > 0
            for p in group["params"]:
                names = optimizer.state[p].keys()
                assert ("master" in names) == (degraded or master == "float32")
                assert names & {"remainder", "compensation"} == ({rest} if rest and not degraded else set())
    made.finish()


@pytest.mark.parametrize("master", ["split", "kahan", "float32", "stochastic"])
def test_live_weights_without_gradients(master: str) -> None:
    """A parameter that meets no gradient while live weights come and go keeps its true weights."""
    optimizer = build("adamw", SHAPES, "bfloat16", master=master, state_dtype="int8")
    drive(optimizer, 3)
    params = parameters_of(optimizer)
    still = params[0]
    kept, made = true_weights(optimizer.state[still], still), Twin(optimizer, "adamw")
    gradients = Gradients(params, 5)
    for strength in (0.5, 0.5, 0.0, 0.0):
        optimizer.set_strength("audio", 0, strength)
        made.step([None, *gradients()[1:]])
        found = true_weights(optimizer.state[still], still)
        # Half of the last bit goes where two numbers are rounded into one, once, and the rest of it was.
        bound = tol.rest_error(abs(kept), 8, -126) if master == "kahan" else 0.0
        assert (abs(found - kept) <= bound).all()
    assert ("master" in optimizer.state[still]) == (master == "float32")


@pytest.mark.parametrize("master", [None, "split"])
def test_averages_begin_with_true_weights(master: str | None) -> None:
    """Also where the option comes while weights are degraded."""
    optimizer = build("adamw", SHAPES, "bfloat16", master=master)
    optimizer.set_strength("audio", 0, 0.9)
    drive(optimizer, 2)
    for group in optimizer.param_groups:
        group["ema_decay"] = 0.5
    params = parameters_of(optimizer)
    made = Twin(optimizer, "adamw")
    for group, block in zip(optimizer.param_groups, made.oracle.blocks, strict=True):
        assert block.hyper.ema_decay == group["ema_decay"] == 0.5
    run_twin(made, Gradients(params), 3)
    assert all("ema" in optimizer.state[p] for p in params)


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("memory", GRADIENT_LAYOUTS)
def test_gradients_are_cleared_where_they_lie(memory: str, backend: str) -> None:
    optimizer = build("adamw", (((6, 5), (4, 3, 2, 5), (7,), ()),), zero_grad_in_step=True, backend=backend)
    params = parameters_of(optimizer)
    grads = Gradients(params, layouts=(memory,))()
    assign(params, grads)
    versions = [grad._version for grad in grads]
    optimizer.step()
    for p, grad, version in zip(params, grads, versions, strict=True):
        assert p.grad is grad and not grad.any() and grad._version > version
        whole = grad._base if grad._base is not None else grad
        if memory in ("sliced", "rows", "offset"):  # what lies between is not the gradient's
            assert int((whole == 7.0).sum()) == whole.numel() - grad.numel()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("known", [False, True], ids=["first step", "later step"])
def test_gradients_are_cleared_where_a_step_is_skipped(known: bool, backend: str) -> None:
    options = {"zero_grad_in_step": True, "fused_scaling": True, "state_dtype": "int8", "backend": backend}
    optimizer = build("adamw", SHAPES, **options)
    params = parameters_of(optimizer)
    if known:
        drive(optimizer, 1)
    # States are made, with zeros, in a step that is skipped as well.
    before = frozen(optimizer)
    grads = Gradients(params, layouts=("contiguous", "sliced"))()
    assign(params, grads)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    assert not any(bool(grad.any()) for grad in grads)
    after = frozen(optimizer)
    same_bits(before if known else before["params"], after if known else after["params"])
    optimizer.found_inf = torch.tensor(0.0)
    other = copy.deepcopy(optimizer)
    more = Gradients(params)()
    assign(params, [4 * grad for grad in more])
    assign(parameters_of(other), more)
    optimizer.step()
    other.step()
    same_bits(frozen(optimizer), frozen(other))
    assert not any(bool(p.grad.any()) for p in params)


@pytest.mark.parametrize("states", [None, "bfloat16", "int8"])
def test_clipping_reads_gradients_before_they_are_cleared(states: str | None) -> None:
    options = {"max_grad_norm": 0.5, "state_dtype": states}
    clearing, leaving = (build("adamw", SHAPES, zero_grad_in_step=z, **options) for z in (True, False))
    params = [parameters_of(optimizer) for optimizer in (clearing, leaving)]
    gradients = Gradients(params[0])
    for _ in range(3):
        grads = gradients()
        exact = torch.cat([grad.double().flatten() for grad in grads]).norm()
        for members, optimizer in zip(params, (clearing, leaving), strict=True):
            assign(members, [grad.clone() for grad in grads])
            optimizer.step()
            # Sums in float64 of float32 products.
            torch.testing.assert_close(optimizer.grad_norm.double(), exact, rtol=tol.SUM_ROUNDOFFS * 2.0**-24, atol=0)
        assert not any(bool(p.grad.any()) for p in params[0]) and all(bool(p.grad.any()) for p in params[1][:2])
        same_bits(frozen(clearing), frozen(leaving))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_gradients_that_are_not_finite(dtype: str, options: dict[str, Any], backend: str) -> None:
    optimizer = build("adamw", SHAPES, dtype, backend=backend, **options)
    made, params = Twin(optimizer, "adamw"), parameters_of(optimizer)
    gradients = Gradients(params)
    for number in range(3):
        grads = gradients()
        if number == 1:
            grads[0][5], grads[0][300], grads[3][1, 2], grads[1][0] = (float(x) for x in ("nan", "inf", "-inf", "nan"))
        made.step(grads)
        assert sum(row["nonfinite"] for row in optimizer.statistics()) == (4 if number == 1 else 0)
    wrong = int(params[0].isnan().sum())
    # Of 8 bits, a block of 128 shares the exponent that says so.
    assert wrong == (2 if options["state_dtype"] == "bfloat16" else 2 * 128)


# -- the same bits everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["adamw", "amsgrad", "adagrad", "rmsprop-momentum", "lion", "sgd-nesterov"])
@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_instruction_sets_and_threads_agree(
    dtype: str, options: dict[str, Any], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for isa, threads in [*((isa, 1) for isa in ISAS), ("scalar", 2), (ISAS[-1], 2)]:
        monkeypatch.setenv("AIM_KERNELS_ISA", isa)
        torch.set_num_threads(threads)
        optimizer = build(rule, (((_C.CHUNK + 137,), (37,)), ((67, 65), (9,))), dtype, **options)
        set_row(optimizer, 0, "all")
        set_row(optimizer, 1, "alternate")
        drive(optimizer, 3)
        results.append(frozen(optimizer))
    for other in results[1:]:
        same_bits(results[0], other)


# -- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_graphs")
@pytest.mark.parametrize(
    ("dtype", "options", "backend"),
    [*((*CASES[i], "aot_eager") for i in (0, 2, 3, 4, 5)), (*CASES[0], "inductor")],
    ids=str,
)
def test_compiled_and_eager_agree(dtype: str, options: dict[str, Any], backend: str) -> None:
    pair = Pair(lambda: build("adamw", SHAPES, dtype, **options), backend)
    for strength in (0.0, 0.0, 0.5, 0.5, 0.0, 0.0):
        pair.each(lambda o, s=strength: o.set_strength("audio", 0, s))
        pair.step()


# -- what somebody else does to weights and averages -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("master", ["split", "kahan", "stochastic", "float32", None])
def test_weights_that_are_set_to_zero_between_steps(backend: str, master: str | None) -> None:
    """What a remainder is to be added to is gone: the sum of the two must be no NaN."""
    optimizer = build("adamw", (((40, 130),),), dtype="bfloat16", backend=backend, master=master)
    params = parameters_of(optimizer)
    draw = Gradients(params)
    for number in range(3):
        assign(params, draw())
        optimizer.step()
        with torch.no_grad():
            for p in params:
                p.clamp_(min=0) if number else p.copy_(torch.where(p < 0, -0.0, p))
    assert all(bool(p.isfinite().all()) for p in params)


def test_a_remainder_follows_a_parameter_that_is_laid_out_anew() -> None:
    optimizer = build("adamw", (((8, 4, 3, 3),),), dtype="bfloat16", master="split")
    (p,) = parameters_of(optimizer)
    assign([p], Gradients([p])())
    optimizer.step()
    kept = states.true_weights(p, optimizer.state[p]).clone()
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    assert torch.equal(states.true_weights(p, optimizer.state[p]), kept)
    p.data = p.data.float()
    assert torch.equal(states.true_weights(p, optimizer.state[p]), kept)


def test_nothing_else_is_done_while_averages_are_in_the_module() -> None:
    optimizer = build("adamw", (((70, 64),),), dtype="bfloat16", master="float32", ema_decay=0.5)
    params = parameters_of(optimizer)
    for grads in (Gradients(params)(), Gradients(params, seed=2)()):
        assign(params, grads)
        optimizer.step()
    saved, before = copy.deepcopy(optimizer.state_dict()), frozen(optimizer)
    with optimizer.ema_parameters():
        for name, call in {
            "eval": optimizer.eval,
            "train": optimizer.train,
            "step": optimizer.step,
            "load_state_dict": lambda: optimizer.load_state_dict(saved),
            "ema_parameters": lambda: optimizer.ema_parameters().__enter__(),
        }.items():
            with pytest.raises(RuntimeError, match=f"holds averages .* call {name}"):
                call()
    same_bits(before, frozen(optimizer))
    with pytest.raises(KeyError), optimizer.ema_parameters():
        raise KeyError
    same_bits(before, frozen(optimizer))
