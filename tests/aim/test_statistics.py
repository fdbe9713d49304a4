"""``refresh_statistics``: running statistics of the weights in the model, and what AIM and methods judge with them."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels.aim.inputs import Inputs
from aim_kernels.aim.statistics import SAMPLES, batches_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*running statistics")]


class Two(nn.Module):
    """Two inputs, of which either may be missing; batch normalization, dropout before it, and one on their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.b = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, momentum=None))
        self.top = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))

    def forward(self, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        parts = [net(x) for net, x in ((self.a, a), (self.b, b)) if x is not None]
        return self.top(sum(parts))


def made(seed: int = 0) -> Two:
    """In double precision, after passes in training mode."""
    torch.manual_seed(seed)
    model = Two().double()
    for _ in range(3):
        model(torch.randn(5, 3).double() + 4.0, torch.randn(5, 2).double())
    return model


def data(*sizes: int) -> list[list[Tensor]]:
    torch.manual_seed(1)
    return [[torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)] for n in sizes]


def state_of(model: nn.Module) -> Any:
    """Buffers, flags, momenta, gradients, hooks and random states."""
    kept: list[Any] = [{name: t.clone() for name, t in model.state_dict().items()}]
    kept += [[m.training for m in model.modules()], [getattr(m, "momentum", 0) for m in model.modules()]]
    kept += [[len(m._forward_hooks) for m in model.modules()], [p.grad for p in model.parameters()]]
    return [*kept, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def expected(model: Two, batches: list[list[Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Means and unbiased variances of each layer, batches weighted by their sizes; no dropout."""

    def normalized(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    seen: dict[str, list[Tensor]] = {"a.2": [], "b.1": [], "top.1": []}
    for a, b in batches:
        za, zb = a @ model.a[1].weight.T + model.a[1].bias, b @ model.b[0].weight.T + model.b[0].bias
        layer_a, layer_b = model.a[2], model.b[1]
        z = normalized(za) * layer_a.weight + layer_a.bias + normalized(zb) * layer_b.weight + layer_b.bias
        for name, x in (("a.2", za), ("b.1", zb), ("top.1", z.tanh())):
            seen[name].append(x.detach())
    total = sum(len(a) for a, _ in batches)
    return {
        name: (sum(len(x) * x.mean(0) for x in xs) / total, sum(len(x) * x.var(0) for x in xs) / total)
        for name, xs in seen.items()
    }


# -- the estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_those_of_the_batches_and_nothing_else_changes(training: bool) -> None:
    model, batches = made().train(training), data(6, 6, 3)
    if training:
        model.top[0].eval()
    before = state_of(model)
    random_draws = iter(torch.randn(1) for _ in range(9))

    def loader() -> Any:
        for batch in batches:
            next(random_draws), random.random(), np.random.rand()
            yield batch

    memory = [t.data_ptr() for t in model.buffers()]
    assert ak.refresh_statistics(model, loader()) == ["a.2", "b.1", "top.1"]
    for name, (mean, var) in expected(model, batches).items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=1e-14)
        assert int(layer.num_batches_tracked) == 3
    assert memory == [t.data_ptr() for t in model.buffers()]
    after = state_of(model)
    assert same(before[1:], after[1:])
    assert all(torch.equal(before[0][name], t) for name, t in after[0].items() if ".weight" in name or ".bias" in name)


def test_equal_batches_give_what_torch_collects() -> None:
    """As momentum=None does, also of a layer that is called twice, and of instances."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3)
    norm = nn.InstanceNorm2d(3, track_running_stats=True)
    model = nn.Sequential(layer, nn.ReLU(), layer, norm)
    batches = [torch.randn(4, 3, 5, 5) for _ in range(3)]
    other = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, other)
    ak.refresh_statistics(model.eval(), batches)
    torch.testing.assert_close(layer.running_mean, other[0].running_mean)
    torch.testing.assert_close(layer.running_var, other[0].running_var)
    assert int(layer.num_batches_tracked) == 6 and not model.training
    # torch's instance norm has no cumulative average: the one with momentum 1 of the last batch
    norm.momentum = 1.0
    ak.refresh_statistics(model, batches[-1:], layers=[norm])
    seen = model[:3](batches[-1])
    torch.testing.assert_close(norm.running_mean, seen.mean((2, 3)).mean(0))
    torch.testing.assert_close(norm.running_var, seen.var((2, 3)).mean(0))


def test_batches_of_every_kind() -> None:
    batches = data(6, 6)
    reference = made()
    ak.refresh_statistics(reference, batches)

    class Output:
        def __init__(self, a: Tensor, b: Tensor) -> None:
            self.a, self.b = a, b

    calls: dict[str, tuple[list[Any], Callable[[Any], Any] | None]] = {
        "tuples": ([tuple(batch) for batch in batches], None),
        "mappings": ([{"b": b, "a": a} for a, b in batches], None),
        "forward": ([Output(*batch) for batch in batches], lambda batch: model(batch.a, batch.b)),
    }
    for what, (given, forward) in calls.items():
        model = made()
        ak.refresh_statistics(model, given, forward=forward)
        assert same(model.state_dict(), reference.state_dict()), what
    one = nn.Sequential(nn.BatchNorm1d(3)).double()
    ak.refresh_statistics(one, (a for a, _ in batches))
    torch.testing.assert_close(one[0].running_mean, torch.cat([a for a, _ in batches]).mean(0))
    with pytest.raises(TypeError, match=r"got Output; give forward=, called as forward\(batch\)"):
        ak.refresh_statistics(made(), [Output(*batches[0])])


def test_a_missing_input_leaves_its_layers_as_they_were() -> None:
    model = made()
    before = copy.deepcopy(model.b.state_dict())
    assert ak.refresh_statistics(model, [[a, None] for a, _ in data(6, 6)]) == ["a.2", "top.1"]
    assert same(before, model.b.state_dict())
    assert not torch.equal(made().a[2].running_mean, model.a[2].running_mean)


def test_statistics_that_are_not_numbers_recover() -> None:
    model, reference = made(), made()
    model.a[2].running_mean.fill_(torch.nan)
    model.a[2].running_var.fill_(torch.inf)
    for each in (model, reference):
        ak.refresh_statistics(each, data(6, 4))
    assert same(model.state_dict(), reference.state_dict())


def test_a_model_that_raises_keeps_its_statistics() -> None:
    model, (many, one) = made(), data(6, 1)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ak.refresh_statistics(model, [many, [torch.zeros(6, 9).double(), None]])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ak.refresh_statistics(model, [many, one])
    with pytest.raises(ValueError, match="at least one batch"):
        ak.refresh_statistics(model, [])
    assert same(before, state_of(model))


def test_wrapped_in_ddp_statistics_are_local() -> None:
    model, reference = made().eval(), made().eval()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert ak.refresh_statistics(wrapped, data(6, 4)) == ak.refresh_statistics(reference, data(6, 4))
    finally:
        torch.distributed.destroy_process_group()
    assert same(model.state_dict(), reference.state_dict())


# -- which layers ----------------------------------------------------------------------------------------------------


def test_frozen_layers_keep_their_statistics() -> None:
    model, batches = made(), data(6)
    model.a[2].eval()
    assert ak.refresh_statistics(model, batches) == ["b.1", "top.1"]
    model.eval()
    model.b.requires_grad_(False)
    assert ak.refresh_statistics(model, batches) == ["a.2", "top.1"]
    model.train()
    assert ak.refresh_statistics(model, batches) == ["a.2", "b.1", "top.1"], "trained as ever but for its weights"
    model.a[2].momentum = 0.0
    assert ak.refresh_statistics(model, batches) == ["b.1", "top.1"]


def test_layers_are_named_or_left_out() -> None:
    model, batches = made(), data(6)
    model.a[2].eval()
    assert ak.refresh_statistics(model, batches, layers=["a", model.top[1]]) == ["a.2", "top.1"]
    assert ak.refresh_statistics(model, batches, exclude=[model.b]) == ["top.1"]
    assert ak.refresh_statistics(model, batches, layers="a", exclude="a.2") == []
    with pytest.raises(ValueError, match="the model has no module 'c'"):
        ak.refresh_statistics(model, batches, layers=["c"])
    with pytest.raises(ValueError, match=r"'a\.1' has no layer that keeps running statistics"):
        ak.refresh_statistics(model, batches, exclude=["a.1"])


def test_models_without_such_layers_and_lazy_ones() -> None:
    unread = iter([torch.zeros(2, 3)])
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3))
    assert ak.refresh_statistics(model, unread) == [] and len(list(unread)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="'0' is a lazy layer without a shape; call the model once before"):
        ak.refresh_statistics(lazy, [torch.zeros(2, 3)])


def test_samples_are_taken_evenly_and_never_alone() -> None:
    x = torch.arange(2000)
    (one,) = batches_of(Inputs((x, None)), 512)
    assert one[1] is None and len(one[0]) == SAMPLES - 12 and one[0][:3].tolist() == [0, 4, 8]
    for count, size, lengths in ((3, 2, [3]), (5, 2, [3, 2]), (9, 4, [3, 3, 3]), (1, 4, []), (8, 512, [8])):
        batches = batches_of(Inputs((torch.arange(count),)), size)
        assert [len(b[0]) for b in batches] == lengths
        if batches:
            assert sorted(torch.cat([b[0] for b in batches]).tolist()) == list(range(count))


# -- AIM -------------------------------------------------------------------------------------------------------------

CLASSES = 4


class Fused(nn.Module):
    """Two encoders of one block with a normalization, and a hidden layer on both."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.honest, self.cue = (nn.Sequential(nn.Linear(8, 32), norm(32), nn.ReLU()) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(64, 32), norm(32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, honest: Tensor, cue: Tensor) -> Tensor:
        return self.head(torch.cat([self.honest(honest), self.cue(cue)], 1))


def shortcut(count: int, seed: int, agrees: bool) -> tuple[list[Tensor], Tensor]:
    """The first modality shows the label noisily; the second one is the label in training, and anything elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    shown = labels if agrees else torch.randint(CLASSES, (count,), generator=generator)
    inputs = [torch.randn(count, 8, generator=generator) for _ in range(2)]
    inputs[0][:, :CLASSES] += 1.0 * nn.functional.one_hot(labels, CLASSES)
    inputs[1] = 0.3 * inputs[1]
    inputs[1][:, :CLASSES] += 2.0 * nn.functional.one_hot(shown, CLASSES)
    return inputs, labels


def fused(norm: type[nn.Module], seed: int = 0) -> tuple[Fused, ak.AIMFusedOptimizer, Callable[[Any, Tensor], None]]:
    torch.manual_seed(seed)
    model = Fused(norm)
    groups = ak.block_param_groups(model, {"honest": [model.honest], "cue": [model.cue]})
    optimizer = ak.AIMFusedOptimizer(groups, lr=3e-3)

    def step(inputs: Any, labels: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()

    return model, optimizer, step


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_trials_hold_back_the_shortcut(norm: type[nn.Module]) -> None:
    """Arms judged on statistics that were collected under degraded weights choose the honest modality."""
    model, optimizer, step = fused(norm)
    aim = ak.AIM(model, optimizer, CLASSES, rule="trial")
    (inputs, labels), held_out = shortcut(512, 0, True), shortcut(256, 1, False)
    held = []
    for _ in range(4):
        aim.update(inputs, labels, held_out=held_out, train=step)
        held.append(sorted(aim.held_back))
        for k in range(16):
            step([x[k::16] for x in inputs], labels[k::16])
    assert held[-1] == ["cue"] and all("honest" not in row for row in held)


@pytest.mark.parametrize("rule", ["gap", "margin", "ratio"])
def test_scores_and_the_guard_see_statistics_of_the_true_weights(rule: str) -> None:
    """While something is degraded, those in the buffers make no difference; and an update leaves the buffers alone."""
    train, held_out = shortcut(64, 0, True), shortcut(64, 1, False)
    seen = []
    for spoilt in (False, True):
        model, optimizer, step = fused(nn.BatchNorm1d)
        aim = ak.AIM(model, optimizer, CLASSES, rule=rule, guard=True)
        optimizer.set_modulation(("cue", 0), live_well=0.1, live_under=0.1)
        for _ in range(8):
            step(*train)
        if spoilt:
            model.cue[1].running_mean += 3.0
        before = state_of(model)
        table = aim.update(*train, held_out=held_out)
        assert same(before, state_of(model))
        seen.append((table.scores, table.held_out_scores, table.excess, vars(aim.guard)))
    assert seen[0] == seen[1]


def test_joint_training_is_scored_with_its_own_statistics() -> None:
    model, optimizer, step = fused(nn.BatchNorm1d)
    train = shortcut(64, 0, True)
    for _ in range(8):
        step(*train)
    seen = []

    def probe(_model: nn.Module, _inputs: Any, _labels: Any) -> Any:
        seen.append(model.cue[1].running_mean.clone())
        return [[0.5], [0.5]]

    before = model.cue[1].running_mean.clone()
    ak.AIM(model, optimizer, CLASSES, rule="ratio", probe=probe).update(*train)
    assert torch.equal(seen[0], before)


# -- methods ---------------------------------------------------------------------------------------------------------


def method_of(name: str, **options: Any) -> tuple[Fused, Any]:
    torch.manual_seed(0)
    model = Fused(nn.BatchNorm1d)
    encoders = {"honest": [model.honest], "cue": [model.cue]}
    blocks = ak.Blocks(model, encoders, lambda z: model.head(torch.cat(z, 1)), num_classes=CLASSES)
    return model, ak.make_method(name, blocks, ak.AIMFusedOptimizer(blocks.param_groups(), lr=3e-3), **options)


@pytest.mark.parametrize("name", ["aim", "sum-of-losses", "sam", "mmpareto", "mla"])
def test_methods_are_judged_with_statistics_of_the_true_weights(name: str) -> None:
    """Those of the latest batches; training goes on to the bit as without."""
    inputs, labels = shortcut(1200, 0, True)
    batches = [([x[k::12] for x in inputs], labels[k::12]) for k in range(12)]
    runs = []
    for judged in (False, True):
        model, method = method_of(name)
        method.optimizer.set_modulation(("cue", 0), live_well=0.1, live_under=0.1)
        for number, batch in enumerate(batches):
            method.step(*batch)
            if judged and number == 7:
                before = state_of(model)
                with method.evaluating():
                    inside = copy.deepcopy(model)
                assert same(before, state_of(model))
                latest = [batch[0] for batch in batches[3:8]]  # 500 samples
                reference = copy.deepcopy(inside)
                ak.refresh_statistics(reference, latest)
                assert same(inside.state_dict(), reference.state_dict())
                assert not torch.equal(inside.cue[1].running_mean, model.cue[1].running_mean)
        runs.append(state_of(model)[:5])
    assert all(same(*pair) for pair in zip(runs[0][0].values(), runs[1][0].values(), strict=True))


def test_methods_without_steps_take_samples_of_the_update_and_trials_leave_no_batches() -> None:
    model, method = method_of("aim", rule="trial")
    train = shortcut(64, 0, True)
    held_out = shortcut(64, 1, False)
    method.optimizer.set_modulation(("cue", 0), live_well=0.1, live_under=0.1)
    with method.evaluating():
        assert int(model.cue[1].num_batches_tracked) == 0
    method.update(*train, held_out=held_out)
    with method.evaluating():
        assert torch.allclose(model.cue[1].running_mean, model.cue[0](train[0][1]).mean(0), atol=1e-6)
    method.step(*shortcut(32, 2, True))
    with method.evaluating():
        mean = model.cue[0](shortcut(32, 2, True)[0][1]).mean(0)
        assert torch.allclose(model.cue[1].running_mean, mean, atol=1e-6), "of the step alone"


def test_joint_training_keeps_its_running_statistics() -> None:
    model, method = method_of("joint")
    method.step(*shortcut(64, 0, True))
    before = state_of(model)
    with method.evaluating():
        assert same(before, state_of(model))
