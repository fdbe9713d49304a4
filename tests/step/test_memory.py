"""Memory that parameters, gradients and states share, lose, or get anew: as torch.optim does, or an error by name."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import frozen, same_bits
from tolerances import peer_error
from torch import Tensor

import aim_kernels as ak
from aim_kernels.step.states import buffer_of

#: A rule of torch.optim, its options there, and here.
RULES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}, {"rule": "sgd", "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}, {"rule": "adagrad"}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}, {"rule": "rmsprop", "momentum": 0.5}),
}
BACKENDS = ("cpu", "reference")


def both(rule: str, backend: str = "cpu", **options: Any) -> list[Callable[[list[Tensor]], Any]]:
    """torch.optim's optimizer, and this library's, over given parameters."""
    there, its, ours = RULES[rule]
    return [
        lambda params: there(params, lr=0.1, weight_decay=0.0, foreach=False, **its),
        lambda params: ak.AIMFusedOptimizer(params, lr=0.1, weight_decay=0.0, backend=backend, **ours, **options),
    ]


def agree(theirs: Tensor, ours: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=peer_error(4))


# -- sizes that change while addresses stay ----------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rule", ["adamw", "sgd", "adagrad", "rmsprop", "lion"])
@pytest.mark.parametrize("resize", ["cut", "grown", "reshaped"])
def test_a_parameter_of_another_size_at_the_same_address_is_refused_until_its_state_is_new(
    resize: str, rule: str, stored: str
) -> None:
    memory, slopes = torch.ones(3, 8192), torch.ones(3, 8192)
    whole = memory[:2] if resize == "grown" else memory
    p = torch.nn.Parameter(whole)
    p.data = whole
    p.grad = slopes[: len(whole)]
    options = {"momentum": 0.9} if rule in ("sgd", "rmsprop") else {}
    optimizer = ak.AIMFusedOptimizer([("w", p)], lr=0.1, rule=rule, state_dtype=stored, backend="cpu", **options)
    optimizer.step()
    part = {"cut": memory[:1], "grown": memory, "reshaped": memory.view(8192, 3)}[resize]
    p.grad = None
    p.data = part
    p.grad = slopes[: len(part)] if resize != "reshaped" else slopes.view(8192, 3)
    before = memory.clone()
    with pytest.raises(RuntimeError, match=r"'w'.*state"):
        optimizer.step()
    assert torch.equal(memory, before)
    del optimizer.state[p]
    optimizer.step()
    stepped = memory.view(-1) != before.view(-1)
    assert stepped[: part.numel()].all() and not stepped[part.numel() :].any()


def test_a_parameter_of_another_type_at_the_same_address_is_noticed() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    p = torch.nn.Parameter(memory.view(torch.float32))
    p.data = memory.view(torch.float32)
    optimizer = ak.AIMFusedOptimizer([p], lr=0.1, backend="cpu")
    p.grad = torch.ones(16)
    optimizer.step()
    memory.zero_()
    p.grad, p.data = None, memory.view(torch.bfloat16)[:16]
    p.grad = torch.ones(16, dtype=torch.bfloat16)
    optimizer.step()
    assert not memory[32:].any(), "no byte behind the parameter is written"
    assert torch.equal(p.detach(), torch.full((16,), -0.1, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step", "max_exp_avg_sq"])
def test_any_state_that_is_given_other_memory_is_read_there(name: str, backend: str) -> None:
    def trained(replaced: bool) -> dict[str, Any]:
        torch.manual_seed(2)
        params = [torch.nn.Parameter(torch.ones(size)) for size in (5, 9)]
        optimizer = ak.AIMFusedOptimizer(params, lr=0.1, amsgrad=True, backend=backend)
        for number in range(4):
            for p in params:
                p.grad = torch.randn_like(p)
            if number == 2:
                state = optimizer.state[params[1]][name]
                if replaced:
                    state.data = state.clone() * 0.5
                else:
                    state.mul_(0.5)
            optimizer.step()
        return frozen(optimizer)

    same_bits(trained(True), trained(False))


def test_states_that_parameters_share_are_counted_in_turn() -> None:
    found = []
    for make in both("adamw"):
        torch.manual_seed(3)
        params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
        optimizer = make(params)
        for number in range(4):
            if number == 2:
                optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        found.append(torch.stack([p.detach() for p in params]))
    agree(*found)


def test_a_state_without_memory_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(8))
    optimizer = ak.AIMFusedOptimizer([("w", p)], lr=0.1)
    p.grad = torch.ones(8)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = torch._efficientzerotensor(8)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"'w'.*exp_avg has no memory"):
        optimizer.step()
    assert torch.equal(p, before)


def test_a_state_that_is_cut_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(8))
    optimizer = ak.AIMFusedOptimizer([("w", p)], lr=0.1)
    p.grad = torch.ones(8)
    optimizer.step()
    optimizer.state[p]["exp_avg_sq"].data = optimizer.state[p]["exp_avg_sq"].data[:4]
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"'w'.*exp_avg_sq.*\(4,\)"):
        optimizer.step()
    assert torch.equal(p, before)


# -- gradients without memory, or to be read in another way ------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_of_zeros_without_memory_is_read_as_zeros(rule: str, backend: str) -> None:
    found = []
    for make in both(rule, backend):
        p = torch.nn.Parameter(torch.linspace(1, 2, 7))
        optimizer = make([p])
        for grad in (torch.ones(7), torch._efficientzerotensor(7), torch.ones(7), torch._efficientzerotensor(7)):
            p.grad = grad
            optimizer.step()
        found.append(p.detach())
    agree(*found)


@pytest.mark.parametrize("kept", [0, 16])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_whose_storage_was_freed_or_cut_is_refused(first: bool, kept: int) -> None:
    p, q = (torch.nn.Parameter(torch.ones(8)) for _ in range(2))
    optimizer = ak.AIMFusedOptimizer([("p", p), ("q", q)], lr=0.1)
    if not first:
        p.grad, q.grad = torch.ones(8), torch.ones(8)
        optimizer.step()
    p.grad, q.grad = torch.ones(8), torch.ones(8)
    q.grad.untyped_storage().resize_(kept)
    before = frozen(optimizer)
    with pytest.raises(RuntimeError, match=r"'q'.*no memory"):
        optimizer.step()
    same_bits(frozen(optimizer), before)


@pytest.mark.parametrize("first", [True, False])
def test_a_parameter_whose_storage_was_freed_is_refused(first: bool) -> None:
    p = torch.nn.Parameter(torch.ones(8))
    optimizer = ak.AIMFusedOptimizer([("p", p)], lr=0.1)
    p.grad = torch.ones(8)
    if not first:
        optimizer.step()
    p.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError), match=r"'p'.*no memory"):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 5])
def test_a_gradient_that_is_negated_when_it_is_read(size: int, backend: str) -> None:
    found = []
    for make in both("adamw", backend):
        p = torch.nn.Parameter(torch.ones(size))
        optimizer = make([p])
        for number in range(4):
            values = torch.linspace(1, 2, size) * (number + 1)
            p.grad = torch._neg_view(values) if number % 2 else values
            assert p.grad.is_neg() == bool(number % 2)
            optimizer.step()
        found.append(p.detach())
    agree(*found)


def test_one_element_of_a_complex_model_goes_downhill() -> None:
    """Autograd's gradient of the imaginary part of a conjugate is a view that is to be negated."""

    def trained(make: Callable[[list[Tensor]], Any]) -> float:
        torch.manual_seed(4)
        real, imaginary = (torch.nn.Parameter(torch.randn(1)) for _ in range(2))
        optimizer, seen = make([real, imaginary]), False
        for _ in range(300):
            optimizer.zero_grad()
            value = torch.complex(real, imaginary).conj()
            loss = (value * torch.tensor([1 + 2j]) - torch.tensor([0.3 + 0.4j])).abs().square().sum()
            loss.backward()
            seen |= imaginary.grad.is_neg()  # type: ignore[union-attr]
            optimizer.step()
        assert seen, "autograd makes no such gradient here any more"
        return loss.item()

    theirs, ours = map(trained, both("adamw"))
    assert theirs < 1e-4 and ours == pytest.approx(theirs, abs=1e-6)


