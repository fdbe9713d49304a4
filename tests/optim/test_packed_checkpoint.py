"""Checkpoints of states in fewer bytes: as they are, resumed to the bit, and converted with the documented error."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import tolerances as tol
import torch
from checkpoint_helpers import batches, drive, through_a_file, transplant
from helpers import build, flat, frozen, parameter, parameters_of, same_bits, set_row
from lockstep import moment, true_weights

import aim_kernels as ak
from aim_kernels import _C

SHAPES = (((4103,), (37,), ()), ((67, 65), (9,)))
CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    ("float32", {"state_dtype": "int8", "ema_decay": 0.9}),
    ("float32", {"state_dtype": "bfloat16"}),
    ("float32", {"state_dtype": "bfloat16", "rounding": "nearest"}),
    ("float16", {"state_dtype": "int8", "master": "kahan", "ema_decay": 0.75}),
    ("float16", {"state_dtype": "bfloat16", "master": "float32"}),
    *(
        ("bfloat16", {"state_dtype": states, "master": master, "ema_decay": 0.75})
        for states, master in (("int8", "split"), ("bfloat16", "kahan"), (None, "stochastic"), ("int8", "float32"))
    ),
]


@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
@pytest.mark.parametrize("row", ["ones", "all", "alternate"])
@pytest.mark.parametrize(("dtype", "options"), CONFIGURATIONS, ids=str)
def test_resume_is_bit_for_bit(dtype: str, options: dict[str, Any], row: str, way: str) -> None:
    through, first, second = (build("adamw", SHAPES, dtype, ("contiguous", "transposed"), **options) for _ in range(3))
    for optimizer in (through, first):
        set_row(optimizer, 0, row)
    grads = batches(through, 6)
    drive(through, grads)
    drive(first, grads[:3])
    if way == "file":
        saved = through_a_file(first.state_dict())
        for index, p in enumerate(parameters_of(first)):
            same_bits(dict(saved["state"][index]), dict(first.state[p]))
        transplant(first, second, saved)
    else:
        second = pickle.loads(pickle.dumps(first)) if way == "pickle" else copy.deepcopy(first)
    same_bits(frozen(first), frozen(second))
    drive(second, grads[3:])
    same_bits(frozen(through), frozen(second))


@pytest.mark.parametrize("rule", ["amsgrad", "adagrad", "rmsprop-momentum", "lion", "sgd-momentum"])
@pytest.mark.parametrize("states", ["bfloat16", "int8"])
def test_resume_of_other_rules(rule: str, states: str) -> None:
    through, first, second = (build(rule, SHAPES, state_dtype=states) for _ in range(3))
    for optimizer in (through, first):
        set_row(optimizer, 0, "all")
    grads = batches(through, 6)
    drive(through, grads)
    drive(first, grads[:3])
    transplant(first, second, through_a_file(first.state_dict()))
    drive(second, grads[3:])
    same_bits(frozen(through), frozen(second))


# -- other types of moments ------------------------------------------------------------------------------------------


def near(found: np.ndarray, exact: np.ndarray, states: str | None, unsigned: bool) -> None:
    """Within what rounding to nearest into that type takes."""
    bound = {None: 0.0, "float32": 0.0, "bfloat16": tol.BFLOAT16_NEAREST, "int8": tol.INT8_NEAREST}[states] * abs(exact)
    if states == "int8":
        # Half a step of the linear binade; what is not 0 is one step at least where there is no sign.
        padded = np.pad(np.abs(exact), (0, -len(exact) % 128)).reshape(-1, 128)
        exponent = np.frexp(padded.max(1))[1]  # one more than float32 has it, as a block may
        step = np.ldexp(1.0, exponent - (18 if unsigned else 10))
        bound = np.maximum(bound, np.repeat(step, 128)[: len(exact)] * (1.0 if unsigned else 0.5))
    bad = np.flatnonzero(np.abs(found - exact) > bound)
    assert not len(bad), (
        f"{len(bad)}: {found[bad[0]]!r} is not {exact[bad[0]]!r} +- {bound if states is None else bound[bad[0]]}"
    )


@pytest.mark.parametrize("to", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("since", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("how", ["load", "option"])
def test_moments_are_converted(since: str | None, to: str | None, how: str) -> None:
    first, second = (build("amsgrad", SHAPES, state_dtype=s, ema_decay=0.9) for s in (since, to))
    set_row(first, 0, "all")
    drive(first, batches(first, 4))
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    before = [{name: moment(first.state[p], name, p) for name in names} for p in parameters_of(first)]
    others = [{k: v.clone() for k, v in first.state[p].items() if "exp" not in k} for p in parameters_of(first)]
    if how == "load":
        transplant(first, second, through_a_file(first.state_dict()))
        assert all(group["state_dtype"] == to for group in second.param_groups)
    else:
        second = first
        for group in second.param_groups:
            group["state_dtype"] = to
        for p in parameters_of(second):
            p.grad = None
        lr = [group["lr"] for group in second.param_groups]
        only = parameters_of(second)[2]  # a step of one scalar brings the states of all into their new form
        only.grad = torch.zeros_like(only)
        second.step()
        assert lr == [group["lr"] for group in second.param_groups]
    for index, (p, exact) in enumerate(zip(parameters_of(second), before, strict=True)):
        state = second.state[p]
        if how == "option" and index == 2:
            continue
        small = p.numel() < 4096
        wanted = {None: torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32 if small else torch.uint8}[to]
        for name, values in exact.items():
            assert state[name].dtype == wanted and (f"{name}_scale" in state) == (wanted == torch.uint8)
            stored = None if wanted == torch.float32 else to
            near(moment(state, name, p), values, None if since == to else stored, "sq" in name)
        same_bits({k: v for k, v in state.items() if "exp" not in k}, others[index])
    drive(second, batches(second, 2))


@pytest.mark.parametrize("states", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_optim_s_checkpoints(dtype: str, states: str) -> None:
    """torch keeps moments in the parameter's type, so those of bfloat16 parameters are bfloat16."""
    theirs = [parameter((4103,), dtype), parameter((7, 5), dtype, seed=1)]
    peer = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    drive(peer, batches(peer, 3))
    params = [p.detach().clone().requires_grad_() for p in theirs]
    ours = ak.AIMFusedOptimizer(params, lr=0.5, state_dtype=states, backend="cpu")
    ours.load_state_dict(through_a_file(peer.state_dict()))
    assert ours.param_groups[0]["lr"] == 0.01 and ours.param_groups[0]["state_dtype"] == states
    for p, q in zip(params, theirs, strict=True):
        assert float(ours.state[p]["step"]) == 3
        for name in ("exp_avg", "exp_avg_sq"):
            exact = peer.state[q][name].double().numpy().ravel()
            exactly = states == "float32" or (states == "bfloat16" and dtype == "bfloat16")
            stored = None if exactly or (states == "int8" and p.numel() < 4096) else states
            near(moment(ours.state[p], name, p), exact, stored, "sq" in name)
    drive(ours, batches(ours, 2))


