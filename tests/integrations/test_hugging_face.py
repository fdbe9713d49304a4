"""transformers.Trainer and Accelerate: which weights are where and in which file, resuming, skipped steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from integration_helpers import CLASSES, Network, Recorder, columns, held_back, samples, with_held_out
from torch import Tensor
from torch.nn.functional import cross_entropy

import aim_kernels as ak
from aim_kernels.aim import Trial
from aim_kernels.integrations.common import true_state_dict
from aim_kernels.integrations.tensorboard import statistics_scalars

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402

from aim_kernels.integrations.transformers import AIMCallback  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WEIGHT = "video.1.0.weight"


class Classifier(Network):
    """Notes, in training and in evaluation, whether the module holds the true weights."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer: list[ak.AIMFusedOptimizer] = []  # in a list, so that it is no attribute of a module
        self.seen: dict[bool, list[bool]] = {True: [], False: []}

    def forward(self, audio: Tensor, video: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        p = held_back(self)
        if labels is not None and "master" in self.optimizer[0].state.get(p, {}):
            self.seen[self.training].append(torch.equal(p, self.optimizer[0].state[p]["master"]))
        logits = super().forward(audio, video)
        return SequenceClassifierOutput(loss=None if labels is None else cross_entropy(logits, labels), logits=logits)


def rows() -> list[dict[str, Tensor]]:
    return [dict(zip(("audio", "video", "labels"), row, strict=True)) for row in zip(*columns(), strict=True)]


def made(folder: Path, strength: float = 0.0, balanced: bool = False, **options: Any) -> tuple[Any, Classifier, Any]:
    """A Trainer with our callback, its model and the callback; three steps an epoch."""
    writer = options.pop("writer", None)
    torch.manual_seed(5)
    model = Classifier()
    optimizer = model.make_optimizer(strength)
    model.optimizer.append(optimizer)
    aim = ak.AIM(model, optimizer, CLASSES, loss=lambda output, y: cross_entropy(output.logits, y))
    callback = AIMCallback(aim, samples, writer=writer) if balanced else AIMCallback(writer=writer)
    options = {"num_train_epochs": 2, "save_strategy": "no", "logging_strategy": "no", **options}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True, report_to="none", **options
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(),
        optimizers=(optimizer, None),
        callbacks=[callback],
    )
    return trainer, model, callback


def parameters(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def test_training_sees_live_weights_and_evaluation_true_ones(tmp_path: Path) -> None:
    trainer, model, _ = made(tmp_path, strength=0.5, eval_strategy="steps", eval_steps=1)
    trainer.train()
    # Before the first step there is no state, and so nothing held back.
    assert model.seen[True] == [False] * 5
    assert model.seen[False] == [True] * 6 * 3
    same_bits(held_back(model).detach(), model.optimizer[0].state[held_back(model)]["master"])
    assert model.optimizer[0].holds_true_weights


def test_checkpoints_hold_true_weights(tmp_path: Path) -> None:
    trainer, model, _ = made(tmp_path, strength=0.5, save_strategy="steps", save_steps=1)
    trainer.train()
    index = [id(p) for group in model.optimizer[0].param_groups for p in group["params"]].index(id(held_back(model)))
    for step in range(1, 7):
        folder = tmp_path / f"checkpoint-{step}"
        state = torch.load(folder / "optimizer.pt", weights_only=True)["state"][index]
        same_bits(load_file(folder / "model.safetensors")[WEIGHT], state["master"])
    # Afterwards the module's state dict is its own again.
    with torch.no_grad():
        held_back(model).fill_(0.5)
    same_bits(model.state_dict()[WEIGHT], held_back(model).detach())


def test_best_model_is_what_training_leaves(tmp_path: Path) -> None:
    """Loaded before on_train_end, it must not be overwritten by the last true weights.

    The Trainer evaluates after the last step, unless a callback ends training elsewhere.
    """

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 5

    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 4}
    trainer, model, _ = made(
        tmp_path, 0.5, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, **options
    )
    trainer.add_callback(Stop())
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.global_step) == (4, 5)
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    same_bits({name: p.detach() for name, p in model.named_parameters()}, saved)
    trainer.evaluate()
    same_bits({name: p.detach() for name, p in model.named_parameters()}, saved)
    assert not torch.equal(held_back(model), model.optimizer[0].state[held_back(model)]["master"])


