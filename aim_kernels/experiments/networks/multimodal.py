"""One encoder a modality and a fusion, for inputs of which some may be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from aim_kernels.experiments.networks.fusion import Fusion
from aim_kernels.methods.base import Blocks


class MultimodalNetwork(nn.Module):
    """``fusion([encoder_m(x_m) for m])``.

    Args:
        encoders: modality to its blocks, shallow to deep; the last one returns ``[B, C_m]``.
        fusion: a :class:`Fusion` for these widths, in the order of ``encoders``.
        missing: what stands for the features of a missing modality: "zeros", or "learnt", a vector a modality that
            starts at zero and is trained with the rest.

    An input may be None: the modality is missing in the whole batch, its encoder is not called and its parameters get
    no gradient (under DistributedDataParallel that needs ``find_unused_parameters=True``). ``present`` (``[B, M]``,
    bool) says which samples have which modality: where it is False the input is not looked at (it may hold NaN) and
    gives no gradient to its encoder, but the encoder runs on zeros in its place, which batch normalization would count.

    Raises ValueError for fewer than two modalities, encoders that are not as many as the fusion's widths, an unknown
    ``missing``; in the forward pass for a wrong number of inputs, only missing ones, a ``present`` of another shape.
    """

    def __init__(self, encoders: Mapping[str, Sequence[nn.Module]], fusion: Fusion, *, missing: str = "zeros") -> None:
        super().__init__()
        if len(encoders) < 2:
            raise ValueError(f"encoders must name at least two modalities, got {list(encoders)}")
        if len(encoders) != len(fusion.widths):
            raise ValueError(
                f"fusion takes {len(fusion.widths)} modalities, encoders has {len(encoders)}: {list(encoders)}"
            )
        if missing not in ("zeros", "learnt"):
            raise ValueError(f"unknown missing {missing!r}; it is 'zeros' or 'learnt'")
        self.encoders = nn.ModuleDict({name: nn.Sequential(*blocks) for name, blocks in encoders.items()})
        self.fusion = fusion
        self.absent: nn.ParameterList | None = None
        if missing == "learnt":
            self.absent = nn.ParameterList(torch.zeros(width) for width in fusion.widths)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.encoders)

    def features(self, *inputs: Tensor | None, present: Tensor | None = None) -> list[Tensor]:
        """One ``[B, C_m]`` tensor a modality; a missing one's is what stands for it."""
        if len(inputs) != len(self.encoders):
            raise ValueError(
                f"give one input a modality, {list(self.encoders)} (None where missing), not {len(inputs)}"
            )
        given = [x for x in inputs if x is not None]
        if not given:
            raise ValueError("every input is None; at least one modality must be there")
        batch = given[0].shape[0]
        if present is not None and present.shape != (batch, len(inputs)):
            raise ValueError(f"present must have the shape {(batch, len(inputs))}, got {tuple(present.shape)}")
        features = []
        for m, (encoder, x) in enumerate(zip(self.encoders.values(), inputs, strict=True)):
            if x is None:
                # of the encoder's type and device; another modality's input may be of another
                features.append(self._absent(m, next(encoder.parameters())).expand(batch, -1))
            elif present is None:
                features.append(encoder(x))
            else:
                # zeros before the encoder as well: NaN there would reach its gradients in spite of the mask behind
                here = present[:, m]
                z = encoder(x.masked_fill(~here.view(-1, *(1,) * (x.dim() - 1)), 0.0))
                features.append(torch.where(here[:, None], z, self._absent(m, z)))
        return features

    def _absent(self, m: int, like: Tensor) -> Tensor:
        """``[C_m]``: what stands for the missing features of modality ``m``."""
        if self.absent is not None:
            return self.absent[m].to(like.dtype)
        return like.new_zeros(self.fusion.widths[m])

    def fuse(self, features: list[Tensor]) -> Tensor:
        """Logits ``[B, K]`` of the encoders' features."""
        return self.fusion(features)

    def forward(self, *inputs: Tensor | None, present: Tensor | None = None) -> Tensor:
        return self.fusion(self.features(*inputs, present=present))

    def blocks(self) -> dict[str, list[nn.Module]]:
        """Modality to blocks, shallow to deep: what ``block_param_groups`` takes."""
        return {name: list(encoder.children()) for name, encoder in self.encoders.items()}

    def as_blocks(self) -> Blocks:
        """The network as methods see it."""
        return Blocks(self, self.blocks(), self.fusion, self.fusion.unimodal, self.features, self.fusion.num_classes)
