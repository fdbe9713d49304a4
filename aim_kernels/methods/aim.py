"""AIM itself, on the protocol of its rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from aim_kernels.aim.aim import AIM
from aim_kernels.methods.base import Blocks, Method, Outputs, check_at_least
from aim_kernels.methods.scores import unimodal_losses


class AIMMethod(Method):
    """:class:`aim_kernels.AIM` with all its options; :meth:`update` is its ``update``, and scores every depth.

    ``num_classes=None``: that of the blocks. ``unimodal_weight`` times the sum of the modalities' own cross entropies
    is added to the loss (0: the joint loss alone), which makes every encoder better by itself, held back or not: not
    the paper's, but what several rivals owe their encoders to (docs/comparison.md). ``options`` go to AIM, whose rule
    is "trial" in updates with labels and ``held_out``, unless a ``probe`` is named: tried are steps of this method.
    With ``mixing="split"`` a step is ``AIM.backward(closure)``, two passes, and the optimizer's step.

    Raises ValueError where neither tells the number of classes, for a negative ``unimodal_weight``, and what AIM
    raises.
    """

    #: What is made of the model, the optimizer and the number of classes.
    make: Any = AIM

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        num_classes: int | None = None,
        unimodal_weight: float = 0.3,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(blocks, optimizer, seed=seed)
        check_at_least("unimodal_weight", unimodal_weight, 0.0)
        self.unimodal_weight = unimodal_weight
        num_classes = blocks.num_classes if num_classes is None else num_classes
        if num_classes is None:
            raise ValueError("num_classes is given neither here nor in the blocks")
        self.tries = "probe" not in options  # whoever names a probe wants scores
        self.aim = self.make(blocks.model, self.optimizer, num_classes, seed=seed, **options)

    @property
    def writes_rows_only(self) -> bool:  # type: ignore[override]
        """Whether a training loop of one's own will do: not where a step takes two passes, or adds to the loss."""
        return self.aim.mixing != "split" and not self.unimodal_weight

    def update(
        self,
        inputs: Sequence[Tensor],
        labels: Tensor | None = None,
        held_out: tuple[Sequence[Tensor], Tensor | None] | None = None,
    ) -> Any:
        """Returns AIM's table."""
        tries = self.aim.rule == "trial" or (self.tries and labels is not None)
        table = self.aim.update(inputs, labels, held_out=held_out, train=self.step if tries else None)
        super().update(inputs, labels, held_out)
        return table

    def loss(self, outputs: Outputs) -> Tensor:
        loss = super().loss(outputs)
        return loss + self.unimodal_weight * unimodal_losses(outputs).sum() if self.unimodal_weight else loss

    def step(self, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        if self.aim.mixing != "split":
            return super().step(inputs, labels)
        self.optimizer.zero_grad()
        loss: Tensor = self.aim.backward(lambda: self.loss(self.blocks.forward(inputs, labels)))
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "aim": self.aim.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.aim.load_state_dict(state["aim"])
