"""Fusion heads, which turn the encoders' features into logits, and into logits of each modality alone.

Every fusion is a module: ``fusion(features) -> [B, K]`` of a list of one ``[B, C_m]`` a modality, and
``fusion.unimodal(features) -> [[B, K] of each modality]``. ``fusion.widths`` are the ``C_m``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aim_kernels.methods.scores import late_fusion_logits


class Fusion(nn.Module):
    """What all fusions share. Subclasses define ``forward``; the modality's own logits are by default those of the
    fusion with the features of all others at zero."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be at least two feature widths of at least 1, got {list(widths)}")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.widths, self.num_classes = tuple(widths), num_classes

    def unimodal(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits ``[B, K]`` of each modality alone, differentiable."""
        return [
            self([z if own == other else torch.zeros_like(z) for other, z in enumerate(features)])
            for own in range(len(features))
        ]


class Concatenation(Fusion):
    """``head(concat(z_1, ..., z_M))`` with one linear layer; the modality's own logits are its share
    ``z_m W_m^T + b / M``, and their sum is the joint logits."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__(widths, num_classes)
        self.head = nn.Linear(sum(widths), num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.head(torch.cat(features, 1))

    def unimodal(self, features: Sequence[Tensor]) -> list[Tensor]:
        return late_fusion_logits(self.head, features)


class Sum(Fusion):
    """``sum_m head_m(z_m)``: a linear classifier a modality, each with a bias of its own; their logits are the
    modality's own."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__(widths, num_classes)
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for width in widths)

    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.stack(self.unimodal(features)).sum(0)

    def unimodal(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [head(z) for head, z in zip(self.heads, features, strict=True)]


class FiLM(Fusion):
    """Feature-wise linear modulation: the first modality's features, scaled and shifted by the others.

    ``h = V z_1``; for ``m = 2, ..., M``: ``h = (1 + g_m(z_m)) * h + s_m(z_m)`` with linear ``g_m``, ``s_m``; logits are
    ``head(relu(h))``.

    Source: Perez et al., arXiv 1709.07871, with the scale learnt as a distance from one, as there; several conditions
    one after another, and the projection ``V``, are our reading.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__(widths, num_classes)
        width = widths[0]
        self.project = nn.Linear(width, width)
        self.conditions = nn.ModuleList(nn.Linear(other, 2 * width) for other in widths[1:])
        self.head = nn.Linear(width, num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        h = self.project(features[0])
        for condition, z in zip(self.conditions, features[1:], strict=True):
            scale, shift = condition(z).chunk(2, 1)
            h = (1.0 + scale) * h + shift
        return self.head(nn.functional.relu(h))


class Gated(Fusion):
    """Gated multimodal unit: ``h = sum_m sigmoid(G_m [z_1, ..., z_M]) * tanh(H_m z_m)``; logits are ``head(h)``.

    ``H_m`` and ``G_m`` have no bias, so that features at zero add nothing. All ``h`` are as wide as the widest feature.

    Source: Arevalo et al., arXiv 1702.01992, equation for more than two modalities, which we take for two as well.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__(widths, num_classes)
        width = max(widths)
        self.values = nn.ModuleList(nn.Linear(own, width, bias=False) for own in widths)
        self.gates = nn.Linear(sum(widths), width * len(widths), bias=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        values = torch.stack([value(z) for value, z in zip(self.values, features, strict=True)], 1).tanh()
        gates = self.gates(torch.cat(features, 1)).sigmoid().view_as(values)
        return self.head((gates * values).sum(1))


class CrossAttention(Fusion):
    """Every modality's tokens ask those of all others.

    A linear layer makes ``tokens`` tokens of ``width`` of each ``z_m``, plus a learnt vector a token. With
    ``T_-m`` the tokens of all modalities but m: ``h_m = mean over tokens of norm(T_m + out(softmax(q(T_m) k(T_-m)^T /
    sqrt(width)) v(T_-m)))``; logits are ``head(concat(h_1, ..., h_M))``.

    Source: the attention of Vaswani et al., arXiv 1706.03762, between modalities as in Tsai et al., arXiv 1906.00295;
    tokens from one feature vector are our reading.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, *, tokens: int = 4, width: int | None = None) -> None:
        super().__init__(widths, num_classes)
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        own = max(widths) if width is None else width
        self.tokens = tokens
        self.split = nn.ModuleList(nn.Linear(z, tokens * own) for z in widths)
        self.places = nn.Parameter(0.02 * torch.randn(len(widths), tokens, own))
        self.query, self.key, self.value, self.out = (nn.Linear(own, own) for _ in range(4))
        self.norm = nn.LayerNorm(own)
        self.head = nn.Linear(own * len(widths), num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        tokens = [
            split(z).unflatten(1, (self.tokens, -1)) + place
            for split, z, place in zip(self.split, features, self.places, strict=True)
        ]
        asked = []
        for m, own in enumerate(tokens):
            others = torch.cat([t for other, t in enumerate(tokens) if other != m], 1)
            found = nn.functional.scaled_dot_product_attention(self.query(own), self.key(others), self.value(others))
            asked.append(self.norm(own + self.out(found)).mean(1))
        return self.head(torch.cat(asked, 1))


#: Fusions by name: ``FUSIONS[name](widths, num_classes)``.
FUSIONS: dict[str, type[Fusion]] = {
    "concat": Concatenation,
    "sum": Sum,
    "film": FiLM,
    "gated": Gated,
    "attention": CrossAttention,
}
