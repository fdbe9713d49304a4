"""Parameters that nothing has ever moved and that require no gradient: they are degraded as well-optimized ones."""

from __future__ import annotations

import copy
import io
from typing import Any

import aim_helpers
import pytest
import torch
from backends_under_test import BACKENDS, enter
from helpers import DTYPES, RULES, frozen, same_bits
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels import AIM
from aim_kernels.aim import Alternate, Prototypes
from aim_kernels.backends.reference import classes_of
from aim_kernels.step.layout import STATISTIC

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter

KEEP = 0.75  # exact, so that an expected live weight is a product rounded once
#: Rules, and ways to keep fewer bytes.
OPTIONS: dict[str, dict[str, Any]] = {
    **{
        name: RULES[name] for name in ("adamw", "sgd", "sgd-momentum", "amsgrad", "adagrad", "rmsprop-momentum", "lion")
    },
    "int8": {"rule": "adamw", "state_dtype": "int8"},
    "bfloat16": {"rule": "adam", "state_dtype": "bfloat16", "ema_decay": 0.9},
    "fisher": {"rule": "adamw", "measure": "fisher"},
}


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """One modulated group with a frozen and a trained parameter, and one that is trained all the time."""

    def __init__(self, dtype: str = "float32", device: str = "cpu", freeze: bool = True, **options: Any) -> None:
        # Several chunks with a tail; enough for 8 bits.
        self.fixed = nn.Parameter(values((67, 63), 0).to(device, DTYPES[dtype]), requires_grad=not freeze)
        self.trained = nn.Parameter(values((40,), 1).to(device, DTYPES[dtype]))
        self.head = nn.Parameter(values((9,), 2).to(device, DTYPES[dtype]))
        self.before = self.fixed.detach().clone()
        self.members = [self.fixed, self.trained] if freeze is not None else [self.trained]
        self.optimizer = ak.AIMFusedOptimizer(
            [
                {"params": self.members, "modality": "audio", "depth": 0, "modulated": True},
                {"params": [self.head]},
            ],
            under_optimized=("fraction", 0.4),
            threshold_rate=0.3,
            **{"backend": "cpu"} | options,
        )
        self.count = 0

    def step(self, *, moved: bool = False, alone: bool = False) -> None:
        """``moved``: with a gradient for the frozen parameter; ``alone``: none for its group."""
        self.count += 1
        for index, p in enumerate((self.trained, self.head, self.fixed)):
            absent = (p is self.fixed and not moved) or (alone and p is not self.head)
            p.grad = None if absent else values(tuple(p.shape), 10 * self.count + index).to(p)
        self.optimizer.step()

    def holds(self, factor: float) -> None:
        """The module has the frozen weights times a factor, and the optimizer a master of them and nothing else."""
        same_bits(self.fixed.detach(), (self.before.double() * factor).to(self.fixed.dtype))
        assert self.optimizer.state[self.fixed].keys() == {"master"}
        same_bits(self.optimizer.state[self.fixed]["master"].to(self.fixed.dtype), self.before)

    def gone(self) -> None:
        same_bits(self.fixed.detach(), self.before)
        assert self.fixed not in self.optimizer.state