def test_wrappers_of_tensors_are_named() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    wrapper = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    with pytest.raises(ValueError, match=r"'w'.*TwoTensor"):
        ak.AIMFusedOptimizer([("w", wrapper)])
    plain = torch.nn.Parameter(torch.ones(3))
    optimizer = ak.AIMFusedOptimizer([("w", plain)])
    plain.grad = TwoTensor(torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match=r"'w'.*TwoTensor"):
        optimizer.step()


# -- shapes without numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "sgd", "momentum": 0.9, "max_grad_norm": 1.0},
        {"rule": "adagrad", "initial_accumulator_value": 0.1},
        {"state_dtype": "int8", "master": "split", "ema_decay": 0.9},
    ],
    ids=str,
)
def test_a_step_of_shapes_makes_the_states_of_a_real_one(options: dict[str, Any], inside: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def shapes(state: dict[str, Any]) -> dict[str, Any]:
        return {name: (value.shape, value.dtype, value.device.type) for name, value in state.items()}

    def stepped(params: list[Tensor], optimizer: ak.AIMFusedOptimizer) -> list[dict[str, Any]]:
        for _ in range(2):
            optimizer.zero_grad()
            sum(p.float().square().sum() for p in params).backward()  # type: ignore[union-attr]
            optimizer.step()
        assert len(optimizer.state_dict()["state"]) == len(params)
        return [shapes(optimizer.state[p]) for p in params]

    def made() -> list[Tensor]:
        return [torch.nn.Parameter(torch.ones(70, 80, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(3))]

    real = made()
    wanted = stepped(real, ak.AIMFusedOptimizer(real, **options))
    mode = FakeTensorMode()
    with mode:
        params = made()
        optimizer = ak.AIMFusedOptimizer(params, **options) if inside else None
    optimizer = optimizer or ak.AIMFusedOptimizer(params, **options)
    with mode:
        assert stepped(params, optimizer) == wanted
        assert optimizer.modulation()[0]["tau"] == 0.0
    assert all(isinstance(value, FakeTensor) for value in optimizer.state[params[0]].values())


def test_masters_of_shapes_come_and_go() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        _, optimizer = _degraded()
        for call in ("eval", "state_dict", "train", "begin_true_pass", "begin_live_pass", "step"):
            getattr(optimizer, call)()
        (state,) = optimizer.state.values()
    assert isinstance(state["master"], FakeTensor)


@pytest.mark.parametrize("degraded", [True, False])
def test_a_parameter_with_numbers_is_not_stepped_among_shapes(degraded: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if degraded:
        p, optimizer = _degraded()
    else:
        p = torch.nn.Parameter(torch.ones(6))
        optimizer = ak.AIMFusedOptimizer([("p", p)])
    before = frozen(optimizer)
    p.grad = torch.ones(6)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=r"'p'.*FakeTensorMode"):
        optimizer.step()
    same_bits(frozen(optimizer), before)


@pytest.mark.parametrize("call", ["eval", "begin_true_pass", "step"])
def test_a_degraded_parameter_of_another_shape_is_named(call: str) -> None:
    p, optimizer = _degraded()
    p.data, p.grad = torch.ones(9), torch.ones(9)
    with pytest.raises(RuntimeError, match=r"'p'.*its state master has shape \(6,\).*the parameter \(9,\)"):
        getattr(optimizer, call)()
    assert (p == 1).all()


def _degraded() -> tuple[torch.nn.Parameter, ak.AIMFusedOptimizer]:
    p = torch.nn.Parameter(torch.ones(6))
    optimizer = ak.AIMFusedOptimizer([{"params": [("p", p)], "modality": "a", "depth": 0, "modulated": True}], lr=0.1)
    optimizer.set_strength("a", 0, 0.5)
    p.grad = torch.ones(6)
    optimizer.step()
    return p, optimizer


# -- memory that several share -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tie", ["same", "overlapping", "views of one", "strided", "three"])
def test_parameters_over_one_memory_take_turns(tie: str, rule: str, backend: str) -> None:
    size = 40_000  # more than one unit of work, so that threads would meet

    def tied() -> tuple[Tensor, list[Tensor]]:
        memory = torch.linspace(-1, 1, 2 * size)
        parts = {
            "same": [memory[:size], memory[:size]],
            "overlapping": [memory[:size], memory[size // 2 : size // 2 + size]],
            "views of one": [memory[:size], memory[:size].view(size // 8, 8)],
            "strided": [memory[::2], memory[:size]],
            "three": [memory[:size], memory[: size // 2], memory[10 : size // 2 + 10]],
        }[tie]
        params = [torch.nn.Parameter(torch.zeros_like(part)) for part in parts]
        for p, part in zip(params, parts, strict=True):
            p.data = part
        return memory, params

    found = []
    for make in both(rule, backend):
        memory, params = tied()
        optimizer = make(params)
        torch.manual_seed(5)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        found.append(memory)
    agree(*found)


def test_shared_memory_is_refused_in_backward() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight.data = model[0].weight.data
    optimizer = ak.AIMFusedOptimizer(model.named_parameters(), lr=0.1, backend="cpu")
    ak.step_in_backward(optimizer, model)
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"'1.weight'.*shares memory"):
        model(torch.ones(2, 3)).sum().backward()
    assert torch.equal(model[0].weight, before)


def test_shared_memory_with_live_weights_is_refused() -> None:
    p, q = (torch.nn.Parameter(torch.ones(6)) for _ in range(2))
    q.data = p.data
    groups = [{"params": [("p", p), ("q", q)], "modality": "a", "depth": 0, "modulated": True}]
    optimizer = ak.AIMFusedOptimizer(groups, lr=0.1)
    optimizer.set_strength("a", 0, 0.5)
    p.grad, q.grad = torch.ones(6), torch.ones(6)
    with pytest.raises(RuntimeError, match=r"'p'.*and 'q'.*share memory"):
        optimizer.step()
    assert (p == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alias", ["its parameter", "another state", "a part of another state"])
def test_a_state_in_the_memory_of_another_is_refused(alias: str, backend: str) -> None:
    memory = torch.zeros(12)
    p = torch.nn.Parameter(torch.ones(8))
    optimizer = ak.AIMFusedOptimizer([("p", p)], lr=0.1, backend=backend)
    p.grad = torch.ones(8)
    optimizer.step()
    state, before = optimizer.state[p], p.detach().clone()
    state["exp_avg_sq"] = memory[:8]
    state["exp_avg"] = {"its parameter": p.data, "another state": memory[:8]}.get(alias, memory[4:])
    with pytest.raises(RuntimeError, match=r"'p'.*share memory; give each its own"):
        optimizer.step()
    assert torch.equal(p, before) and not memory.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", ["one tensor", "views", "overlapping views", "no memory"])
def test_a_gradient_of_several_parameters_is_cleared_after_all_have_read_it(share: str, backend: str) -> None:
    found = []
    for make in both("adamw", backend):
        params = [torch.nn.Parameter(torch.ones(50)) for _ in range(3)]
        optimizer = make(params)
        ours = isinstance(optimizer, ak.AIMFusedOptimizer)
        if ours:
            optimizer.zero_grad_in_step = True
        torch.manual_seed(6)
        for _ in range(3):
            memory = torch.randn(60)
            first = torch._efficientzerotensor(50) if share == "no memory" else memory[:50]
            second = {"views": memory[:50], "overlapping views": memory[10:]}.get(share, first)
            for p, grad in zip(params, (first, second, torch.randn(50)), strict=True):
                p.grad = grad
            optimizer.step()
            if ours:
                assert not any(p.grad.any() for p in params)
        found.append(torch.stack([p.detach() for p in params]))
    agree(*found)


# -- states have their own size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16"}, {"amsgrad": True, "ema_decay": 0.9}], ids=str)
def test_the_state_of_one_parameter_takes_its_own_bytes(options: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.randn(1000)) for _ in range(50)]
    optimizer = ak.AIMFusedOptimizer(params, **options)
    for p in params:
        p.grad = torch.randn(1000)
    optimizer.step()
    state = optimizer.state[params[7]]
    own = sum(value.numel() * value.element_size() for value in state.values())
    for value in (*state.values(), *copy.deepcopy(state).values()):
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    saved = io.BytesIO()
    torch.save(state, saved)
    assert own < len(saved.getvalue()) < own + 4000
    assert own < len(pickle.dumps(state)) < own + 4000
    again = pickle.loads(pickle.dumps(state))
    same_bits({name: value.clone() for name, value in again.items()}, {n: v.clone() for n, v in state.items()})


def test_states_side_by_side_have_one_version_and_keep_their_memory() -> None:
    params = [torch.nn.Parameter(torch.randn(30)) for _ in range(3)]
    optimizer = ak.AIMFusedOptimizer(params)
    for p in params:
        p.grad = torch.ones(30)
    optimizer.step()
    kept = optimizer.state[params[1]]["exp_avg"]
    before, values = kept._version, kept.clone()
    for p in params:
        p.grad = torch.ones(30)
    optimizer.step()
    assert kept._version > before, "a backward through what it was must fail"
    values = kept.clone()
    del optimizer, params
    torch.randn(10_000)
    assert torch.equal(kept, values)


def _small_states() -> list[Tensor]:
    params = [torch.nn.Parameter(torch.randn(30)) for _ in range(3)]
    optimizer = ak.AIMFusedOptimizer(params)
    for p in params:
        p.grad = torch.ones(30)
    optimizer.step()
    return [optimizer.state[p]["exp_avg"] for p in params]


@pytest.mark.usefixtures("own_graphs")
def test_a_compiled_function_writes_the_states_it_is_given() -> None:
    states = _small_states()

    @torch.compile(backend="aot_eager")
    def fill(states: list[Tensor]) -> None:
        for number, state in enumerate(states):
            state.fill_(number + 1.0)

    fill(states)
    assert [state.unique().tolist() for state in states] == [[1.0], [2.0], [3.0]]


def test_a_state_that_moves_leaves_its_buffer() -> None:
    stays, moves, _ = _small_states()
    buffer = buffer_of(stays)
    assert buffer is not stays and buffer_of(moves) is buffer
    moves.data = moves.clone()
    assert buffer_of(moves) is moves and buffer_of(stays) is buffer
