"""``AIM(rule="trial")``: steps that are tried and undone, and who is held back by what they showed."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from aim_helpers import CLASSES, Net, batch, build, fixed, phase_rows, train
from torch import nn

import aim_kernels as ak
from aim_kernels.aim import AIM, Ratio, Trial
from aim_kernels.aim.strengths import KAPPA_MAX, ModulationTable
from aim_kernels.aim.trials import judge
from aim_kernels.methods.controls import DropFeatures
from aim_kernels.optim.optimizer import AIMFusedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

MIXINGS = ["alternate", "split", "weights", "features"]


def stepper(model: Net, optimizer: AIMFusedOptimizer, aim: AIM | None = None) -> Any:
    def step(inputs: Any, labels: Any) -> None:
        optimizer.zero_grad()

        def loss() -> torch.Tensor:
            return nn.functional.cross_entropy(model(*inputs), labels)

        if aim is None:
            loss().backward()
        else:
            aim.backward(loss)
        optimizer.step()

    return step


def everything(model: Net, optimizer: AIMFusedOptimizer, *others: Any) -> Any:
    """All bits that a step could change."""
    kept = [optimizer.state_dict(), dict(model.state_dict()), [p.grad for p in model.parameters()]]
    kept += [torch.get_rng_state(), [m.training for m in model.modules()], optimizer.holds_true_weights, *others]
    return copy.deepcopy(kept)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (a != a and b != b))


# -- who is held back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "losses", "dead_zone", "confidence", "expected"),
    [
        ("", {"": 1.0, "a": 0.9, "b": 1.2}, 0.0, 3.0, "a"),  # gains 0.1, errors 0.03
        ("", {"": 1.0, "a": 0.92, "b": 1.2}, 0.0, 3.0, ""),  # not by three errors
        ("", {"": 1.0, "a": 0.92, "b": 1.2}, 0.0, 2.0, "a"),
        ("", {"": 1.0, "a": 0.8, "b": 0.7, "c": 2.0}, 0.0, 3.0, "b"),  # one move, the best
        ("a", {"": 1.0, "a": 1.5, "c": 0.9}, 0.0, 3.0, "ac"),
        ("a", {"": 1.0, "a": 0.8}, 0.0, 3.0, ""),  # let go
        ("a", {"": 1.0, "a": 0.95}, 0.0, 3.0, "a"),  # stays: not sure
        ("", {"": 1.0, "a": 0.8, "b": 1.2}, 0.15, 3.0, ""),  # 0.2 - 0.09 within the dead zone
        ("", {"": -2.0, "a": -2.2, "b": -1.0}, 0.0, 3.0, "a"),  # losses below zero
        ("", {"": math.nan, "a": 0.8}, 0.0, 3.0, ""),
        ("", {"": 1.0, "a": math.nan, "b": 0.5}, 0.0, 3.0, "b"),
    ],
)
def test_one_sure_move(held: str, losses: Any, dead_zone: float, confidence: float, expected: str) -> None:
    errors = dict.fromkeys(losses, 0.03)
    assert judge(frozenset(held), losses, errors, dead_zone, confidence) == frozenset(expected)


def test_losses_are_those_of_training_by_hand() -> None:
    """Every arm from the same weights, on the same batches, judged with the true weights in evaluation mode."""
    inputs, labels = batch(30)
    held_out = batch(64, seed=1, shortcut=False)
    model, optimizer = build()
    train(model, optimizer, 30)
    aim = AIM(model, optimizer, CLASSES, rule=Trial(steps=4, confidence=0.0))
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    seen: list[list[int]] = []

    def step(x: Any, y: Any) -> None:
        seen.append(y.tolist())
        stepper(model, optimizer)(x, y)

    table = aim.update(inputs, labels, held_out=held_out, train=step)
    whole = labels.tolist()
    assert seen == 3 * [whole[:8], whole[8:16], whole[16:23], whole[23:]]

    looks = {}
    for arm in ("", "a", "b"):
        other, second = build()
        other.load_state_dict(start[0])
        second.load_state_dict(start[1])
        torch.set_rng_state(start[2])
        for number, group in enumerate(second.param_groups):
            if arm and group["modality"] == arm:
                row = {"grad_under": 0.0, "grad_well": 0.0}
                if group["modulated"]:
                    row |= {"live_well": 1.0 - KAPPA_MAX}
                second.set_phase_rows(number, true={}, aux=row)
        second.set_phases(KAPPA_MAX if arm else 0.0)
        looks[arm] = []
        for part in (slice(0, 8), slice(8, 16), slice(16, 23), slice(23, 30)):
            other.train()
            second.train()
            stepper(other, second)([x[part] for x in inputs], labels[part])
            second.eval()
            other.eval()
            with torch.no_grad():
                each = nn.functional.cross_entropy(other(*held_out[0]), held_out[1], reduction="none").double()
            looks[arm].append(each.view(16, 4).mean(1).numpy())
    means = {arm: np.mean(losses) for arm, losses in looks.items()}
    assert table.trial_losses == pytest.approx(means, rel=1e-6)
    assert means["b"] < means[""] and table.dominant == ("b",), "the case tells nothing"
    for m in ("a", "b"):
        difference = np.array(looks[""]) - np.array(looks[m])
        by_look = difference.mean(1)
        line = np.polyval(np.polyfit(range(4), by_look, 1), range(4))
        error = np.hypot(difference.mean(0).std(ddof=1) / 4, np.sqrt(((by_look - line) ** 2).sum() / 2))
        assert table.excess[m] == pytest.approx([2.0 - means[m] / means[""]] * len(table.excess[m]), rel=1e-6)
        assert table.errors[m] == pytest.approx([error / means[""]] * len(table.excess[m]), rel=1e-4)
    assert table.kappa == {"a": [0.0] * 2, "b": [KAPPA_MAX] * 3}
    assert table.weak_kappa == {"a": [KAPPA_MAX] * 2, "b": [0.0] * 3}
    assert phase_rows(optimizer, "b", 1, True)[1]["live_well"] == 1.0 - KAPPA_MAX
    assert ModulationTable.from_dict(table.to_dict()) == table
    assert "trial" in repr(table)


def test_a_shortcut_is_held_back_and_let_go_when_it_is_none() -> None:
    inputs, labels = batch(96)
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, rule="trial")
    step = stepper(model, optimizer)
    for _ in range(6):
        table = aim.update(inputs, labels, held_out=batch(96, seed=1, shortcut=False), train=step)
        train(model, optimizer, 10)
    assert table.dominant == ("b",) and aim.held_back == {"b"}
    assert "a" not in table.trial_losses and math.isnan(table.excess["a"][0]), "holding everybody was tried"
    assert table.excess["b"][0] > 1.0
    for _ in range(6):
        table = aim.update(inputs, labels, held_out=batch(96, seed=1), train=step)
    assert table.dominant == () and aim.held_back == frozenset()


def test_a_schedule_scales_what_is_set_and_not_what_is_tried() -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, rule="trial", schedule=lambda update: 0.5)
    for _ in range(6):
        table = aim.update(*batch(96), held_out=batch(96, seed=1, shortcut=False), train=stepper(model, optimizer))
        train(model, optimizer, 10)
    assert table.kappa["b"] == [0.5 * KAPPA_MAX] * 3


# -- nothing is left of a trial --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_trials_are_undone_to_the_bit(mixing: str, held: bool, backend: str) -> None:
    """A run whose trials are all without effect on the rows equals one without trials."""
    inputs, labels = batch(24)
    runs = []
    for tries in (False, True):
        model, optimizer = build(backend=backend, anchor="ema", ema_decay=0.9, max_grad_norm=1.0)
        aim = AIM(model, optimizer, CLASSES, rule=Trial(confidence=1e9), mixing=mixing)
        step = stepper(model, optimizer, aim)
        if held:
            aim.held_back = frozenset({"b"})
        for number in range(3):
            model.train()
            if tries or not number:
                assert bool(aim.update(inputs, labels, held_out=batch(24, seed=1), train=step).dominant) == held
            for _ in range(4):
                step(inputs, labels)
        runs.append(everything(model, optimizer, aim.generator.get_state()))
    assert same(*runs)


@pytest.mark.parametrize("where", ["before the first step", "in training", "held back", "in eval mode"])
def test_everything_is_as_it_was(where: str) -> None:
    model, optimizer = build(normalization=nn.BatchNorm1d(8), state_dtype="bfloat16", ema_decay=0.9)
    inputs, labels = batch(32)
    with pytest.warns(UserWarning, match="running statistics"):
        aim = AIM(model, optimizer, CLASSES, rule=Trial(confidence=1e9))
    if where != "before the first step":
        train(model, optimizer, 3)
    if where in ("held back", "in eval mode"):
        aim.held_back = frozenset({"b"})
        aim.update(inputs, labels, held_out=batch(seed=1), train=stepper(model, optimizer))
        train(model, optimizer, 3)
    model.a[1].eval()
    if where == "in eval mode":
        optimizer.eval()
    gradients = [p.grad for p in model.parameters()]
    memory = [p.data_ptr() for p in model.parameters()] + [
        t.data_ptr() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
    ]
    before = everything(model, optimizer, aim.generator.get_state())
    rows = optimizer.tables.rows.clone()
    steps = 0

    def step(x: Any, y: Any) -> None:
        nonlocal steps
        model.train()
        torch.rand(3)
        stepper(model, optimizer)(x, y)
        steps += 1

    aim.update(inputs, labels, held_out=batch(seed=1), train=step)
    assert steps == 16 * len(aim.history[-1].trial_losses)
    after = everything(model, optimizer, aim.generator.get_state())
    if where != "before the first step":
        assert torch.equal(optimizer.tables.rows, rows)
    assert same(before, after)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), gradients, strict=True))
    assert memory == [p.data_ptr() for p in model.parameters()] + [
        t.data_ptr() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
    ]


@pytest.mark.parametrize("mixing", ["alternate", DropFeatures()])
def test_a_trial_that_fails_leaves_nothing(mixing: Any) -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, rule=Trial(confidence=1e9), mixing=mixing)
    train(model, optimizer, 3)
    aim.update(*batch(), held_out=batch(seed=1), train=stepper(model, optimizer))
    before = everything(model, optimizer, aim.state_dict())
    steps = 0

    def step(x: Any, y: Any) -> None:
        nonlocal steps
        stepper(model, optimizer)(x, y)
        steps += 1
        if steps == 40:  # in the third arm
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        aim.update(*batch(), held_out=batch(seed=1), train=step)
    assert same(before, everything(model, optimizer, aim.state_dict()))
    assert set(aim.mixing_state.get("drop", {"a": 0.0}).values()) == {0.0}


def test_what_else_a_step_changes_is_restored() -> None:
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)

    def step(inputs: Any, labels: Any) -> None:
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(*inputs), labels)).backward()
        scaler.step(optimizer)
        scaler.update()

    aim = AIM(model, optimizer, CLASSES, rule=Trial(steps=2))
    step(*batch())
    state = scaler.state_dict()
    aim.update(*batch(), held_out=batch(seed=1), train=step, restore=[scaler])
    assert scaler.state_dict() == state
    aim.update(*batch(), held_out=batch(seed=1), train=step)
    assert scaler.state_dict() != state, "the case tells nothing"


class Replacing(nn.Module):
    """A buffer that every pass replaces, and one that shares memory with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("ones", torch.ones(1).expand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x * self.ones - self.mean


def test_buffers_options_and_random_numbers_are_restored() -> None:
    model, optimizer = build(normalization=Replacing())
    optimizer.param_groups[1]["lr"] = torch.tensor(0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    aim = AIM(model, optimizer, CLASSES, rule=Trial(confidence=1e9))
    train(model, optimizer, 2)
    draws: list[Any] = []

    def step(inputs: Any, labels: Any) -> None:
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
        stepper(model, optimizer)(inputs, labels)
        scheduler.step()
        optimizer.param_groups[0]["new"] = 1

    def rates() -> list[Any]:
        return [float(group["lr"]) for group in optimizer.param_groups]

    buffers, rate = dict(model.a[1][1].named_buffers()), optimizer.param_groups[1]["lr"]
    mean, before, chance = buffers["mean"].clone(), rates(), (random.getstate(), np.random.get_state()[1].copy())
    aim.update(*batch(32), held_out=batch(32, seed=1), train=step, restore=[scheduler])
    assert draws[:16] == draws[16:32] == draws[32:], "every arm draws the same"
    assert random.getstate() == chance[0] and (np.random.get_state()[1] == chance[1]).all()
    assert rates() == before and optimizer.param_groups[1]["lr"] is rate
    assert "new" not in optimizer.param_groups[0]
    after = dict(model.a[1][1].named_buffers())
    assert after["mean"] is buffers["mean"] and torch.equal(after["mean"], mean)


def test_steps_inside_backward() -> None:
    """Undone to the bit; a backward that fails half way leaves no step open."""
    model, optimizer = build()
    release = ak.step_in_backward(optimizer, model)
    aim = AIM(model, optimizer, CLASSES, rule=Trial(confidence=1e9))
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    aim.update(*batch(), held_out=batch(seed=1), train=stepper(model, optimizer))
    assert same(before, everything(model, optimizer))

    def fails(inputs: Any, labels: Any) -> None:
        nn.functional.cross_entropy(model(*inputs), labels).backward()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        aim.update(*batch(), held_out=batch(seed=1), train=fails)
    assert not release.is_open and same(before, everything(model, optimizer))
    train(model, optimizer, 1)


def test_labels_are_whatever_the_loss_takes_and_pieces_no_larger_than_batch_size() -> None:
    model, optimizer = build()
    sizes = []
    model.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def step(inputs: Any, labels: Any) -> None:
        optimizer.zero_grad()
        loss(model(*inputs), labels).backward()
        optimizer.step()

    tables = []
    for batch_size in (3, 512):
        aim = AIM(model, optimizer, CLASSES, rule=Trial(confidence=1e9), loss=loss, batch_size=batch_size)
        (inputs, labels), (others, classes) = batch(32), batch(80, seed=1)
        targets = [nn.functional.one_hot(y, CLASSES).float() for y in (labels, classes)]
        sizes.clear()
        torch.manual_seed(0)
        tables.append(aim.update(inputs, targets[0], held_out=(others, targets[1]), train=step))
        assert max(sizes) == min(batch_size, 80)
    assert tables[0].trial_losses == pytest.approx(tables[1].trial_losses, rel=1e-5)


def test_trials_train_in_training_mode() -> None:
    """After a validation the model is in evaluation mode, in which features are not mixed."""
    model, optimizer = build()
    train(model, optimizer, 20)
    model.eval()
    aim = AIM(model, optimizer, CLASSES, rule="trial", mixing="features")
    table = aim.update(*batch(), held_out=batch(seed=1, shortcut=False), train=stepper(model, optimizer))
    assert not model.training and len(set(table.trial_losses.values())) == 3


def test_after_another_rule_what_it_set_is_as_it_is() -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, probe=fixed((0.9, 0.9), (0.1, 0.1, 0.1)))
    aim.held_back = frozenset({"b"})
    aim.update(*batch())
    assert aim.held_back == {"a"}
    aim.rule = Trial()
    table = aim.update(*batch(), held_out=batch(seed=1), train=stepper(model, optimizer))
    assert table.rule == "trial" and "b" not in table.trial_losses
    inputs, labels = batch()
    aim.rule = Ratio()
    assert aim.update([None, inputs[1]], labels).scores["a"] == [0.9, 0.9], "not what trials made of it"


def test_a_run_goes_on_from_its_state() -> None:
    held_out = batch(96, seed=1, shortcut=False)

    def more(model: Net, optimizer: AIMFusedOptimizer, aim: AIM, count: int) -> None:
        for _ in range(count):
            model.train()
            aim.update(*batch(96), held_out=held_out, train=stepper(model, optimizer))
            train(model, optimizer, 5)

    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, rule="trial")
    more(model, optimizer, aim, 4)
    assert aim.held_back
    optimizer.eval()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), aim.state_dict(), torch.get_rng_state()))
    optimizer.train()
    more(model, optimizer, aim, 3)
    other, second = build(seed=5)
    again = AIM(other, second, CLASSES, rule="trial")
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    more(other, second, again, 3)
    assert same(everything(model, optimizer, aim.state_dict()), everything(other, second, again.state_dict()))