@pytest.mark.parametrize("how", ["load", "moved"])
@pytest.mark.parametrize(("since", "to"), [("contiguous", "transposed"), ("transposed", "contiguous")])
def test_codes_follow_a_parameter_that_is_laid_out_anew(since: str, to: str, how: str) -> None:
    """Blocks go by memory order: codes without their exponents would be other numbers."""
    shapes = (((67, 65), (9, 8, 8, 8)),)
    first, second = (build("amsgrad", shapes, layouts=(memory,), state_dtype="int8") for memory in (since, to))
    drive(first, batches(first, 3))
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    order = parameters_of(second)

    def moments(optimizer: ak.AIMFusedOptimizer) -> list[dict[str, np.ndarray]]:
        """In the order of the second's memory."""
        found = []
        for p, q in zip(parameters_of(optimizer), order, strict=True):
            whole = {}
            for name in names:
                line = torch.from_numpy(moment(optimizer.state[p], name, p))
                lying = torch.empty_like(p, dtype=torch.float64)
                lying.as_strided((p.numel(),), (1,)).copy_(line)
                whole[name] = flat(lying, q)
            found.append(whole)
        return found

    before = moments(first)
    if how == "load":
        transplant(first, second, through_a_file(first.state_dict()))
    else:
        for p, q in zip(parameters_of(first), order, strict=True):
            p.data = q.detach().clone().copy_(p.detach())
        second = first
        for p in parameters_of(second):
            p.grad = None
        # Without a gradient to the first, its states only move.
        parameters_of(second)[1].grad = torch.zeros_like(parameters_of(second)[1])
        second.step()
    after = moments(second)
    for index in range(2 if how == "load" else 1):
        for name in names:
            near(after[index][name], before[index][name], "int8", "sq" in name)
    drive(second, batches(second, 2))


# -- other ways to keep true weights ---------------------------------------------------------------------------------

WAYS = (None, "stochastic", "kahan", "split", "float32")