def test_state_dict_of_true_weights_in_the_module_is_left_alone() -> None:
    network = Network()
    optimizer = network.make_optimizer(0.5)
    handle = true_state_dict(network, optimizer)
    gradients(network)
    optimizer.step()
    same_bits(network.state_dict()[WEIGHT], optimizer.state[held_back(network)]["master"])
    assert torch.nn.Sequential(network).state_dict().keys() == {f"0.{name}" for name in network.state_dict()}
    same_bits(torch.nn.Sequential(network).state_dict()[f"0.{WEIGHT}"], network.state_dict()[WEIGHT])
    optimizer.eval()
    with torch.no_grad():
        held_back(network).fill_(0.5)
    same_bits(network.state_dict()[WEIGHT], held_back(network).detach())
    optimizer.train()
    handle.remove()
    same_bits(network.state_dict()[WEIGHT], held_back(network).detach())


@pytest.mark.parametrize("stopped", [2, 3, 4])
def test_resumed_run_continues_bit_for_bit(stopped: int, tmp_path: Path) -> None:
    """Stopped in the first epoch, between the two, in the second."""
    through, model, callback = made(tmp_path / "through", balanced=True, num_train_epochs=3)
    through.train()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": stopped, "num_train_epochs": 3}
    first, _, _ = made(tmp_path / "first", balanced=True, **options)
    first.train()
    second, other, resumed = made(tmp_path / "second", balanced=True, num_train_epochs=3)
    second.train(resume_from_checkpoint=str(tmp_path / "first" / f"checkpoint-{stopped}"))
    assert callback.aim.updates == resumed.aim.updates == 3
    assert [t.scores for t in callback.aim.history] == [t.scores for t in resumed.aim.history]
    assert callback.aim.history[-1].dominant
    same_bits(parameters(model), parameters(other))


def test_writer_gets_statistics_and_updates(tmp_path: Path) -> None:
    writer = Recorder()
    trainer, model, _ = made(tmp_path, balanced=True, writer=writer, logging_strategy="steps", logging_steps=2)
    trainer.train()
    assert [step for tag, _, step in writer.seen if tag == "aim/video/1/grad_norm"] == [2, 4, 6]
    assert [step for tag, _, step in writer.seen if tag == "aim/video/1/score"] == [0, 3]
    (last,) = [value for tag, value, step in writer.seen if (tag, step) == ("aim/video/1/grad_norm", 6)]
    assert last == statistics_scalars(model.optimizer[0])["aim/video/1/grad_norm"] > 0.0


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="aim and samples"):
        AIMCallback(samples=samples)
    trainer, model, _ = made(tmp_path)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"exactly one AIMFusedOptimizer.*AcceleratedOptimizer"):
        trainer.train()


# -- Accelerate ----------------------------------------------------------------------------------------------------


def gradients(network: Network, scaler: torch.amp.GradScaler | None = None) -> None:
    *inputs, labels = columns()
    loss = cross_entropy(network(*inputs), labels)
    (loss if scaler is None else scaler.scale(loss)).backward()


def test_wrapped_optimizer_is_found() -> None:
    network = Network()
    optimizer = network.make_optimizer(0.5)
    prepared, wrapped = accelerate.Accelerator(cpu=True).prepare(network, optimizer)
    assert wrapped is not optimizer
    assert ak.AIM(prepared, wrapped, CLASSES).optimizer is optimizer
    gradients(network)
    wrapped.step()
    assert statistics_scalars(wrapped) == statistics_scalars(optimizer)
    wrapped.eval()
    same_bits(held_back(network).detach(), optimizer.state[held_back(network)]["master"])
    wrapped.train()
    assert not torch.equal(held_back(network), optimizer.state[held_back(network)]["master"])


def test_accumulation_steps_only_at_the_end_of_it() -> None:
    network, plain = Network(), Network()
    plain.load_state_dict(network.state_dict())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    _, wrapped = accelerator.prepare(network, network.make_optimizer(0.5))
    direct = plain.make_optimizer(0.5)
    for _ in range(2):
        for part in range(3):
            with accelerator.accumulate(network):
                *inputs, labels = columns(seed=part)
                accelerator.backward(cross_entropy(network(*inputs), labels))
                wrapped.step()
                wrapped.zero_grad()
            *inputs, labels = columns(seed=part)
            (cross_entropy(plain(*inputs), labels) / 3).backward()
        direct.step()
        direct.zero_grad()
    same_bits(parameters(network), parameters(plain))
    assert float(wrapped.state[held_back(network)]["step"]) == 2


