"""``step_in_backward`` against the plain step, bit for bit: parameters, states, rows, statistics, control."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends_under_test import enter
from helpers import AUX_PHASE, TRUE_PHASE, frozen, same_bits
from torch import nn

import aim_kernels as ak

pytestmark = pytest.mark.usefixtures("one_thread")


class Tied(nn.Module):
    """One weight that is used twice, and a module that is not used in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.spare = nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24)
        self.embedding = nn.Embedding(300, 24)
        self.use_spare = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embedding((x.abs().sum(1) * 10).long() % 300)
        hidden = self.norm(self.first(tokens).relu())
        if self.use_spare:
            hidden = hidden + self.spare(hidden)
        return hidden @ self.embedding.weight.T


def mlp() -> nn.Module:
    # The second weight has several chunks, so that the order of the sums matters.
    return nn.Sequential(nn.Linear(24, 160), nn.GELU(), nn.Linear(160, 160), nn.GELU(), nn.Linear(160, 5))


def conv() -> nn.Module:
    body = nn.Sequential(nn.Unflatten(1, (2, 3, 4)), nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(body, nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(48, 5)).to(memory_format=torch.channels_last)


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "tied": Tied, "conv": conv}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"rule": "adamw", "weight_decay": 0.1},
    "sgd": {"rule": "sgd", "momentum": 0.9},
    "lion": {"rule": "lion", "lr": 1e-3},
    "int8": {"state_dtype": "int8"},
    "bfloat16": {"state_dtype": "bfloat16", "ema_decay": 0.9},
    "anchor": {"anchor": "init", "zero_grad_in_step": True},
    "average": {"anchor": "ema", "ema_decay": 0.9, "measure": "fisher"},
    "absolute": {"under_optimized": ("absolute", 0.3), "maximize": True},
}


def optimizer_of(model: nn.Module, backend: str, **options: Any) -> ak.AIMFusedOptimizer:
    """Two groups that share the layers in turn; weights of the first may be degraded."""
    params = list(model.parameters())
    groups = [
        {"params": params[::2], "modality": "audio", "depth": 0, "modulated": True},
        {"params": params[1::2], "modality": "video", "depth": 0, "modulated": True},
    ]
    return ak.AIMFusedOptimizer(groups, **({"lr": 3e-3, "seed": 7, "backend": backend} | options))


class Pair:
    """The same training twice: plain, and with steps in backward."""

    def __init__(self, model: str = "mlp", backend: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any):
        torch.manual_seed(0)
        self.models = [MODELS[model]().to(dtype)]
        self.models.append(copy.deepcopy(self.models[0]))
        self.optimizers = [optimizer_of(each, backend, **options) for each in self.models]
        self.release = ak.step_in_backward(self.optimizers[1], self.models[1])
        self.dtype, self.random = dtype, torch.Generator().manual_seed(1)

    def backward(self) -> None:
        x = torch.randn(16, 24, generator=self.random).to(self.dtype)
        for model in self.models:
            model(x).float().square().mean().backward()

    def step(self) -> None:
        """A step of both; the plain one alone needs zero_grad()."""
        self.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.optimizers[0].zero_grad()
        assert all(p.grad is None for p in self.models[1].parameters())

    def each(self, call: Callable[[ak.AIMFusedOptimizer], Any]) -> None:
        for optimizer in self.optimizers:
            call(optimizer)

    def agree(self, *, sums: bool = True) -> None:
        one, other = (frozen(optimizer) for optimizer in self.optimizers)
        if not sums:  # added up in another order
            close = torch.testing.assert_close
            close(one.pop("statistics"), other.pop("statistics"), rtol=1e-5, atol=1e-4, equal_nan=True)
        same_bits(one, other)
        same_bits(*(list(model.buffers()) for model in self.models))


