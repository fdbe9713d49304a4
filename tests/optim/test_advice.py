"""Advice that errors give, followed to the letter: what it says works, and has the bits of the plain step."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import frozen, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import aim_kernels as ak

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., Any]


class Net(nn.Module):
    """Two layers of one size, and a head. ``way`` says what is run in a checkpoint."""

    def __init__(self, way: Callable[[Net, Tensor, Run], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.head = nn.Linear(6, 3)
        self.way, self.reentrant = way, True

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def scaled(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale)

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x, functools.partial(checkpoint, use_reentrant=self.reentrant))


@dataclass
class Answer:
    logits: Tensor
    note: str = ""


def closed(module: nn.Module) -> Run:
    return lambda x: module(x)


#: Ways in which a weight gets its gradient in parts.
SHARED: dict[str, Callable[[Net, Tensor, Run], Any]] = {
    "twice": lambda net, x, run: net.head(run(net.first, run(net.first, x))),
    "before": lambda net, x, run: net.head(run(net.first, net.first(x))),
    "after": lambda net, x, run: net.head(net.first(run(net.first, x))),
    "with another between": lambda net, x, run: net.head(run(net.first, run(net.second, run(net.first, x)))),
    "within two others": lambda net, x, run: net.head(
        run(nn.Sequential(net.first, net.second), run(nn.Sequential(net.second, nn.Tanh()), x))
    ),
    "a method": lambda net, x, run: net.head(run(net.block, run(net.block, x))),
    "a plain parameter": lambda net, x, run: net.head(run(net.scaled, run(net.scaled, x))),
    "a closure": lambda net, x, run: net.head(run(closed(net.first), run(closed(net.first), x))),
    "a default": lambda net, x, run: net.head(run(lambda x, m=net.first: m(x), run(lambda x, m=net.first: m(x), x))),
    "a partial": lambda net, x, run: net.head(
        run(functools.partial(nn.functional.linear, weight=net.first.weight), run(net.first, x))
    ),
    "a list": lambda net, x, run: net.head(run(lambda x, ms=[net.first]: ms[0](x), run(net.first, x))),
    "in a dict": lambda net, x, run: {"logits": net.head(run(net.first, run(net.first, x))), "note": "a"},
    "in a dataclass": lambda net, x, run: Answer(net.head(run(net.first, run(net.first, x)))),
    "in a tuple": lambda net, x, run: (net.head(x), net.head(run(net.first, run(net.first, x)))),
}

#: Ways in which it does not, so that reentrant checkpoints can be had.
APART: dict[str, Callable[[Net, Tensor, Run], Any]] = {
    "once each": lambda net, x, run: net.head(run(net.second, run(net.first, x))),
    "a part": lambda net, x, run: net.head(net.second(run(net.first, x))),
    "closures": lambda net, x, run: net.head(run(closed(net.second), run(closed(net.first), x))),
    "twice in one": lambda net, x, run: net.head(run(nn.Sequential(net.first, net.first), x)),
    "given as an input": lambda net, x, run: net.head(
        run(nn.functional.linear, run(nn.functional.linear, x, net.first.weight), net.first.weight)
    ),
}


def loss_of(found: Any) -> Tensor:
    if isinstance(found, dict):
        found = found["logits"]
    if isinstance(found, Answer):
        found = found.logits
    return sum(each.square().mean() for each in found) if isinstance(found, tuple) else found.square().mean()


class Pair:
    """The same training twice: plain, and with steps in backward."""

    def __init__(self, way: Callable[[Net, Tensor, Run], Any], *, reentrant: bool) -> None:
        torch.manual_seed(0)
        self.models = [Net(way), Net(way)]
        self.models[1].load_state_dict(self.models[0].state_dict())
        for model in self.models:
            model.reentrant = reentrant
        self.optimizers = [ak.AIMFusedOptimizer(model.parameters(), lr=0.01) for model in self.models]
        self.release = ak.step_in_backward(self.optimizers[1], self.models[1])
        self.random = torch.Generator().manual_seed(1)

    def batch(self) -> Tensor:
        return torch.randn(5, 6, generator=self.random).requires_grad_()

    def step(self) -> None:
        x = self.batch()
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            loss_of(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
        same_bits(*map(frozen, self.optimizers))


@pytest.mark.parametrize("way", SHARED)
def test_weights_that_get_their_gradient_in_parts_are_refused_before_anything_is_written(way: str) -> None:
    pair = Pair(SHARED[way], reentrant=True)
    model, optimizer = pair.models[1], pair.optimizers[1]
    model.reentrant = False
    pair.models[0].reentrant = False
    pair.step()
    before = frozen(optimizer)
    model.reentrant = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(first|second|scale).*in parts.*use_reentrant=False"):
            loss_of(model(pair.batch())).backward()
        same_bits(before, frozen(optimizer))
        assert all(p.grad is None for p in model.parameters())
        assert not pair.release.is_open
    model.reentrant = False
    pair.step()


@pytest.mark.parametrize("way", [*SHARED, *APART])
def test_the_other_kind_of_checkpoint_has_the_bits_of_the_plain_step(way: str) -> None:
    pair = Pair({**SHARED, **APART}[way], reentrant=False)
    for _ in range(3):
        pair.step()


@pytest.mark.parametrize("way", APART)
def test_weights_of_one_reentrant_checkpoint_are_stepped_in_it(way: str) -> None:
    pair = Pair(APART[way], reentrant=True)
    for _ in range(3):
        pair.step()
    loss_of(pair.models[1](pair.batch())).backward()
    assert all(p.grad is None for p in pair.models[1].parameters())
    pair.optimizers[1].step()


def test_checkpoint_sequential() -> None:
    """Its pieces all reach the whole list, so that nobody can tell them apart: refused, and the other kind works."""

    def way(net: Net, x: Tensor, run: Run) -> Tensor:
        reentrant = run.keywords["use_reentrant"]  # type: ignore[attr-defined]
        return net.head(checkpoint_sequential([net.first, net.second, nn.Tanh()], 3, x, use_reentrant=reentrant))

    Pair(way, reentrant=False).step()
    pair = Pair(way, reentrant=True)
    before = frozen(pair.optimizers[1])
    with pytest.raises(RuntimeError, match=r"first\.weight.*use_reentrant=False"):
        pair.step()
    same_bits(before, frozen(pair.optimizers[1]))


def test_gradients_that_only_add_up_may_come_in_parts() -> None:
    """In accumulate() nothing is stepped, so there is nothing to refuse; and what was added up stays when the backward
    after it is refused."""
    pair = Pair(SHARED["after"], reentrant=True)
    x = pair.batch()
    with pair.release.accumulate():
        for model in pair.models:
            loss_of(model(x)).backward()
    grads = [None if p.grad is None else p.grad.clone() for p in pair.models[1].parameters()]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss_of(pair.models[1](x)).backward()
    same_bits([g for g in grads if g is not None], [p.grad for p in pair.models[1].parameters() if p.grad is not None])
    for optimizer in pair.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    same_bits(*map(frozen, pair.optimizers))


def test_the_model_itself_in_two_checkpoints() -> None:
    """It is never called with a graph around it, and known by that it is called without."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = ak.AIMFusedOptimizer(model.parameters())
    release = ak.step_in_backward(optimizer, model)
    before = frozen(optimizer)
    x = torch.ones(2, 4, requires_grad=True)

    def loss(*, reentrant: bool) -> Tensor:
        return checkpoint(model, checkpoint(model, x, use_reentrant=reentrant), use_reentrant=reentrant).sum()

    with pytest.raises(RuntimeError, match=r"(weight|bias).*use_reentrant=False"):
        loss(reentrant=True).backward()
    same_bits(before, frozen(optimizer))
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    same_bits(before, frozen(optimizer))
    with torch.no_grad():  # what validation does counts for nothing
        for _ in range(3):
            model(torch.ones(2, 4))
    loss(reentrant=False).backward()
    optimizer.step()
    checkpoint(model, x, use_reentrant=True).sum().backward()
    optimizer.step()
    with release.accumulate():
        loss(reentrant=True).backward()
    checkpoint(model, x, use_reentrant=True).sum().backward()
    optimizer.step()
    assert optimizer.tables.control[1] == 3


