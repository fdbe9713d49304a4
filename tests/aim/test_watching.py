"""What a model with live weights says if it is evaluated, saved or averaged, and what becomes of weights loaded into
it; blocks that come later, are compiled, or are made of several modules."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from aim_helpers import CLASSES, Net, batch, build, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from aim_kernels.aim import AIM, block_param_groups
from aim_kernels.integrations.common import true_state_dict
from aim_kernels.optim.optimizer import AIMFusedOptimizer


def held_back(**options: Any) -> tuple[Net, AIMFusedOptimizer, AIM]:
    """A network of which modality b is held back, in a live phase."""
    model, optimizer = build(**options)
    aim = AIM(model, optimizer, CLASSES)
    optimizer.set_phases(1.0)
    for depth in range(3):
        optimizer.set_strength("b", depth, 0.5)
    train(model, optimizer, 3)
    assert aim.degrades_weights
    return model, optimizer, aim


def quietly(function: Any, *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


def test_evaluating_live_weights_is_said_once() -> None:
    model, optimizer, aim = held_back()
    model.eval()
    with pytest.warns(UserWarning, match="the model is evaluated with live weights"):
        model(*batch()[0])
    quietly(model, *batch()[0])
    other, optimizer, aim = held_back()
    quietly(other, *batch()[0])  # in training mode
    other.eval()
    with optimizer.true_parameters():
        quietly(other, *batch()[0])
    aim.remove()
    quietly(other, *batch()[0])


def test_nothing_is_said_while_nothing_is_degraded() -> None:
    model, optimizer = build()
    _aim = AIM(model, optimizer, CLASSES)  # hooks hold no reference to it
    train(model, optimizer, 2)
    model.eval()
    quietly(model, *batch()[0])
    quietly(model.state_dict)


def test_an_update_and_a_decision_say_nothing() -> None:
    model, optimizer, aim = held_back()
    # b is the label in training and somebody else's outside: it is held back, and later judged with live weights too
    outside = batch(240, seed=1, shortcut=False)
    for _ in range(4):
        train(model, optimizer, 20)
        quietly(lambda: aim.update(*batch(240), held_out=outside))
    assert aim.history[-2].dominant


def test_reliance_says_nothing_of_the_live_weights_that_it_measures_itself() -> None:
    model, optimizer, aim = held_back()
    inputs, labels = batch()

    def degrade() -> None:
        optimizer.set_phases(1.0)
        for depth in range(3):
            optimizer.set_strength("b", depth, 0.5)
        train(model, optimizer, 3)
        assert aim.degrades_weights

    aim.update(inputs, labels, held_out=batch(seed=1))
    aim.history[-1] = replace(aim.history[-1], dominant=("b",))
    degrade()
    table = quietly(lambda: aim.update(inputs, labels, held_out=batch(seed=1)))
    assert table.trial_losses  # of live weights, too
    degrade()
    model.eval()
    with pytest.warns(UserWarning, match="the model is evaluated with live weights"):
        model(*inputs)


def test_saving_live_weights_is_said_once() -> None:
    model, optimizer, _aim = held_back()
    with optimizer.true_parameters():
        quietly(model.state_dict)
    with pytest.warns(UserWarning, match="the model's state_dict has live weights"):
        model.state_dict()
    quietly(model.state_dict)
    model, optimizer, _aim = held_back()
    true_state_dict(model, optimizer)  # as callbacks do
    quietly(model.state_dict)


@pytest.mark.parametrize("kind", ["AveragedModel", "own"])
def test_averaging_live_weights_is_said(kind: str) -> None:
    model, optimizer = build()
    _aim = AIM(model, optimizer, CLASSES)  # hooks hold no reference to it
    average = AveragedModel(model) if kind == "AveragedModel" else copy.deepcopy(model)
    inner = average.module if isinstance(average, AveragedModel) else average

    def write() -> None:
        if isinstance(average, AveragedModel):
            average.update_parameters(model)
            average.update_parameters(model)
        else:
            for _ in range(2):
                for p, q in zip(inner.parameters(), model.parameters(), strict=True):
                    p.data.lerp_(q.data, 0.5)
                    p.detach().lerp_(q.detach(), 0.5)

    write()
    inner.eval()
    quietly(inner, *batch()[0])  # nothing is degraded
    optimizer.set_phases(1.0)
    for depth in range(3):
        optimizer.set_strength("b", depth, 0.5)
    train(model, optimizer, 3)
    write()
    with pytest.warns(UserWarning, match="if it averages them, use ema_decay="):
        inner(*batch()[0])
    quietly(inner, *batch()[0])


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("then", ["eval", "step", "train"])
def test_weights_that_are_loaded_are_kept(then: str, storage: torch.dtype) -> None:
    model, optimizer, _aim = held_back()
    model.to(storage)
    with optimizer.true_parameters():
        best = {name: x.clone() for name, x in model.state_dict().items()}
    train_on(model, optimizer, storage)
    model.load_state_dict(best)
    if then == "step":
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train_on(model, optimizer, storage, 1)
    if then == "train":
        optimizer.train()
    optimizer.eval()
    assert all(torch.equal(x, best[name]) for name, x in model.state_dict().items())


def train_on(model: nn.Module, optimizer: AIMFusedOptimizer, storage: torch.dtype, steps: int = 3) -> None:
    inputs, labels = batch(seed=5)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(*(x.to(storage) for x in inputs))
        nn.functional.cross_entropy(outputs.float(), labels).backward()
        optimizer.step()


def test_a_part_that_is_loaded_leaves_the_rest() -> None:
    model, optimizer, _aim = held_back()
    with optimizer.true_parameters():
        before = {name: x.clone() for name, x in model.state_dict().items()}
    part = {name: x + 1.0 for name, x in before.items() if name.startswith("b.0")}
    model.load_state_dict(part, strict=False)
    optimizer.eval()
    for name, x in model.state_dict().items():
        assert torch.equal(x, part.get(name, before[name])), name


def test_a_checkpoint_of_live_weights_does_not_become_the_true_ones() -> None:
    model, optimizer, _aim = held_back()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = copy.deepcopy(model.state_dict())
    with optimizer.true_parameters():
        true = {name: x.clone() for name, x in model.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    again, other, _aim = held_back(seed=1)
    other.load_state_dict(state)
    again.load_state_dict(live)
    other.eval()
    assert all(torch.equal(x, true[name]) for name, x in again.state_dict().items())


def test_a_compiled_model_is_not_disturbed() -> None:
    model, optimizer = build()
    _aim = AIM(model, optimizer, CLASSES)  # hooks hold no reference to it
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(*batch()[0])
    compiled.eval()
    quietly(compiled, *batch()[0])


# -- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["reliance", "gap"])
def test_blocks_that_are_added_later(rule: str) -> None:
    torch.manual_seed(0)
    model = Net()
    groups = block_param_groups(model, {"a": list(model.a), "b": list(model.b)})
    early, late = [], []
    for group in groups:
        (late if group["modality"] == "b" and group["depth"] == 2 else early).append(group)
    optimizer = AIMFusedOptimizer(early, lr=1e-2)
    aim = AIM(model, optimizer, CLASSES, rule=rule)
    first = aim.update(*batch(), held_out=batch(seed=1))
    assert len(first.kappa["b"]) == 2
    train(model, optimizer, 2)
    for group in late:
        optimizer.add_param_group(group)
    second = aim.update(*batch(), held_out=batch(seed=1))
    assert len(second.kappa["b"]) == len(second.scores["b"]) == 3
    train(model, optimizer, 2)


def test_blocks_that_leave_out_the_first_say_what_to_do() -> None:
    model = Net()
    groups = block_param_groups(model, {"a": list(model.a), "b": list(model.b)})
    optimizer = AIMFusedOptimizer([group for group in groups if group["depth"] != 0], lr=1e-2)
    with pytest.raises(ValueError, match="give the optimizer all of them and use requires_grad_"):
        AIM(model, optimizer, CLASSES)


@pytest.mark.parametrize("what", ["model", "block"])
def test_names_of_compiled_models(what: str) -> None:
    model, optimizer = build()
    expected = AIM(model, optimizer, CLASSES, rule="gap").update(*batch(), held_out=batch(seed=1))
    if what == "model":
        given: Any = torch.compile(model, backend="eager")
    else:
        model.a[1] = torch.compile(model.a[1], backend="eager")  # type: ignore[assignment]
        given = model
    found = AIM(given, optimizer, CLASSES, rule="gap").update(*batch(), held_out=batch(seed=1))
    assert found.scores == expected.scores


class Tokens(nn.Module):
    """An encoder with a class token beside a stem and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.stem, self.norm, self.layer = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.other, self.head = nn.Linear(3, 6), nn.Linear(12, CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        z = self.norm(torch.cat([self.token.expand(len(a), -1, -1), self.stem(a)[:, None]], 1))
        return self.head(torch.cat([self.layer(z).mean(1), self.other(b)], 1))


def test_several_modules_and_parameters_are_one_block() -> None:
    model = Tokens()
    groups = block_param_groups(
        model, {"a": [[model.token, model.stem, model.norm], model.layer], "b": [model.other]}, weight_decay=0.1
    )
    first = [group for group in groups if group["modality"] == "a" and group["depth"] == 0]
    assert [len(group["params"]) for group in first] == [2, 3]  # token and weight; biases and norm
    assert {group["module"] for group in first} == {"norm"}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = AIMFusedOptimizer(groups, lr=1e-2)
    aim = AIM(model, optimizer, CLASSES, pool="channels_last", rule="gap")
    inputs = [torch.randn(24, 4), torch.randn(24, 3)]
    table = aim.update(inputs, torch.arange(24) % CLASSES, held_out=(inputs, torch.arange(24) % CLASSES))
    assert len(table.kappa["a"]) == 2
    with pytest.raises(ValueError, match=r"blocks\['a'\]\[0\] \(Parameter\) is not a module of the model, nor a"):
        block_param_groups(model, {"a": [[nn.Parameter(torch.zeros(2))]]})


def test_a_block_of_parameters_alone_has_no_output_to_probe() -> None:
    model = Tokens()
    groups = block_param_groups(model, {"a": [[model.token], model.stem], "b": [model.other]})
    optimizer = AIMFusedOptimizer(groups, lr=1e-2)
    with pytest.raises(ValueError, match="has no 'module' name to probe"):
        AIM(model, optimizer, CLASSES, rule="gap")
    inputs, labels = [torch.randn(24, 4), torch.randn(24, 3)], torch.arange(24) % CLASSES
    AIM(model, optimizer, rule="reliance").update(inputs, labels, held_out=(inputs, labels))


@pytest.mark.parametrize("part", ["b", "b.0"])
def test_weights_that_are_loaded_into_a_part_are_kept(part: str) -> None:
    model, optimizer, _aim = held_back()
    module = model.get_submodule(part)
    with optimizer.true_parameters():
        other = {name: x + 1.0 for name, x in module.state_dict().items()}
    module.load_state_dict(other)
    optimizer.eval()
    assert all(torch.equal(x, other[name]) for name, x in module.state_dict().items())


def test_a_run_goes_on_whichever_is_loaded_first() -> None:
    model, optimizer, _aim = held_back()
    with optimizer.true_parameters():
        weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    found = []
    for first in ("model", "optimizer"):
        again, other, _other_aim = held_back(seed=1)
        for what in (first, "optimizer" if first == "model" else "model"):
            if what == "model":
                again.load_state_dict(weights)
            else:
                other.load_state_dict(state)
        train(again, other, 3)
        found.append([p.detach().clone() for p in again.parameters()])
    assert all(map(torch.equal, *found))


def test_a_copy_of_live_weights_is_warned_of_when_it_is_evaluated() -> None:
    model, optimizer, _aim = held_back()
    best = copy.deepcopy(model).eval()
    with pytest.warns(UserWarning, match="this copy of the model was taken while it held live weights"):
        best(*batch()[0])
    with optimizer.true_parameters():
        best = copy.deepcopy(model).eval()
    quietly(best, *batch()[0])