def test_as_a_method_of_the_protocol() -> None:
    model, _ = build()
    blocks = ak.Blocks(
        model, {"a": list(model.a), "b": list(model.b)}, lambda z: model.head(torch.cat(z, 1)), num_classes=CLASSES
    )
    optimizer = ak.AIMFusedOptimizer(blocks.param_groups(), lr=1e-2, betas=(0.9, 0.99))
    method = ak.make_method("aim", blocks, optimizer, rule="trial", unimodal_weight=0.3)
    for _ in range(5):
        table = method.update(*batch(96), held_out=batch(96, seed=1, shortcut=False))
        for _ in range(10):
            method.step(*batch())
    assert table.rule == "trial" and table.dominant == ("b",)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_what_is_missing() -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, rule="trial")
    step = stepper(model, optimizer)
    before = everything(model, optimizer, aim.state_dict())
    with pytest.raises(ValueError, match="rule='trial' compares training with held-out scores; pass held_out"):
        aim.update(*batch(), train=step)
    with pytest.raises(ValueError, match=r"pass train=, one step as train\(inputs, labels\)"):
        aim.update(*batch(), held_out=batch(seed=1))
    with pytest.raises(ValueError, match="pass labels and held_out"):
        aim.update(batch()[0], held_out=batch(seed=1), train=step)
    with pytest.raises(ValueError, match="at least two held-out samples"):
        aim.update(*batch(), held_out=batch(1), train=step)
    with optimizer.ema_parameters(), pytest.raises(RuntimeError, match="averages"):
        aim.update(*batch(), held_out=batch(seed=1), train=step)
    assert same(before, everything(model, optimizer, aim.state_dict()))
