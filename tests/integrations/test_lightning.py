"""``AIMCallback`` under Lightning's Trainer: which weights are where, checkpoints, resuming, logging, wrappers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from integration_helpers import CLASSES, Network, columns, held_back, samples, with_held_out
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import aim_kernels as ak
from aim_kernels.aim import Trial

pl = pytest.importorskip("lightning.pytorch")

from aim_kernels.integrations.lightning import AIMCallback  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(Network, pl.LightningModule):
    """Notes, in training and in validation, whether the module holds the true weights."""

    strength = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[bool]] = {"train": [], "validate": []}

    def note(self, what: str) -> None:
        (optimizer,) = self.trainer.optimizers
        p = held_back(self)
        if "master" in optimizer.state.get(p, {}):
            self.seen[what].append(torch.equal(p, optimizer.state[p]["master"]))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.note("train")
        return cross_entropy(self.forward(*batch[:2]), batch[2])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.note("validate")
        self.log("loss", cross_entropy(self.forward(*batch[:2]), batch[2]))

    def test_step(self, batch: list[Tensor], index: int) -> None:
        assert (held_back(self) == 0.5).all()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.strength)


class Balanced(Module):
    """Strengths are set by AIM."""

    strength = 0.0


class Logger(pl.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((dict(metrics), step))


def loader(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*columns()), 8, shuffle=shuffle)


def trainer(folder: Path, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    options = {"logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=str(folder),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def balancing(**options: Any) -> AIMCallback:
    return AIMCallback(lambda module, optimizer: ak.AIM(module, optimizer, CLASSES), samples, **options)


def test_training_sees_live_weights_and_validation_true_ones(tmp_path: Path) -> None:
    module = Module()
    made = trainer(tmp_path, AIMCallback(), epochs=3, val_check_interval=1)
    made.fit(module, loader(), loader())
    assert module.seen["train"] == [False] * 8  # nine batches; before the first step there is nothing to hold back
    assert module.seen["validate"] == [True] * 27
    (optimizer,) = made.optimizers
    for p in module.parameters():
        same_bits(p.detach(), optimizer.state[p].get("master", p).detach())
    assert optimizer.holds_true_weights


def test_without_the_callback_validation_would_see_live_weights(tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path).fit(module, loader(), loader())
    assert module.seen["validate"] == [False] * 6


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_true_weights(weights_only: bool, tmp_path: Path) -> None:
    """Also those that are written between two steps, and those without the states of callbacks."""

    class Keeper(pl.Callback):
        kept: list[Tensor] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt", weights_only=weights_only)
            p = held_back(module)
            self.kept.append(trainer.optimizers[0].state[p]["master"].clone())
            assert not torch.equal(p, self.kept[-1])

    module, keeper = Module(), Keeper()
    trainer(tmp_path, AIMCallback(), keeper).fit(module, loader())
    assert len(keeper.kept) == 6
    for step, master in enumerate(keeper.kept, 1):
        saved = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        same_bits(saved["state_dict"]["video.1.0.weight"], master)
    # Afterwards the module's state dict is its own again.
    with torch.no_grad():
        held_back(module).fill_(0.5)
    same_bits(module.state_dict()["video.1.0.weight"], held_back(module).detach())


def test_resumed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    def fresh(epochs: int, *more: Any, **options: Any) -> tuple[Balanced, AIMCallback, Any]:
        torch.manual_seed(5)
        callback = balancing(log=False)
        return Balanced(), callback, trainer(tmp_path, callback, *more, epochs=epochs, **options)

    module, callback, through = fresh(4)
    through.fit(module, loader())
    save = pl.callbacks.ModelCheckpoint(tmp_path, "kept", save_on_train_epoch_end=True)
    first, _, interrupted = fresh(2, save, enable_checkpointing=True)
    interrupted.fit(first, loader())
    other, resumed, second = fresh(4)
    second.fit(other, loader(), ckpt_path=tmp_path / "kept.ckpt")
    assert resumed.aim is not None
    assert callback.aim is not None
    assert [table.to_dict()["scores"] for table in callback.aim.history] == [
        table.to_dict()["scores"] for table in resumed.aim.history
    ]
    assert callback.aim.updates == resumed.aim.updates == 4
    assert callback.aim.history[-1].dominant == ("video",)
    same_bits([p.detach() for p in module.parameters()], [p.detach() for p in other.parameters()])


def test_updates_come_every_so_many_epochs(tmp_path: Path) -> None:
    callback = balancing(every_n_epochs=3, log=False)
    trainer(tmp_path, callback, epochs=7).fit(Balanced(), loader())
    assert callback.aim is not None
    assert callback.aim.updates == 3


def test_loggers_get_statistics_and_updates(tmp_path: Path) -> None:
    logger = Logger()
    made = trainer(tmp_path, balancing(), logger=logger, log_every_n_steps=2, accumulate_grad_batches=1)
    made.fit(Balanced(), loader())
    steps = [step for row, step in logger.rows if "aim/video/1/grad_norm" in row]
    assert steps == [2, 4, 6]
    assert [step for row, step in logger.rows if "aim/video/1/score" in row] == [0, 3]
    last = [row for row, _ in logger.rows if "aim/video/1/grad_norm" in row][-1]
    assert last["aim/video/1/grad_norm"] == made.optimizers[0].statistics()[6]["grad_norm"] > 0.0


def test_true_weights_are_left_after_an_exception(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                raise ZeroDivisionError

    module = Module()
    made = trainer(tmp_path, AIMCallback(), Stop())
    with pytest.raises(ZeroDivisionError):
        made.fit(module, loader())
    p = held_back(module)
    same_bits(p.detach(), made.optimizers[0].state[p]["master"])


def test_tests_after_training_see_what_was_loaded(tmp_path: Path) -> None:
    """``test`` and ``validate`` outside of ``fit`` neither replace loaded weights nor bring live ones back."""
    module = Module()
    made = trainer(tmp_path, AIMCallback())
    made.fit(module, loader())
    with torch.no_grad():
        held_back(module).fill_(0.5)
    made.validate(module, loader(), verbose=False)
    made.test(module, loader(), verbose=False)
    assert (held_back(module) == 0.5).all()


def test_wrapped_optimizer_of_manual_optimization_is_the_optimizer(tmp_path: Path) -> None:
    """``self.optimizers()`` imitates our class; what its methods write has to reach the optimizer it wraps."""

    class Manual(Module):
        automatic_optimization = False
        strength = 0.0

        def training_step(self, batch: list[Tensor], index: int) -> None:
            wrapper, (optimizer,) = self.optimizers(), self.trainer.optimizers
            assert wrapper is not optimizer
            p = held_back(self)
            if index == 1:
                wrapper.set_strength("video", 1, 0.5)
            wrapper.zero_grad()
            self.manual_backward(cross_entropy(self.forward(*batch[:2]), batch[2]))
            wrapper.step()
            assert ("master" in optimizer.state[p]) == (index >= 1)
            if index:
                live = p.detach().clone()
                assert not torch.equal(live, optimizer.state[p]["master"])
                wrapper.eval()
                assert optimizer.holds_true_weights
                assert torch.equal(p, optimizer.state[p]["master"])
                wrapper.train()
                assert not optimizer.holds_true_weights
                same_bits(p.detach(), live)
                assert "_plan" not in vars(wrapper)
            if index == 2:
                table = ak.AIM(self, wrapper, CLASSES).update(*samples())
                assert table.dominant == ("video",)
            self.steps = index

    module = Manual()
    trainer(tmp_path, epochs=1).fit(module, loader())
    assert module.steps == 2


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make_aim and samples"):
        AIMCallback(samples=samples)
    with pytest.raises(ValueError, match="every_n_epochs"):
        AIMCallback(every_n_epochs=0)

    class Plain(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match=r"exactly one AIMFusedOptimizer.*SGD"):
        trainer(tmp_path, AIMCallback()).fit(Plain(), loader())


@pytest.mark.filterwarnings("ignore:.*running statistics")
def test_validation_has_running_statistics_of_the_true_weights(tmp_path: Path) -> None:
    """Training goes on with its own, to the bit; checkpoints have those; at the end they are refreshed for good."""

    class Normalized(Balanced):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Sequential(torch.nn.BatchNorm1d(12), self.head)
            self.means: dict[str, list[Tensor]] = {"train": [], "validate": []}

        def note(self, what: str) -> None:
            super().note(what)
            self.means[what].append(self.head[0].running_mean.clone())

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            super().validation_step(batch, index)
            features = torch.cat(
                [self.audio[1](self.audio[0](columns()[0])), self.video[1](self.video[0](columns()[1]))], 1
            )
            assert not self.seen["train"] or torch.allclose(self.head[0].running_mean, features.mean(0), atol=1e-6)

    runs = []
    for validated in (False, True):
        torch.manual_seed(5)
        module = Normalized()
        save = pl.callbacks.ModelCheckpoint(tmp_path, f"kept{validated}", save_on_train_epoch_end=True)
        made = trainer(tmp_path, balancing(log=False), save, epochs=3, enable_checkpointing=True)
        made.fit(module, loader(), *([loader()] if validated else []))
        runs.append(module)
    assert runs[1].seen["validate"] and len(runs[1].means["validate"]) > 6
    assert all(torch.equal(*pair) for pair in zip(*(run.means["train"] for run in runs), strict=True))
    saved = torch.load(tmp_path / "keptTrue.ckpt", weights_only=False)["state_dict"]["head.0.running_mean"]
    assert torch.equal(
        saved, torch.load(tmp_path / "keptFalse.ckpt", weights_only=False)["state_dict"]["head.0.running_mean"]
    )
    assert not torch.allclose(saved, runs[1].head[0].running_mean, atol=1e-4)
    reference = runs[1].head[0].running_mean.clone()
    ak.refresh_statistics(runs[1], [samples()[0]])
    assert torch.allclose(reference, runs[1].head[0].running_mean, atol=1e-6)


def test_trials_run_and_are_undone(tmp_path: Path) -> None:
    made = {}
    for kind in ("own", "given"):
        torch.manual_seed(5)
        module, steps = Balanced(), []

        def step(inputs: Any, labels: Tensor, module: Any = module, steps: list[int] = steps) -> None:
            (optimizer,) = module.trainer.optimizers
            steps.append(len(labels))
            optimizer.zero_grad()
            cross_entropy(module(*inputs), labels).backward()
            optimizer.step()

        callback = AIMCallback(
            lambda module, optimizer: ak.AIM(module, optimizer, rule=Trial(steps=2)),
            with_held_out,
            train=step if kind == "given" else None,
        )
        trainer(tmp_path, callback, epochs=1).fit(module, loader())
        assert callback.aim is not None and callback.aim.history[0].rule == "trial"
        assert bool(steps) == (kind == "given")
        made[kind] = module, callback.aim.history[0].trial_losses
    assert made["own"][1] == made["given"][1]
    for p, q in zip(made["own"][0].parameters(), made["given"][0].parameters(), strict=True):
        same_bits(p.detach(), q.detach())


def test_two_passes_are_refused_under_automatic_optimization(tmp_path: Path) -> None:
    def split(automatic: bool) -> None:
        module = Balanced()
        module.automatic_optimization = automatic
        callback = AIMCallback(lambda module, optimizer: ak.AIM(module, optimizer, CLASSES, mixing="split"), samples)
        trainer(tmp_path, callback, epochs=1).fit(module, loader())

    with pytest.raises(ValueError, match=r"mixing='split' takes two passes a step .* Lightning's automatic"):
        split(True)
    split(False)


def test_accuracies_of_each_modality_alone_reach_the_loggers(tmp_path: Path) -> None:
    logger = Logger()
    callback = balancing()
    trainer(tmp_path, callback, epochs=1, logger=logger, log_every_n_steps=1).fit(Balanced(), loader())
    found = [row for row, _ in logger.rows if "aim/accuracy" in row]
    assert len(found) == 1 and {"aim/audio/accuracy_alone", "aim/video/accuracy_alone"} <= set(found[0])
    assert all(0.0 <= found[0][tag] <= 1.0 for tag in found[0] if "accuracy" in tag)