@pytest.mark.parametrize("how", ["load", "option"])
@pytest.mark.parametrize("to", WAYS)
@pytest.mark.parametrize("since", WAYS)
@pytest.mark.parametrize("live", [False, True])
def test_true_weights_are_converted(since: str | None, to: str | None, how: str, live: bool) -> None:
    first, second = (build("adamw", SHAPES, "bfloat16", master=master) for master in (since, to))
    if live:
        first.set_strength("audio", 0, 0.5)
    drive(first, batches(first, 4))
    params = parameters_of(first)
    before = [true_weights(first.state[p], p) for p in params]
    if how == "load":
        transplant(first, second, through_a_file(first.state_dict()))
    else:
        second = first
        for group in second.param_groups:
            group["master"] = to
    # No gradient but one: others only change their form.
    params = parameters_of(second)
    for p in params:
        p.grad = None
    params[2].grad = torch.zeros_like(params[2])
    second.step()
    for index, (p, exact) in enumerate(zip(params, before, strict=True)):
        names, degraded = second.state[p].keys(), live and index < 3
        if index == 2:
            continue
        found = true_weights(second.state[p], p)
        if degraded or since == to or to in ("split", "float32"):
            bound = np.zeros_like(exact)
        elif to == "kahan":
            bound = tol.rest_error(np.abs(exact), 8, -126)
        else:
            bound = np.abs(exact) * tol.BFLOAT16_NEAREST
        assert np.all(np.abs(found - exact) <= bound), f"parameter {index}: {np.abs(found - exact).max()}"
        if degraded:
            assert "master" in names
        assert not (names & {"remainder", "compensation"} and "master" in names)
    drive(second, batches(second, 3))
    for index, p in enumerate(params):
        names, degraded = second.state[p].keys(), live and index < 3
        assert ("master" in names) == (degraded or to == "float32")
        rest = {"split": {"remainder"}, "kahan": {"compensation"}}.get(to or "", set())
        assert names & {"remainder", "compensation"} == (set() if degraded else rest)


def test_averages_are_begun_and_dropped_by_the_option() -> None:
    first, second = (build("adamw", SHAPES, ema_decay=decay) for decay in (0.9, 0.5))
    drive(first, batches(first, 3))
    transplant(first, second, through_a_file(first.state_dict()))
    same_bits(frozen(first), frozen(second))
    for group in second.param_groups:
        group["ema_decay"] = None
    drive(second, batches(second, 1))
    assert not any("ema" in state for state in second.state.values())
    for group in second.param_groups:
        group["ema_decay"] = 0.9
    before = [p.detach().clone() for p in parameters_of(second)]
    drive(second, batches(second, 1))
    for p, start in zip(parameters_of(second), before, strict=True):
        expected = 0.9 * start.double() + (1 - 0.9) * p.detach().double()
        # Two products of rounded constants, and a sum.
        torch.testing.assert_close(second.state[p]["ema"].double(), expected, rtol=0, atol=4 * 2.0**-24 * 6)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_codes_without_exponents_are_refused() -> None:
    first, second = (build("adamw", SHAPES, state_dtype="int8") for _ in range(2))
    drive(first, batches(first, 2))
    before = frozen(second)
    for change, words in (
        (lambda state: state.pop("exp_avg_scale"), "8 bits without exp_avg_scale"),
        (lambda state: state.update(exp_avg_sq_scale=torch.zeros(3, dtype=torch.uint8)), "exp_avg_sq_scale has shape"),
    ):
        saved = copy.deepcopy(first.state_dict())
        change(saved["state"][0])
        with pytest.raises(ValueError, match=rf"parameter 0 of group 0.*{words}"):
            second.load_state_dict(saved)
        same_bits(before, frozen(second))


def test_exponents_that_do_not_fit_are_named() -> None:
    optimizer = build("adamw", SHAPES, state_dtype="int8")
    drive(optimizer, batches(optimizer, 2))
    p = parameters_of(optimizer)[0]
    optimizer.state[p]["exp_avg_scale"] = torch.zeros(5, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*exp_avg_scale"):
        drive(optimizer, batches(optimizer, 1))


def test_instruction_sets_resume_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    isas = [name for name, _, supported in _C.isas() if supported]
    results = []
    for isa in (isas[0], isas[-1]):
        first, second = (build("adamw", SHAPES, "bfloat16", state_dtype="int8", master="split") for _ in range(2))
        grads = batches(first, 4)
        drive(first, grads[:2])
        monkeypatch.setenv("AIM_KERNELS_ISA", isa)
        transplant(first, second, through_a_file(first.state_dict()))
        drive(second, grads[2:])
        results.append(frozen(second))
    same_bits(*results)