def test_a_second_part_that_nobody_saw_coming_names_the_way_out() -> None:
    """Where the model is not called as a whole the second part is refused when it comes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = ak.AIMFusedOptimizer(model.parameters())
    ak.step_in_backward(optimizer, model)
    x = torch.ones(2, 4, requires_grad=True)
    hidden = checkpoint(model[0], checkpoint(model[0], x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"0\.(weight|bias).*use_reentrant=False"):
        hidden.sum().backward()


def test_hooks_on_the_model_do_not_follow_it() -> None:
    """Copies, pickles, a compiled model, and one that is let go of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = ak.AIMFusedOptimizer(model.parameters())
    with pytest.raises(ValueError, match="none of the optimizer's parameters"):
        ak.step_in_backward(optimizer, other := nn.Linear(2, 2))
    assert not other._forward_hooks
    release = ak.step_in_backward(optimizer, model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        twin(torch.ones(1, 4)).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.ones(1, 4)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    release.remove()
    assert not model._forward_hooks


# -- other errors ------------------------------------------------------------------------------------------------------


def advised(words: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=words):
        call()


def test_complex_parameters_as_real_ones() -> None:
    """The real tensor is the parameter, and the forward pass takes it as complex: torch.optim's steps of the complex
    one are the same, as torch takes those as real ones too."""
    values = torch.randn(3, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    theirs = nn.Parameter(values.clone())
    advised(
        r"parameter 0 of group 0.*torch\.view_as_real\(parameter\)\.detach\(\) the nn\.Parameter.*view_as_complex",
        lambda: ak.AIMFusedOptimizer([theirs]),
    )
    ours = nn.Parameter(torch.view_as_real(theirs).detach().clone())
    expected, optimizer = torch.optim.AdamW([theirs], lr=0.1), ak.AIMFusedOptimizer([ours], lr=0.1)
    for step in range(4):
        weight = torch.full((2,), 1.0 + step, dtype=torch.complex64)
        for each in (theirs, torch.view_as_complex(ours)):
            (each @ weight).abs().square().sum().backward()
        for each in (expected, optimizer):
            each.step()
            each.zero_grad()
        torch.testing.assert_close(torch.view_as_complex(ours), theirs, rtol=1e-5, atol=1e-6)


def test_parameters_of_other_kinds_made_into_what_is_advised() -> None:
    for bad, words, made in (
        (
            torch.eye(3).to_sparse().requires_grad_(),
            r"nn\.Parameter\(parameter\.detach\(\)\.to_dense\(\)\)",
            "to_dense",
        ),
        (torch.ones(1).expand(4).requires_grad_(), r"nn\.Parameter\(parameter\.detach\(\)\.clone\(\)\)", "clone"),
        (nn.Parameter(torch.ones(3)) * 2, r"nn\.Parameter\(tensor\.detach\(\)\)", "detach"),
    ):
        advised(words, lambda bad=bad: ak.AIMFusedOptimizer([bad]))  # type: ignore[misc]
        p = nn.Parameter(getattr(bad.detach(), made)())
        optimizer = ak.AIMFusedOptimizer([p], lr=0.5)
        before = p.detach().clone()
        p.sum().backward()
        optimizer.step()
        assert (p != before).all()
    model = nn.Linear(2, 2, device="meta")
    advised(r"meta device.*module\.to_empty", lambda: ak.AIMFusedOptimizer(model.parameters()))
    ak.AIMFusedOptimizer(model.to_empty(device="cpu").parameters())
    wide, half = (nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float64, torch.float16))
    advised("state_dtype=None", lambda: ak.AIMFusedOptimizer([wide], state_dtype="int8"))
    ak.AIMFusedOptimizer([{"params": [wide], "state_dtype": None}], state_dtype="int8")
    advised("use 'kahan' or 'float32'", lambda: ak.AIMFusedOptimizer([half], master="split"))
    for master in ("kahan", "float32"):
        ak.AIMFusedOptimizer([half], master=master)


def test_gradients_that_do_not_fit() -> None:
    model = nn.Linear(3, 2)
    optimizer = ak.AIMFusedOptimizer(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    model.weight.data = torch.ones(2, 5)
    advised(r"call zero_grad\(\) and run backward\(\) again", optimizer.step, RuntimeError)
    optimizer.zero_grad()
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    assert (model.weight != 1).all()
    model(torch.ones(1, 5)).sum().backward()
    model.double()
    for p in model.parameters():  # as one that was made before the weights changed their type
        p.data = p.data.float()
    advised("cast one of them", optimizer.step, RuntimeError)
    for p in model.parameters():
        p.grad = p.grad.to(p.dtype)
    optimizer.step()


def test_states_that_do_not_fit() -> None:
    model = nn.Linear(3, 2)
    optimizer = ak.AIMFusedOptimizer(model.parameters())
    for width in (3, 5):
        model.weight.data = torch.ones(2, width)
        optimizer.zero_grad()
        model(torch.ones(1, width)).sum().backward()
        if width == 5:
            advised(r"delete optimizer\.state\[parameter\] to start it anew", optimizer.step, RuntimeError)
            del optimizer.state[model.weight]
        optimizer.step()
        assert optimizer.state[model.weight]["exp_avg"].shape == model.weight.shape
        assert float(optimizer.state[model.weight]["step"]) == 1
    group = {"params": [model.weight], "modality": "a", "depth": 0, "modulated": True}
    optimizer = ak.AIMFusedOptimizer([group], anchor="init")
    model.weight.data = torch.ones(2, 7)
    model.weight.grad = torch.ones(2, 7)
    advised("its state anchor.*make a new optimizer", optimizer.step, RuntimeError)
    optimizer = ak.AIMFusedOptimizer([group], anchor="init")
    optimizer.step()


def test_options_that_are_advised() -> None:
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)

    def stepped(group: dict[str, Any] | None = None, **options: Any) -> ak.AIMFusedOptimizer:
        optimizer = ak.AIMFusedOptimizer([{"params": [p], **(group or {})}], **options)
        optimizer.step()
        return optimizer

    block = {"modality": "a", "depth": 0, "modulated": True}
    advised("pass backend='reference'", lambda: stepped(measure="random"))
    stepped(measure="random", backend="reference")
    advised(
        r"give \('fraction', q\)",
        lambda: stepped(measure="random", backend="reference", under_optimized=("absolute", 0.1)),
    )
    stepped(measure="random", backend="reference", under_optimized=("fraction", 0.1))
    advised("give it an ema_decay such as 0.999", lambda: stepped(block, anchor="ema"))
    stepped({**block, "ema_decay": 0.999}, anchor="ema")
    advised("leave it 'stochastic'", lambda: stepped(state_dtype="int8", rounding="nearest"))
    stepped(state_dtype="int8", rounding="stochastic")
    for option, rule in (("amsgrad", "sgd"), ("centered", "adamw"), ("decouple_lr", "sgd"), ("nesterov", "lion")):
        advised("leave it False", lambda option=option, rule=rule: stepped(rule=rule, **{option: True}))  # type: ignore[misc]
        stepped(rule=rule, **{option: False})
    advised("leave it 0", lambda: stepped(rule="rmsprop", momentum=0.9, dampening=0.1))
    stepped(rule="rmsprop", momentum=0.9, dampening=0)
    optimizer = stepped(rule="sgd")
    advised("give the group modulated=True", lambda: optimizer.set_modulation(0, grad_well=0.5))
    optimizer.param_groups[0]["modulated"] = True
    optimizer.set_modulation(0, grad_well=0.5)
    optimizer.step()
    assert optimizer.tables.public_row(0)["grad_well"] == 0.5
    advised("pass it to its constructor", lambda: stepped({"max_grad_norm": 1.0}))
    stepped(max_grad_norm=1.0)
    advised("pass a list", lambda: ak.AIMFusedOptimizer({p}), TypeError)  # type: ignore[arg-type]
    ak.AIMFusedOptimizer([p])


def test_what_is_advised_inside_of_a_compiled_function(own_graphs: None) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = ak.AIMFusedOptimizer(model.parameters(), zero_grad_in_step=True)

    def train(x: Tensor) -> None:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    advised(
        r"set optimizer\.zero_grad_in_step = False, and call zero_grad\(\)",
        lambda: torch.compile(train, backend="eager")(torch.ones(1, 3)),
        Exception,
    )
    torch._dynamo.reset()
    optimizer.zero_grad_in_step = False
    before = model.weight.detach().clone()
    torch.compile(train, backend="eager")(torch.ones(1, 3))
    assert (model.weight != before).all()

    torch._dynamo.reset()
    ak.step_in_backward(optimizer, model)
    model(torch.ones(1, 3)).sum().backward()

    def closed_in(how: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            y = x * 2
            how()
            return y + 1

        return torch.compile(function, backend="eager")

    advised(
        r"call torch\.compiler\.disable\(optimizer\.step\)\(\) there instead",
        lambda: closed_in(lambda: optimizer.step())(torch.ones(1)),
        Exception,
    )
    torch._dynamo.reset()
    steps = int(optimizer.tables.control[1])
    assert closed_in(lambda: torch.compiler.disable(optimizer.step)())(torch.ones(1)) == 3
    assert int(optimizer.tables.control[1]) == steps + 1