def train(pair: Pair, *, noise: bool = True, steps: int = 3, sums: bool = True) -> None:
    """Plain steps, degraded ones, phases, noise, other strengths, none again."""
    changes: list[Callable[[ak.AIMFusedOptimizer], Any]] = [
        lambda o: None,
        lambda o: o.set_strength("audio", 0, 0.4),
        lambda o: o.set_phase_rows(1, true=TRUE_PHASE, aux=AUX_PHASE) or o.set_phases(0.5),
        lambda o: o.set_modulation(0, noise=0.3 if noise else 0.0, step_well=0.5),
        lambda o: o.set_strength("video", 0, 0.2, "step"),
        lambda o: o.set_strength("audio", 0, 0.0) or o.set_strength("video", 0, 0.0),
    ]
    for number, change in enumerate(changes):
        pair.each(change)
        for step in range(steps):
            for model in pair.models:
                if isinstance(model, Tied):
                    model.use_spare = (number + step) % 3 == 2
            pair.step()
            pair.agree(sums=sums)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_has_the_bits_of_the_plain_step(backend: str, model: str, options: str) -> None:
    train(Pair(model, backend, **OPTIONS[options]))


@pytest.mark.parametrize("master", [None, "stochastic", "kahan", "split", "float32"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_16_bit_parameters(backend: str, master: str | None) -> None:
    train(Pair("tied", backend, torch.bfloat16, master=master, state_dtype="int8"), steps=2)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_on_devices(backend: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = enter(backend, monkeypatch)
    # The noise's deviation comes from the sums, which a device adds up in another order.
    train(Pair("tied", name, **OPTIONS[rule]), noise=False, steps=1 if backend == "triton" else 2, sums=False)


def test_several_threads_have_the_same_bits() -> None:
    torch.set_num_threads(2)
    train(Pair("mlp"))


def test_gradients_add_up_in_accumulate() -> None:
    pair = Pair("tied")
    for _ in range(4):
        with pair.release.accumulate():
            pair.backward()
            with pair.release.accumulate():
                for model in pair.models:
                    model.use_spare = False
                pair.backward()
        assert pair.optimizers[1].tables.control[1] == pair.optimizers[0].tables.control[1]
        pair.step()  # steps also what got its gradient inside only
        pair.agree()
        for model in pair.models:
            model.use_spare = True
    with pair.release.accumulate():
        pair.backward()
    pair.each(lambda o: o.step())
    pair.optimizers[0].zero_grad()
    pair.agree()
    assert all(p.grad is None for p in pair.models[1].parameters())


def test_schedulers() -> None:
    pair = Pair("mlp")
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8) for o in pair.optimizers]
    for _ in range(8):
        pair.step()
        for scheduler in schedulers:
            scheduler.step() if scheduler.last_epoch < 7 else None
    pair.agree()


def test_what_is_set_between_backward_and_step_holds_from_the_next_step_on() -> None:
    pair = Pair("mlp")
    plain, released = pair.optimizers
    settings: list[Callable[[ak.AIMFusedOptimizer], Any]] = [
        lambda o: o.set_strength("audio", 0, 0.4),
        lambda o: o.set_strength("audio", 0, 0.7, "step"),
        lambda o: o.set_phases(0.5) or o.set_phase_rows(1, true=TRUE_PHASE, aux=AUX_PHASE),
        lambda o: o.set_strength("audio", 0, 0.0),
        lambda o: o.set_strength("audio", 0, 0.3),
        lambda o: [group.update(lr=1e-2, weight_decay=0.2) for group in o.param_groups],
    ]
    for setting in settings:
        pair.backward()
        setting(released)
        pair.each(lambda o: o.step())
        plain.zero_grad()
        setting(plain)
        for _ in range(2):
            pair.step()
            pair.agree()


def test_checkpoints_in_between() -> None:
    pair = Pair("tied", state_dtype="int8")
    pair.each(lambda o: o.set_strength("audio", 0, 0.4))
    for _ in range(3):
        pair.step()
    saved = [copy.deepcopy((m.state_dict(), o.state_dict())) for m, o in zip(pair.models, pair.optimizers, strict=True)]
    same_bits(saved[0][1]["state"], saved[1][1]["state"])
    pair.step()
    for (weights, states), model, optimizer in zip(saved, pair.models, pair.optimizers, strict=True):
        model.load_state_dict(weights)
        optimizer.load_state_dict(states)
    for _ in range(2):
        pair.step()
        pair.agree()
    pair.each(lambda o: o.eval())
    pair.agree()
    pair.each(lambda o: o.train())
    pair.step()
    pair.agree()


def test_one_gradient_is_alive_at_a_time() -> None:
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(8)])
    optimizer = optimizer_of(model, "cpu")
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def count(p: torch.Tensor) -> None:
        nonlocal most
        assert p.grad is not None
        alive.append(weakref.ref(p.grad.untyped_storage()))
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    ak.step_in_backward(optimizer, model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(4, 32)).sum().backward()
    assert most == 1
    assert len(alive) == 16
    assert all(p.grad is None for p in model.parameters())
    assert all(grad is None for grad in optimizer._plan.grads)  # type: ignore[union-attr]
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
    optimizer.step()


