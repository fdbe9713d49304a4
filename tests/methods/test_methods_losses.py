"""Losses of other tasks than classification: every method trains with them, or says what it needs instead."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from method_helpers import CLASSES, WIDTH, Net, batch, made, sgd
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels.methods import METHODS, make_method
from aim_kernels.methods.coalitions import shapley_losses
from aim_kernels.methods.losses import TAKE_ANY_LOSS, ignored_label, of_classes

pytestmark = pytest.mark.usefixtures("one_thread")

#: float64 on both sides, in another order of sums: some hundred roundoffs (1e-16). A loss of another kind differs in
#: the first digits.
CLOSE = {"rtol": 1e-6, "atol": 1e-12}
COUNT = 12


@dataclass(frozen=True)
class Task:
    """A head on the features of two modalities, labels, and the loss between them (None: the default)."""

    head: Callable[[Net], Callable[[list[Tensor]], Any]]
    labels: Callable[[Tensor, Tensor], Any]
    loss: Any
    #: What a method that needs class numbers says, and when: at once, or at the first step.
    refused: str = ""
    at_once: bool = False
    options: tuple[str, ...] = ()


def linear(net: Net) -> Callable[[list[Tensor]], Tensor]:
    return lambda z: net.head(torch.cat(z, 1))


def one_number(net: Net) -> Callable[[list[Tensor]], Tensor]:
    return lambda z: net.head(torch.cat(z, 1))[:, :1]


def dense(net: Net) -> Callable[[list[Tensor]], Tensor]:
    """``[B, 3, 2, 2]``: the logits, turned in four ways."""
    return lambda z: torch.stack([net.head(torch.cat(z, 1)).roll(n, 1) for n in range(4)], 2).unflatten(2, (2, 2))


def pair(net: Net) -> Callable[[list[Tensor]], tuple[Tensor, Tensor]]:
    """Both embeddings, through halves of the head."""
    return lambda z: (z[0] @ net.head.weight[:, :WIDTH].T, z[1] @ net.head.weight[:, WIDTH:].T + net.head.bias)


def two_heads(net: Net) -> Callable[[list[Tensor]], dict[str, Tensor]]:
    return lambda z: {"class": net.head(torch.cat(z, 1)), "value": net.head(torch.cat(z, 1)).sum(1)}


def contrastive(logits: tuple[Tensor, Tensor], labels: None) -> Tensor:
    assert labels is None
    scores = logits[0] @ logits[1].T
    return nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def of_both(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    away = nn.functional.mse_loss(logits["value"], labels["value"])
    return nn.functional.cross_entropy(logits["class"], labels["class"]) + 0.01 * away


def many(x: Tensor, y: Tensor) -> Tensor:
    return (torch.stack([y, 2 - y, y % 2], 1) > 0).double()


TASKS = {
    "regression": Task(
        one_number, lambda x, y: x.flatten(1).mean(1, keepdim=True), nn.functional.mse_loss, "mse_loss has not", True
    ),
    "multi-label": Task(linear, many, nn.BCEWithLogitsLoss(), "BCEWithLogitsLoss has not", True),
    "soft labels": Task(
        linear,
        lambda x, y: nn.functional.one_hot(y, CLASSES) * 0.8 + 0.2 / CLASSES,
        nn.functional.cross_entropy,
        r"class numbers, int64 of shape \[B\]; got float32 of shape \[12, 3\]",
    ),
    "dense": Task(
        dense, lambda x, y: y[:, None, None].expand(-1, 2, 2).clone(), None, r"int64 of shape \[B\]; got int64"
    ),
    "pair": Task(pair, lambda x, y: None, contrastive, r"int64 of shape \[B\]; got NoneType"),
    "dict": Task(two_heads, lambda x, y: {"class": y, "value": x.flatten(1)[:, 0]}, of_both, "got dict"),
}

#: What makes the first step's loss that of all samples and modalities as they are.
PLAIN: dict[str, dict[str, Any]] = {"modality-dropout": {"probability": 0.0}, "train-on-held": {"share": 0.0}}
LOSS_OF_MODALITIES = {"mmpareto": (1, 1), "sum-of-losses": (1, 1), "mla": (0, 1)}
CHANGE_GRADIENTS = {"mmpareto", "mla", "sam", "m-sam"}


def case(task: Task, name: str) -> tuple[Net, Any, list[Tensor], Any, Any]:
    """The network, a maker of the method, inputs, labels, and held-out samples."""
    torch.manual_seed(0)
    net = Net(2).double()
    fuse = task.head(net)
    net.forward = lambda *inputs: fuse(net.features(inputs))  # type: ignore[method-assign]
    blocks = ak.Blocks(net, {m: list(e) for m, e in zip("ab", net.encoders, strict=True)}, fuse=fuse)
    given = {} if task.loss is None else {"loss": task.loss}

    def make(**options: Any) -> Any:
        return make_method(name, blocks, sgd(blocks), **{**PLAIN.get(name, {}), **given, **options})

    inputs, numbers = batch(2)
    others, other_numbers = batch(2, seed=1)
    return net, make, inputs, task.labels(inputs[0], numbers), (others, task.labels(others[0], other_numbers))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_a_method_trains_with_the_loss_that_is_given_or_says_what_it_needs(task: str, name: str) -> None:
    net, make, inputs, labels, held_out = case(TASKS[task], name)
    before = copy.deepcopy(net.state_dict())
    if name not in TAKE_ANY_LOSS:
        starts = f"^{METHODS[name][1]} needs .*{TASKS[task].refused}.*joint, aim, mmpareto"
        if TASKS[task].at_once:
            with pytest.raises(ValueError, match=starts):
                make()
            return
        method = make()
        rows = method.optimizer.tables.rows.clone()
        with pytest.raises(ValueError, match=starts):
            method.step(inputs, labels)
        if labels is not None:
            with pytest.raises(ValueError, match=starts):
                method.update(inputs, labels, held_out=held_out)
        assert torch.equal(method.optimizer.tables.rows, rows) and all(p.grad is None for p in net.parameters())
        for key, value in net.state_dict().items():
            assert torch.equal(value, before[key])
        return
    method = make()
    method.update(inputs, labels, held_out=held_out)
    twin, loss = copy.deepcopy(net), TASKS[task].loss or nn.functional.cross_entropy
    fuse = TASKS[task].head(twin)
    z = twin.features(inputs)
    joint = loss(fuse(z), labels)
    own = sum(loss(fuse([x if m == n else 0.0 * x for n, x in enumerate(z)]), labels) for m in range(2))
    factors = LOSS_OF_MODALITIES.get(name, (1, 0))
    expected = factors[0] * joint + factors[1] * own
    found = method.step(inputs, labels)
    if name != "mla":  # of which the second turn sees what the first one changed
        torch.testing.assert_close(found, expected.detach(), **CLOSE)
    assert expected > 1e-3, "a loss of nothing tells nothing"
    if name not in CHANGE_GRADIENTS:
        expected.backward()
        for (key, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda text, key=key: f"{key}: {text}", **CLOSE)
    at_first = found.item()
    for _ in range(8):
        last = method.step(inputs, labels).item()
    assert last < at_first or (task, name) == ("pair", "mla")  # a pair of which one is zero teaches nothing
    with method.evaluating():
        net(*inputs)


def test_the_list_of_methods_that_take_any_loss_is_what_they_say() -> None:
    classes = {name: getattr(importlib.import_module(module), cls) for name, (module, cls, _) in METHODS.items()}
    asks_if_unnamed = {"pdmp"}
    assert {name for name, cls in classes.items() if not cls.class_scores} - asks_if_unnamed == set(TAKE_ANY_LOSS)
    assert not make_method_of("pdmp", dominant="a", loss=nn.functional.mse_loss).class_scores


def make_method_of(name: str, **options: Any) -> Any:
    return made(name, **options)[1]


def test_losses_are_known_by_name() -> None:
    weighted = functools.partial(functools.partial(nn.functional.cross_entropy, ignore_index=5), label_smoothing=0.1)
    assert of_classes(nn.functional.cross_entropy) and of_classes(nn.CrossEntropyLoss()) and of_classes(weighted)
    assert of_classes(nn.MSELoss()) is False and of_classes(functools.partial(nn.functional.l1_loss)) is False
    assert of_classes(lambda logits, labels: logits.sum()) is None
    assert ignored_label(weighted) == 5 and ignored_label(nn.CrossEntropyLoss(ignore_index=2)) == 2
    assert ignored_label(nn.functional.cross_entropy) == -100 and ignored_label(nn.MSELoss()) == -100
    with pytest.raises(TypeError, match=r"loss must be called as loss\(logits, labels\), got a str"):
        make_method_of("joint", loss="mse")


#: Methods of which nothing is drawn by sample, so that samples may be left out of a batch.
NOT_DRAWN = [name for name in METHODS if name not in ("opm", "modality-dropout", "train-on-held")]


@pytest.mark.parametrize("name", NOT_DRAWN)
@pytest.mark.parametrize("ignored", [-100, 1])
def test_samples_with_the_ignored_label_count_nowhere(name: str, ignored: int) -> None:
    """A number that is a class, too: whoever gives it leaves that class out."""
    loss = nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), label_smoothing=0.1, ignore_index=ignored
    )
    options = {"probe": lambda model, inputs, labels: torch.ones(2, 2)} if name in ("aim", "drop") else {}
    net, method = made(name, loss=loss, **options)
    other, twin = made(name, loss=loss, **options)
    for step in range(5):
        (inputs, labels), held_out = batch(2, seed=step), batch(2, seed=50 + step)
        keep = labels != 1
        with_ignored = torch.where(keep, labels, ignored)
        if step % 2 == 0 and name in ("pmr", "pdmp", "diagnosing-relearning", "inforeg", "best-subset"):
            method.update(inputs, with_ignored, held_out=held_out)
            twin.update([x[keep] for x in inputs], labels[keep], held_out=held_out)
        method.step(inputs, with_ignored)
        twin.step([x[keep] for x in inputs], labels[keep])
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        # OGM's scores are float32; elsewhere sums of another length
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-8)


def test_dropping_probabilities_leave_ignored_samples_out() -> None:
    _, method = made("opm", loss=functools.partial(nn.functional.cross_entropy, ignore_index=7))
    inputs, labels = batch(2)
    keep = labels != 1
    all_of_them = method.blocks.forward(inputs, torch.where(keep, labels, 7))
    without = method.blocks.forward([x[keep] for x in inputs], labels[keep])
    torch.testing.assert_close(method.probabilities(all_of_them), method.probabilities(without), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", ["joint", "aim", "ogm", "mmpareto", "mla", "train-on-held"])
def test_labels_of_another_kind_are_never_trained_as_classes(name: str) -> None:
    net, method = made(name)
    inputs, labels = batch(2)
    before = copy.deepcopy(net.state_dict())
    for wrong, message in (
        (torch.rand(COUNT, 1), r"got float32 of shape \[12, 1\]"),
        (torch.rand(COUNT, CLASSES), r"got float32 of shape \[12, 3\]"),
        (labels.int(), "got int32"),
        (labels.bool(), "got bool"),
        (labels + 1, "labels range from 1 to 3, and the model returns 3 logits"),
        (labels - 1, "labels range from -1 to 1"),
        (labels[:-1], r"beside labels of shape \[11\]"),
        (None, "got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            method.step(inputs, wrong)
    net.head = nn.Linear(2 * WIDTH, 1).double()
    blocks = ak.Blocks(net, method.blocks.encoders, lambda z: net.head(torch.cat(z, 1)))
    one = make_method("joint", blocks, sgd(blocks))
    with pytest.raises(ValueError, match="of one logit a sample cross entropy is always 0"):
        one.step(inputs, labels * 0)
    for key, value in net.state_dict().items():
        assert key.startswith("head") or torch.equal(value, before[key])


def test_a_loss_of_ones_own_is_checked_at_every_step_of_a_method_that_needs_classes() -> None:
    def focal(logits: Tensor, labels: Tensor) -> Tensor:
        own = logits.log_softmax(1).gather(1, labels[:, None])
        return -((1.0 - own.exp()).square() * own).mean()

    net, method = made("ogm", loss=focal)
    inputs, labels = batch(2)
    expected = focal(net(*inputs), labels)
    torch.testing.assert_close(method.step(inputs, labels), expected.detach(), **CLOSE)
    with pytest.raises(ValueError, match="OGM needs the probability of the true class, so labels must be"):
        method.step(inputs, labels.double())


def test_a_loss_is_a_scalar() -> None:
    _, method = made("joint", loss=functools.partial(nn.functional.cross_entropy, reduction="none"))
    with pytest.raises(ValueError, match=r"loss must return a scalar tensor, the mean over samples; it returned shape"):
        method.step(*batch(2))


def test_aim_measures_by_the_loss_that_it_trains_by() -> None:
    seen = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return nn.functional.mse_loss(logits[:, 0], labels)

    _, method = made("aim", loss=loss)
    (inputs, _), (held, _) = batch(2), batch(2, seed=1)
    values = inputs[0].flatten(1)[:, 0]
    table = method.update(inputs, values, held_out=(held, held[0].flatten(1)[:, 0]))
    assert table.rule == "reliance" and seen and not any(seen)
    method.step(inputs, values)
    assert seen[-1]


def test_values_of_losses_add_up() -> None:
    net, method = made("m-sam", loss=nn.functional.mse_loss)
    inputs, labels = batch(2)
    target = nn.functional.one_hot(labels, CLASSES).double()
    z = net.features(inputs)

    def value(*present: int) -> float:
        return -nn.functional.mse_loss(net.with_zeros(z, set(present)), target).item()

    phi = shapley_losses(method.blocks.fuse, z, lambda x: nn.functional.mse_loss(x, target)).tolist()
    by_hand = [(value(m) - value() + value(0, 1) - value(1 - m)) / 2 for m in range(2)]
    assert phi == pytest.approx(by_hand, rel=1e-12)
    assert sum(phi) == pytest.approx(value(0, 1) - value(), rel=1e-12)
