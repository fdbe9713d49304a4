"""The recipes hold: their blocks run on networks of the published structure, before and after, in ten added lines."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recipe_scripts as scripts
import torch
from recipe_scripts import CLASSES
from torch import Tensor, nn
from torch.nn import functional

import aim_kernels as ak

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
#: The longest line of a block: the page is read side by side with a script.
COLUMNS = 125

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[title], re.MULTILINE | re.DOTALL)


def side(title: str, sign: str) -> str:
    """The script before ("-") or after ("+")."""
    (diff,) = blocks(title, "diff")
    return "".join(line[2:] for line in diff.splitlines(keepends=True) if line[:1] in (sign, " "))


def run(code: str, names: dict[str, Any], *expected: str) -> None:
    """Executes a block. Any warning is an error, but for those that begin as expected, which must come."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(code, "docs/recipes.md", "exec"), names)
    said = {str(each.message) for each in caught}
    unexpected = [text for text in said if not any(re.search(pattern, text) for pattern in expected)]
    assert not unexpected
    assert all(any(re.search(pattern, text) for text in said) for pattern in expected)


STATISTICS = r"layers keep running statistics, collected under the live weights"


class Watch:
    """What the script's own functions see of the weights."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.degraded, self.true = 0, []

    def after_step(self) -> None:
        masters = getattr(self.names["optimizer"], "masters", dict)()
        self.degraded += any(not torch.equal(p, master) for p, master in masters.items())

    def evaluated(self) -> None:
        self.true.append(getattr(self.names["optimizer"], "holds_true_weights", True))

    def steps(self, model: nn.Module, batches: Any, loss: Callable[[Any], Tensor]) -> None:
        model.train()
        for batch in batches:
            self.names["optimizer"].zero_grad()
            loss(batch).backward()
            self.names["optimizer"].step()
            self.after_step()


def holds(names: dict[str, Any], watch: Watch, shortcut: str, path: Path) -> None:
    """AIM has held back the shortcut and nothing else, training saw degraded weights, evaluation and the file true
    ones."""
    aim, optimizer = names["aim"], names["optimizer"]
    assert {m for table in aim.history for m in table.dominant} == {shortcut}
    assert watch.degraded > 0
    assert watch.true and all(watch.true)
    optimizer.eval()
    (state,) = saved_in(path)
    true = {name.removeprefix("module."): x for name, x in aim.model.state_dict().items() if "running" not in name}
    assert all(torch.equal(state[name], x) for name, x in true.items() if "num_batches" not in name)
    masters = optimizer.masters()
    assert masters and all(torch.equal(p, master) for p, master in masters.items())


def saved_in(path: Path) -> Iterator[dict[str, Tensor]]:
    found = torch.load(path, weights_only=False)
    if isinstance(found, nn.Module):
        found = found.state_dict()
    for name in ("model", "state_dict"):
        found = found.get(name, found)
    yield {name.removeprefix("module."): x for name, x in found.items()}


def test_every_recipe_has_a_test_and_is_short() -> None:
    assert set(SECTIONS) == {*LOOPS, *TRAINERS}
    for title in SECTIONS:
        (diff,) = blocks(title, "diff")
        assert 0 < sum(line.startswith("+") for line in diff.splitlines()) <= 10, title
        assert max(map(len, diff.splitlines())) <= COLUMNS, title


# -- loops -------------------------------------------------------------------------------------------------------------


def two_streams(epochs: int, path: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"torch": torch, "cross_entropy": functional.cross_entropy, "path": path}
    watch = Watch(names)

    def train_epoch(args: Any, epoch: int, model: nn.Module, device: Any, loader: Any, *_: Any) -> None:
        def loss(batch: Any) -> Tensor:
            spec, image, label = batch
            return functional.cross_entropy(model(spec.unsqueeze(1).float(), image.float())[2], label)

        watch.steps(model, loader, loss)

    def valid(args: Any, model: nn.Module, device: Any, loader: Any) -> float:
        watch.evaluated()
        model.eval()
        with torch.no_grad():
            spec, image, label = next(iter(loader))
            return float((model(spec.unsqueeze(1).float(), image.float())[2].argmax(1) == label).float().mean())

    train, outside = scripts.clips(192, 16, 1, True), scripts.clips(128, 64, 2, False)
    return names | {
        "watch": watch,
        "names": names,
        "args": SimpleNamespace(learning_rate=0.05, epochs=epochs),
        "device": torch.device("cpu"),
        "model": scripts.TwoStreams(),
        "num_classes": CLASSES,
        "scheduler": None,
        "train_dataloader": train,
        "valid_dataloader": outside,
        "train_epoch": train_epoch,
        "valid": valid,
    }


def cross_modal(epochs: int, path: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"torch": torch, "path": path}
    watch = Watch(names)
    train_loader, valid_loader = scripts.aligned(256, 16, 1, True), scripts.aligned(128, 64, 2, False)

    def train(model: nn.Module, optimizer: Any, criterion: Any) -> None:
        watch.steps(model, train_loader, lambda batch: criterion(model(*batch[0][1:])[0], batch[1].squeeze(-1)))

    def evaluate(model: nn.Module, criterion: Any) -> float:
        watch.evaluated()
        model.eval()
        with torch.no_grad():
            x, y, _ = next(iter(valid_loader))
            return float(criterion(model(*x[1:])[0], y.squeeze(-1)))

    return names | {
        "watch": watch,
        "names": names,
        "hyp_params": SimpleNamespace(lr=1e-2, num_epochs=epochs),
        "MULTModel": lambda _: scripts.CrossModalNetwork({"l": 6, "a": 5, "v": 4}),
        "train_loader": train_loader,
        "valid_loader": valid_loader,
        "train": train,
        "evaluate": evaluate,
    }


def segmentation(epochs: int, path: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"torch": torch, "cross_entropy": functional.cross_entropy, "path": path}
    watch = Watch(names)

    def loss_of(outputs: Any, targets: Any) -> Tensor:
        pairs = zip(outputs, targets, strict=True)
        return torch.stack([functional.cross_entropy(x, y.long() - 1, ignore_index=-1) for x, y in pairs]).sum()

    def train_one_epoch(model: nn.Module, loader: Any, device: Any, optimizer: Any, loss: Any, epoch: int) -> None:
        def each(s: Any) -> Tensor:
            return loss(model(s["image"], s["depth"]), [s["label"], *s["label_down"].values()])

        watch.steps(model, loader, each)

    def validate(model: nn.Module, loader: Any, device: Any) -> float:
        watch.evaluated()
        model.eval()
        with torch.no_grad():
            s = next(iter(loader))
            return float((model(s["image"], s["depth"]).argmax(1) + 1 == s["label"]).float().mean())

    return names | {
        "watch": watch,
        "names": names,
        "args": SimpleNamespace(lr=0.05, epochs=epochs),
        "device": torch.device("cpu"),
        "model": scripts.Segmenter(),
        "loss_function_train": loss_of,
        "train_loader": scripts.scenes(128, 8, 1, True),
        "valid_loader": scripts.scenes(64, 32, 2, False),
        "train_one_epoch": train_one_epoch,
        "validate": validate,
    }


def late_fusion(epochs: int, path: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"torch": torch, "l1_loss": functional.l1_loss}
    watch = Watch(names)

    def loss_of(model: nn.Module, d: Any) -> Tensor:
        return functional.l1_loss(model(d["text"], d["audio"], d["vision"])["M"], d["labels"]["M"].view(-1, 1))

    def do_test(model: nn.Module, loader: Any) -> float:
        watch.evaluated()
        model.eval()
        with torch.no_grad():
            return float(loss_of(model, next(iter(loader))))

    return names | {
        "watch": watch,
        "names": names,
        "args": SimpleNamespace(learning_rate=1e-2, epochs=epochs, model_save_path=path),
        "device": torch.device("cpu"),
        "model": scripts.LateFusion(),
        "dataloader": {"train": scripts.sentiment(256, 16, 1, True), "valid": scripts.sentiment(128, 64, 2, False)},
        "train_epoch": lambda model, loader, _: watch.steps(model, loader, lambda d: loss_of(model, d)),
        "do_test": do_test,
    }


#: Recipe to what its script would have, its shortcut, epochs, and the warnings that it brings.
LOOPS: dict[str, tuple[Callable[[int, Path], dict[str, Any]], str, int, tuple[str, ...]]] = {
    "Two-stream ResNet": (two_streams, "visual", 4, (STATISTICS,)),
    "Sequence-first transformer of three modalities": (cross_modal, "a", 4, ()),
    "RGB-D segmentation": (segmentation, "depth", 4, (STATISTICS,)),
    "Sentiment from text, audio and vision": (late_fusion, "audio", 4, ()),
}


def made(title: str, epochs: int, path: Path) -> dict[str, Any]:
    make = LOOPS[title][0]
    found = make(epochs, path)
    names = found.pop("names")
    names.update(found)
    return names


@pytest.mark.parametrize("title", LOOPS)
def test_the_script_as_it_was_runs(title: str, tmp_path: Path) -> None:
    names = made(title, 1, tmp_path / "model.pt")
    run(side(title, "-"), names)
    assert (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("title", LOOPS)
def test_the_loop_holds_back_a_shortcut(title: str, tmp_path: Path) -> None:
    _, shortcut, epochs, expected = LOOPS[title]
    names = made(title, epochs, tmp_path / "model.pt")
    run(side(title, "+"), names, *expected)
    assert names["aim"].updates == epochs
    holds(names, names["watch"], shortcut, tmp_path / "model.pt")
    for other in blocks(title, "python"):
        names["optimizer"].train()
        run(other, names, *(expected if "ak.AIM(" in other else ()))
        assert names["aim"].history


TRAINERS: dict[str, Any] = {}
