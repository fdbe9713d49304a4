"""AIM itself, on the protocol of its rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aim_kernels.aim.aim import AIM
from aim_kernels.aim.samples import Samples
from aim_kernels.methods.base import Blocks, Method, Outputs
from aim_kernels.methods.losses import Loss
from aim_kernels.step.arguments import check_at_least


class AIMMethod(Method):
    """:class:`aim_kernels.AIM` with all its options and defaults; :meth:`update` is its ``update``, with a step of this
    method as ``train``.

    ``num_classes=None``: that of the blocks, which may be None, too. ``unimodal_weight`` times the sum of the
    modalities' own losses is added to the loss (0, the default: the joint loss alone), which makes every
    encoder better by itself, held back or not, and costs accuracy where classes are unbalanced: not the paper's, but
    what several rivals owe their encoders to (docs/comparison.md). ``options`` go to AIM. With a mixing of two passes a
    step is ``AIM.backward(closure)`` and the optimizer's step.

    Raises ValueError for a negative ``unimodal_weight``, and what AIM raises.
    """

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        num_classes: int | None = None,
        unimodal_weight: float = 0.0,
        loss: Loss | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_at_least("unimodal_weight", unimodal_weight, 0.0)
        self.unimodal_weight = unimodal_weight
        self._without_labels = False  # in the latest update
        num_classes = blocks.num_classes if num_classes is None else num_classes
        self.aim = AIM(
            blocks.model,
            self.optimizer,
            num_classes,
            arguments=blocks.arguments,
            seed=seed,
            loss=None if loss is None else self._measured_loss,
            **self.options_of_aim(options),
        )

    def options_of_aim(self, options: dict[str, Any]) -> dict[str, Any]:
        """What AIM is made with, of the options that were given."""
        return options

    @property
    def writes_rows_only(self) -> bool:  # type: ignore[override]
        """Whether a training loop of one's own will do: not where a step takes two passes, or adds to the loss."""
        return not self.aim.mixing.two_passes and not self.unimodal_weight

    def _update(self, samples: Samples, held_out: Samples | None) -> Any:
        """Returns AIM's table."""
        rule = self.aim.rule
        on_losses = not self.aim.asks_for_scores if rule is None else not rule.scores_blocks
        self._without_labels = (
            samples.labels is None and self.given_loss is not None and on_losses and held_out is not None
        )
        labels, outside = samples.labels, None if held_out is None else held_out.labels
        if self._without_labels and held_out is not None:
            # Rules on losses take labels apart by sample, whatever they are; the loss does not see these.
            labels, outside = (torch.arange(each.size, device=each.inputs.device) for each in (samples, held_out))
        recent, held = self._recent.copy(), None if held_out is None else (held_out.inputs, outside)
        try:
            return self.aim.update(samples.inputs, labels, held_out=held, train=self._try)
        finally:
            self._recent = recent  # without the steps that were tried

    def _measured_loss(self, logits: Any, labels: Any) -> Tensor:
        return self.loss_function(logits, None if self._without_labels else labels)

    def _try(self, inputs: Any, labels: Any, present: Tensor | None = None, **keywords: Any) -> Tensor:
        """A step on inputs in the form in which a rule gives them: positions, and keywords beside them."""
        labels = None if self._without_labels else labels
        if keywords:
            inputs = {**dict(enumerate(inputs)), **keywords}
        return self.step(inputs, labels) if present is None else self.step(inputs, labels, present)

    @property
    def degrades(self) -> bool:
        """Whether training sees degraded weights or features."""
        return self.aim.degrades

    def loss(self, outputs: Outputs) -> Tensor:
        loss = super().loss(outputs)
        return loss + self.unimodal_weight * self.unimodal_losses(outputs).sum() if self.unimodal_weight else loss

    def _backward(self, batch: Samples, run: Callable[[Tensor], Any]) -> tuple[Tensor, Outputs]:
        if not self.aim.mixing.two_passes:
            return super()._backward(batch, run)
        seen: list[Outputs] = []

        def closure() -> Tensor:
            seen[:] = [self.forward(batch)]
            return self.loss(seen[0])

        return self.aim.backward(closure, run).detach(), seen[0]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "aim": self.aim.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.aim.load_state_dict(state["aim"])
