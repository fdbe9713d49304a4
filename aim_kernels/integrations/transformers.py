"""``AIMCallback`` for the ``Trainer`` of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aim_kernels.aim.aim import AIM
from aim_kernels.aim.rules import Trial
from aim_kernels.aim.trials import Train
from aim_kernels.integrations.common import Samples, Updates, aim_optimizer, refuse_two_passes, true_state_dict
from aim_kernels.integrations.tensorboard import Writer, accuracy_scalars, statistics_scalars, update_scalars


def _precision(args: TrainingArguments) -> AbstractContextManager[Any]:
    """What the Trainer's forward passes run under."""
    return torch.autocast(args.device.type, torch.bfloat16) if args.bf16 else nullcontext()


#: Where AIM's state lies in trainer_state.json.
STATE_KEY = "aim_kernels.AIM"


class AIMCallback(TrainerCallback):
    """Updates AIM, keeps live and true weights apart, and logs, under ``transformers.Trainer(optimizers=(optimizer,
    scheduler), callbacks=[AIMCallback(aim, samples)])``.

    The Trainer itself calls ``optimizer.train()`` before every batch and ``optimizer.eval()`` before it evaluates. It
    does neither before it saves: under this callback every checkpoint's model, and the module after training (that of
    ``load_best_model_at_end`` too), holds the true weights. ``train(resume_from_checkpoint=...)`` goes on bit for bit,
    AIM's own state included.

    Running statistics (BatchNorm) are refreshed from the inputs of the latest update for evaluations that the Trainer
    schedules, and at the end of training for good. Checkpoints keep those of training, which a run that goes on needs:
    refresh them in a model that is loaded for anything else (``aim_kernels.refresh_statistics``). Without ``samples``
    nothing is refreshed.

    Args:
        aim: an :class:`AIM` of the model and the optimizer; None where strengths are set by hand. A model that returns
            a ``ModelOutput`` needs ``AIM(loss=lambda output, labels: cross_entropy(output.logits, labels))``, and
            ``arguments`` that say which of its keywords belong to which modality.
        samples: ``samples()`` returns ``(inputs, labels, held_out)`` as ``aim.update`` takes them, ``held_out`` being
            ``(inputs, labels)`` or None; tensors are moved to the model's device.
        train: a step that trials try (``rule="trial"``), ``train(inputs, labels)``, on a model that is restored after;
            None: AIM's ``loss`` of its model under the Trainer's bf16, backward and the optimizer's step.
        every_n_epochs: ``aim.update`` runs at the start of the epochs 0, n, 2n, ...
        writer: a ``SummaryWriter``, or None; gets statistics whenever the Trainer logs, AIM's tables, and the
            accuracies of each modality alone.
        log: called with the same as one dict; ``callback.log = trainer.log`` (after the Trainer was made) sends them
            where the Trainer logs to, ``callback.log = wandb.log`` to Weights & Biases.

    Raises:
        ValueError: ``every_n_epochs`` below 1, only one of ``aim`` and ``samples``, or a mixing of two passes; at the
            first update, trials without ``train`` under fp16.
        TypeError: at the start of training, where the Trainer's optimizer is not an AIMFusedOptimizer.
    """

    def __init__(
        self,
        aim: AIM | None = None,
        samples: Samples | None = None,
        *,
        train: Train | None = None,
        every_n_epochs: int = 1,
        writer: Writer | None = None,
        log: Callable[[dict[str, float]], Any] | None = None,
    ) -> None:
        if (aim is None) != (samples is None):
            raise ValueError("give both aim and samples, or neither")
        refuse_two_passes(aim, "the Trainer")
        self.aim, self.writer, self.log = aim, writer, log
        self._updates = Updates(samples, every_n_epochs, train)
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hooks()  # of a training that was interrupted
        model = kwargs["model"]
        # A checkpoint that follows an evaluation has the running statistics of training.
        put_back = model.register_state_dict_pre_hook(lambda *_: self._updates.put_back())
        self._hooks = [true_state_dict(model, aim_optimizer(kwargs["optimizer"])), put_back]
        self._updates.latest = -1
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is not None:
            found = dict(saved)
            if found["aim"] is not None:  # JSON has no tensors
                generator = torch.tensor(found["aim"]["generator"], dtype=torch.uint8, device="cpu")
                found["aim"] = {**found["aim"], "generator": generator}
            self._updates.load_state_dict(found, self.aim)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._updates.put_back()
        # A resumed run begins the epoch that it was stopped in once more.
        if args.fp16 and self._updates.train is None and self.aim is not None and isinstance(self.aim.rule, Trial):
            raise ValueError("trials under fp16 need the Trainer's GradScaler; give AIMCallback train=, or use bf16")
        if not self._updates.at(int((state.epoch or 0.0) + 1e-6), self.aim, partial(_precision, args)):
            return
        assert self.aim is not None
        saved = self._updates.state_dict(self.aim)
        saved["aim"]["generator"] = saved["aim"]["generator"].tolist()
        state.stateful_callbacks[STATE_KEY] = saved
        self._send({**update_scalars(self.aim.history[-1]), **accuracy_scalars(self._updates.accuracies)}, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._updates.put_back()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_evaluate:
            self._evaluate(kwargs["optimizer"])
        if (self.writer is not None or self.log is not None) and control.should_log:
            self._send(statistics_scalars(kwargs["optimizer"]), state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Before the best model is loaded, which eval() would overwrite afterwards. The next batch undoes it.
        aim_optimizer(kwargs["optimizer"]).eval()
        if control.should_evaluate:
            self._evaluate(kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        aim_optimizer(kwargs["optimizer"]).eval()
        self._updates.put_back()
        self._updates.refresh(self.aim, for_good=True)
        self._remove_hooks()

    def _evaluate(self, optimizer: Any) -> None:
        """The evaluation that follows; the Trainer does not say when it begins, nor which of several is the last."""
        aim_optimizer(optimizer).eval()
        self._updates.refresh(self.aim)

    def _send(self, scalars: dict[str, float], state: TrainerState) -> None:
        for tag, value in scalars.items():
            if self.writer is not None:
                self.writer.add_scalar(tag, value, state.global_step)
        if self.log is not None:
            self.log(dict(scalars))

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
