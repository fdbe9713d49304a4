"""What somebody writes into a module counts, also where a master stands beside its weights: as it does without one.

The twin has float32 weights and no master. An edit reaches it where it changed the bits of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends_under_test import BACKENDS, enter
from helpers import DTYPES, frozen, same_bits
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels.integrations.common import true_state_dict

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter

#: Type of the weights and options of the optimizer: who has masters though nothing is degraded.
STORAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("bfloat16", {"master": "float32"}),
    "float16": ("float16", {"master": "float32"}),
    "kept": ("float32", {"keep_masters": True}),
    "kept-bfloat16": ("bfloat16", {"keep_masters": True, "master": "kahan"}),
    "kept-float64": ("float64", {"keep_masters": True}),
}
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"rule": "adamw", "lr": 1e-2},
    "average": {"rule": "adamw", "lr": 1e-2, "ema_decay": 0.5},
    "int8": {"rule": "adam", "lr": 1e-2, "weight_decay": 0.1, "state_dtype": "int8"},
    "sgd": {"rule": "sgd", "lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
    "rmsprop": {"rule": "rmsprop", "lr": 1e-2, "state_dtype": "bfloat16", "centered": True},
    "lion": {"rule": "lion", "lr": 1e-3},
}


def load(model: nn.Linear) -> None:
    model.load_state_dict({name: torch.full_like(value, 5.0) for name, value in model.state_dict().items()})


def give_memory(model: nn.Linear) -> None:
    model.weight.data = torch.full_like(model.weight, 0.25)


def set_one(model: nn.Linear) -> None:
    model.weight.data[3, 2] = 5.0


def clip(model: nn.Linear) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.05, 0.05)


def begin_anew(model: nn.Linear) -> None:
    generator = torch.Generator(model.weight.device).manual_seed(5)
    nn.init.normal_(model.weight, generator=generator)
    nn.init.zeros_(model.bias)


def hardly(model: nn.Linear) -> None:
    """Rounds to what is there: nothing happened."""
    with torch.no_grad():
        model.weight.mul_(1 + 2.0**-30)


EDITS: dict[str, Callable[[nn.Linear], None]] = {
    "load": load,
    "give_memory": give_memory,
    "set_one": set_one,
    "clip": clip,
    "begin_anew": begin_anew,
    "hardly": hardly,
}


class Pair:
    """A layer whose weights have masters, and its twin."""

    def __init__(self, storage: str, rule: str = "adamw", backend: str = "cpu", device: str = "cpu") -> None:
        name, options = STORAGES[storage]
        torch.manual_seed(3)
        self.layer = nn.Linear(60, 70).to(device, DTYPES[name])
        self.twin = nn.Linear(60, 70).to(device, torch.float64 if name == "float64" else torch.float32)
        self.optimizer, self.other = (
            ak.AIMFusedOptimizer(
                [
                    {"params": [m.weight], "modality": "audio", "depth": 0, "modulated": "keep_masters" in options},
                    {"params": [m.bias], "modality": "audio", "depth": 0, "modulated": "keep_masters" in options},
                ],
                backend=backend,
                **RULES[rule] | extra,
            )
            for m, extra in ((self.layer, options), (self.twin, {}))
        )
        with torch.no_grad():
            for p, q in self.both():
                q.copy_(p)
        self.random = torch.Generator().manual_seed(9)

    def both(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.layer.parameters(), self.twin.parameters(), strict=True)

    def edit(self, change: Callable[[nn.Linear], None]) -> None:
        before = [p.detach().clone() for p in self.layer.parameters()]
        change(self.layer)
        for (p, q), old in zip(self.both(), before, strict=True):
            changed = p.detach() != old
            q.data[changed] = p.detach()[changed].to(q.dtype)

    def step(self, without: int | None = None) -> None:
        for index, (p, q) in enumerate(self.both()):
            grad = torch.randn(p.shape, generator=self.random).to(p)
            p.grad, q.grad = (None, None) if index == without else (grad, grad.to(q))
        self.optimizer.step()
        self.other.step()

    def agree(self) -> None:
        """Masters are the twin's weights to the bit, and the module holds them rounded."""
        for p, q in self.both():
            same_bits(self.optimizer.state[p].get("master", p), q.detach().clone() if p.dtype == q.dtype else q)
            same_bits(p.detach(), q.detach().to(p.dtype))


