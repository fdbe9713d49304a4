"""AIM itself, on the protocol of its rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from aim_kernels.aim.aim import AIM
from aim_kernels.methods.base import Blocks, Method, Outputs
from aim_kernels.methods.scores import unimodal_losses
from aim_kernels.step.arguments import check_at_least


class AIMMethod(Method):
    """:class:`aim_kernels.AIM` with all its options and defaults; :meth:`update` is its ``update``, with a step of this
    method as ``train``.

    ``num_classes=None``: that of the blocks, which may be None, too. ``unimodal_weight`` times the sum of the
    modalities' own cross entropies is added to the loss (0, the default: the joint loss alone), which makes every
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
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(blocks, optimizer, seed=seed)
        check_at_least("unimodal_weight", unimodal_weight, 0.0)
        self.unimodal_weight = unimodal_weight
        num_classes = blocks.num_classes if num_classes is None else num_classes
        self.aim = AIM(
            blocks.model,
            self.optimizer,
            num_classes,
            arguments=blocks.arguments,
            seed=seed,
            **self.options_of_aim(options),
        )

    def options_of_aim(self, options: dict[str, Any]) -> dict[str, Any]:
        """What AIM is made with, of the options that were given."""
        return options

    @property
    def writes_rows_only(self) -> bool:  # type: ignore[override]
        """Whether a training loop of one's own will do: not where a step takes two passes, or adds to the loss."""
        return not self.aim.mixing.two_passes and not self.unimodal_weight

    def update(
        self,
        inputs: Sequence[Tensor],
        labels: Tensor | None = None,
        held_out: tuple[Sequence[Tensor], Tensor | None] | None = None,
    ) -> Any:
        """Returns AIM's table."""
        recent = self._recent.copy()
        try:
            table = self.aim.update(inputs, labels, held_out=held_out, train=self.step)
        finally:
            self._recent = recent  # without the steps that were tried
        super().update(inputs, labels, held_out)
        return table

    @property
    def degrades(self) -> bool:
        """Whether training sees degraded weights or features."""
        return self.aim.degrades

    def loss(self, outputs: Outputs) -> Tensor:
        loss = super().loss(outputs)
        return loss + self.unimodal_weight * unimodal_losses(outputs).sum() if self.unimodal_weight else loss

    def step(self, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        if not self.aim.mixing.two_passes:
            return super().step(inputs, labels)
        self.note_batch(inputs)
        self.optimizer.zero_grad()
        loss: Tensor = self.aim.backward(lambda: self.loss(self.blocks.forward(inputs, labels)))
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "aim": self.aim.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.aim.load_state_dict(state["aim"])
