"""MLA: modalities take turns, each a step of its own through one shared head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim.inputs import Inputs
from aim_kernels.aim.prototypes import first_tensor, probing
from aim_kernels.aim.samples import Samples
from aim_kernels.methods.base import Blocks, Method
from aim_kernels.methods.losses import Loss
from aim_kernels.methods.scores import wide
from aim_kernels.step.arguments import check_at_least, check_choice
from aim_kernels.step.sharding import averaged


class MLA(Method):
    """For each modality in turn: ``loss(head(z_m), y)``, backward, (projection of the head's gradient), optimizer step.

    ``head``: the linear layer that all modalities share, so that features are equally wide; the model's own logits
    should be a mean or weighted sum of ``head(z_m)``. None: ``blocks.unimodal`` instead, so that alternation works with
    every network; the other encoders then run along without gradients.

    ``projection`` of the head's gradient, ``G <- G P^T``, from the second turn on. With ``r`` the batch mean of the
    features and ``k = P r``, ``a = 0.1^(1 + i / steps_per_epoch)`` for the i-th batch of an epoch
    (``steps_per_epoch=None``: 0.1)::

        "published"    P <- P - k k^T / (a + k r^T), element by element; then P <- P / |P|
        "owm"          P <- P - k k^T / (a + r^T P r): recursive least squares, the textbook's
        "none"         no projection

    Source: Cecile-hi/Multimodal-Learning-with-Alternating-Unimodal-Adaptation, ab6c184 (CVPR 2024). It looks for the
    head under a name that it does not have, so that what it runs is "none", the default. Its fusion by entropies is
    part of evaluation, and not here.

    Encoders run block by block, one at a time: a model that does something between its blocks, or whose features need
    ``present=``, is refused at the first step (ValueError), rather than trained as another network.

    Raises ValueError for a projection without a head, unknown words, ``zero_grad_in_step`` (encoders whose turn it is
    not would be stepped with zeros); TypeError for a head that is not linear.
    """

    writes_rows_only = False
    one_pass = False

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        head: nn.Linear | None = None,
        projection: str = "none",
        steps_per_epoch: int | None = None,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_choice("projection", projection, ("none", "published", "owm"))
        if head is not None and not isinstance(head, nn.Linear):
            raise TypeError(f"head must be the nn.Linear that all modalities share, got {type(head).__name__}")
        if head is None and projection != "none":
            raise ValueError(f"projection={projection!r} is of a shared head's gradient; pass head=, or 'none'")
        if steps_per_epoch is not None:
            check_at_least("steps_per_epoch", steps_per_epoch, 1)
        if self.optimizer.zero_grad_in_step:
            raise ValueError("MLA steps one encoder at a time, and zero_grad_in_step would step the others with zeros")
        self.head, self.projection, self.steps_per_epoch = head, projection, steps_per_epoch
        self.batches = self.turns = 0
        self.compared: set[int] = set()  # modalities of which block by block is what the model does
        self.projector: Tensor | None = None
        if head is not None and projection != "none":
            self.projector = torch.eye(head.in_features, dtype=wide(head.weight).dtype, device=head.weight.device)

    def _update(self, samples: Samples, held_out: Samples | None) -> None:
        """An epoch begins."""
        self.batches = 0

    def _step_on(self, batch: Samples) -> Tensor:
        """As many optimizer steps as modalities that have an input; returns the sum of their losses."""
        inputs, labels = batch.inputs, batch.labels
        if inputs.shared.get("present") is not None:
            raise ValueError(
                "MLA steps one encoder at a time, block by block, which knows nothing of present=; leave it out"
            )
        new = {m for m, x in enumerate(inputs) if x is not None} - self.compared
        if new:
            self.compare(inputs, new)
        losses = []
        for m in range(len(self.blocks.modalities)):
            if inputs[m] is None:
                continue
            self.optimizer.zero_grad()
            z, logits = self.own_logits(m, inputs)
            self.check(logits, labels)
            loss = self.loss_of(logits, labels)
            loss.backward()
            if self.projector is not None and self.turns:
                self.project(z)
            self.optimizer.step()
            self.turns += 1
            losses.append(loss.detach())
        self.batches += 1
        return torch.stack(losses).sum()

    def own_logits(self, m: int, inputs: Inputs) -> tuple[Tensor, Any]:
        """Features and logits of modality m; no other encoder gets a gradient."""
        returned = self.blocks.encode_one(m, inputs[m])
        z = first_tensor(returned)
        assert z is not None
        if self.head is not None:
            return z, self.head(z)
        with torch.no_grad():
            features = self.blocks.encode(inputs)
        features[m] = returned
        return z, self.blocks.unimodal(features)[m]

    @torch.no_grad()
    def compare(self, inputs: Inputs, modalities: set[int]) -> None:
        """Raises ValueError where block by block gives other features than the model's own forward pass. Evaluation
        mode, random states as they were; waits for the device."""
        with probing(self.blocks.model):
            features = self.blocks.forward(inputs).features
            for m in modalities:
                own = first_tensor(self.blocks.encode_one(m, inputs[m]))
                whole = features[m]
                same = own is not None and own.shape == whole.shape
                if same:
                    assert own is not None
                    # The same operations, but compiled, or in another order: some hundred roundoffs.
                    near = 1e3 * max(torch.finfo(x.dtype).eps for x in (own, whole))
                    away = (wide(own) - wide(whole)).norm()
                    same = bool(away <= min(near, 0.03) * wide(whole).norm())
                if not same:
                    name = self.blocks.modalities[m]
                    raise ValueError(
                        f"MLA runs the blocks of {name!r} one after the other, which gives other features than the "
                        "model's forward pass: something lies between them. Make it part of a block, or use another "
                        "method"
                    )
        self.compared |= modalities

    @torch.no_grad()
    def project(self, z: Tensor) -> None:
        """Moves P by this batch's features, then projects the head's gradient."""
        assert self.head is not None and self.head.weight.grad is not None and self.projector is not None
        progress = self.batches / self.steps_per_epoch if self.steps_per_epoch else 0.0
        a = 0.1 ** (1.0 + progress)
        r = averaged(wide(z).mean(0))
        k = self.projector @ r
        if self.projection == "published":
            moved = self.projector - torch.outer(k, k) / (a + torch.outer(k, r))
            self.projector = moved / torch.linalg.matrix_norm(moved)
        else:
            self.projector = self.projector - torch.outer(k, k) / (a + r @ k)
        gradient = self.head.weight.grad
        gradient.copy_(wide(gradient) @ self.projector.T)

    def state_dict(self) -> dict[str, Any]:
        projector = None if self.projector is None else self.projector.clone()
        return {**super().state_dict(), "batches": self.batches, "turns": self.turns, "projector": projector}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.batches, self.turns = int(state["batches"]), int(state["turns"])
        self.projector = None if state["projector"] is None else state["projector"].to(self.device, copy=True)