def case(backend: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype: str = "float32") -> Case:
    return Case(dtype, "cuda" if "@" in backend else "cpu", backend=enter(backend, monkeypatch), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_strength_degrades_it_wholly(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else feels it: trained parameters, thresholds and statistics are those of a group without it."""
    made = case(backend, monkeypatch, OPTIONS[name])
    device = made.fixed.device
    alone = Case("float32", str(device), backend=made.optimizer.backend, **OPTIONS[name])
    alone.optimizer.param_groups[0]["params"].remove(alone.fixed)
    for other in (made, alone):
        other.step()
        other.optimizer.set_strength("audio", 0, 1 - KEEP)
        other.step()
    made.holds(KEEP)
    made.step(alone=True)
    alone.step(alone=True)
    made.holds(KEEP)
    for other in (made, alone):
        other.optimizer.set_strength("audio", 0, 0.0)
        other.step()
        other.step()
    made.gone()
    if "int8" not in name and name != "bfloat16":  # whose random bits go by the place among all elements
        same_bits(made.trained.detach(), alone.trained.detach())
        same_bits(made.optimizer.state[made.trained], alone.optimizer.state[alone.trained])
        same_bits(made.optimizer.tables.rows, alone.optimizer.tables.rows)
        same_bits(made.optimizer.tables.statistics, alone.optimizer.tables.statistics)
    assert made.optimizer.tables.statistics[0, STATISTIC["numel"]] == made.trained.numel()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float64", {}),
        ("bfloat16", {"master": "split"}),
        ("bfloat16", {"master": "kahan", "rule": "lion"}),
        ("bfloat16", {"master": "float32", "rule": "sgd"}),
        ("float16", {"master": "float32"}),
        ("float16", {}),
    ],
)
def test_every_type(dtype: str, options: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(backend, monkeypatch, options, dtype)
    made.optimizer.set_strength("audio", 0, 1 - KEEP)
    for _ in range(2):
        made.step()
        made.holds(KEEP)
    made.optimizer.eval()
    same_bits(made.fixed.detach(), made.before)
    made.optimizer.train()
    made.holds(KEEP)
    made.optimizer.set_strength("audio", 0, 0.0)
    made.step()
    made.gone()


@pytest.mark.parametrize("backend", BACKENDS)
def test_phases(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Degraded in the auxiliary phase alone; the step that changes it may have no gradient for the whole block."""
    made = case(backend, monkeypatch, {})
    made.optimizer.set_phase_rows(0, aux={"live_under": 1.0, "live_well": KEEP})
    for number, probability in enumerate((1.0, 0.0, 1.0, 1.0, 0.0)):
        made.optimizer.set_phases(probability)
        made.step(alone=number % 2 == 1)
        made.holds(KEEP if probability else 1.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rules_without_classes_go_by_their_row(backend: str) -> None:
    p, q = (nn.Parameter(values((20,), seed), requires_grad=bool(seed)) for seed in (0, 1))
    optimizer = ak.AIMFusedOptimizer([p, q], rule="sgd", lr=0.1, backend=backend)
    before = p.detach().clone()
    optimizer.set_modulation(0, live_under=KEEP, live_well=KEEP)
    q.grad = torch.ones_like(q)
    optimizer.step()
    same_bits(p.detach(), before * KEEP)
    optimizer.set_modulation(0, live_under=1.0, live_well=1.0)
    optimizer.step()
    same_bits(p.detach(), before)
    assert p not in optimizer.state


@pytest.mark.parametrize("anchor", ["init", "ema"])
def test_anchors_of_its_own_weights_are_zero(anchor: str) -> None:
    """Its start and its average are itself: withdrawn to those it would stay as it is."""
    made = Case(anchor=anchor, ema_decay=0.9 if anchor == "ema" else None)
    made.optimizer.set_strength("audio", 0, 1 - KEEP)
    made.step()
    made.holds(KEEP)
    # Once it moves it has the anchor of the others.
    made.fixed.requires_grad_(True)
    made.step(moved=True)
    assert ("anchor" in made.optimizer.state[made.fixed]) == (anchor == "init")


def test_a_measure_that_is_drawn() -> None:
    made = Case(measure="random", backend="reference")
    made.optimizer.set_strength("audio", 0, 1 - KEEP)
    made.step()
    made.holds(KEEP)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["adamw", "rmsprop"])
def test_the_first_gradient_steps_from_the_true_weights(
    rule: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = case(backend, monkeypatch, {"rule": rule})
    made.optimizer.set_strength("audio", 0, 1 - KEEP, "straight-through")
    made.step()
    made.step()
    made.fixed.requires_grad_(True)
    made.step()
    made.holds(KEEP)  # nothing has moved it yet
    twin = nn.Parameter(made.before.clone())
    other = ak.AIMFusedOptimizer([twin], rule=rule, backend=made.optimizer.backend)
    for _ in range(3):
        made.step(moved=True)
        twin.grad = made.fixed.grad
        other.step()
        state = made.optimizer.state[made.fixed]
        same_bits(state["master"], twin.detach().clone())
        assert float(state["step"]) == float(other.state[twin]["step"])
    # Classes are those of its moments now, so that some elements are degraded and others are not.
    same = made.fixed.detach() == state["master"]
    assert same.any() and not same.all()


def test_thawing_alone_changes_nothing() -> None:
    """Until the first gradient it is what it was, also where the step is prepared anew."""
    made = Case()
    made.optimizer.set_strength("audio", 0, 1 - KEEP)
    made.step()
    made.fixed.requires_grad_(True)
    made.optimizer._plan = None
    made.step()
    made.holds(KEEP)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_has_not_been_stepped_beside_it(backend: str) -> None:
    """A branch that has met no gradient yet requires one: it is under-optimized, as ever."""
    made = Case(backend=backend)
    spare = nn.Parameter(values((5,), 7))
    made.optimizer.param_groups[0]["params"].append(spare)
    before = spare.detach().clone()
    made.optimizer.set_strength("audio", 0, 1 - KEEP)
    made.trained.requires_grad_(True)
    made.step(alone=True)
    made.step()
    made.holds(KEEP)
    same_bits(spare.detach(), before)
    assert made.optimizer.state[spare].keys() > {"step", "master", "exp_avg"}


def test_resumed_bit_for_bit() -> None:
    first = Case(anchor="init")
    first.optimizer.set_phases(0.5)
    first.optimizer.set_phase_rows(0, aux={"live_well": KEEP})
    for _ in range(3):
        first.step()
    file = io.BytesIO()
    weights = [p.detach().clone() for p in (first.fixed, first.trained, first.head)]
    torch.save(first.optimizer.state_dict(), file)
    second = Case(anchor="init")
    for p, saved in zip((second.fixed, second.trained, second.head), weights, strict=True):
        p.data.copy_(saved)
    file.seek(0)
    second.optimizer.load_state_dict(torch.load(file, weights_only=True))
    second.count = first.count
    for number in range(6):
        for made in (first, second):
            if number == 4:
                made.fixed.requires_grad_(True)
            made.step(moved=number > 4)
        same_bits(frozen(first.optimizer), frozen(second.optimizer))
    assert "step" in first.optimizer.state[first.fixed]


def test_copies_and_pickles() -> None:
    made = Case()
    made.optimizer.set_strength("audio", 0, 1 - KEEP)
    made.step()
    other = copy.deepcopy(made)
    for each in (made, other):
        each.step()
        each.holds(KEEP)


def test_masters_at_all_times() -> None:
    made = Case(keep_masters=True)
    for kappa in (0.0, 1 - KEEP, 0.0):
        made.optimizer.set_strength("audio", 0, kappa)
        for _ in range(2):
            made.step()
            made.holds(1 - kappa)


def test_a_parameter_that_was_trained_before_keeps_its_classes() -> None:
    made = Case(freeze=False)
    for _ in range(3):
        made.step(moved=True)
    made.fixed.requires_grad_(False)
    made.optimizer.set_strength("audio", 0, 1 - KEEP)
    made.step()
    state = made.optimizer.state[made.fixed]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq", "master"}
    rows, control = made.optimizer.tables.rows[0].tolist(), made.optimizer.tables.control.tolist()
    under = classes_of(made.optimizer.param_groups[0], state, rows, control, 0)
    assert under is not None and under.any() and not under.all()
    same_bits(made.fixed.detach(), torch.where(under, state["master"], state["master"] * KEEP))


def test_nothing_happens_without_any_gradient() -> None:
    made = Case()
    made.optimizer.set_strength("audio", 0, 1 - KEEP)
    for p in (made.fixed, made.trained, made.head):
        p.grad = None
    before = frozen(made.optimizer)
    made.optimizer.step()
    same_bits(frozen(made.optimizer), before)


def test_in_a_compiled_step() -> None:
    made, eager = Case(), Case()
    step = torch.compile(lambda: made.optimizer.step(), backend="aot_eager")
    for number in range(5):
        for each in (made, eager):
            if number in (1, 3):
                each.optimizer.set_strength("audio", 0, (1 - KEEP) if number == 1 else 0.0)
            each.count += 1
            for index, p in enumerate((each.trained, each.head)):
                p.grad = values(tuple(p.shape), 10 * each.count + index)
        step()
        eager.optimizer.step()
        same_bits(frozen(made.optimizer), frozen(eager.optimizer))
        made.holds(KEEP) if number in (1, 2) else made.gone()


def test_under_step_in_backward() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    plain = copy.deepcopy(model)
    pairs = []
    for module in (model, plain):
        groups = ak.block_param_groups(module, {"audio": [module[0]]})
        pairs.append((module, ak.AIMFusedOptimizer(groups, backend="cpu")))
    ak.step_in_backward(pairs[0][1], model)
    before = model[0].weight.detach().clone()
    x = values((16, 6), 4)
    for kappa in (1 - KEEP, 1 - KEEP, 0.0, 0.0):
        for module, optimizer in pairs:
            optimizer.set_strength("audio", 0, kappa)
            module(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            same_bits(module[0].weight.detach(), before * (1 - kappa))
        same_bits(frozen(pairs[0][1]), frozen(pairs[1][1]))


def held_back(mixing: str, freeze: str | None) -> tuple[Any, ...]:
    """A network whose modality b is a shortcut, after AIM has found that out."""
    model, optimizer = aim_helpers.build()
    if freeze:
        getattr(model, freeze).requires_grad_(False)
    aim = AIM(
        model,
        optimizer,
        aim_helpers.CLASSES,
        mixing=Alternate(probability=1.0) if mixing == "alternate" else mixing,
        probe=Prototypes(steps=3),
        alpha=100.0,
        rule="ratio",
    )
    aim_helpers.train(model, optimizer, 20)
    inputs, labels = aim_helpers.batch()
    before = [p.detach().clone() for p in model.b.parameters()]
    model.eval()
    undegraded = model.b(inputs[1]).detach()
    table = aim.update(inputs, labels)
    model.train()
    return model, optimizer, aim, table, inputs, before, undegraded


@pytest.mark.parametrize("mixing", ["alternate", "weights", "features", "split"])
def test_a_frozen_encoder_is_held_back_by_aim(mixing: str) -> None:
    model, optimizer, _, table, inputs, before, undegraded = held_back(mixing, "b")
    assert table.dominant == ["b"] or "b" in table.dominant
    kappa = table.kappa["b"]
    assert max(kappa) > 0
    if mixing != "features":  # which is in the forward pass, not in the weights
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        weights = {id(p): k for block, k in zip(model.b, kappa, strict=True) for p in block.parameters() if p.dim() > 1}
        for p, old in zip(model.b.parameters(), before, strict=True):
            factor = torch.tensor(1.0 - weights.get(id(p), 0.0), dtype=torch.float64).float()
            torch.testing.assert_close(p.detach(), old * factor, rtol=1e-6, atol=0.0)
    assert not torch.equal(model.b(inputs[1]), undegraded)
    with optimizer.true_parameters():
        model.eval()
        same_bits(model.b(inputs[1]).detach(), undegraded)
        same_bits([p.detach() for p in model.b.parameters()], before)


# -- adapters ---------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen linear layer, and what a low-rank adapter adds to it (LoRA, arXiv 2106.09685)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 8).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


@pytest.mark.parametrize("everything", [True, False])
def test_base_weights_beside_adapters(everything: bool) -> None:
    """Given whole blocks, base weights are degraded, too; given what is trained only, they stay."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Adapted(), "b": Adapted(), "head": nn.Linear(16, 3)})
    groups = ak.block_param_groups(model, {"a": [model["a"]], "b": [model["b"]]})
    for group in groups:
        group["params"] = [p for p in group["params"] if everything or p.requires_grad]
    optimizer = ak.AIMFusedOptimizer([group for group in groups if group["params"]], lr=1e-2)
    base = model["b"].base.weight.clone()
    inputs, labels = [values((16, 4), seed) for seed in range(2)], torch.arange(16) % 3
    optimizer.set_strength("b", 0, 1.0 - KEEP)
    for _ in range(40):  # until the threshold tells classes apart
        optimizer.zero_grad()
        features = torch.cat([model[m](x) for m, x in zip("ab", inputs, strict=True)], 1)
        nn.functional.cross_entropy(model["head"](features), labels).backward()
        optimizer.step()
    same_bits([model["b"].base.weight], [base * KEEP if everything else base])
    masters = optimizer.masters()
    assert model["b"].up.weight in masters and (model["b"].base.weight in masters) == everything
    assert not torch.equal(model["b"].up.weight, masters[model["b"].up.weight])
    optimizer.eval()
    same_bits([model["b"].base.weight], [base])
