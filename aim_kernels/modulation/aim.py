"""AIM: scores every depth of every modality and writes the rows (specification sections 4 and 5)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.modulated import unwrapped
from aim_kernels.modulation.prototypes import (
    POOLS,
    Pool,
    RidgeReadout,
    block_features,
    fit_prototypes,
    probing,
    prototype_score,
)
from aim_kernels.modulation.strengths import ModulationTable, Scores, assess

#: Default width of the band around 1 in which an excess sets no strength, by rule.
DEAD_ZONES = {"gap": 0.2, "ratio": 0.0}

#: A user's probe: ``probe(model, inputs, labels)`` returns an ``[M, D]``-like table of non-negative scores.
Probe = Callable[[nn.Module, Sequence[Tensor], Tensor | None], Any]

_CHOICES = {
    "decouple": ("dominant", "all"),
    "mixing": ("alternate", "weights"),
    "probe": ("prototypes", "linear", "gradients"),
    "rule": ("gap", "ratio"),
    "init": ("noise", "mean"),
    "coefficients": ("chain", "straight-through", "step"),
    "pool": tuple(POOLS),
    "learn_dominant_in_aux": ("none", "under"),
}


def _check_choice(option: str, value: object) -> None:
    if value not in _CHOICES[option]:
        names = ", ".join(repr(name) for name in _CHOICES[option])
        suffix = " or a callable" if option in ("probe", "pool") else ""
        raise ValueError(f"unknown {option} {value!r}; it is one of {names}{suffix}")


class AIM:
    """Adaptive intra-network modulation (arXiv 2508.19769) on top of an :class:`AIMFusedOptimizer`.

    ``model`` is called as ``model(*inputs)``; ``optimizer`` holds param groups with the keys of
    :func:`block_param_groups`. At every :meth:`update` the blocks are scored and the strengths ``kappa = tanh(alpha *
    max(excess - 1 - dead_zone, 0))`` computed (:func:`~aim_kernels.modulation.strengths.assess`); then the rows of all
    groups are written:

    ``mixing="alternate"``: before each step a seeded draw chooses the phase. In the auxiliary phase (probability
    ``probability``) the dominant modality's well-optimized weights are live as ``(1 - kappa) * theta``, and all but the
    dominant modality learns; in the true phase all but the weak one learns. Where nobody is dominant it is joint
    training. ``mixing="weights"``: always degraded, everything learns; ``coefficients`` as in
    ``optimizer.set_strength``. ``decouple="all"`` multiplies the update of a weak modality's under-optimized weights by
    ``1 + beta * weak_kappa``.

    Options
    -------
    rule, dead_zone
        "gap" compares training with held-out scores, "ratio" only modalities. None: "gap" in updates with ``held_out``,
        else "ratio". ``dead_zone=None``: 0.2 for the gap, 0 for the ratio.
    probe
        "prototypes" (``prototype_steps``, ``prototype_lr``, ``init``: see ``fit_prototypes``), "linear" (ridge readout,
        fitted on the first half of the batch), "gradients" (root mean square gradient of a block in the optimizer's
        latest step, no samples), or ``probe(model, inputs, labels)`` returning one row of scores (>= 0, higher is
        better) a modality.
    loss
        ``loss(model(*prototypes), classes)`` for fitting prototypes; cross entropy by default. Where there are no
        classes, give a callable probe.
    pool
        How a block's output becomes ``[B, C]``: "channels_first" (convolutions), "channels_last" (transformers, ``[B,
        T, C]``), a callable, or a dict from modality to one of these.
    learn_weak_in_true_phase, learn_dominant_in_aux
        Let the weak modality learn in both phases; let the dominant one's under-optimized weights ("under") learn in
        the auxiliary phase.
    schedule
        ``schedule(update_index) -> factor`` in [0, 1] that multiplies every kappa.
    batch_size
        Scoring runs in pieces of this many samples.

    Scores are averaged over the ranks of an initialized process group, so that all set the same rows: each rank calls
    :meth:`update`, with samples of its own, of which every rank has equally many where the model is sharded (FSDP2).
    Everything but S1-S5 of the specification (what
    the abstracts say) is this library's reading.

    Raises ValueError for fewer than two modalities, unknown choices and numbers out of range; TypeError for another
    optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        num_classes: int,
        *,
        alpha: float = 10.0,
        decouple: str = "dominant",
        mixing: str = "alternate",
        probe: str | Probe = "prototypes",
        rule: str | None = None,
        dead_zone: float | None = None,
        probability: float = 0.5,
        beta: float = 1.0,
        coefficients: str = "chain",
        prototype_steps: int = 30,
        prototype_lr: float = 0.1,
        init: str = "noise",
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        pool: str | Pool | Mapping[str, str | Pool] = "channels_first",
        batch_size: int = 512,
        learn_weak_in_true_phase: bool = False,
        learn_dominant_in_aux: str = "none",
        schedule: Callable[[int], float] | None = None,
        seed: int = 0,
    ) -> None:
        for option, value in (
            ("decouple", decouple),
            ("mixing", mixing),
            ("init", init),
            ("coefficients", coefficients),
        ):
            _check_choice(option, value)
        _check_choice("learn_dominant_in_aux", learn_dominant_in_aux)
        if rule is not None:
            _check_choice("rule", rule)
        if not callable(probe):
            _check_choice("probe", probe)
        for name, number in (
            ("alpha", alpha),
            ("beta", beta),
            ("dead_zone", dead_zone),
            ("prototype_lr", prototype_lr),
        ):
            if number is not None and not (math.isfinite(number) and number >= 0.0):
                raise ValueError(f"{name} must be a finite number >= 0, got {number}")
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must lie in [0, 1], got {probability}")
        for name, count, least in (
            ("num_classes", num_classes, 2),
            ("batch_size", batch_size, 1),
            ("prototype_steps", prototype_steps, 0),
        ):
            if count < least:
                raise ValueError(f"{name} must be at least {least}, got {count}")
        optimizer = unwrapped(optimizer)
        if not hasattr(optimizer, "set_phase_rows"):
            raise TypeError(f"AIM writes rows of an AIMFusedOptimizer; {type(optimizer).__name__} has none")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module  # probing needs no gradient exchange; prefixed names are handled below
        self.model, self.optimizer, self.num_classes = model, optimizer, num_classes
        self.alpha, self.decouple, self.mixing, self.probe = alpha, decouple, mixing, probe
        self.rule, self.dead_zone, self.probability, self.beta = rule, dead_zone, probability, beta
        self.coefficients = coefficients
        self.prototype_steps, self.prototype_lr, self.init = prototype_steps, prototype_lr, init
        self.loss = nn.functional.cross_entropy if loss is None else loss
        self.batch_size = batch_size
        self.learn_weak_in_true_phase = learn_weak_in_true_phase
        self.learn_dominant_in_aux = learn_dominant_in_aux
        self.schedule = schedule
        self.updates = 0
        self.history: list[ModulationTable] = []
        self.generator = torch.Generator().manual_seed(seed)

        self.depths = self._find_blocks()
        self.modalities = tuple(self.depths)
        self._modules = self._find_modules() if probe in ("prototypes", "linear") else {}
        pools = dict(pool) if isinstance(pool, Mapping) else dict.fromkeys(self.modalities, pool)
        if set(pools) != set(self.modalities):
            raise ValueError(f"pool is given for {sorted(pools)}, the modalities are {sorted(self.modalities)}")
        self._pools: dict[str, Pool] = {}
        for name, way in pools.items():
            if not callable(way):
                _check_choice("pool", way)
            self._pools[name] = way if callable(way) else POOLS[way]
        running = [name for name, module in model.named_modules() if getattr(module, "running_mean", None) is not None]
        if running:
            warnings.warn(
                f"{running[0]} and {len(running) - 1} other layers keep running statistics, collected under the live "
                "weights; before validating with the true weights refresh them with torch.optim.swa_utils.update_bn, "
                "or use GroupNorm",
                stacklevel=2,
            )

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

    # -- probing ----------------------------------------------------------------------------------------------------

    def update(
        self,
        inputs: Sequence[Tensor],
        labels: Tensor | None = None,
        held_out: tuple[Sequence[Tensor], Tensor | None] | None = None,
    ) -> ModulationTable:
        """Score every block on a batch, set the strengths, and return the table (also appended to ``history``).

        ``inputs``: one tensor ``[B, ...]`` a modality, in the order of the blocks; ``labels``: int64 ``[B]``;
        ``held_out``: another such pair that the network is not trained on. The held-out samples must look like the
        deployment: a share of the training set shows memorization, but no shift. Synchronizes with the device. Model
        flags, gradients and the global random state stay as they were; where it raises, no row and no state has
        changed.

        Raises ValueError, saying what to do: missing labels, another number of inputs, unequal lengths, labels out of
        range, ``rule="gap"`` without ``held_out``, a probe's table of another shape or with negative scores.
        """
        inputs, labels = self._checked("", inputs, labels)
        rule = self.rule or ("ratio" if held_out is None else "gap")
        if rule == "gap" and held_out is None:
            raise ValueError("rule='gap' compares training with held-out scores; pass held_out=(inputs, labels)")
        if self.probe == "gradients" and rule == "gap":
            raise ValueError("probe='gradients' has no held-out scores; use rule='ratio'")
        if held_out is not None:
            held_out = self._checked("held-out ", *held_out)
        factor = 1.0 if self.schedule is None else float(self.schedule(self.updates))
        if not 0.0 <= factor <= 1.0:
            raise ValueError(f"schedule({self.updates}) returned {factor}; a factor lies in [0, 1]")
        generator_state = self.generator.get_state()
        try:
            with self.optimizer.true_parameters(), probing(self.model):
                scores, held_out_scores = self._scores(inputs, labels, held_out)
        except BaseException:
            self.generator.set_state(generator_state)
            raise
        dead_zone = DEAD_ZONES[rule] if self.dead_zone is None else self.dead_zone
        table = assess(
            self.updates,
            scores,
            held_out_scores,
            self._under_fraction(),
            rule=rule,
            alpha=self.alpha,
            dead_zone=dead_zone,
            factor=factor,
        )
        self._write_rows(table)
        self.updates += 1
        self.history.append(table)
        return table

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
    ) -> tuple[Scores, Scores | None]:
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
    ) -> Scores:
        total: dict[str, list[Any]] = {m: [0.0] * n for m, n in self.depths.items()}
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            features = self._features([x[part] for x in inputs])
            for modality, row in features.items():
                for depth, z in enumerate(row):
                    total[modality][depth] = total[modality][depth] + judges[modality][depth](z, labels[part])
        flat = torch.stack([value for row in total.values() for value in row]) / len(labels)
        numbers = iter(flat.tolist())
        return self._averaged({m: [next(numbers) for _ in range(n)] for m, n in self.depths.items()})

    def _averaged(self, scores: Scores) -> Scores:
        """The mean over ranks, so that every rank sets the same rows."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return scores
        device = next(self.model.parameters()).device
        flat = torch.tensor([value for row in scores.values() for value in row], dtype=torch.float64, device=device)
        distributed.all_reduce(flat)
        numbers = iter((flat / distributed.get_world_size()).tolist())
        return {m: [next(numbers) for _ in row] for m, row in scores.items()}

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

    # -- rows -------------------------------------------------------------------------------------------------------

    def _write_rows(self, table: ModulationTable) -> None:
        (self._write_alternate if self.mixing == "alternate" else self._write_weights)(table)

    def _stimulus(self, table: ModulationTable, modality: str, depth: int) -> dict[str, float]:
        """``step_under`` of a weak modality's block where ``decouple="all"``."""
        if self.decouple != "all" or modality not in table.weak:
            return {}
        return {"step_under": 1.0 + self.beta * table.weak_kappa[modality][depth]}

    def _write_alternate(self, table: ModulationTable) -> None:
        held = {"grad_under": 0.0, "grad_well": 0.0}
        for index, group in enumerate(self.optimizer.param_groups):
            modality, depth, modulated = group.get("modality"), group.get("depth"), group.get("modulated")
            true: dict[str, float] = {}
            aux: dict[str, float] = {}
            if modality in table.dominant:
                # biases and normalization have no classes, but they are held with their block
                aux = dict(held)
                if modulated:
                    aux |= {"live_under": 1.0, "live_well": 1.0 - table.kappa[modality][depth]}
                    if self.learn_dominant_in_aux == "under":
                        aux["grad_under"] = 1.0
            elif modality in table.weak:
                stimulus = self._stimulus(table, modality, depth) if modulated else {}
                true = {**({} if self.learn_weak_in_true_phase else held), **stimulus}
                aux = stimulus
            self.optimizer.set_phase_rows(index, true=true, aux=aux)
        self.optimizer.set_phases(self.probability if table.dominant else 0.0)

    def _write_weights(self, table: ModulationTable) -> None:
        self.optimizer.set_phases(0.0)
        for index, group in enumerate(self.optimizer.param_groups):
            modality, depth = group.get("modality"), group.get("depth")
            if modality is None or not group.get("modulated"):
                continue
            if modality in table.dominant:
                self.optimizer.set_strength(
                    modality, depth, table.kappa[modality][depth], coefficients=self.coefficients
                )
            else:
                stimulus = self._stimulus(table, modality, depth)
                self.optimizer.set_phase_rows(index, true=stimulus, aux=stimulus)

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Updates, random state and history as plain data. The rows in force are part of the optimizer's state."""
        return {
            "updates": self.updates,
            "generator": self.generator.get_state(),
            "history": [table.to_dict() for table in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: bit for bit, where the optimizer's state is loaded too."""
        self.updates = int(state["updates"])
        self.generator.set_state(state["generator"].cpu())
        self.history = [ModulationTable.from_dict(row) for row in state["history"]]


def _prototype_judge(prototypes: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda features, labels: prototype_score(features, prototypes, labels)
