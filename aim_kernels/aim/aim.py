"""AIM: scores every depth of every modality and writes the rows (docs/design.md)."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim.blocks import block_depths, block_modules
from aim_kernels.aim.inputs import Inputs, Layout
from aim_kernels.aim.mixing import DECOUPLES, Decouple, Mixing, as_mixing
from aim_kernels.aim.options import chosen
from aim_kernels.aim.probes import Probe, ProbeFunction, Prototypes, as_probe
from aim_kernels.aim.prototypes import FRAMES, POOLS, WAYS, Pool, probing
from aim_kernels.aim.rules import RULES, Gap, Ratio, Reliance, Rule
from aim_kernels.aim.samples import read_held_out, read_samples
from aim_kernels.aim.schedules import Schedule, as_schedule
from aim_kernels.aim.scoring import Scoring
from aim_kernels.aim.statistics import batches_of, layers_with_statistics, refreshed, trained_layers
from aim_kernels.aim.strengths import Guard, ModulationTable
from aim_kernels.aim.trials import Train
from aim_kernels.aim.watching import LiveWatch
from aim_kernels.optim.modulation import unwrapped
from aim_kernels.step.arguments import check_at_least, check_choice, check_finite, numbers_checked
from aim_kernels.step.sharding import any_dtensor


class AIM:
    """Adaptive intra-network modulation (arXiv 2508.19769) on top of an :class:`AIMFusedOptimizer`.

    ``model`` is called as ``model(*inputs)``, or as ``arguments`` say; ``optimizer`` holds param groups with the keys
    of :func:`block_param_groups`. ``num_classes`` is read by probes of features alone; leave it out under
    ``rule="reliance"`` or "trial", and with callable probes. At every :meth:`update` a rule decides which
    modality is dominant and how strongly each of its blocks is held back (``kappa``), and a mixing writes the rows of
    all groups accordingly. Where nobody is dominant every mixing is joint training.

    Options
    -------
    rule
        A :class:`Rule`, or its name: "reliance" (:class:`Reliance`), "trial" (:class:`Trial`), "gap" (:class:`Gap`),
        "ratio" (:class:`Ratio`), "margin" (:class:`Margin`). None, the default, takes what an update is given: reliance
        with labels and ``held_out``, unless ``probe``, ``alpha``, ``targets`` or ``pool`` is given; else the gap with
        ``held_out``, or the ratio.
    probe
        Of rules on scores: a :class:`Probe`, or its name: "prototypes" (:class:`Prototypes`, the default), "linear"
        (:class:`LinearReadout`), "gradient-norm" (:class:`GradientNorm`); or a callable, ``probe(model, inputs,
        labels)``, which returns one row of scores (>= 0, higher is better) per modality.
    alpha
        Of rules on scores: how quickly ``kappa = tanh(alpha * max(excess - confidence * error - 1 - dead_zone, 0))``
        approaches 1 (default 10).
    mixing
        A :class:`Mixing`, or its name: "alternate" (:class:`Alternate`, the default), "split" (:class:`Split`),
        "weights" (:class:`Weights`), "features" (:class:`Features`).
    decouple
        "dominant" (:class:`DecoupleDominant`, the default), or "all" (:class:`DecoupleAll`), which also stimulates the
        under-optimized weights of weak modalities.
    schedule
        The factor on every kappa: a :class:`Schedule` (:class:`Constant`, the default, :class:`LinearOut`,
        :class:`CosineOut`), "constant", or ``schedule(update_index) -> factor`` in [0, 1].
    loss
        ``loss(model(*inputs), targets)`` of reliance, trials, the guard, and the fit of prototypes; cross entropy by
        default.
    targets
        Of probes of features: "classes" (the default), or "quantiles" for regression: labels are real numbers, which
        ``num_classes`` bins of equally many training samples make classes of; a bin's prototype is fitted to its mean
        by ``loss``, which must be given. Where neither fits, give a callable probe.
    pool
        Of probes of features: how a block's output becomes ``[B, C]``: "channels_first" (convolutions, the default),
        "channels_last" (transformers, ``[B, T, C]``), "sequence_first" (``[T, B, C]``), "frames" (``[B * T, C, ...]``,
        frames of a sample one after the other), a callable, or a dict from modality to one of these.
    guard
        Halves all strengths when the held-out joint loss has risen while somebody was held back, and gives a tenth
        back in every other update (see ``strengths.Guard``). Needs ``held_out``.
    batch_size
        Measurements run in pieces of this many samples.
    arguments
        Modality to the model's arguments that belong to it, names of keywords or numbers of positions: ``{"text":
        ("input_ids", "attention_mask"), "image": "pixel_values"}``. What no modality owns is passed as it is. None: one
        positional argument per modality, or keywords with the modalities' names.

    An option that means nothing under the rule, probe or mixing that is chosen is refused.

    Scores are averaged over the ranks of an initialized process group, so that all set the same rows: each rank calls
    :meth:`update`, with samples of its own, of which every rank has equally many where the model is sharded (FSDP2).
    What the abstracts do not say is this library's reading (docs/design.md, "Decisions of ours").

    Raises ValueError for fewer than two modalities, unknown choices, numbers out of range, and options that mean
    nothing beside the others; TypeError for another optimizer.
    """

    @numbers_checked
    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        num_classes: int | None = None,
        *,
        rule: str | Rule | None = None,
        probe: str | Probe | ProbeFunction | None = None,
        mixing: str | Mixing = "alternate",
        decouple: str | Decouple = "dominant",
        schedule: str | Schedule | Callable[[int], float] = "constant",
        alpha: float | None = None,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        targets: str | None = None,
        pool: str | Pool | Mapping[str, str | Pool] | None = None,
        guard: bool = False,
        batch_size: int = 512,
        arguments: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.rule = None if rule is None else chosen("rule", rule, RULES, Rule)
        self.probe: Probe = Prototypes() if probe is None else as_probe(probe)
        self.mixing, self.decouple = as_mixing(mixing), chosen("decouple", decouple, DECOUPLES, Decouple)
        self.schedule = as_schedule(schedule)
        self.asks_for_scores = any(given is not None for given in (probe, alpha, targets, pool))
        self._refuse_without_meaning(
            probe=probe, alpha=alpha, targets=targets, pool=pool, decouple=None if decouple == "dominant" else decouple
        )
        self.alpha = 10.0 if alpha is None else alpha
        check_finite("alpha", self.alpha)
        reads_features = self.probe.reads_features and (self.rule is None or self.rule.scores_blocks)
        if num_classes == 1 and reads_features:
            raise ValueError("num_classes must be at least 2, got 1; leave it out where no probe reads features")
        if num_classes is not None:
            check_at_least("num_classes", num_classes, 1)
        elif reads_features and self.rule is not None:
            raise ValueError(
                f"rule={self.rule.name!r} with probe={self.probe.name!r} scores classes; give num_classes, or another "
                "probe"
            )
        check_at_least("batch_size", batch_size, 1)
        targets = "classes" if targets is None else targets
        check_choice("targets", targets, ("classes", "quantiles"))
        if targets == "quantiles" and loss is None:
            raise ValueError("targets='quantiles' needs a loss for real numbers: loss=torch.nn.functional.mse_loss")
        optimizer = unwrapped(optimizer)
        if not hasattr(optimizer, "set_phase_rows"):
            raise TypeError(f"AIM writes rows of an AIMFusedOptimizer; {type(optimizer).__name__} has none")
        if self.mixing.needs_whole_parameters and any_dtensor(optimizer.param_groups):
            raise ValueError(
                f"mixing={self.mixing.name!r} works on whole parameters, and the optimizer's are sharded (DTensor, "
                "FSDP2); use mixing='alternate'"
            )
        self.wrapped = model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module  # probing needs no gradient exchange; prefixed names are handled below
        self.model, self.optimizer = model, optimizer
        self.guard = Guard() if guard else None
        self.held_back: frozenset[str] = frozenset()  # by what trials have shown
        self.updates = 0
        self.history: list[ModulationTable] = []
        self.generator = torch.Generator().manual_seed(seed)

        self.depths = block_depths(optimizer)
        self.modalities = tuple(self.depths)
        self.layout = Layout.of(self.modalities, arguments, model)
        self.scoring = Scoring(
            model=model,
            optimizer=optimizer,
            num_classes=0 if num_classes is None else num_classes,
            depths=self.depths,
            modules=block_modules(model, optimizer) if reads_features else {},
            pools=_pools("channels_first" if pool is None else pool, self.modalities),
            loss=nn.functional.cross_entropy if loss is None else loss,
            targets=targets,
            batch_size=batch_size,
            generator=self.generator,
        )
        self.mixing_state = self.mixing.initial_state(self.modalities, seed)
        self._handles = self._install()
        running = list(layers_with_statistics(model))
        if running:
            warnings.warn(
                f"{running[0]} and {len(running) - 1} other layers keep running statistics, collected under the live "
                "weights. AIM's own measurements, Method.evaluating() and the callbacks refresh them; after your own "
                "optimizer.eval() call aim_kernels.refresh_statistics(model, batches), or use GroupNorm",
                stacklevel=2,
            )

    def _refuse_without_meaning(self, **given: Any) -> None:
        """Raises ValueError for an option that is given (not None) and means nothing beside the others."""
        rule, probe, mixing = self.rule, self.probe, self.mixing
        for name in ("probe", "alpha", "targets", "pool"):
            if given[name] is not None and rule is not None and not rule.scores_blocks:
                raise ValueError(
                    f"{name} means nothing under rule={rule.name!r}, which scores no blocks; leave it out, or use "
                    "rule='gap'"
                )
        for name in ("targets", "pool"):
            if given[name] is not None and not probe.reads_features:
                raise ValueError(
                    f"{name} means nothing under probe={probe.name!r}, which reads no features; leave it out, or use "
                    "probe='prototypes'"
                )
        if given["decouple"] is not None and not mixing.writes_rows:
            raise ValueError(f"decouple means nothing under mixing={mixing.name!r}, which writes no rows; leave it out")
        if not probe.has_held_out and rule is not None and rule.needs_held_out:
            raise ValueError(f"probe={probe.name!r} has no held-out scores; use rule='ratio'")

    # -- updates -----------------------------------------------------------------------------------------------------

    def update(
        self,
        inputs: Any,
        labels: Any = None,
        held_out: Any = None,
        train: Train | None = None,
        restore: Sequence[Any] = (),
        present: Tensor | None = None,
    ) -> ModulationTable:
        """Decide who is held back, set the strengths, and return the table (also appended to ``history``).

        ``inputs``: one tensor ``[B, ...]`` per modality, in the order of the blocks, or None for a modality that is not
        there: it keeps the scores of the update before, and the model is called with None in its place. ``labels``:
        int64 ``[B]`` (under ``targets="quantiles"`` real numbers); ``held_out``: another such pair that the network is
        not trained on. The held-out samples must look like the
        deployment: a share of the training set shows memorization, but no shift. Synchronizes with the device. Model
        flags, gradients and the global random state stay as they were; where it raises, no row and no state has
        changed. Degraded weights spoil running statistics (BatchNorm): they are estimated anew, from up to 512 of the
        training samples, for the weights that are judged, and put back.

        Under the :class:`Reliance` rule the network runs over the samples and the held-out samples 2 x modalities + 2
        times (five times with two modalities), without gradients. Labels may be whatever ``loss`` takes.

        Under the :class:`Trial` rule the samples are cut into ``steps`` batches (so pass that many times your batch
        size; fewer samples than that are as many batches of one), on which steps are tried and undone: as it is, then
        with each modality wholly held back that is not, or let go that is. The move whose held-out loss is the lowest
        is made, if it gains more than ``confidence`` standard errors of the paired difference; ``kappa`` is then 1
        (1 - 1e-6) at every depth, or 0. ``train(inputs, labels)`` is one step of your loop, from ``zero_grad`` to
        ``optimizer.step()``, without the scheduler; ``restore``: whatever else it changes, with ``state_dict`` and
        ``load_state_dict`` (a GradScaler). Labels may be whatever ``loss`` and ``train`` take. It costs at most
        (modalities + 1) times ``steps`` steps and four passes over the held-out samples, and a copy of weights,
        states and gradients. Other rules do not look at ``train``.

        Raises ValueError, saying what to do: missing labels, another number of inputs, unequal lengths, labels out of
        range, a rule or a guard that needs ``held_out`` without it, no input and no earlier score, a probe's table of
        another shape or with negative scores, trials without ``train``. RuntimeError: a ``train`` that never steps.
        """
        found = read_samples("", self.layout, inputs, labels, present)
        self._follow_blocks()
        rule = self.rule or self._automatic(found.labels, held_out)
        samples = rule.check(self, "", found)
        if rule.needs_held_out and held_out is None:
            raise ValueError(
                f"rule={rule.name!r} compares training with held-out scores; pass held_out=(inputs, labels)"
            )
        if self.guard is not None and held_out is None:
            raise ValueError("guard=True watches the held-out loss; pass held_out=(inputs, labels)")
        if rule.scores_blocks and rule.needs_held_out and not self.probe.has_held_out:
            raise ValueError(f"probe={self.probe.name!r} has no held-out scores; use rule='ratio'")
        outside = None if held_out is None else rule.check(self, "held-out ", read_held_out(self.layout, held_out))
        factor, joint_loss = self.schedule(self.updates), None
        generator_state = self.generator.get_state()
        try:
            measured = rule.measure(self, samples, outside, train, restore)
            if self.guard is not None and outside is not None:
                with self.measuring(samples.inputs):
                    joint_loss = self.scoring.joint_loss(outside)
        except BaseException:
            self.generator.set_state(generator_state)
            raise
        if self.guard is not None and joint_loss is not None:
            held_back = bool(self.history) and bool(self.history[-1].dominant)
            factor *= self.guard.update(joint_loss, held_back)
        table, self.held_back = rule.decide(self, measured, factor)
        self.mixing.write(self, table)
        self.updates += 1
        self.history.append(table)
        return table

    def _follow_blocks(self) -> None:
        """Takes up blocks that ``add_param_group`` has added. Raises ValueError for other modalities than before."""
        depths = block_depths(self.optimizer)
        if depths == self.depths:
            return
        if tuple(depths) != self.modalities:
            raise ValueError(
                f"the optimizer's groups now name the modalities {list(depths)}, AIM was made for "
                f"{list(self.modalities)}; make another AIM"
            )
        self.depths = depths
        modules = block_modules(self.model, self.optimizer) if self.scoring.modules else {}
        self.scoring = replace(self.scoring, depths=depths, modules=modules)
        if self._handles:
            self.remove()
            self._handles = self._install()

    def _automatic(self, labels: Any, held_out: Any) -> Rule:
        """The rule that an update's arguments allow. Options of scores ask for them."""
        if held_out is None:
            return Ratio()
        return Gap() if labels is None or self.asks_for_scores else Reliance()

    @contextlib.contextmanager
    def measuring(self, inputs: Inputs, *, refresh: bool = False) -> Iterator[None]:
        """Inside, the module holds the true weights in evaluation mode; the global random state is restored after.

        Running statistics are those of ``inputs``, training samples, and the true weights where ``refresh`` says so or
        training degrades something; what was there before is put back after. Elsewhere they stay as they are.
        """
        layers = trained_layers(self.model) if refresh or self.degrades else {}
        batches = batches_of(inputs, self.scoring.batch_size) if layers else []
        with self.optimizer.true_parameters(), probing(self.model), refreshed(self.model, layers, batches):
            yield

    @property
    def degrades_weights(self) -> bool:
        """Whether training sees degraded weights."""
        return any(map(self.optimizer.tables.degrades, range(len(self.optimizer.param_groups))))

    @property
    def degrades(self) -> bool:
        """Whether training sees degraded weights or features."""
        return self.degrades_weights or bool(self.history and self.history[-1].dominant)

    def remove(self) -> None:
        """Takes the hooks off the model: a mixing of features is then without effect on it, and nothing warns of live
        weights."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def __getstate__(self) -> dict[str, Any]:
        """All but the hooks, which stay on this object's model."""
        return {**self.__dict__, "_handles": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handles = self._install() if state["_handles"] else ()

    def _install(self) -> Sequence[Any]:
        return [*self.mixing.install(self), *LiveWatch(self).handles]

    def remember(self) -> Callable[[], None]:
        """Saves what steps change of this object; the function that is returned brings it back."""
        state, mixing_state = self.generator.get_state(), self._mixing_state()

        def back() -> None:
            self.generator.set_state(state)
            self._load_mixing_state(mixing_state)

        return back

    def _mixing_state(self) -> dict[str, Any]:
        return {
            name: value.get_state() if isinstance(value, torch.Generator) else copy.deepcopy(value)
            for name, value in self.mixing_state.items()
        }

    def _load_mixing_state(self, state: Mapping[str, Any]) -> None:
        for name, value in self.mixing_state.items():
            if isinstance(value, torch.Generator):
                value.set_state(state[name].cpu())
            else:
                self.mixing_state[name] = copy.deepcopy(state[name])

    # -- a step ------------------------------------------------------------------------------------------------------

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any] | None = None) -> Tensor:
        """Takes the place of ``loss.backward()``, once for each batch before ``optimizer.step()``.

        Under :class:`Split`, while somebody is dominant, two passes: with the auxiliary weights, then with the
        true ones. Gradients are added to ``grad`` as ever, so batches can be accumulated; dropout draws anew in each
        pass. Elsewhere it is one plain pass.

        Args:
            closure: returns the loss of ``model(*inputs)``, scaled if it is to be (``scaler.scale(loss)``).
            backward: what takes the loss backward, for frameworks that do it by themselves
                (``accelerator.backward``); None: ``loss.backward()``.

        Returns:
            The loss of the last pass, detached: with true weights, under "split".

        Raises:
            RuntimeError: the module holds weights that were put there for something else (``optimizer.eval()``), or
                the optimizer steps inside backward (``step_in_backward``).
        """
        return self.mixing.backward(self, closure, torch.Tensor.backward if backward is None else backward)

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Updates, random state and history as plain data. The rows in force are part of the optimizer's state."""
        return {
            "updates": self.updates,
            "generator": self.generator.get_state(),
            "history": [table.to_dict() for table in self.history],
            "guard": None if self.guard is None else vars(self.guard).copy(),
            "held_back": sorted(self.held_back),
            **self._mixing_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: bit for bit, where the optimizer's state is loaded too."""
        self.updates = int(state["updates"])
        self.generator.set_state(state["generator"].cpu())
        self.history = [ModulationTable.from_dict(row) for row in state["history"]]
        if self.guard is not None and state.get("guard") is not None:
            vars(self.guard).update(state["guard"])
        self.held_back = frozenset(state["held_back"])
        self._load_mixing_state(state)


def _pools(pool: str | Pool | Mapping[str, str | Pool], modalities: Sequence[str]) -> dict[str, Pool | None]:
    """Modality to what makes ``[B, C]`` of its blocks' outputs. Raises ValueError for other modalities than there are,
    and for unknown names."""
    pools = dict(pool) if isinstance(pool, Mapping) else dict.fromkeys(modalities, pool)
    if set(pools) != set(modalities):
        raise ValueError(f"pool is given for {sorted(pools)}, the modalities are {sorted(modalities)}")
    for way in pools.values():
        if not callable(way):
            check_choice("pool", way, WAYS, " or a callable")
    return {name: way if callable(way) else None if way == FRAMES else POOLS[way] for name, way in pools.items()}
