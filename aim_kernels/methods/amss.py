"""AMSS and AMSS+: of each weight only some output filters learn in a step, more of them where a modality is behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.methods.base import Blocks, Method, Outputs, check_window
from aim_kernels.methods.losses import Loss
from aim_kernels.methods.scores import counted, mean_of_counted, wide
from aim_kernels.step.arguments import check_choice, check_within
from aim_kernels.step.sharding import averaged

#: Smallest weight of a filter in a draw: filters without a gradient come last, and never make a logarithm infinite.
_TINY = 1e-30


class AMSS(Method):
    r"""``g_f <- w_f g_f`` for a drawn part of the filters f (rows of dimension 0 of every weight), 0 for the rest.

    Per modality ``score_m = (-CE(logits_m, y) + H(y) + 0.5) / H(z_m)``, ``H(z)`` the entropy of the softmax of the
    features, meaned over samples; ``t = score / temperature``. The share of filters that learn::

        rho_m = (1 - softmax(t)_m) * M / (2 (M - 1)),    clamped to [low, high]

    0.5 for all where a numerator is not positive. For two modalities it is the published ``softmax(t)_{other}``; for
    more, our reading that keeps 0.5 where all are equal. ``G_f`` is the sum of squared gradients of a filter,
    ``p_f = G_f / sum G``; ``n`` filters.

    Source: njustkmg/TPAMI-AMSS, 3161ecc, which treats convolutions of the encoders only; here all their weights with
    two or more dimensions. A masked gradient still moves weights by momentum and decay, as there.

    Options
    -------
    sample
        "adaptive" (as published: ``ceil(rho n)`` filters without replacement, by Gumbel top-k on ``log p``), "topk"
        (those with the largest ``p``), "bernoulli" (each with ``min(1, rho n p_f)``), "random" (``ceil(rho n)``,
        whatever p).
    weight
        "one" (AMSS), "plus" (AMSS+, ``1 / (p_f + 1 / n)``: it reaches n for filters that were unlikely), "inverse" (one
        over the probability; "bernoulli" only): then the masked gradient is right on average.
    significance
        "gn" (``G_f``), "gn_wn" (``G_f / sum theta^2``), "sqrt_gn" (``sqrt(G_f)``).
    label_entropy
        "published": cross entropy of the label frequencies against their own softmax; "entropy": of the frequencies.

    Raises ValueError for unknown words, ``low`` above ``high`` or outside [0, 1], "inverse" with another draw, a
    temperature that is not positive.
    """

    class_scores = "the cross entropy of each modality against that of the class frequencies"
    writes_gradients = True
    reads_rows = True

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        sample: str = "adaptive",
        weight: str = "one",
        significance: str = "gn",
        label_entropy: str = "published",
        temperature: float = 1.0,
        low: float = 0.1,
        high: float = 0.9,
        starts: int = 0,
        ends: int | None = None,
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_choice("sample", sample, ("adaptive", "topk", "bernoulli", "random"))
        check_choice("weight", weight, ("one", "plus", "inverse"))
        check_choice("significance", significance, ("gn", "gn_wn", "sqrt_gn"))
        check_choice("label_entropy", label_entropy, ("published", "entropy"))
        if weight == "inverse" and sample != "bernoulli":
            raise ValueError(
                f"weight='inverse' needs the probability of each filter, which sample={sample!r} has not; use "
                "sample='bernoulli'"
            )
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        check_within("low", low, 0.0, 1.0)
        check_within("high", high, low, 1.0)
        check_window(starts, ends)
        self.sample, self.weight, self.significance, self.label_entropy = sample, weight, significance, label_entropy
        self.temperature, self.low, self.high, self.starts, self.ends = temperature, low, high, starts, ends

    @torch.no_grad()
    def shares(self, outputs: Outputs) -> Tensor:
        """``rho``, ``[M]``: the share of each encoder's filters that learn."""
        labels, classes = outputs.labels, outputs.logits.shape[1]
        counts, _ = counted(labels, self.ignored)
        of_class = labels == torch.arange(classes, device=labels.device)[:, None]
        frequency = averaged(mean_of_counted(of_class.double(), counts))
        if self.label_entropy == "published":
            entropy = -(frequency * frequency.log_softmax(0)).sum()
        else:
            entropy = -torch.xlogy(frequency, frequency).sum()
        losses = torch.stack([self.own_loss(x, labels) for x in outputs.unimodal()])
        spread = torch.stack([self.feature_entropy(outputs.per_sample(m)) for m in range(len(losses))])
        losses, spread = averaged(torch.stack([losses, spread]))
        numerator = -losses + entropy + 0.5
        modalities = len(losses)
        ahead = (numerator / spread / self.temperature).softmax(0)
        rho = ((1.0 - ahead) * modalities / (2.0 * (modalities - 1))).clamp(self.low, self.high)
        return torch.where((numerator <= 0.0).any(), torch.full_like(rho, 0.5), rho)

    def own_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of one modality's logits, whatever the network is trained by; 0-dim, float64."""
        return nn.functional.cross_entropy(wide(logits), labels, ignore_index=self.ignored).double()

    @staticmethod
    def feature_entropy(z: Tensor) -> Tensor:
        """Mean over samples of the entropy of ``softmax(z[i])``; 0-dim, float64."""
        log = wide(z).flatten(1).log_softmax(1)
        return -(log.exp() * log).sum(1).double().mean()

    @torch.no_grad()
    def after_backward(self, outputs: Outputs) -> Tensor | None:
        """Masks the gradients in place; returns ``rho``, None outside of the epochs."""
        if not self.active:
            return None
        rho = self.shares(outputs)
        found = [
            (m, p)
            for m, modality in enumerate(self.blocks.modalities)
            for p in self.blocks.parameters(modality)
            if p.grad is not None and p.dim() > 1
        ]
        draws = self.uniform(sum(len(p) for _, p in found)).double().split([len(p) for _, p in found])
        for (m, p), uniform in zip(found, draws, strict=True):
            assert p.grad is not None
            factor = self.factors(self.significances(p), rho[m], uniform)
            p.grad.mul_(factor.to(p.grad.dtype).view(-1, *[1] * (p.dim() - 1)))
        return rho

    def significances(self, p: Tensor) -> Tensor:
        """``p_f``, float64 ``[n]``, of one weight."""
        assert p.grad is not None
        size = wide(p.grad).square().flatten(1).sum(1).double()
        if self.significance == "gn_wn":
            size = size / wide(p).square().flatten(1).sum(1).double().clamp_min(_TINY)
        elif self.significance == "sqrt_gn":
            size = size.sqrt()
        return size / size.sum().clamp_min(_TINY)

    def factors(self, p: Tensor, rho: Tensor, uniform: Tensor) -> Tensor:
        """``w_f``, or 0, of ``n`` filters. ``p``: ``[n]``; ``rho``: 0-dim; ``uniform``: ``[n]`` draws."""
        n = len(p)
        if self.sample == "bernoulli":
            probability = (rho * n * p).clamp_max(1.0)
            kept = uniform < probability
        else:
            gumbel = -(-uniform.clamp(_TINY, 1.0 - 1e-12).log()).log()
            keys = {"adaptive": p.clamp_min(_TINY).log() + gumbel, "topk": p, "random": uniform}[self.sample]
            rank = keys.argsort(descending=True, stable=True).argsort()
            kept = rank < (rho * n).ceil()
        if self.weight == "one":
            return kept.double()
        weight = 1.0 / (p + 1.0 / n) if self.weight == "plus" else 1.0 / probability.clamp_min(_TINY)
        return torch.where(kept, weight, torch.zeros_like(weight))
