"""Scores of a model's blocks, by one of the probes, on samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim.prototypes import Pool, RidgeReadout, block_features, fit_prototypes, prototype_score
from aim_kernels.aim.strengths import Measured, ModulationTable, Scores

#: A user's probe: ``probe(model, inputs, labels)`` returns an ``[M, D]``-like table of non-negative scores.
Probe = Callable[[nn.Module, Sequence[Tensor | None], Tensor | None], Any]


#: Inputs, one a modality (None: not there), and labels.
Samples = tuple[list[Tensor | None], Tensor | None]


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
    targets: str
    batch_size: int
    history: list[ModulationTable]
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
        self, what: str, inputs: Sequence[Tensor | None] | Tensor, labels: Tensor | None, plain: bool = False
    ) -> Samples:
        """One batch, or an exception that says what is wrong with it. ``plain``: labels are for the loss alone, and may
        be whatever it takes."""
        if isinstance(inputs, Tensor) or len(inputs) != len(self.modalities):
            got = "one tensor" if isinstance(inputs, Tensor) else f"{len(inputs)}"
            raise ValueError(
                f"{what}inputs must be {len(self.modalities)} tensors, one a modality in the order "
                f"{', '.join(self.modalities)}; got {got}"
            )
        if all(x is None for x in inputs):
            raise ValueError(f"{what}inputs are all None; give at least one modality")
        if labels is None:
            if self.probe in ("prototypes", "linear") and not plain:
                raise ValueError(
                    f"probe={self.probe!r} needs {what}labels; pass them, or use probe='gradient-norm' or a callable"
                )
            return list(inputs), None
        for modality, x in zip(self.modalities, inputs, strict=True):
            if x is not None and (len(x) != len(labels) or len(x) == 0):
                raise ValueError(f"{what}input of {modality!r} has {len(x)} samples, {what}labels have {len(labels)}")
        labels = labels.to(next(x.device for x in inputs if x is not None))
        if plain:
            return list(inputs), labels
        if self.targets == "quantiles":
            if not labels.is_floating_point() or labels.dim() > 2 or labels[0].numel() != 1:
                raise ValueError(
                    f"{what}labels must be real numbers of shape [B] or [B, 1] under targets='quantiles', got "
                    f"{labels.dtype} of shape {tuple(labels.shape)}"
                )
            if not bool(torch.isfinite(labels).all()):
                raise ValueError(f"{what}labels are not all finite; leave such samples out")
            return list(inputs), labels
        if callable(self.probe):
            return list(inputs), labels
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"{what}labels must be class numbers of shape [B], got {labels.dtype} of shape {tuple(labels.shape)}; "
                "for real numbers use targets='quantiles' with a loss, or a callable probe"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"{what}labels range from {low} to {high}; "
                f"with num_classes={self.num_classes} they lie in 0..{self.num_classes - 1}"
            )
        return list(inputs), labels.long()

    def _scores(self, samples: Samples, held_out: Samples | None) -> tuple[Measured, Measured | None]:
        if self.probe == "gradient-norm":
            return self._averaged(_exactly(self._gradient_scores())), None
        missing = [
            modality
            for number, modality in enumerate(self.modalities)
            if samples[0][number] is None or (held_out is not None and held_out[0][number] is None)
        ]
        previous = self._previous(missing, held_out is not None)
        if callable(self.probe):
            found = _exactly(self._as_scores(self.probe(self.model, *samples)))
            found_out = None if held_out is None else _exactly(self._as_scores(self.probe(self.model, *held_out)))
        else:
            found, found_out = self._judged(_without(samples, self.modalities, missing), held_out, missing)

        def whole(now: Measured, before: Measured) -> Measured:
            parts = zip(now, before, strict=True)
            return self._averaged(
                Measured(*({m: (b if m in missing else a)[m] for m in self.modalities} for a, b in parts))
            )

        train = whole(found, previous[0])
        return train, None if found_out is None else whole(found_out, previous[1])

    def _previous(self, missing: Sequence[str], both: bool) -> tuple[Measured, Measured]:
        """What the latest update measured in training and outside of it, for modalities that now have no input."""
        scored = (table for table in reversed(self.history) if table.rule != "trial")
        latest = next(scored, None) if missing else None
        if missing and (latest is None or (both and latest.held_out_scores is None)):
            raise ValueError(
                f"the input of {missing[0]!r} is None, and there is no earlier update whose "
                f"{'scores' if latest is None else 'held-out scores'} it could keep; give it once"
            )
        if latest is None:
            return Measured({}, {}), Measured({}, {})
        return latest.measured, latest.held_out or Measured({}, {})

    def _judged(
        self, samples: Samples, held_out: Samples | None, missing: Sequence[str]
    ) -> tuple[Measured, Measured | None]:
        """Scores of the prototypes or linear readouts fitted on ``samples``, there and on ``held_out``."""
        inputs, labels = samples
        assert labels is not None
        classes, means, edges = self._binned(labels)
        judges: dict[str, list[Callable[[Tensor, Tensor], Tensor]]]
        scored = (inputs, classes)
        if self.probe == "linear":
            half = max(len(labels) // 2, 1)
            with torch.no_grad():
                fitted = self._features(_part(inputs, slice(half)))
            judges = {
                m: [RidgeReadout(z, classes[:half], self.num_classes).score for z in row] for m, row in fitted.items()
            }
            if len(labels) > half:  # never score what it was fitted on, if there is anything else
                scored = (_part(inputs, slice(half, None)), classes[half:])
        else:
            prototypes = fit_prototypes(
                self.model,
                inputs,
                classes,
                self.num_classes,
                steps=self.prototype_steps,
                lr=self.prototype_lr,
                init=self.init,
                loss=self.loss,
                generator=self.generator,
                targets=means,
            )
            with torch.no_grad():
                fitted = self._features(prototypes)
            judges = {m: [_prototype_judge(p) for p in row] for m, row in fitted.items()}
        found = self._mean_scores(judges, *scored)
        if held_out is None:
            return found, None
        inputs, labels = _without(held_out, self.modalities, missing)
        assert labels is not None
        return found, self._mean_scores(judges, inputs, labels if edges is None else _bins(labels, edges))

    def _binned(self, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Class numbers ``[B]``. Of real numbers: of bins that hold equally many of these; then also the mean of each
        bin (the middle quantile of an empty one), shaped like labels, and the edges between them."""
        if self.targets == "classes":
            return labels, None, None
        values, k = labels.flatten(), self.num_classes
        fractions = torch.arange(2 * k + 1, device=values.device, dtype=values.dtype) / (2 * k)
        quantiles = torch.quantile(values.float(), fractions.float()).to(values.dtype)
        edges, middles = quantiles[2:-1:2].contiguous(), quantiles[1::2]
        classes = _bins(labels, edges)
        counts = torch.bincount(classes, minlength=k)
        sums = torch.zeros(k, dtype=values.dtype, device=values.device).index_add_(0, classes, values)
        means = torch.where(counts > 0, sums / counts.clamp_min(1), middles)
        return classes, means.view(k, *labels.shape[1:]), edges

    def _features(self, inputs: Sequence[Tensor | None]) -> dict[str, list[Tensor]]:
        modules = {m: self._modules[m] for m, x in zip(self.modalities, inputs, strict=True) if x is not None}
        return block_features(self.model, modules, inputs, self._pools)

    @torch.no_grad()
    def _mean_scores(
        self,
        judges: Mapping[str, Sequence[Callable[[Tensor, Tensor], Tensor]]],
        inputs: Sequence[Tensor | None],
        labels: Tensor,
    ) -> Measured:
        """Means over the samples, with their standard errors."""
        found: dict[str, list[list[Tensor]]] = {m: [[] for _ in row] for m, row in judges.items()}
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            for modality, row in self._features(_part(inputs, part)).items():
                for depth, z in enumerate(row):
                    found[modality][depth].append(judges[modality][depth](z, labels[part]).double())
        samples = torch.stack([torch.cat(pieces) for row in found.values() for pieces in row])  # [blocks, B]
        mean = samples.mean(1)
        error = samples.std(1) / len(labels) ** 0.5 if len(labels) > 1 else torch.zeros_like(mean)
        tables = []
        for column in torch.stack([mean, error]).tolist():
            numbers = iter(column)
            tables.append({m: [next(numbers) for _ in row] for m, row in found.items()})
        return Measured(*tables)

    @torch.no_grad()
    def _joint_loss(self, samples: Samples) -> float:
        """Mean of ``loss(model(*inputs), labels)`` over all samples and ranks."""
        inputs, labels = samples
        if labels is None:
            raise ValueError("guard=True watches the held-out loss and needs held-out labels; pass them")
        total = 0.0
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            here = labels[part]
            total += float(self.loss(self.model(*_part(inputs, part)), here)) * len(here)
        return self._averaged(_exactly({"joint": [total / len(labels)]})).scores["joint"][0]

    def _averaged(self, measured: Measured) -> Measured:
        """The mean over ranks, so that every rank sets the same rows."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return measured
        world = distributed.get_world_size()
        scores, errors = measured
        own = [[value for row in scores.values() for value in row], [e**2 for row in errors.values() for e in row]]
        flat = torch.tensor(own, dtype=torch.float64, device=next(self.model.parameters()).device)
        distributed.all_reduce(flat)
        means, squares = (flat / world).tolist()
        numbers, variances = iter(means), iter(squares)
        return Measured(
            {m: [next(numbers) for _ in row] for m, row in scores.items()},
            {m: [(next(variances) / world) ** 0.5 for _ in row] for m, row in scores.items()},
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


def _exactly(scores: Scores) -> Measured:
    """Scores of which no errors are known."""
    return Measured(scores, {m: [0.0] * len(row) for m, row in scores.items()})


def _part(inputs: Sequence[Tensor | None], part: slice) -> list[Tensor | None]:
    return [None if x is None else x[part] for x in inputs]


def _without(samples: Samples, modalities: Sequence[str], missing: Sequence[str]) -> Samples:
    """The same with None for all modalities that have no input somewhere."""
    inputs, labels = samples
    return [None if m in missing else x for m, x in zip(modalities, inputs, strict=True)], labels


def _bins(labels: Tensor, edges: Tensor) -> Tensor:
    return torch.bucketize(labels.flatten(), edges, right=True)


def _prototype_judge(prototypes: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda features, labels: prototype_score(features, prototypes, labels)
