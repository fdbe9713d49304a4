"""AIM: scores every depth of every modality and writes the rows (docs/design.md)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim import trials
from aim_kernels.aim.features import FeatureMixing
from aim_kernels.aim.mixing import WRITERS
from aim_kernels.aim.mixing import backward as _backward
from aim_kernels.aim.options import (
    CONFIDENCE,
    Schedule,
    check_at_least,
    check_choices,
    check_finite,
    schedule_of,
)
from aim_kernels.aim.prototypes import POOLS, Pool, probing
from aim_kernels.aim.scoring import Probe, Scoring
from aim_kernels.aim.strengths import Guard, ModulationTable, assess
from aim_kernels.optim.modulation import unwrapped
from aim_kernels.step.arguments import numbers_checked
from aim_kernels.step.sharding import any_dtensor


class AIM(Scoring):
    """Adaptive intra-network modulation (arXiv 2508.19769) on top of an :class:`AIMFusedOptimizer`.

    ``model`` is called as ``model(*inputs)``; ``optimizer`` holds param groups with the keys of
    :func:`block_param_groups`. At every :meth:`update` the blocks are scored and the strengths ``kappa = tanh(alpha *
    max(excess - confidence * error - 1 - dead_zone, 0))`` computed
    (:func:`~aim_kernels.aim.strengths.assess`); then the rows of all groups are written:

    ``mixing="alternate"``
        Before each step a seeded draw chooses the phase. In the auxiliary phase the dominant modality's well-optimized
        weights are live as ``(1 - kappa) * theta``, and all but the dominant modality learns; in the true phase
        everything does.
    ``mixing="split"``
        Two passes a step, by :meth:`backward`: the dominant encoder learns from the true weights, the weak ones from
        the auxiliary weights, the rest from the average.
    ``mixing="weights"``
        Always degraded, everything learns; ``coefficients`` as in ``optimizer.set_strength``.
    ``mixing="features"``
        A block of a dominant modality answers ``(1 - kappa) * E(z; theta) + kappa * E(z; theta_aux)`` in training mode,
        with gradients to ``theta_aux`` through under-optimized elements only: two forward passes of the block by
        ``torch.func.functional_call``, in eager PyTorch, which is slow and shows what the others stand for. Call
        :meth:`remove` to take its hooks off the model again.

    Where nobody is dominant all of them are joint training. ``decouple="all"`` multiplies the update of a weak
    modality's under-optimized weights by ``1 + beta * weak_kappa``.

    Options
    -------
    rule, confidence, dead_zone
        "gap" compares the lead in training with the held-out one, "ratio" only modalities, "margin" what each
        modality's own training score loses outside it (see ``strengths.margins``); "trial" does without a probe: see
        :meth:`update`. None: "trial" in updates with ``held_out`` and ``train``, "gap" with ``held_out`` alone, else
        "ratio". Of the excess, ``dead_zone`` and ``confidence`` standard errors (None: 3, and 0 for the ratio) set no
        strength; a probe that is a callable, or "gradient-norm", tells none.
    trial_steps
        Of each trial.
    probe
        "prototypes" (``prototype_steps``, ``prototype_lr``, ``init``: see ``fit_prototypes``), "linear" (ridge readout,
        fitted on the first half of the batch), "gradient-norm" (also called "gradients": root mean square gradient of a
        block in the optimizer's latest step, no samples), or ``probe(model, inputs, labels)`` returning one row of
        scores (>= 0, higher is better) a modality.
    loss
        ``loss(model(*prototypes), targets)`` for fitting prototypes, and the joint loss of the guard; cross entropy by
        default.
    targets
        "classes", or "quantiles" for regression: labels are real numbers, which ``num_classes`` bins of equally many
        training samples make classes of; a bin's prototype is fitted to its mean by ``loss``, which must be given.
        Where neither fits, give a callable probe.
    pool
        How a block's output becomes ``[B, C]``: "channels_first" (convolutions), "channels_last" (transformers, ``[B,
        T, C]``), a callable, or a dict from modality to one of these.
    probability
        Of the auxiliary phase: a number, or "strength", the greatest kappa of a dominant modality's blocks, so that a
        lead that is wholly unconfirmed leaves next to no true phase, and a slight one next to no auxiliary phase.
    learn_weak_in_true_phase, learn_dominant_in_aux
        Let the weak modality learn in the true phase too; let the dominant one's under-optimized weights ("under")
        learn in the auxiliary phase.
    hold
        What becomes of a block that does not learn in a phase. "fade": its gradient is zero, so momentum moves it on
        and its moments fade, the first faster than the second; after a few such steps in a row none of its elements,
        then, as the threshold follows, all of them are under-optimized, and the mask says little. "freeze": weights,
        moments and step count stay as they are, and so does the mask.
    head_from, auxiliary_weight
        Which pass ("split") or phase ("alternate") the parameters of no modality (fusion, head) learn from: "average"
        (both), "true" or "auxiliary"; of "split", what multiplies all gradients of the auxiliary pass.
    schedule
        What multiplies every kappa: "constant", "linear-out" or "cosine-out" (to 0 in the last of ``total_updates``),
        or ``schedule(update_index) -> factor`` in [0, 1]; in the first ``warmup_updates`` it rises from 0.
    guard
        Halves all strengths when the held-out joint loss has risen while somebody was held back, and gives a tenth
        back in every other update (see ``strengths.Guard``). Needs ``held_out``.
    batch_size
        Scoring runs in pieces of this many samples.

    Scores are averaged over the ranks of an initialized process group, so that all set the same rows: each rank calls
    :meth:`update`, with samples of its own, of which every rank has equally many where the model is sharded (FSDP2).
    What the abstracts do not say is this library's reading (docs/design.md, "Decisions of ours").

    Raises ValueError for fewer than two modalities, unknown choices and numbers out of range; TypeError for another
    optimizer.
    """

    @numbers_checked
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
        dead_zone: float = 0.0,
        confidence: float | None = None,
        probability: float | str = "strength",
        beta: float = 1.0,
        coefficients: str = "chain",
        prototype_steps: int = 30,
        prototype_lr: float = 0.1,
        init: str = "noise",
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        pool: str | Pool | Mapping[str, str | Pool] = "channels_first",
        batch_size: int = 512,
        learn_weak_in_true_phase: bool = True,
        learn_dominant_in_aux: str = "none",
        hold: str = "fade",
        head_from: str = "average",
        auxiliary_weight: float = 1.0,
        targets: str = "classes",
        schedule: str | Schedule | None = None,
        total_updates: int | None = None,
        warmup_updates: int = 0,
        guard: bool = False,
        trial_steps: int = 16,
        seed: int = 0,
    ) -> None:
        schedule = "constant" if schedule is None else schedule
        check_choices(
            decouple=decouple,
            mixing=mixing,
            init=init,
            coefficients=coefficients,
            learn_dominant_in_aux=learn_dominant_in_aux,
            hold=hold,
            head_from=head_from,
            probe=probe,
            targets=targets,
            schedule=schedule,
        )
        if rule is not None:
            check_choices(rule=rule)
        check_finite(
            alpha=alpha,
            beta=beta,
            dead_zone=dead_zone,
            confidence=confidence,
            prototype_lr=prototype_lr,
            auxiliary_weight=auxiliary_weight,
        )
        if isinstance(probability, str):
            check_choices(probability=probability)
        elif not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must be 'strength' or lie in [0, 1], got {probability}")
        check_at_least(num_classes=(num_classes, 2), batch_size=(batch_size, 1), prototype_steps=(prototype_steps, 0))
        check_at_least(warmup_updates=(warmup_updates, 0), trial_steps=(trial_steps, 1))
        if targets == "quantiles" and loss is None:
            raise ValueError("targets='quantiles' needs a loss for real numbers: loss=torch.nn.functional.mse_loss")
        optimizer = unwrapped(optimizer)
        if not hasattr(optimizer, "set_phase_rows"):
            raise TypeError(f"AIM writes rows of an AIMFusedOptimizer; {type(optimizer).__name__} has none")
        if mixing in ("split", "features") and any_dtensor(optimizer.param_groups):
            raise ValueError(
                f"mixing={mixing!r} works on whole parameters, and the optimizer's are sharded (DTensor, FSDP2); "
                "use mixing='alternate'"
            )
        self.wrapped = model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module  # probing needs no gradient exchange; prefixed names are handled below
        self.model, self.optimizer, self.num_classes = model, optimizer, num_classes
        self.alpha, self.decouple, self.mixing, self.probe = alpha, decouple, mixing, probe
        if probe == "gradients":
            self.probe = "gradient-norm"
        self.rule, self.dead_zone, self.confidence = rule, dead_zone, confidence
        self.probability, self.beta = probability, beta
        self.coefficients = coefficients
        self.prototype_steps, self.prototype_lr, self.init = prototype_steps, prototype_lr, init
        self.loss = nn.functional.cross_entropy if loss is None else loss
        self.batch_size = batch_size
        self.learn_weak_in_true_phase = learn_weak_in_true_phase
        self.learn_dominant_in_aux = learn_dominant_in_aux
        self.hold = hold
        self.head_from, self.auxiliary_weight = head_from, auxiliary_weight
        self.targets = targets
        self.schedule = schedule_of(schedule, total_updates, warmup_updates)
        self.guard = Guard() if guard else None
        self.trial_steps = trial_steps
        self.held_back: frozenset[str] = frozenset()  # by what trials have shown
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
            check_choices(pool=way)
            self._pools[name] = way if callable(way) else POOLS[way]
        self._handles = self._install()
        running = [name for name, module in model.named_modules() if getattr(module, "running_mean", None) is not None]
        if running:
            warnings.warn(
                f"{running[0]} and {len(running) - 1} other layers keep running statistics, collected under the live "
                "weights; before validating with the true weights refresh them with torch.optim.swa_utils.update_bn, "
                "or use GroupNorm",
                stacklevel=2,
            )

    # -- probing ----------------------------------------------------------------------------------------------------

    def update(
        self,
        inputs: Sequence[Tensor | None],
        labels: Tensor | None = None,
        held_out: tuple[Sequence[Tensor | None], Tensor | None] | None = None,
        train: trials.Train | None = None,
        restore: Sequence[Any] = (),
    ) -> ModulationTable:
        """Score every block on a batch, set the strengths, and return the table (also appended to ``history``).

        ``inputs``: one tensor ``[B, ...]`` a modality, in the order of the blocks, or None for a modality that is not
        there: it keeps the scores of the update before, and the model is called with None in its place. ``labels``:
        int64 ``[B]`` (under ``targets="quantiles"`` real numbers); ``held_out``: another such pair that the network is
        not trained on. The held-out samples must look like the
        deployment: a share of the training set shows memorization, but no shift. Synchronizes with the device. Model
        flags, gradients and the global random state stay as they were; where it raises, no row and no state has
        changed.

        Under ``rule="trial"`` the samples are cut into ``trial_steps`` batches (so pass that many times your batch
        size; fewer samples than that are as many batches of one), on which steps are tried and undone: as it is, then
        with each modality wholly held back that is not, or let go that is. The move whose held-out loss is the lowest
        is made, if it gains more than ``confidence`` standard errors of the paired difference; ``kappa`` is then 1
        (1 - 1e-6) at every depth, or 0. ``train(inputs, labels)`` is one step of your loop, from ``zero_grad`` to
        ``optimizer.step()``, without the scheduler; ``restore``: whatever else it changes, with ``state_dict`` and
        ``load_state_dict`` (a GradScaler). Labels may be whatever ``loss`` and ``train`` take. It costs at most
        (modalities + 1) times ``trial_steps`` steps and four passes over the held-out samples, and a copy of weights,
        states and gradients. Other rules do not look at ``train``.

        Raises ValueError, saying what to do: missing labels, another number of inputs, unequal lengths, labels out of
        range, a rule or a guard that needs ``held_out`` without it, no input and no earlier score, a probe's table of
        another shape or with negative scores, trials without ``train``.
        """
        rule = self.rule or ("ratio" if held_out is None else "gap" if train is None else "trial")
        tries = rule == "trial"
        samples = self._checked("", inputs, labels, plain=tries)
        if rule != "ratio" and held_out is None:
            raise ValueError(f"rule={rule!r} compares training with held-out scores; pass held_out=(inputs, labels)")
        if self.guard is not None and held_out is None:
            raise ValueError("guard=True watches the held-out loss; pass held_out=(inputs, labels)")
        if self.probe == "gradient-norm" and rule not in ("ratio", "trial"):
            raise ValueError("probe='gradient-norm' has no held-out scores; use rule='ratio'")
        outside = None if held_out is None else self._checked("held-out ", *held_out, plain=tries)
        factor, joint_loss = self.schedule(self.updates), None
        generator_state = self.generator.get_state()
        try:
            if tries:
                tried = trials.measure(self, *trials.checked(samples, outside, train), restore)
            with self.optimizer.true_parameters(), probing(self.model):
                if not tries:
                    scores, held_out_scores = self._scores(samples, outside)
                if self.guard is not None and outside is not None:
                    joint_loss = self._joint_loss(outside)
        except BaseException:
            self.generator.set_state(generator_state)
            raise
        if self.guard is not None and joint_loss is not None:
            held_back = bool(self.history) and bool(self.history[-1].dominant)
            factor *= self.guard.update(joint_loss, held_back)
        confidence = CONFIDENCE[rule] if self.confidence is None else self.confidence
        if tries:
            before = self.held_back
            self.held_back = trials.judge(before, *tried, self.dead_zone, confidence)
            table = trials.table_of(self, before, *tried, factor)
        else:
            table = assess(
                self.updates,
                scores,
                held_out_scores,
                self._under_fraction(),
                rule=rule,
                alpha=self.alpha,
                dead_zone=self.dead_zone,
                confidence=confidence,
                factor=factor,
            )
            self.held_back = frozenset(table.dominant)
        self._write_rows(table)
        self.updates += 1
        self.history.append(table)
        return table

    def _install(self) -> list[Any]:
        """Handles of the hooks that the method needs on the model."""
        return FeatureMixing(self).handles if self.mixing == "features" else []

    def remove(self) -> None:
        """Takes the hooks off the model, where there are any; the method is then without effect on it."""
        for handle in self._handles:
            handle.remove()

    def _remembered(self) -> Callable[[], None]:
        """Brings back what steps change of the method itself."""
        state = self.generator.get_state()

        def back() -> None:
            self.generator.set_state(state)

        return back

    def _write_rows(self, table: ModulationTable) -> None:
        WRITERS[self.mixing](self, table)

    # -- a step ------------------------------------------------------------------------------------------------------

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any] | None = None) -> Tensor:
        """Takes the place of ``loss.backward()``, once for each batch before ``optimizer.step()``.

        Under ``mixing="split"`` and where somebody is dominant, two passes: with the auxiliary weights, then with the
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
        return _backward(self, closure, torch.Tensor.backward if backward is None else backward)

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Updates, random state and history as plain data. The rows in force are part of the optimizer's state."""
        return {
            "updates": self.updates,
            "generator": self.generator.get_state(),
            "history": [table.to_dict() for table in self.history],
            "guard": None if self.guard is None else vars(self.guard).copy(),
            "held_back": sorted(self.held_back),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: bit for bit, where the optimizer's state is loaded too."""
        self.updates = int(state["updates"])
        self.generator.set_state(state["generator"].cpu())
        self.history = [ModulationTable.from_dict(row) for row in state["history"]]
        if self.guard is not None and state.get("guard") is not None:
            vars(self.guard).update(state["guard"])
        self.held_back = frozenset(state["held_back"])
