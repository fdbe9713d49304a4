"""``AIMCallback`` for Lightning's ``Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from aim_kernels.aim.aim import AIM
from aim_kernels.aim.trials import Train
from aim_kernels.integrations.common import Samples, Updates, aim_optimizer, refuse_two_passes, true_state_dict
from aim_kernels.integrations.tensorboard import accuracy_scalars, statistics_scalars, update_scalars
from aim_kernels.optim.optimizer import AIMFusedOptimizer


class AIMCallback(Callback):
    """Updates AIM, keeps live and true weights apart, and logs, under ``lightning.pytorch.Trainer``.

    The module's ``configure_optimizers`` returns an :class:`AIMFusedOptimizer`. Validation, test, prediction,
    checkpoints and the end of training then see the true weights, training the live ones; a run resumed with
    ``fit(ckpt_path=...)`` goes on bit for bit, AIM's own state included.

    Running statistics (BatchNorm) are refreshed from the inputs of the latest update for validation, and at the end of
    training for good. Checkpoints keep those of training, which a run that goes on needs: refresh them in a model that
    is loaded for anything else (``aim_kernels.refresh_statistics``). Without ``samples`` nothing is refreshed.

    Args:
        make_aim: ``make_aim(module, optimizer)`` returns the :class:`AIM`; None where strengths are set by hand.
        samples: ``samples()`` returns ``(inputs, labels, held_out)`` as ``aim.update`` takes them, ``held_out`` being
            ``(inputs, labels)`` or None; tensors are moved to the module's device.
        train: a step that trials try (``rule="trial"``), ``train(inputs, labels)``, on a model that is restored after;
            None: AIM's ``loss`` of its model under the trainer's precision, backward and the optimizer's step.
        every_n_epochs: ``aim.update`` runs at the start of the epochs 0, n, 2n, ...
        log: sends statistics, AIM's tables and the accuracies of each modality alone (``statistics_scalars``,
            ``update_scalars``, ``accuracy_scalars``) to the trainer's loggers (TensorBoard, Weights & Biases), every
            ``log_every_n_steps`` of the trainer, which waits for the device that often.

    Raises:
        ValueError: ``every_n_epochs`` below 1, or only one of ``make_aim`` and ``samples``; at the start of training,
            a mixing of two passes under automatic optimization.
        TypeError: at the start of training, where not exactly one of the module's optimizers is an AIMFusedOptimizer.
    """

    def __init__(
        self,
        make_aim: Callable[[Any, AIMFusedOptimizer], AIM] | None = None,
        samples: Samples | None = None,
        *,
        train: Train | None = None,
        every_n_epochs: int = 1,
        log: bool = True,
    ) -> None:
        if (make_aim is None) != (samples is None):
            raise ValueError("give both make_aim and samples, or neither")
        self.make_aim, self.log = make_aim, log
        self.aim: AIM | None = None
        self._updates = Updates(samples, every_n_epochs, train)
        self._loaded: dict[str, Any] | None = None
        self._optimizer: AIMFusedOptimizer | None = None
        self._hook: RemovableHandle | None = None
        self._visiting = False  # whether the weights of this evaluation were put there by us

    # -- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the sanity check and before the optimizer's state is restored.
        self._optimizer = aim_optimizer(trainer.optimizers)
        self._hook = true_state_dict(pl_module, self._optimizer)
        self.aim = None if self.make_aim is None else self.make_aim(pl_module, self._optimizer)
        if pl_module.automatic_optimization:
            refuse_two_passes(self.aim, "Lightning's automatic optimization")
        self._updates.latest = -1
        if self._loaded is not None:
            self._updates.load_state_dict(self._loaded, self.aim)
            self._loaded = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        context = trainer.precision_plugin.forward_context
        if self._updates.at(trainer.current_epoch, self.aim, context) and self.log and self.aim is not None:
            accuracies = accuracy_scalars(self._updates.accuracies)
            self._send(trainer, {**update_scalars(self.aim.history[-1]), **accuracies})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last_of_a_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.log and last_of_a_step and trainer.global_step % trainer.log_every_n_steps == 0:
            self._send(trainer, statistics_scalars(self._optimizer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._optimizer is not None:
            self._optimizer.eval()
            self._updates.refresh(self.aim, for_good=True)
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._finish()

    def _finish(self) -> None:
        """The true weights are what training leaves in the module."""
        self._updates.put_back()
        if self._optimizer is not None:
            self._optimizer.eval()
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = self._hook = None

    @staticmethod
    def _send(trainer: Trainer, scalars: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)

    # -- evaluation during training; otherwise the module holds the true weights anyway ------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._optimizer is not None and not self._optimizer.holds_true_weights:
            self._optimizer.eval()
            self._updates.refresh(self.aim)
            self._visiting = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._optimizer is not None and self._visiting:
            self._updates.put_back()
            self._optimizer.train()
        self._visiting = False

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return self._updates.state_dict(self.aim)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict  # AIM does not exist yet