def pair(storage: str, rule: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair(storage, rule, enter(backend, monkeypatch), "cuda" if "@" in backend else "cpu")


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("storage", STORAGES)
def test_edits_between_steps_count(storage: str, edit: str) -> None:
    """Before the first step, between steps, and before a step that has no gradient for the parameter."""
    made = Pair(storage)
    made.edit(EDITS[edit])
    for number in range(5):
        made.step(without={2: 0, 3: 1}.get(number))
        made.agree()
        made.edit(EDITS[edit])
    assert all("master" in made.optimizer.state[p] for p in made.layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("storage", ["bfloat16", "float16", "kept"])
def test_every_kernel_takes_them(storage: str, rule: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pair(storage, rule, backend, monkeypatch)
    made.step()
    for number, edit in enumerate((set_one, begin_anew)):
        made.edit(edit)
        made.step(without=number)
        made.agree()
    averages = [s.get("ema") for s in made.optimizer.state.values()], [s.get("ema") for s in made.other.state.values()]
    same_bits(*averages)


@pytest.mark.parametrize("isa", [name for name, _, supported in ak._C.isas() if supported])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_instruction_set_takes_them(storage: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIM_KERNELS_ISA", isa)
    made = Pair(storage)
    for _ in range(2):
        made.step()
        made.edit(set_one)
        made.edit(clip)
    made.step()
    made.agree()


@pytest.mark.parametrize("storage", STORAGES)
def test_against_torch_over_float32_weights(storage: str) -> None:
    made = Pair(storage)
    peer = torch.optim.AdamW(made.twin.parameters(), lr=1e-2, foreach=False)
    made.other = peer  # type: ignore[assignment]
    for edit in (load, clip, set_one):
        made.step()
        made.edit(edit)
        made.step()
        for p, q in made.both():
            torch.testing.assert_close(made.optimizer.state[p]["master"], q.detach(), rtol=2e-6, atol=2e-7)


def after_eval(made: Pair) -> None:
    made.optimizer.eval()
    made.optimizer.train()


def after_state_dict(made: Pair) -> None:
    saved = made.optimizer.state_dict()["state"]
    for index, (_, q) in enumerate(made.both()):
        same_bits(saved[index]["master"], q.detach().clone())


def after_true_parameters(made: Pair) -> None:
    with made.optimizer.true_parameters():
        for p, q in made.both():
            same_bits(p.detach(), q.detach().to(p.dtype))
        made.edit(clip)


def after_true_pass(made: Pair) -> None:
    made.optimizer.begin_true_pass()
    for p, q in made.both():
        same_bits(p.detach(), q.detach().to(p.dtype))
    made.optimizer.begin_live_pass()


def after_a_resume(made: Pair) -> None:
    saved = made.optimizer.state_dict()
    weights = made.layer.state_dict()
    begin_anew(made.layer)
    made.layer.load_state_dict(weights)
    made.optimizer.load_state_dict(saved)


def after_a_strength(made: Pair) -> None:
    """Which is set between the edit and the step that degrades for the first time."""
    if made.optimizer.keep_masters:
        made.optimizer.set_strength("audio", 0, 0.5, "straight-through")
        made.step()
        made.optimizer.set_strength("audio", 0, 0.0)
        made.step()


def after_a_skipped_step(made: Pair) -> None:
    made.optimizer.found_inf = torch.ones(())  # as GradScaler does
    made.optimizer.grad_scale = torch.ones(())
    made.optimizer.step()
    del made.optimizer.found_inf, made.optimizer.grad_scale


def after_a_change_of_options(made: Pair) -> None:
    """The master leaves with the next step, which reads it."""
    for group in made.optimizer.param_groups:
        group["master"] = "split" if made.layer.weight.dtype == torch.bfloat16 else group["master"]


def after_a_writer_of_checkpoints(made: Pair) -> None:
    handle = true_state_dict(made.layer, made.optimizer)
    saved = made.layer.state_dict()
    for (name, _), (_, q) in zip(made.layer.named_parameters(), made.both(), strict=True):
        same_bits(saved[name], q.detach().to(saved[name].dtype))
    handle.remove()


MEANWHILE = (
    after_eval,
    after_state_dict,
    after_true_parameters,
    after_true_pass,
    after_a_resume,
    after_a_strength,
    after_a_skipped_step,
    after_a_writer_of_checkpoints,
)


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("storage", STORAGES)
def test_whatever_happens_before_the_next_step(storage: str, meanwhile: Callable[[Pair], None]) -> None:
    made = Pair(storage)
    made.step()
    for edit in (set_one, clip):
        made.edit(edit)
        meanwhile(made)
        made.step()
        made.agree()


@pytest.mark.parametrize("storage", ["bfloat16"])
def test_options_that_change_after_an_edit(storage: str) -> None:
    made = Pair(storage)
    made.step()
    made.edit(set_one)
    after_a_change_of_options(made)
    made.step()
    for p, q in made.both():
        state = made.optimizer.state[p]
        assert "master" not in state
        same_bits(ak.step.states.true_weights(p, state), q.detach().clone())


def test_true_weights_changed_in_evaluation_keep_the_rest() -> None:
    """Elements that nobody touched keep their lower bits."""
    made = Pair("bfloat16")
    for _ in range(3):
        made.step()
    made.optimizer.eval()
    made.edit(set_one)
    made.optimizer.train()
    made.step()
    made.agree()


def test_degraded_weights_are_no_edits() -> None:
    """While they are live the master is all that counts; edits of the true phase of such a group are lost as well."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 64))
    optimizer = ak.AIMFusedOptimizer(
        [{"params": [p], "modality": "audio", "depth": 0, "modulated": True}], lr=0.0, weight_decay=0.0, backend="cpu"
    )
    optimizer.set_phase_rows(0, aux={"live_under": 0.5, "live_well": 0.5})
    begin = p.detach().clone()
    for phase in (1.0, 0.0, 1.0, 0.0):
        optimizer.set_phases(phase)
        p.grad = torch.ones_like(p)
        optimizer.step()
        same_bits(optimizer.state[p]["master"], begin)
        same_bits(p.detach(), begin * (0.5 if phase else 1.0))
        p.data.add_(1.0)


def test_under_step_in_backward() -> None:
    made = Pair("bfloat16")
    release = ak.step_in_backward(made.optimizer, made.layer)
    for _ in range(3):
        x = torch.randn(8, 60, generator=made.random).bfloat16()
        loss = (made.layer(x) * x[:, :1]).sum()
        grads = torch.autograd.grad(loss, list(made.layer.parameters()), retain_graph=True)
        for grad, q in zip(grads, made.twin.parameters(), strict=True):
            q.grad = grad.float()
        loss.backward()
        made.optimizer.step()
        made.other.step()
        made.agree()
        made.edit(set_one)
    release.remove()


@pytest.mark.parametrize("storage", ["bfloat16", "kept"])
def test_in_a_compiled_step(storage: str) -> None:
    made = Pair(storage)
    step = torch.compile(lambda: made.optimizer.step(), fullgraph=True, backend="aot_eager")
    made.optimizer, eager = made.optimizer, made.optimizer
    for number in range(4):
        for p, q in made.both():
            grad = torch.randn(p.shape, generator=made.random).to(p)
            p.grad, q.grad = grad, grad.to(q)
        step()
        made.other.step()
        made.agree()
        made.edit((set_one, clip)[number % 2])
    assert eager is made.optimizer


def test_a_master_that_takes_over_a_rest_is_no_edit() -> None:
    """Halfway between two bfloat16 numbers the remainder's is the one away from zero, a rounded master's the even."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = ak.AIMFusedOptimizer([p], lr=0.0, weight_decay=0.0, master="split", backend="cpu")
    p.grad = torch.ones_like(p)
    optimizer.step()
    theta = torch.tensor([1.0 + 2.0**-8, -1.0 - 2.0**-8, 1.0 + 3 * 2.0**-8, 1.0 + 2.0**-9])
    ak.step.states.store_weights(p, optimizer.state[p], theta, "split")
    optimizer.param_groups[0]["master"] = "float32"
    for _ in range(2):
        optimizer.step()
        same_bits(optimizer.state[p]["master"], theta)


def test_nothing_but_the_edit_changes() -> None:
    """A step after an edit that was undone is the step without it."""
    one, other = Pair("bfloat16"), Pair("bfloat16")
    for made in (one, other):
        made.step()
    kept = one.layer.weight.detach().clone()
    one.layer.weight.data.fill_(3.0)
    one.layer.weight.data.copy_(kept)
    for made in (one, other):
        made.step()
    same_bits(frozen(one.optimizer), frozen(other.optimizer))
