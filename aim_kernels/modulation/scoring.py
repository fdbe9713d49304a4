"""What AIM scores: the blocks of a model, with one of the probes, on samples (specification section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.modulation.prototypes import Pool, RidgeReadout, block_features, fit_prototypes, prototype_score
from aim_kernels.modulation.strengths import Measured, Scores

#: A user's probe: ``probe(model, inputs, labels)`` returns an ``[M, D]``-like table of non-negative scores.
Probe = Callable[[nn.Module, Sequence[Tensor], Tensor | None], Any]


class Scoring:
    """The part of :class:`AIM` that finds blocks, checks samples and scores them; its attributes are AIM's options."""

    model: nn.Module
    optimizer: Any
    num_classes: int
    probe: str | Probe
    prototype_steps: int
    prototype_lr: float
    init: str
    loss: Callable[[Any, Tensor], Tensor]
    batch_size: int
    generator: torch.Generator
    depths: dict[str, int]
    modalities: tuple[str, ...]
    _modules: dict[str, list[nn.Module]]
    _pools: dict[str, Pool]

    def _find_blocks(self) -> dict[str, int]:
        """Modality to number of blocks, in the order of the groups."""
        found: dict[str, set[int]] = {}
        for group in self.optimizer.param_groups:
            if group.get("modality") is not None:
                found.setdefault(group["modality"], set()).add(group["depth"])
        if len(found) < 2:
            raise ValueError(
                f"AIM needs at least two modalities, the optimizer's groups name {sorted(found) or 'none'}; "
                "make them with block_param_groups"
            )
        for modality, depths in found.items():
            if depths != set(range(len(depths))):
                raise ValueError(
                    f"modality {modality!r} has blocks of depths {sorted(depths)}; they must be 0, 1, 2, ..."
                )
        return {modality: len(depths) for modality, depths in found.items()}

    def _find_modules(self) -> dict[str, list[nn.Module]]:
        modules: dict[str, list[nn.Module | None]] = {m: [None] * n for m, n in self.depths.items()}
        for group in self.optimizer.param_groups:
            if group.get("modality") is None:
                continue
            name = group.get("module")
            if name is None:
                raise ValueError(
                    f"block ({group['modality']!r}, {group['depth']}) has no 'module' name to probe; "
                    "make the groups with block_param_groups, or give a callable probe"
                )
            try:
                module = self.model.get_submodule(name)
            except AttributeError:
                try:
                    module = self.model.get_submodule(name.removeprefix("module."))
                except AttributeError:
                    raise ValueError(
                        f"the model has no module {name!r}; give AIM the model that block_param_groups got"
                    ) from None
            modules[group["modality"]][group["depth"]] = module
        return {m: [module for module in row if module is not None] for m, row in modules.items()}

    def _checked(
        self, what: str, inputs: Sequence[Tensor] | Tensor, labels: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Inputs and labels of one batch, or an exception that says what is wrong with them."""
        if isinstance(inputs, Tensor) or len(inputs) != len(self.modalities):
            got = "one tensor" if isinstance(inputs, Tensor) else f"{len(inputs)}"
            raise ValueError(
                f"{what}inputs must be {len(self.modalities)} tensors, one a modality in the order "
                f"{', '.join(self.modalities)}; got {got}"
            )
        if labels is None:
            if self.probe in ("prototypes", "linear"):
                raise ValueError(
                    f"probe={self.probe!r} needs {what}labels; pass them, or use probe='gradients' or a callable"
                )
            return list(inputs), None
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"{what}labels must be class numbers of shape [B], got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        for modality, x in zip(self.modalities, inputs, strict=True):
            if len(x) != len(labels) or len(x) == 0:
                raise ValueError(f"{what}input of {modality!r} has {len(x)} samples, {what}labels have {len(labels)}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"{what}labels range from {low} to {high}; "
                f"with num_classes={self.num_classes} they lie in 0..{self.num_classes - 1}"
            )
        return list(inputs), labels.to(inputs[0].device).long()

    def _scores(
        self, inputs: list[Tensor], labels: Tensor | None, held_out: tuple[Sequence[Tensor], Tensor | None] | None
    ) -> tuple[Measured, Measured | None]:
        if self.probe == "gradients":
            return self._averaged(self._gradient_scores()), None
        if callable(self.probe):
            found = self._averaged(self._as_scores(self.probe(self.model, inputs, labels)))
            if held_out is None:
                return found, None
            return found, self._averaged(self._as_scores(self.probe(self.model, *held_out)))
        assert labels is not None
        judges: dict[str, list[Callable[[Tensor, Tensor], Tensor]]]
        scored = (inputs, labels)
        if self.probe == "linear":
            half = max(len(labels) // 2, 1)
            with torch.no_grad():
                fitted = self._features([x[:half] for x in inputs])
            judges = {
                m: [RidgeReadout(z, labels[:half], self.num_classes).score for z in row] for m, row in fitted.items()
            }
            if len(labels) > half:  # never score what it was fitted on, if there is anything else
                scored = ([x[half:] for x in inputs], labels[half:])
        else:
            prototypes = fit_prototypes(
                self.model,
                inputs,
                labels,
                self.num_classes,
                steps=self.prototype_steps,
                lr=self.prototype_lr,
                init=self.init,
                loss=self.loss,
                generator=self.generator,
            )
            with torch.no_grad():
                fitted = self._features(prototypes)
            judges = {m: [_prototype_judge(p) for p in row] for m, row in fitted.items()}
        found_train = self._mean_scores(judges, *scored)
        if held_out is None:
            return found_train, None
        assert held_out[1] is not None
        return found_train, self._mean_scores(judges, held_out[0], held_out[1])

    def _features(self, inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        return block_features(self.model, self._modules, inputs, self._pools)

    @torch.no_grad()
    def _mean_scores(
        self,
        judges: Mapping[str, Sequence[Callable[[Tensor, Tensor], Tensor]]],
        inputs: Sequence[Tensor],
        labels: Tensor,
    ) -> Measured:
        found: dict[str, list[list[Tensor]]] = {m: [[] for _ in range(n)] for m, n in self.depths.items()}
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            features = self._features([x[part] for x in inputs])
            for modality, row in features.items():
                for depth, z in enumerate(row):
                    found[modality][depth].append(judges[modality][depth](z, labels[part]).double())
        samples = torch.stack([torch.cat(pieces) for row in found.values() for pieces in row])  # [blocks, B]
        spread = samples.std(1, correction=1) if len(labels) > 1 else torch.zeros(len(samples))
        numbers = iter(torch.stack([samples.mean(1), spread.to(samples) / len(labels) ** 0.5]).T.tolist())
        pairs = {m: [next(numbers) for _ in range(n)] for m, n in self.depths.items()}
        return self._averaged(*({m: [pair[k] for pair in row] for m, row in pairs.items()} for k in range(2)))

    def _averaged(self, scores: Scores, errors: Scores | None = None) -> Measured:
        """The mean over ranks, so that every rank sets the same rows. ``errors``: standard errors of the scores, where
        they are known."""
        errors = {m: [0.0] * len(row) for m, row in scores.items()} if errors is None else errors
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return Measured(scores, errors)
        world = distributed.get_world_size()
        own = [(value, error**2 / world) for m in scores for value, error in zip(scores[m], errors[m], strict=True)]
        flat = torch.tensor(own, dtype=torch.float64, device=next(self.model.parameters()).device)
        distributed.all_reduce(flat)
        pairs = iter((flat / world).tolist())
        means = {m: [next(pairs) for _ in row] for m, row in scores.items()}
        return Measured(
            {m: [value for value, _ in row] for m, row in means.items()},
            {m: [square**0.5 for _, square in row] for m, row in means.items()},
        )

    def _as_scores(self, table: Any) -> Scores:
        rows = table.tolist() if hasattr(table, "tolist") else [list(row) for row in table]
        shape = [self.depths[m] for m in self.modalities]
        if [len(row) for row in rows] != shape:
            raise ValueError(
                f"the probe returned rows of lengths {[len(row) for row in rows]}; the blocks are {self.depths}"
            )
        scores = {m: [float(value) for value in row] for m, row in zip(self.modalities, rows, strict=True)}
        for modality, row in scores.items():
            if any(value < 0.0 for value in row):
                raise ValueError(
                    f"the probe returned a negative score for {modality!r}: {row}; strengths are ratios of scores >= 0"
                )
        return scores

    def _gradient_scores(self) -> Scores:
        """Root mean square gradient of each block in the latest step; all ones before the first."""
        squares = {m: [0.0] * n for m, n in self.depths.items()}
        numel = {m: [0] * n for m, n in self.depths.items()}
        for row in self.optimizer.statistics():
            if row["modality"] is not None:
                squares[row["modality"]][row["depth"]] += row["grad_norm"] ** 2
                numel[row["modality"]][row["depth"]] += row["numel"]
        if not any(any(row) for row in squares.values()):
            return {m: [1.0] * n for m, n in self.depths.items()}
        return {
            m: [math.sqrt(s / max(n, 1)) for s, n in zip(squares[m], numel[m], strict=True)] for m in self.modalities
        }

    def _under_fraction(self) -> Scores:
        table = {m: [math.nan] * n for m, n in self.depths.items()}
        for group, row in zip(self.optimizer.param_groups, self.optimizer.statistics(), strict=True):
            if group.get("modality") is not None and group.get("modulated"):
                table[group["modality"]][group["depth"]] = float(row["under_fraction"])
        return table


def _prototype_judge(prototypes: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda features, labels: prototype_score(features, prototypes, labels)