def test_parameters_of_others() -> None:
    """Of the optimizer but not in the model: stepped by step(). In the model but not of the optimizer: left alone."""
    pair = Pair("mlp")
    extra = [torch.ones(50, requires_grad=True) for _ in range(2)]
    for optimizer, p in zip(pair.optimizers, extra, strict=True):
        optimizer.add_param_group({"params": [p], "lr": 0.1})
    for model in pair.models:
        model.register_parameter("foreign", nn.Parameter(torch.ones(3)))
    for _ in range(3):
        for p in extra:
            (p * torch.arange(50)).sum().backward()
        x = torch.randn(4, 24)
        for model in pair.models:
            (model(x).sum() + model.foreign.sum()).backward()
        pair.each(lambda o: o.step())
        assert extra[1].grad is not None
        assert pair.models[1].foreign.grad is not None
        pair.each(lambda o: o.zero_grad())
        pair.agree()
    assert torch.equal(pair.models[1].foreign, torch.ones(3))


def test_parameters_that_are_added_later_are_stepped_in_backward_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = ak.AIMFusedOptimizer(model[0].parameters())
    ak.step_in_backward(optimizer, model)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    model(torch.ones(1, 4)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()


def test_a_step_without_gradients_does_nothing() -> None:
    pair = Pair("mlp")
    pair.each(lambda o: o.step())
    pair.step()
    before = frozen(pair.optimizers[1])
    pair.optimizers[1].step()
    same_bits(before, frozen(pair.optimizers[1]))


def test_losses_on_different_parameters_are_one_step() -> None:
    models = [nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])]
    models.append(copy.deepcopy(models[0]))
    optimizers = [optimizer_of(model, "cpu") for model in models]
    ak.step_in_backward(optimizers[1], models[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        for part in model:
            part(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    same_bits(*map(frozen, optimizers))


def test_a_second_backward_is_refused() -> None:
    model = mlp()
    optimizer = optimizer_of(model, "cpu")
    release = ak.step_in_backward(optimizer, model)
    x = torch.randn(4, 24)
    model(x).sum().backward()
    before = frozen(optimizer)
    with pytest.raises(RuntimeError, match=r"4\.bias: backward\(\) has stepped it already.*accumulate"):
        model(x).sum().backward()
    same_bits(before, frozen(optimizer))
    for call in (
        optimizer.eval,
        optimizer.state_dict,
        lambda: optimizer.load_state_dict({}),
        lambda: optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)]}),
        release.remove,
    ):
        with pytest.raises(RuntimeError, match=r"call optimizer\.step\(\), which closes the step, before"):
            call()
    same_bits(before, frozen(optimizer))
    optimizer.step()
    model(x).sum().backward()
    optimizer.step()
    assert optimizer.tables.control[1] == 2


def test_a_backward_that_fails_leaves_a_step_that_can_be_closed() -> None:
    pair = Pair("mlp")
    pair.step()
    x = torch.randn(4, 24)
    broken = True

    def fail(grad: torch.Tensor) -> None:
        if broken:
            raise KeyError("in the middle")

    hidden = pair.models[1][:2](x)
    hidden.register_hook(fail)
    with pytest.raises(KeyError):
        pair.models[1][2:](hidden).sum().backward()
    # The plain step of what came to its gradient: the layers after it.
    pair.models[0][2:](pair.models[0][:2](x).detach()).sum().backward()
    pair.each(lambda o: o.step())
    pair.optimizers[0].zero_grad()
    pair.agree()
    pair.step()
    pair.agree()


