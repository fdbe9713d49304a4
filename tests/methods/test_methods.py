"""What holds for every method: the protocol, resuming, three modalities, errors before anything is written."""

from __future__ import annotations

import inspect
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from method_helpers import NEEDED, assert_same, batch, made, network, sgd
from torch import nn

import aim_kernels as ak
from aim_kernels.methods import METHODS, Outputs, make_method
from aim_kernels.methods.coalitions import shapley_values
from aim_kernels.methods.ogm import OGM
from aim_kernels.methods.scores import accuracies, true_class_scores
from aim_kernels.step import validation

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = pytest.mark.parametrize("name", METHODS)


def run(method: Any, steps: range) -> list[float]:
    """Steps, and an update before every second one."""
    losses = []
    for step in steps:
        inputs, labels = batch(3, seed=step)
        if step % 2 == 0:
            method.update(inputs, labels, held_out=batch(3, seed=100 + step))
        losses.append(method.step(inputs, labels).item())
    return losses


@EVERY
def test_it_learns_with_three_modalities(name: str) -> None:
    net, method = made(name, 3)
    inputs, labels = batch(3, seed=200, count=60)
    before = [p.detach().clone() for p in net.parameters()]
    at_first = nn.functional.cross_entropy(net(*inputs), labels).item()
    losses = run(method, range(8))
    changed = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
    # of the last an encoder may wait long for its turn
    assert all(changed) or (name == "shapley-alternation" and all(changed[-2:]))
    assert all(loss > 0.0 for loss in losses)
    with method.optimizer.true_parameters():
        assert nn.functional.cross_entropy(net(*inputs), labels).item() < at_first
    assert method.updates == 4 and method.epoch == 3


@EVERY
def test_a_saved_run_goes_on_bit_for_bit(name: str) -> None:
    net, method = made(name, 3)
    run(method, range(5))
    with method.optimizer.true_parameters():
        weights = {key: value.clone() for key, value in net.state_dict().items()}
    saved = {"optimizer": method.optimizer.state_dict(), "method": method.state_dict()}
    torch.save(saved, path := io.BytesIO())
    run(method, range(5, 9))

    other, resumed = made(name, 3, seed=1)
    path.seek(0)
    saved = torch.load(path, weights_only=True)
    other.load_state_dict(weights)
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["method"])
    run(resumed, range(5, 9))
    assert_same(net, other, rtol=0.0, atol=0.0)


#: Methods of which a step is more than ``loss``, ``backward`` and ``after_backward`` on the module's own forward pass.
NEED_STEP = {"opm", "mlb", "sum-of-losses", "inforeg", "pmr", "mmpareto", "mla", "sam", "m-sam"} | {
    "train-on-held", "best-subset", "modality-dropout"
}  # fmt: skip


@EVERY
def test_a_method_says_whether_a_loop_of_ones_own_will_do(name: str) -> None:
    assert made(name)[1].writes_rows_only == (name not in NEED_STEP)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NEED_STEP])
def test_a_loop_of_ones_own_equals_step(name: str) -> None:
    net, method = made(name, 2)
    other, twin = made(name, 2)
    for step in range(3):
        inputs, labels = batch(2, seed=step)
        method.step(inputs, labels)
        twin.optimizer.zero_grad()
        outputs = twin.blocks.forward(inputs, labels)
        twin.loss(outputs).backward()
        twin.after_backward(outputs)
        twin.optimizer.step()
    assert_same(net, other, rtol=0.0, atol=0.0)


