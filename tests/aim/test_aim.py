"""AIM: probe, scores, strengths and rows; OGM-GE and the feature-dropping control."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from aim_helpers import CLASSES, DOMINANT_A, Net, batch, build, fixed, phase_rows, probability, train
from torch import Tensor, nn

from aim_kernels.aim import AIM, Alternate, DecoupleAll, Gap, Prototypes, Weights, block_param_groups
from aim_kernels.aim.inputs import Inputs
from aim_kernels.aim.prototypes import fit_prototypes, probing, prototype_score
from aim_kernels.methods.controls import DropFeatures
from aim_kernels.optim.optimizer import AIMFusedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

# -- rows -----------------------------------------------------------------------------------------------------------


def test_alternate_rows() -> None:
    model, optimizer = build()
    aim = AIM(
        model, optimizer, CLASSES, probe=DOMINANT_A, mixing=Alternate(probability=0.25, learn_weak_in_true_phase=False)
    )
    table = aim.update(*batch())
    assert table.dominant == ("a",)
    held = {"grad_under": 0.0, "grad_well": 0.0}
    for depth, kappa in enumerate(table.kappa["a"]):
        assert phase_rows(optimizer, "a", depth, True) == ({}, {**held, "live_well": pytest.approx(1.0 - kappa)})
        assert phase_rows(optimizer, "a", depth, False) == ({}, held)
    for depth in range(3):
        for modulated in (True, False):
            assert phase_rows(optimizer, "b", depth, modulated) == (held, {})
    assert phase_rows(optimizer, None, None, False) == ({}, {})
    assert probability(optimizer) == 0.25


def test_alternate_options() -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing=Alternate(learn_dominant_in_aux="under"))
    kappa = aim.update(*batch()).kappa["a"][0]
    expected = {"grad_well": 0.0, "live_well": pytest.approx(1.0 - kappa)}
    assert phase_rows(optimizer, "a", 0, True) == ({}, expected)
    assert phase_rows(optimizer, "a", 0, False) == ({}, {"grad_under": 0.0, "grad_well": 0.0})
    assert phase_rows(optimizer, "b", 0, True) == ({}, {})


def test_freezing_holds_updates_too() -> None:
    model, optimizer = build()
    AIM(
        model,
        optimizer,
        CLASSES,
        probe=DOMINANT_A,
        mixing=Alternate(hold="freeze", learn_weak_in_true_phase=False),
        decouple="all",
    ).update(*batch())
    held = dict.fromkeys(("grad_under", "grad_well", "step_under", "step_well"), 0.0)
    for depth in range(2):
        assert phase_rows(optimizer, "a", depth, True)[1].items() >= held.items()
        assert phase_rows(optimizer, "a", depth, False) == ({}, held)
    true, aux = phase_rows(optimizer, "b", 0, True)
    assert true == held
    assert aux.keys() == {"step_under"}
    model, optimizer = build()
    AIM(
        model, optimizer, CLASSES, probe=DOMINANT_A, mixing=Alternate(hold="freeze", learn_dominant_in_aux="under")
    ).update(*batch())
    aux = phase_rows(optimizer, "a", 0, True)[1]
    assert aux.keys() == {"grad_well", "step_well", "live_well"} and aux["grad_well"] == aux["step_well"] == 0.0


@pytest.mark.parametrize("mixing", ["alternate", "weights"])
def test_decouple_all_stimulates_the_weak_modality(mixing: str) -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, decouple=DecoupleAll(beta=0.5), alpha=1.0, mixing=mixing)
    table = aim.update(*batch())
    assert min(table.weak_kappa["b"]) > 0.0
    for depth in range(3):
        true, aux = phase_rows(optimizer, "b", depth, True)
        wanted = 1.0 + 0.5 * table.weak_kappa["b"][depth]
        assert true.get("step_under", 1.0) == pytest.approx(wanted)
        assert aux.get("step_under", 1.0) == pytest.approx(wanted)
        assert "step_under" not in phase_rows(optimizer, "b", depth, False)[0]


def test_rows_are_taken_back_where_nobody_is_dominant() -> None:
    model, optimizer = build()
    AIM(model, optimizer, CLASSES, probe=DOMINANT_A).update(*batch())
    assert probability(optimizer) > 0.0
    AIM(model, optimizer, CLASSES, probe=fixed((0.5, 0.5), (0.5, 0.5, 0.5))).update(*batch())
    assert probability(optimizer) == 0.0
    for group in optimizer.param_groups:
        assert phase_rows(optimizer, group["modality"], group["depth"], group["modulated"]) == ({}, {})


def test_the_auxiliary_phase_is_as_frequent_as_it_is_told_or_as_blocks_are_dominant() -> None:
    model, optimizer = build()
    table = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, alpha=0.3).update(*batch())
    greatest = max(table.kappa["a"])
    assert 0.0 < min(table.kappa["a"]) < greatest < 1.0
    assert probability(optimizer) == pytest.approx(greatest, abs=2**-31)
    AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing=Alternate(probability=0.25)).update(*batch())
    assert probability(optimizer) == 0.25


@pytest.mark.parametrize("phase", ["average", "true", "auxiliary"])
def test_the_head_learns_in_the_phases_it_is_told(phase: str) -> None:
    model, optimizer = build()
    AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing=Alternate(head_from=phase)).update(*batch())
    true, aux = phase_rows(optimizer, None, None, False)
    held = {"grad_under": 0.0, "grad_well": 0.0}
    assert true == (held if phase == "auxiliary" else {})
    assert aux == (held if phase == "true" else {})


def test_weights_rows_are_those_of_set_strength() -> None:
    model, optimizer = build()
    optimizer.set_phases(0.5)  # as after alternation
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing=Weights(coefficients="step"))
    kappa = aim.update(*batch()).kappa["a"]
    _, by_hand = build()
    for depth in range(2):
        by_hand.set_strength("a", depth, kappa[depth], coefficients="step")
    assert torch.equal(optimizer.tables.rows, by_hand.tables.rows)
    assert probability(optimizer) == 0.0


def test_schedule_scales_every_strength() -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, alpha=1.0, schedule=lambda update: 1.0 - 0.5 * update)
    full, half, none = (aim.update(*batch()).kappa["a"][0] for _ in range(3))
    assert half == pytest.approx(0.5 * full)
    assert none == 0.0
    assert probability(optimizer) == 0.0
    with pytest.raises(ValueError, match=r"schedule\(3\) returned -0\.5"):
        aim.update(*batch())


# -- update ---------------------------------------------------------------------------------------------------------


def test_a_shortcut_is_found_and_a_true_lead_is_not() -> None:
    inputs, labels = batch(96)
    for shortcut, found in ((False, ("b",)), (True, ())):
        model, optimizer = build()
        train(model, optimizer, 150)
        held_out = batch(96, seed=1, shortcut=shortcut)
        table = AIM(model, optimizer, CLASSES, rule="gap").update(inputs, labels, held_out=held_out)
        assert table.dominant == found
        assert max(table.kappa["b"]) > 0.9 if found else not any(table.kappa["b"])
        assert table.held_out_scores is not None
        assert all(0.0 < s < 1.0 for row in table.scores.values() for s in row)


def test_scores_are_those_of_hooked_features() -> None:
    model, optimizer = build()
    train(model, optimizer, 10)
    inputs, labels = batch()
    table = AIM(model, optimizer, CLASSES, seed=5, batch_size=7).update(inputs, labels)
    with probing(model):
        prototypes = fit_prototypes(
            model,
            Inputs(tuple(inputs)),
            labels,
            CLASSES,
            steps=30,
            lr=0.1,
            init="noise",
            loss=nn.functional.cross_entropy,
            generator=torch.Generator().manual_seed(5),
        )
        with torch.no_grad():
            z, p = model.a[0](inputs[0]), model.a[0](prototypes[0])
            assert table.scores["a"][0] == pytest.approx(prototype_score(z, p, labels).mean().item(), rel=1e-5)
            z, p = model.b(inputs[1]), model.b(prototypes[1])
            assert table.scores["b"][2] == pytest.approx(prototype_score(z, p, labels).mean().item(), rel=1e-5)


def test_probing_sees_the_true_weights_in_evaluation_mode_and_touches_nothing() -> None:
    model, optimizer = build()
    AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing=Alternate(probability=1.0)).update(*batch())
    train(model, optimizer, 60)
    weight = model.a[0][0].weight
    live, true = weight.detach().clone(), optimizer.state[weight]["master"].clone()
    assert not torch.equal(live, true)
    seen = []

    def probe(net: nn.Module, _inputs: Any, _labels: Any) -> list[list[float]]:
        seen.append((weight.detach().clone(), net.training))
        torch.rand(5)
        return [[1.0, 1.0], [1.0, 1.0, 1.0]]

    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = torch.random.get_rng_state()
    AIM(model, optimizer, CLASSES, probe=probe).update(*batch())
    assert torch.equal(seen[0][0], true)
    assert seen[0][1] is False
    assert torch.equal(weight, live)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True) if p.grad is not None)
    assert all(p.requires_grad for p in model.parameters())


def test_update_with_prototypes_leaves_no_gradient() -> None:
    model, optimizer = build()
    AIM(model, optimizer, CLASSES).update(*batch(), held_out=batch(seed=1))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_without_dominance_training_is_joint_training_bit_for_bit() -> None:
    results = []
    for use in (False, True):
        model, optimizer = build()
        aim = AIM(model, optimizer, CLASSES, rule=Gap(dead_zone=1e9))
        for epoch in range(3):
            if use:
                aim.update(*batch(), held_out=batch(seed=1))
            train(model, optimizer, 4, seed=epoch)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mixing", ["alternate", DropFeatures()])
def test_a_resumed_run_continues_bit_for_bit(mixing: Any) -> None:
    def epoch(model: Net, optimizer: AIMFusedOptimizer, aim: AIM, number: int) -> None:
        aim.update(*batch(), held_out=batch(seed=1, shortcut=False))
        torch.manual_seed(number)  # dropout
        train(model, optimizer, 15, seed=number)

    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, rule=Gap(confidence=0.0), mixing=mixing, seed=4)
    for number in range(3):
        epoch(model, optimizer, aim, number)
    assert any(table.dominant for table in aim.history)
    with optimizer.true_parameters():
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), aim.state_dict()))
    epoch(model, optimizer, aim, 3)

    again, resumed = build(seed=9)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    aim_again = AIM(again, resumed, CLASSES, rule=Gap(confidence=0.0), mixing=mixing, seed=4)
    aim_again.load_state_dict(saved[2])
    assert aim_again.updates == 3
    assert aim_again.mixing_state.get("drop") == saved[2].get("drop")
    epoch(again, resumed, aim_again, 3)
    assert repr(aim_again.history) == repr(aim.history)
    assert aim_again.history[-1].scores == aim.history[-1].scores
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_history_has_the_under_optimized_share() -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A)
    assert all(math.isnan(x) for row in aim.update(*batch()).under_fraction.values() for x in row)
    train(model, optimizer, 3)
    table = aim.update(*batch())
    stats = [s for s, g in zip(optimizer.statistics(), optimizer.param_groups, strict=True) if g["modulated"]]
    assert [x for row in table.under_fraction.values() for x in row] == [s["under_fraction"] for s in stats]
    assert [t.update for t in aim.history] == [0, 1]
    assert aim.updates == 2


def test_linear_probe_scores_what_it_was_not_fitted_on() -> None:
    model, optimizer = build()
    train(model, optimizer, 150)
    inputs, labels = batch(96)
    table = AIM(model, optimizer, CLASSES, probe="linear").update(inputs, labels, held_out=batch(96, 1, shortcut=False))
    assert min(table.scores["b"]) > 0.9  # b is the label itself
    assert table.held_out_scores is not None
    assert max(table.held_out_scores["b"]) < 0.5
    assert table.dominant == ("b",)
    second_half = [x[48:] for x in inputs], labels[48:]
    table = AIM(model, optimizer, CLASSES, probe="linear").update(inputs, labels, held_out=second_half)
    assert table.scores == table.held_out_scores


def test_gradient_probe_needs_neither_labels_nor_steps() -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES, probe="gradient-norm")
    inputs, _ = batch()
    assert aim.update(inputs).scores == {"a": [1.0, 1.0], "b": [1.0, 1.0, 1.0]}
    train(model, optimizer, 1)
    scores = aim.update(inputs).scores
    grads = torch.cat([p.grad.flatten() for p in model.a[1].parameters() if p.grad is not None])
    assert scores["a"][1] == pytest.approx(grads.square().mean().sqrt().item(), rel=1e-5)


def test_scores_are_averaged_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_rank_adds_ones(flat: Tensor) -> None:
        flat += 1.0

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", other_rank_adds_ones)
    model, optimizer = build()
    table = AIM(model, optimizer, CLASSES, probe=DOMINANT_A).update(*batch())
    assert table.scores == {"a": pytest.approx([0.8, 0.9]), "b": pytest.approx([0.7, 0.7, 0.7])}


def test_a_wrapped_model_is_probed_unwrapped() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plain, _ = build()
        wrapped = nn.parallel.DistributedDataParallel(plain)
        groups = block_param_groups(wrapped, {"a": list(plain.a), "b": list(plain.b)})
        assert groups[0]["module"] == "module.a.0"
        table = AIM(wrapped, AIMFusedOptimizer(groups), CLASSES).update(*batch())
    finally:
        torch.distributed.destroy_process_group()
    model, optimizer = build()
    assert table.scores == AIM(model, optimizer, CLASSES).update(*batch()).scores


def test_running_statistics_warn_once() -> None:
    model, optimizer = build(normalization=nn.BatchNorm1d(8))
    with pytest.warns(UserWarning, match=r"a\.1\.1 .*refresh_statistics"):
        aim = AIM(model, optimizer, CLASSES)
    before = copy.deepcopy(model.a[1][1].state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aim.update(*batch())
    assert all(torch.equal(before[k], v) for k, v in model.a[1][1].state_dict().items())


class Sequences(nn.Module):
    """A convolution ``[B, C, T]`` beside tokens ``[B, T, C]`` from a recurrent layer that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 5, 3)
        self.recurrent = nn.GRU(3, 6, batch_first=True)
        self.head = nn.Linear(11, CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.conv(a).mean(2), self.recurrent(b)[0].mean(1)], 1))


