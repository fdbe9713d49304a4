"""The recipes hold: their blocks run on networks of the published structure, before and after, in ten added lines."""

from __future__ import annotations

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
    assert set(SECTIONS) == {*LOOPS, *TRAINERS, PAIRS}
    for title in SECTIONS:
        (diff,) = blocks(title, "diff")
        assert 0 < sum(line.startswith("+") for line in diff.splitlines()) <= 10, title
        assert max(map(len, diff.splitlines())) <= COLUMNS, title


# -- loops -------------------------------------------------------------------------------------------------------------


def two_streams(epochs: int, path: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"torch": torch, "path": path}
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
    names: dict[str, Any] = {"torch": torch, "path": path}
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
    names: dict[str, Any] = {"torch": torch}
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
    "Sequence-first transformer of three modalities": (cross_modal, "a", 5, ()),
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


# -- transformers ------------------------------------------------------------------------------------------------------


def trainer_names(
    folder: Path, epochs: int, model: nn.Module, columns: Callable[..., dict[str, Tensor]]
) -> dict[str, Any]:
    """What a script of the Trainer has before it makes one."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    watch: dict[str, Any] = {"degraded": 0, "true": []}

    class Observed(transformers.Trainer):
        def training_step(self, model: nn.Module, *args: Any, **keywords: Any) -> Tensor:
            masters = getattr(self.optimizer.optimizer, "masters", dict)()
            watch["degraded"] += any(not torch.equal(p, master) for p, master in masters.items())
            return super().training_step(model, *args, **keywords)

        def prediction_step(self, *args: Any, **keywords: Any) -> Any:
            watch["true"].append(getattr(self.optimizer.optimizer, "holds_true_weights", True))
            return super().prediction_step(*args, **keywords)

    options = {"num_train_epochs": epochs, "save_strategy": "epoch", "eval_strategy": "epoch", "disable_tqdm": True}
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        **options,
    )
    return {
        "torch": torch,
        "Trainer": Observed,
        "training_args": arguments,
        "model": model,
        "collate": scripts.stacked,
        "num_classes": CLASSES,
        "train": scripts.rows(**columns(192, 1, True)),
        "valid": scripts.rows(**columns(128, 2, False)),
        "watch": watch,
    }


def two_towers(folder: Path, epochs: int) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import SequenceClassifierOutput

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = transformers.VisionTextDualEncoderModel(
                transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
                    transformers.ViTConfig(**small, image_size=8, patch_size=4),
                    transformers.BertConfig(**small, vocab_size=16, max_position_embeddings=8),
                    projection_dim=16,
                )
            )
            self.head = nn.Linear(32, CLASSES)

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, labels: Tensor | None = None
        ) -> Any:
            found = self.towers(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
            logits = self.head(torch.cat([found.text_embeds, found.image_embeds], 1))
            loss = None if labels is None else functional.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    def columns(count: int, seed: int, shortcut: bool) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask", "pixel_values", "labels")
        return dict(zip(names, scripts.texts_and_images(count, seed, shortcut), strict=True))

    return trainer_names(folder, epochs, Classifier(), columns)


def frozen_tower(folder: Path, epochs: int) -> dict[str, Any]:
    """Four image tokens, a question that gives the answer away, a mark, and the answer, which alone is asked for."""
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        initializer_range=0.2,  # what is frozen must say something
    )
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=15, vision_feature_layer=-1)
    )
    model.requires_grad_(False)
    scripts.adapt(model.model.language_model, 8)
    model.model.multi_modal_projector.requires_grad_(True)

    def columns(count: int, seed: int, shortcut: bool) -> dict[str, Tensor]:
        ids, _, images, labels = scripts.texts_and_images(count, seed, shortcut, shown=0.5)
        answer, mark = (8 + labels)[:, None], torch.full((count, 1), 3)
        ids = torch.cat([torch.full((count, 4), 15), ids[:, 1:2], mark, answer], 1)
        asked = torch.full_like(ids, -100)
        asked[:, -1:] = answer
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images, "labels": asked}

    return trainer_names(folder, epochs, model, columns)


#: Recipe to what its script would have, its shortcut and epochs.
TRAINERS: dict[str, tuple[Callable[[Path, int], dict[str, Any]], str, int]] = {
    "Hugging Face: text and image, masks, Trainer": (two_towers, "text", 5),
    "LLaVA: a frozen tower, adapters, tokens as labels": (frozen_tower, "text", 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("title", TRAINERS)
def test_the_trainer_holds_back_a_shortcut(title: str, tmp_path: Path) -> None:
    make, shortcut, epochs = TRAINERS[title]
    run(side(title, "-"), make(tmp_path / "before", 1))
    names = make(tmp_path / "after", epochs)
    run(side(title, "+"), names)
    aim, optimizer, watch = names["aim"], names["optimizer"], names["watch"]
    assert aim.updates == epochs
    assert {m for table in aim.history for m in table.dominant} == {shortcut}
    assert watch["degraded"] > 0 and watch["true"] and all(watch["true"])
    assert optimizer.holds_true_weights
    for other in blocks(title, "python"):
        run(other, names)
    masters = optimizer.masters()
    assert all(torch.equal(p, master) for p, master in masters.items())


# -- pairs without labels ----------------------------------------------------------------------------------------------

PAIRS = "CLIP: pairs without labels"


def pairs(epochs: int, path: Path) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**small, "vocab_size": 16, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 2}
    images = {**small, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=images, projection_dim=8)
    ids, mask, pixels, _ = scripts.texts_and_images(64, 1, True)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    names: dict[str, Any] = {"torch": torch, "path": path}
    return names | {
        "args": SimpleNamespace(lr=1e-2, epochs=epochs),
        "model": transformers.CLIPModel(config),
        "dataloader": [{name: x[part::8] for name, x in batch.items()} for part in range(8)],
        "evaluate": lambda _: None,
        "whole": batch,
    }


@pytest.mark.slow
def test_pairs_without_labels_are_modulated_by_gradients(tmp_path: Path) -> None:
    run(side(PAIRS, "-"), pairs(1, tmp_path / "before.pt"))
    names = pairs(3, tmp_path / "model.pt")
    run(side(PAIRS, "+"), names)
    aim, optimizer = names["aim"], names["optimizer"]
    assert aim.updates == 3 and all(min(map(min, table.scores.values())) > 0 for table in aim.history)
    # Somebody's gradients are always the larger ones.
    assert any(table.dominant for table in aim.history)
    optimizer.eval()
    (state,) = saved_in(tmp_path / "model.pt")
    assert all(torch.equal(state[name], x) for name, x in aim.model.state_dict().items())
    names["val_batch"] = names["whole"]
    for other in blocks(PAIRS, "python"):
        run(other, names)
    assert names["aim"].guard.loss is not None


@pytest.mark.slow
def test_reliance_says_nothing_of_pairs(tmp_path: Path) -> None:
    """A loss of pairs is whole again if both are exchanged: each modality's score is within its error of 0, though
    the pairs matter."""
    names = pairs(20, tmp_path / "model.pt")
    run(side(PAIRS, "-"), names)
    model, batch = names["model"], {**names["whole"], "return_loss": True}
    blocks_of = {"text": [model.text_model.encoder], "image": [model.vision_model.encoder]}
    optimizer = ak.AdamW(ak.block_param_groups(model, blocks_of))
    arguments = {"text": ("input_ids", "attention_mask"), "image": "pixel_values"}
    aim = ak.AIM(model, optimizer, arguments=arguments, rule="reliance", loss=lambda output, _: output.loss)
    with pytest.raises(ValueError, match=r"pass labels, or, if the loss needs none, .* torch.arange\(B\)"):
        aim.update(batch, held_out=batch)
    table = aim.update(batch, torch.arange(64), held_out=(batch, torch.arange(64)))
    broken = {**batch, "pixel_values": batch["pixel_values"].roll(1, 0)}
    with torch.no_grad():
        lost = float(model(**broken).loss - model(**batch).loss)
    assert lost > 0.3
    for modality in ("text", "image"):
        assert abs(table.scores[modality][0]) < max(3 * table.errors[modality][0], 0.05 * lost)