def test_overflow_is_a_skipped_step_that_accelerate_sees() -> None:
    """The scaler unscales, finds the infinity and skips; Accelerate then holds the scheduler back."""
    network, plain = Network(), Network()
    plain.load_state_dict(network.state_dict())
    accelerate.Accelerator(cpu=True)
    optimizer, direct = network.make_optimizer(0.5), plain.make_optimizer(0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    for overflow in (False, True, False):
        wrapped.zero_grad()
        gradients(network, scaler)
        if overflow:
            before = [p.clone() for p in parameters(network)], optimizer.statistics()
            held_back(network).grad[0, 0] = float("inf")
        wrapped.step()
        assert wrapped.step_was_skipped == overflow
        if overflow:
            same_bits(before[0], parameters(network))
            assert before[1] == optimizer.statistics()
            continue
        direct.zero_grad()
        gradients(plain)
        direct.step()
        same_bits(parameters(network), parameters(plain))  # scales are powers of two
    assert float(optimizer.state[held_back(network)]["step"]) == 2


@pytest.mark.filterwarnings("ignore:.*running statistics")
def test_evaluation_has_running_statistics_of_the_true_weights(tmp_path: Path) -> None:
    """Training goes on with its own, to the bit; checkpoints have those; at the end they are refreshed for good."""
    seen: dict[bool, list[dict[bool, list[Tensor]]]] = {False: [], True: []}
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
    for evaluated in (False, True):
        more = {"eval_strategy": "steps", "eval_steps": 1} if evaluated else {}
        trainer, model, _ = made(tmp_path / str(evaluated), balanced=True, **options, **more)
        norm = torch.nn.BatchNorm1d(12)
        model.head = torch.nn.Sequential(norm, model.head)
        noted: dict[bool, list[Tensor]] = {True: [], False: []}

        def note(module: Any, _args: Any, noted: dict[bool, list[Tensor]] = noted) -> None:
            if module.training == torch.is_grad_enabled():  # not where they are estimated
                noted[module.training].append(module.running_mean.clone())

        norm.register_forward_pre_hook(note)
        if evaluated:
            trainer.eval_dataset = {"one": trainer.eval_dataset, "other": trainer.eval_dataset}
        trainer.train()
        seen[evaluated].append(noted)
        end = norm.running_mean.clone()
        ak.refresh_statistics(model, [samples()[0]])
        assert torch.allclose(end, norm.running_mean, atol=1e-6)
        last = load_file(tmp_path / str(evaluated) / "checkpoint-9" / "model.safetensors")["head.0.running_mean"]
        noted[True].append(last)
        assert not torch.allclose(last, end, atol=1e-4)
    (plain,), (judged,) = seen[False], seen[True]
    live = [mean for mean in judged[True] if mean.abs().sum() > 0]
    assert len(judged[False]) >= 54 and not any(torch.equal(a, b) for a in live for b in judged[False])
    same_bits(plain[True], judged[True])


def test_trials_and_two_passes(tmp_path: Path) -> None:
    trainer, model, callback = made(tmp_path, balanced=True, num_train_epochs=1)
    callback.aim.rule, callback._updates.samples = Trial(steps=2), with_held_out
    trainer.train()
    assert [table.rule for table in callback.aim.history] == ["trial"]
    split = ak.AIM(model, model.optimizer[0], CLASSES, mixing="split")
    with pytest.raises(ValueError, match=r"mixing='split' takes two passes a step .* the Trainer takes its own"):
        AIMCallback(split, samples)


def test_logs_go_where_the_trainer_logs_to(tmp_path: Path) -> None:
    trainer, _model, callback = made(tmp_path, balanced=True, logging_strategy="steps", logging_steps=1)
    callback.log = trainer.log
    trainer.train()
    tags = {tag for row in trainer.state.log_history for tag in row}
    assert {"aim/accuracy", "aim/audio/accuracy_alone", "aim/video/0/kappa", "aim/video/0/strength"} <= tags