def test_pooling_may_differ_by_modality() -> None:
    torch.manual_seed(0)
    model = Sequences()
    optimizer = AIMFusedOptimizer(block_param_groups(model, {"a": [model.conv], "b": [model.recurrent]}))
    inputs, labels = [torch.randn(6, 2, 9), torch.randn(6, 7, 3)], torch.arange(6) % CLASSES
    pool = {"a": "channels_first", "b": "channels_last"}
    table = AIM(model, optimizer, CLASSES, pool=pool, probe=Prototypes(steps=2)).update(inputs, labels)
    assert all(0.0 < row[0] < 1.0 for row in table.scores.values())
    with pytest.raises(RuntimeError, match=r"block \('b', 0\) returns \[3, 7, 6\] for 3 samples; AIM must know"):
        AIM(model, optimizer, CLASSES, pool={**pool, "b": lambda x: x}, probe="linear").update(inputs, labels)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing": "mean"}, "unknown mixing 'mean'; it is one of 'alternate', 'split', 'weights', 'features'"),
        ({"decouple": "weak"}, "unknown decouple"),
        ({"probe": "knn"}, "unknown probe 'knn'; it is one of .* or a callable"),
        ({"rule": "difference"}, "unknown rule"),
        ({"pool": "mean"}, "unknown pool"),
        ({"pool": {"a": "channels_last"}}, "pool is given for"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": math.inf}, "alpha must be"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    model, optimizer = build()
    with pytest.raises(ValueError, match=message):
        AIM(model, optimizer, **{"num_classes": CLASSES, **options})


def test_group_errors() -> None:
    model, optimizer = build()
    with pytest.raises(TypeError, match="SGD has none"):
        AIM(model, torch.optim.SGD(model.parameters()), CLASSES)
    with pytest.raises(ValueError, match="at least two modalities"):
        AIM(model, AIMFusedOptimizer(model.parameters()), CLASSES)
    with pytest.raises(ValueError, match=r"the model has no module 'a\.0'"):
        AIM(nn.Linear(2, 2), optimizer, CLASSES)
    optimizer.param_groups[0]["module"] = None
    with pytest.raises(ValueError, match=r"block \('a', 0\) has no 'module'"):
        AIM(model, optimizer, CLASSES)
    optimizer.param_groups[0]["depth"] = optimizer.param_groups[1]["depth"] = 7
    with pytest.raises(ValueError, match=r"'a' has blocks of depths \[1, 7\]"):
        AIM(model, optimizer, CLASSES)


def test_update_errors_change_nothing() -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, CLASSES)
    inputs, labels = batch()
    rows, state = optimizer.tables.rows.clone(), aim.generator.get_state()
    cases: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((inputs,), {}, ValueError, "probe='prototypes' needs labels"),
        ((inputs, labels), {"held_out": (inputs, None)}, ValueError, "compares losses; pass held-out labels"),
        ((inputs, labels), {"held_out": ([x[:1] for x in inputs], labels[:1])}, ValueError, "at least two held-out"),
        ((inputs[:1], labels), {}, ValueError, "inputs must be 2 tensors, one a modality in the order a, b; got 1"),
        ((inputs[0], labels), {}, ValueError, "got one tensor"),
        ((inputs, labels[:-1]), {}, ValueError, "input of 'a' has 24 samples, labels have 23"),
        ((inputs, labels + 1), {}, ValueError, "labels range from 1 to 3; with num_classes=3 they lie in 0..2"),
        ((inputs, labels.float()), {}, ValueError, "labels must be class numbers"),
        (([x.long() for x in inputs], labels), {}, TypeError, "input 0 has dtype torch.int64"),
        (([inputs[0], inputs[1][:, :2]], labels), {}, RuntimeError, "shapes cannot be multiplied"),
    ]
    for arguments, keywords, error, message in cases:
        with pytest.raises(error, match=message):
            aim.update(*arguments, **keywords)
    assert torch.equal(optimizer.tables.rows, rows)
    assert torch.equal(aim.generator.get_state(), state)
    assert aim.history == []
    with pytest.raises(ValueError, match="rule='gap' compares"):
        AIM(model, optimizer, CLASSES, rule="gap").update(inputs, labels)
    with pytest.raises(ValueError, match="has no held-out scores"):
        AIM(model, optimizer, CLASSES, probe="gradient-norm").update(inputs, labels, held_out=(inputs, labels))


def test_probe_table_errors() -> None:
    model, optimizer = build()
    with pytest.raises(ValueError, match=r"rows of lengths \[2, 2\]; the blocks are \{'a': 2, 'b': 3\}"):
        AIM(model, optimizer, CLASSES, probe=fixed((1.0, 1.0), (1.0, 1.0))).update(*batch())
    with pytest.raises(ValueError, match="negative score for 'a'"):
        AIM(model, optimizer, CLASSES, probe=fixed((1.0, -1.0), (1.0, 1.0, 1.0))).update(*batch())


def test_a_block_that_the_forward_skips() -> None:
    model, optimizer = build()
    model.a = nn.Sequential(model.a[0], nn.Sequential(nn.Linear(8, 8)))
    aim = AIM(model, optimizer, CLASSES)
    model.a = nn.Sequential(model.a[0])  # the block that AIM knows is gone
    with pytest.raises(RuntimeError, match=r"block \('a', 1\) was not called"):
        aim.update(*batch())