def test_names_are_public_and_wrong_ones_are_told() -> None:
    _, blocks = network(2)
    assert ak.make_method is make_method and isinstance(blocks, ak.Blocks)
    with pytest.raises(ValueError, match="unknown method 'ogn'; it is one of joint, aim, "):
        ak.make_method("ogn", blocks, sgd(blocks))
    with pytest.raises(TypeError, match="SGD has none"):
        make_method("joint", blocks, torch.optim.SGD(blocks.model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"groups name the modalities \[\].*blocks.param_groups"):
        make_method("joint", blocks, ak.AIMFusedOptimizer(blocks.model.parameters()))


def test_the_page_of_methods_names_every_one_and_its_options() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(code, {})
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    listed = {name: row[-1] for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    assert set(listed) == set(METHODS)
    shared = {"seed", "apply_to", "starts", "ends", "biases", "num_classes", "options", "loss"}
    for name in METHODS:
        known = set(inspect.signature(type(made(name)[1]).__init__).parameters) - {"self", "blocks", "optimizer"}
        told = set(re.findall(r"`(\w+)", listed[name]))
        assert known - shared <= told, f"{name}: options that the page does not tell"
        assert told - known <= shared | {"ak"}, f"{name}: options that the class does not have"


def test_blocks_without_unimodal_logits_zero_the_other_features() -> None:
    net, blocks = network(3)
    plain = ak.Blocks(net, blocks.encoders, fuse=blocks.fuse)
    inputs, labels = batch(3)
    outputs = plain.forward(inputs, labels)
    for m, logits in enumerate(outputs.unimodal()):
        torch.testing.assert_close(logits, net.with_zeros(outputs.features, {m}), rtol=1e-12, atol=0.0)
    for z, one in zip(plain.encode(inputs), outputs.features, strict=True):
        assert torch.equal(z, one)


def half_precision() -> tuple[ak.Blocks, torch.dtype, dict[str, Any]]:
    return network(3)[1], torch.bfloat16, {"master": "split"}


def with_a_frozen_encoder() -> tuple[ak.Blocks, torch.dtype, dict[str, Any]]:
    net, blocks = network(3)
    net.encoders[1].requires_grad_(False)
    return blocks, torch.float32, {}


def features_over_time() -> tuple[ak.Blocks, torch.dtype, dict[str, Any]]:
    """Encoders that return ``[B, C, T]``, with dropout; what a modality says alone, it says with zeros beside it."""
    net = network(3)[0]
    for encoder in net.encoders:
        encoder[0] = nn.Sequential(nn.Unflatten(1, (1, -1)) if encoder is not net.encoders[0] else nn.Identity())
        encoder[0].append(nn.Conv1d(1, 4, 3, padding=1))
        encoder[1] = nn.Sequential(nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4), nn.Dropout(0.2), nn.Tanh())
    encoders = {name: list(encoder) for name, encoder in zip("abc", net.encoders, strict=True)}

    def fuse(features: list[torch.Tensor]) -> torch.Tensor:
        return net.head(torch.cat([z.mean(2) for z in features], 1))

    net.forward = lambda *inputs: fuse(net.features(inputs))
    return ak.Blocks(net, encoders, fuse=fuse), torch.float32, {"rule": "sgd", "momentum": 0.9}


@EVERY
@pytest.mark.parametrize("build", [half_precision, with_a_frozen_encoder, features_over_time])
def test_other_networks_and_number_types(name: str, build: Any) -> None:
    blocks, dtype, options = build()
    blocks.model.to(dtype)
    frozen = {id(p): p.clone() for p in blocks.model.parameters() if not p.requires_grad}
    before = blocks.model.head.weight.detach().clone()
    optimizer = ak.AIMFusedOptimizer(blocks.param_groups(), **{"lr": 1e-2, **options})
    method = make_method(name, blocks, optimizer, **NEEDED.get(name, {}))
    for step in range(4):
        (inputs, labels), held_out = batch(3, seed=step), batch(3, seed=90 + step)
        inputs, held = [x.to(dtype) for x in inputs], [x.to(dtype) for x in held_out[0]]
        if step % 2 == 0:
            method.update(inputs, labels, held_out=(held, held_out[1]))
        assert method.step(inputs, labels).isfinite()
    assert all(p.isfinite().all() and p.dtype == dtype for p in blocks.model.parameters())
    assert all(torch.equal(p, frozen[id(p)]) for p in blocks.model.parameters() if id(p) in frozen)
    assert not torch.equal(blocks.model.head.weight, before)


def balanced(method: Any) -> Outputs:
    """Outputs of a network to which both modalities are the same."""
    net = method.blocks.model
    with torch.no_grad():
        net.head.weight[:, 4:] = net.head.weight[:, :4]
    inputs, labels = batch(2)
    z = net.encoders[0](inputs[0])
    features = [z, z * 1.0]
    return Outputs(method.blocks, features, net.head(torch.cat(features, 1)), labels)


@pytest.mark.parametrize("name", ["ogm", "ogm-ge", "mlb", "agm", "pdmp", "shapley-alternation"])
def test_factors_are_one_where_modalities_are_equally_good(name: str) -> None:
    _, method = made(name)
    outputs = balanced(method)
    if name == "pdmp":  # it ranks by the samples of an update
        method.blocks.forward = lambda inputs, labels: outputs
        method.update(*batch(2))
    for _ in range(3):  # AGM compares with the batches before
        k = method.after_backward(outputs)
        assert k.tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_other_methods_leave_equally_good_modalities_alone() -> None:
    _, method = made("amss")
    assert method.shares(balanced(method)).tolist() == pytest.approx([0.5, 0.5])
    _, method = made("inforeg")
    method.update(*batch(2))
    outputs = balanced(method)
    method.loss(outputs).backward()  # the second encoder is not in this graph, and gets no gradient
    assert method.after_backward(outputs).tolist() == [0.0, 0.0]
    _, method = made("m-sam")
    assert method.shares(balanced(method)).tolist() == pytest.approx([0.5, 0.5])
    _, method = made("pmr")
    outputs = balanced(method)
    forward, method.blocks.forward = method.blocks.forward, lambda inputs, labels: outputs
    method.update(*batch(2))
    method.blocks.forward = forward
    torch.testing.assert_close(method.loss(outputs), nn.functional.cross_entropy(outputs.logits, outputs.labels))


def test_methods_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of a step but the optimizer's own, with every way of a tensor to the host closed."""
    waits = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")

    def refuse(self: torch.Tensor, *args: Any) -> Any:
        raise AssertionError("a tensor was asked for its value")

    for name in METHODS:
        _, method = made(name, 3, **({"probability": 1.0} if name == "opm" else {}))
        run(method, range(3))  # running means, prototypes and weights of an epoch's start are there
        inputs, labels = batch(3)
        with monkeypatch.context() as patch:
            patch.setattr(method.optimizer, "step", lambda: None)
            # as for tensors in a device's memory, which the rows' writers do not look at
            patch.setattr(validation, "on_device", lambda value: isinstance(value, torch.Tensor))
            for wait in waits:
                patch.setattr(torch.Tensor, wait, refuse)
            with pytest.raises(AssertionError, match="asked for its value"):
                bool(labels[0])
            method.step(inputs, labels)


def test_ranks_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second rank that has other samples, scores are the means of both."""
    _, blocks = network(3)
    here, there = (blocks.forward(*batch(3, seed=seed)) for seed in (0, 1))

    def scores(outputs: Outputs) -> list[torch.Tensor]:
        own = outputs.unimodal()
        optimizer = sgd(blocks)
        return [
            true_class_scores(own, outputs.labels),
            accuracies(own, outputs.labels),
            shapley_values(blocks.fuse, outputs.features, outputs.labels),
            OGM.ratios(own, outputs.labels),
            make_method("amss", blocks, optimizer).shares(outputs),
            make_method("agm", blocks, optimizer, sign="published").coefficients(outputs),
        ]

    alone = [scores(outputs) for outputs in (here, there)]
    sent: list[torch.Tensor] = []
    world = torch.distributed
    monkeypatch.setattr(world, "is_initialized", lambda: True)
    monkeypatch.setattr(world, "get_world_size", lambda: 2)
    monkeypatch.setattr(world, "all_reduce", lambda values: sent.append(values.clone()))
    scores(there)
    answers = iter(sent)
    monkeypatch.setattr(world, "all_reduce", lambda values: values.add_(next(answers)))
    together = scores(here)
    for a, b, both in zip(*(row[:3] for row in alone), together[:3], strict=True):
        torch.testing.assert_close(both, (a + b) / 2, rtol=1e-12, atol=1e-15)
    for a, b, both in zip(*(row[3:] for row in alone), together[3:], strict=True):
        assert not torch.allclose(both, a) and not torch.allclose(both, b)
    assert next(answers, None) is None


REFUSED = [
    ("ogm", {"alpha": -1.0}, "alpha must be"),
    ("ogm", {"argument": "s"}, "unknown argument 's'; it is one of 'r', 'r-1'"),
    ("ogm", {"boost": 0.5}, "boost must be at least 1"),
    ("ogm-ge", {"noise": -1.0}, "noise must be"),
    ("ogm", {"apply_to": "weights"}, "unknown apply_to"),
    ("ogm", {"starts": -1}, "starts must be at least 0"),
    ("ogm", {"starts": 3, "ends": 2}, "ends must be at least 3"),
    ("opm", {"base": 1.5}, r"base must lie in \[0.0, 1.0\]"),
    ("opm", {"probability": float("nan")}, "probability must lie"),
    ("opm", {"alpha": -1.0}, "alpha must be"),
    ("agm", {"sign": "minus"}, "unknown sign"),
    ("agm", {"alpha": -1.0}, "alpha must be"),
    ("mlb", {"beta_max": 0.0}, "beta_max must be at least 1"),
    ("mlb", {"unimodal_weight": -1.0}, "unimodal_weight must be"),
    ("cggm", {"rou": -1.0}, "rou must be"),
    ("cggm", {"bounds": (2.0, 1.0)}, "low <= high"),
    ("pdmp", {"dominant": "video"}, "dominant names 'video'; the modalities are a, b"),
    ("pdmp", {"gamma_p": 0.5}, "gamma_p must be at least 1"),
    ("sum-of-losses", {"encoder_factor": -3.0}, "encoder_factor must be"),
    ("aim", {"unimodal_weight": -0.1, "num_classes": 3}, "unimodal_weight must be"),
    ("sum-of-losses", {"apply_to": "x"}, "unknown apply_to"),
    ("amss", {"sample": "best"}, "unknown sample"),
    ("amss+", {"weight": "inverse"}, "use sample='bernoulli'"),
    ("amss", {"significance": "g"}, "unknown significance"),
    ("amss", {"label_entropy": "none"}, "unknown label_entropy"),
    ("amss", {"temperature": 0.0}, "temperature must be positive"),
    ("amss", {"low": 0.6, "high": 0.5}, r"high must lie in \[0.6, 1.0\]"),
    ("mmpareto", {"gamma": -1.0}, "gamma must be"),
    ("inforeg", {"strength": [0.1, 0.2, 0.3]}, "3 numbers for 2 modalities"),
    ("inforeg", {"strength": -1.0}, "strength must be"),
    ("inforeg", {"scores": "max"}, "unknown scores"),
    ("pmr", {"momentum": 2.0}, "momentum must lie"),
    ("pmr", {"weighting": "two"}, "unknown weighting"),
    ("mla", {"projection": "svd"}, "unknown projection"),
    ("diagnosing-relearning", {"every": 0}, "every must be at least 1"),
    ("diagnosing-relearning", {"times": -1}, "times must be at least 0"),
    ("sam", {"rho": -0.1}, "rho must be"),
    ("m-sam", {"perturb": "some"}, "unknown perturb"),
    ("shapley-alternation", {"period": "week"}, "unknown period"),
    ("shapley-alternation", {"margin": -1.0}, "margin must be"),
    ("weight-averaging", {"decay": -0.1}, "decay must lie"),
    ("train-on-held", {"share": -0.1}, "share must be a finite number >= 0"),
    ("train-on-held", {"share": float("inf")}, "share must be a finite number >= 0"),
    ("modality-dropout", {"probability": 1.1}, r"probability must lie in \[0.0, 1.0\]"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_options_out_of_range_are_refused_and_nothing_is_written(
    name: str, options: dict[str, Any], message: str
) -> None:
    net, blocks = network(2)
    optimizer = sgd(blocks)
    rows = optimizer.tables.rows.clone()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=message):
        make_method(name, blocks, optimizer, **{**NEEDED.get(name, {}), **options})
    assert torch.equal(optimizer.tables.rows, rows)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