def test_a_weight_that_is_needed_after_its_step_fails_in_autograd() -> None:
    """Detached from the graph it is no gradient that autograd waits for, but the value it saved is gone."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = ak.AIMFusedOptimizer(model.parameters())
    ak.step_in_backward(optimizer, model)
    hidden = model[0](torch.ones(1, 4)) @ model[1].weight.detach()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model[1](hidden).sum().backward()
    optimizer.step()


def test_what_cannot_work_is_refused() -> None:
    model = mlp()

    def refused(match: str, error: type[Exception] = ValueError, of: Any = model, **options: Any) -> None:
        optimizer = ak.AIMFusedOptimizer(model.parameters(), **options)
        with pytest.raises(error, match=match):
            ak.step_in_backward(optimizer, of)
        assert all(not p._post_accumulate_grad_hooks for p in model.parameters())

    refused("max_grad_norm", max_grad_norm=1.0)
    refused("fused_scaling", fused_scaling=True)
    refused("sync_every", sync_every=2)
    refused("none of the optimizer's parameters", of=mlp())
    refused(r"expected a torch\.nn\.Module", TypeError, of=list(model.parameters()))
    with pytest.raises(TypeError, match="expected an AIMFusedOptimizer"):
        ak.step_in_backward(torch.optim.AdamW(model.parameters()), model)
    optimizer = ak.AIMFusedOptimizer(model.parameters())
    release = ak.step_in_backward(optimizer, model)
    with pytest.raises(RuntimeError, match="called for this optimizer before"):
        ak.step_in_backward(optimizer, model)
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        optimizer.step(lambda: 0.0)
    # Options that are set later are seen by the next step, before anything is written.
    before = frozen(optimizer)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="max_grad_norm"):
        model(torch.ones(1, 24)).sum().backward()
    optimizer.max_grad_norm = None
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises((TypeError, ValueError), match="lr"):
        model(torch.ones(1, 24)).sum().backward()
    optimizer.param_groups[0]["lr"] = 1e-3
    same_bits(before, frozen(optimizer))
    optimizer.zero_grad()
    model(torch.ones(1, 24)).sum().backward()
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match="grad_scale"):
        optimizer.step()
    optimizer.grad_scale = None
    optimizer.step()
    release.remove()
    release.remove()
    model(torch.ones(1, 24)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_ddp_is_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = mlp()
        optimizer = ak.AIMFusedOptimizer(model.parameters())
        with pytest.raises(ValueError, match="DistributedDataParallel averages gradients after"):
            ak.step_in_backward(optimizer, nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_step_is_refused(own_graphs: None) -> None:
    model = mlp()
    optimizer = ak.AIMFusedOptimizer(model.parameters())
    release = ak.step_in_backward(optimizer, model)
    with release.accumulate():
        model(torch.ones(1, 24)).sum().backward()
    before = frozen(optimizer)
    with pytest.raises(Exception, match="cannot be compiled after step_in_backward"):
        torch.compile(lambda: optimizer.step(), backend="eager")()
    same_bits(before, frozen(optimizer))


def test_gradients_that_no_step_can_read_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    optimizer = ak.AIMFusedOptimizer(model.named_parameters())
    ak.step_in_backward(optimizer, model)
    with pytest.raises(RuntimeError, match=r"0\.weight.*sparse"):
        model(torch.tensor([1, 2])).sum().backward()


def test_the_hooks_keep_no_optimizer_alive_and_copies_have_none() -> None:
    model = mlp()
    optimizer = ak.AIMFusedOptimizer(model.parameters())
    ak.step_in_backward(optimizer, model)
    model(torch.ones(1, 24)).sum().backward()
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin._release is None
    assert all(not p._post_accumulate_grad_hooks for p in copy.deepcopy(model).parameters())
    gone = weakref.ref(optimizer)
    del optimizer, twin
    gc.collect()
    assert gone() is None
    model(torch.ones(1, 24)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
