"""Mixings: how training relies on the degraded blocks of a dominant modality."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from aim_kernels.aim.features import FeatureMixing
from aim_kernels.aim.options import chosen
from aim_kernels.aim.strengths import ModulationTable
from aim_kernels.step.arguments import check_choice, check_fields, check_finite, check_within

if TYPE_CHECKING:
    from aim_kernels.aim.interface import Modulator

#: Columns of a block that does not learn, by ``hold``: its gradient counts as zero, or it stays as it is.
_HELD = {
    "fade": {"grad_under": 0.0, "grad_well": 0.0},
    "freeze": {"grad_under": 0.0, "grad_well": 0.0, "step_under": 0.0, "step_well": 0.0},
}
#: What gets through a pass of "split": (auxiliary, true), by ``head_from``, of the parameters of no modality.
_HEAD = {"average": (0.5, 0.5), "true": (0.0, 1.0), "auxiliary": (1.0, 0.0)}


class Mixing(abc.ABC):
    """Writes the rows of all groups after an update, and takes a loss backward."""

    name: ClassVar[str]

    @property
    def two_passes(self) -> bool:
        """Whether a step needs :meth:`backward`, while somebody is dominant."""
        return False

    @property
    def needs_whole_parameters(self) -> bool:
        """Whether sharded parameters are refused."""
        return False

    @property
    def writes_rows(self) -> bool:
        """Whether weak modalities have rows, so that ``decouple`` means something."""
        return True

    @property
    def tells_classes_by_rows(self) -> bool:
        """Whether rows say what becomes of under- and of well-optimized elements."""
        return self.writes_rows

    def install(self, aim: Modulator) -> Sequence[Any]:
        """Handles of the hooks that it needs on the model."""
        return ()

    def initial_state(self, modalities: Sequence[str], seed: int) -> dict[str, Any]:
        """What it keeps between steps in ``aim.mixing_state``: plain data and generators, part of AIM's state."""
        return {}

    @abc.abstractmethod
    def write(self, aim: Modulator, table: ModulationTable) -> None:
        """Sets rows and phases by a table."""

    def backward(self, aim: Modulator, closure: Callable[[], Tensor], run: Callable[[Tensor], Any]) -> Tensor:
        """Takes the loss that ``closure`` returns backward by ``run``; returns it, detached."""
        with torch.enable_grad():
            loss = closure()
            run(loss)
        return loss.detach()


@dataclass(frozen=True, kw_only=True)
class Alternate(Mixing):
    """One pass per step. Before each, a seeded draw chooses the phase: in the auxiliary phase the dominant modality's
    well-optimized weights are live as ``(1 - kappa) * theta`` and all but the dominant modality learns; in the true
    phase everything does.

    Attributes:
        probability: of the auxiliary phase: a number, or "strength", the greatest kappa of a dominant modality's
            blocks, so that a wholly unconfirmed lead leaves next to no true phase, and a slight one next to no
            auxiliary phase.
        learn_weak_in_true_phase: False: weak modalities learn in the auxiliary phase only.
        learn_dominant_in_aux: "none", or "under": the dominant modality's under-optimized weights learn in the
            auxiliary phase.
        hold: of a block that does not learn in a phase. "fade": its gradient is zero, so momentum moves it on and its
            moments fade, the first faster than the second; after a few such steps in a row none of its elements, then,
            as the threshold follows, all of them are under-optimized, and the mask says little. "freeze": weights,
            moments and step count stay as they are, and so does the mask.
        head_from: the phase in which parameters of no modality (fusion, head) learn: "average" (both), "true" or
            "auxiliary".

    Raises ValueError for unknown words and a probability outside of [0, 1].
    """

    name: ClassVar[str] = "alternate"
    probability: float | str = "strength"
    learn_weak_in_true_phase: bool = True
    learn_dominant_in_aux: str = "none"
    hold: str = "fade"
    head_from: str = "average"

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.probability, str):
            check_choice("probability", self.probability, ("strength",), ", or a number")
        else:
            check_within("probability", self.probability, 0.0, 1.0)
        check_choice("learn_dominant_in_aux", self.learn_dominant_in_aux, ("none", "under"))
        check_choice("hold", self.hold, tuple(_HELD))
        check_choice("head_from", self.head_from, tuple(_HEAD))

    def write(self, aim: Modulator, table: ModulationTable) -> None:
        held = _HELD[self.hold]
        for index, group in enumerate(aim.optimizer.param_groups):
            modality = group.get("modality")
            true: dict[str, float] = {}
            aux: dict[str, float] = {}
            if modality in table.dominant:
                # biases and normalization have no classes, but they are held with their block
                aux = dict(held)
                if group.get("modulated"):
                    aux |= {"live_under": 1.0, "live_well": 1.0 - table.kappa[modality][group["depth"]]}
                    if self.learn_dominant_in_aux == "under":
                        aux |= {"grad_under": 1.0, "step_under": 1.0}
            elif modality in table.weak:
                aux = aim.decouple.stimulus(table, group)
                true = dict(aux) if self.learn_weak_in_true_phase else {**aux, **held}
            elif modality is None and table.dominant and self.head_from != "average":
                (true if self.head_from == "auxiliary" else aux).update(held)
            aim.optimizer.set_phase_rows(index, true=true, aux=aux)
        aim.optimizer.set_phases(self._probability(table) if table.dominant else 0.0)

    def _probability(self, table: ModulationTable) -> float:
        if not isinstance(self.probability, str):
            return self.probability
        return max(kappa for modality in table.dominant for kappa in table.kappa[modality])


@dataclass(frozen=True, kw_only=True)
class Split(Mixing):
    """Two passes per step, by :meth:`AIM.backward`: the dominant encoder learns from the true weights, the weak ones
    from the auxiliary weights.

    Attributes:
        head_from: the pass from which parameters of no modality (fusion, head) learn: "average" (both), "true" or
            "auxiliary".
        auxiliary_weight: factor on all gradients of the auxiliary pass.

    Raises ValueError for an unknown ``head_from`` and a negative ``auxiliary_weight``.
    """

    name: ClassVar[str] = "split"
    head_from: str = "average"
    auxiliary_weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("head_from", self.head_from, tuple(_HEAD))
        check_finite("auxiliary_weight", self.auxiliary_weight)

    @property
    def two_passes(self) -> bool:
        return True

    @property
    def needs_whole_parameters(self) -> bool:
        return True

    def write(self, aim: Modulator, table: ModulationTable) -> None:
        for index, group in enumerate(aim.optimizer.param_groups):
            row = aim.decouple.stimulus(table, group)
            if group.get("modality") in table.dominant and group.get("modulated"):
                row = {"live_well": 1.0 - table.kappa[group["modality"]][group["depth"]]}
            aim.optimizer.set_phase_rows(index, true=row, aux=row)
        # With equal rows the phase only tells what the module holds.
        aim.optimizer.set_phases(1.0 if table.dominant else 0.0)

    def backward(self, aim: Modulator, closure: Callable[[], Tensor], run: Callable[[Tensor], Any]) -> Tensor:
        optimizer = aim.optimizer
        table = aim.history[-1] if aim.history else None
        optimizer.refuse_passes()
        if table is not None and table.dominant:
            optimizer.begin_live_pass()
            with _without_exchange(aim.wrapped), self._routed(aim, table, True), torch.enable_grad():
                run(closure())
            optimizer.begin_true_pass()
            with self._routed(aim, table, False), torch.enable_grad():
                loss = closure()
                run(loss)
            return loss.detach()
        if any(earlier.dominant for earlier in aim.history):
            # The module may still hold what the last dominant table made of it.
            optimizer.begin_true_pass()
        return super().backward(aim, closure, run)

    @contextlib.contextmanager
    def _routed(self, aim: Modulator, table: ModulationTable, auxiliary: bool) -> Iterator[None]:
        """Inside, each parameter's gradient is multiplied by its share of this pass as it comes, before it is added to
        ``grad``: so gradients accumulate, are scaled and are exchanged between processes as ever."""
        handles = []
        for group in aim.optimizer.param_groups:
            modality = group.get("modality")
            if modality is None:
                share = _HEAD[self.head_from][0 if auxiliary else 1]
            else:
                share = float((modality in table.dominant) != auxiliary)
            factor = share * self.auxiliary_weight if auxiliary else share
            if factor != 1.0:
                handles += [p.register_hook(_scaled(factor)) for p in group["params"] if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, kw_only=True)
class Weights(Mixing):
    """Always degraded; everything learns.

    Attributes:
        coefficients: as in ``optimizer.set_strength``: "chain", "straight-through" or "step".

    Raises ValueError for unknown ``coefficients``.
    """

    name: ClassVar[str] = "weights"
    coefficients: str = "chain"

    def __post_init__(self) -> None:
        check_choice("coefficients", self.coefficients, ("chain", "straight-through", "step"))

    def write(self, aim: Modulator, table: ModulationTable) -> None:
        aim.optimizer.set_phases(0.0)
        for index, group in enumerate(aim.optimizer.param_groups):
            modality, depth = group.get("modality"), group.get("depth")
            if modality is None or not group.get("modulated"):
                continue
            if modality in table.dominant:
                kappa = table.kappa[modality][depth]
                aim.optimizer.set_strength(modality, depth, kappa, coefficients=self.coefficients)
            else:
                row = aim.decouple.stimulus(table, group)
                aim.optimizer.set_phase_rows(index, true=row, aux=row)


@dataclass(frozen=True, kw_only=True)
class Features(Mixing):
    """A block of a dominant modality answers ``(1 - kappa) * E(z; theta) + kappa * E(z; theta_aux)`` in training mode,
    with gradients to ``theta_aux`` through under-optimized elements only: two forward passes of the block by
    ``torch.func.functional_call``, in eager PyTorch, which is slow and shows what the others stand for. Call
    :meth:`AIM.remove` to take its hooks off the model again."""

    name: ClassVar[str] = "features"

    @property
    def needs_whole_parameters(self) -> bool:
        return True

    @property
    def tells_classes_by_rows(self) -> bool:
        return False

    def install(self, aim: Modulator) -> Sequence[Any]:
        return FeatureMixing(aim).handles

    def write(self, aim: Modulator, table: ModulationTable) -> None:
        aim.optimizer.set_phases(0.0)
        for index, group in enumerate(aim.optimizer.param_groups):
            row = aim.decouple.stimulus(table, group)
            aim.optimizer.set_phase_rows(index, true=row, aux=row)


def _scaled(factor: float) -> Callable[[Tensor], Tensor]:
    # Not grad * 0: what overflowed in a pass that does not count must not come through as NaN.
    return torch.zeros_like if factor == 0.0 else lambda grad: grad * factor


def _without_exchange(model: Any) -> contextlib.AbstractContextManager[Any]:
    """DDP exchanges what has accumulated, so only the last pass of a step need do it."""
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()


#: Mixings by their names.
MIXINGS: dict[str, type[Mixing]] = {cls.name: cls for cls in (Alternate, Split, Weights, Features)}


def as_mixing(mixing: Any) -> Mixing:
    """A mixing of what :class:`AIM` takes for one: an object, or a name."""
    return chosen("mixing", mixing, MIXINGS, Mixing)


# -- weak modalities --------------------------------------------------------------------------------------------------


class Decouple(abc.ABC):
    """Whose parameters are treated by their class: of dominant modalities, or of weak ones too."""

    name: ClassVar[str]

    @abc.abstractmethod
    def stimulus(self, table: ModulationTable, group: dict[str, Any]) -> dict[str, float]:
        """Columns of a weak modality's group."""


@dataclass(frozen=True, kw_only=True)
class DecoupleDominant(Decouple):
    """Weak modalities learn as in joint training."""

    name: ClassVar[str] = "dominant"

    def stimulus(self, table: ModulationTable, group: dict[str, Any]) -> dict[str, float]:
        return {}


@dataclass(frozen=True, kw_only=True)
class DecoupleAll(Decouple):
    """The update of a weak modality's under-optimized weights is multiplied by ``1 + beta * weak_kappa``.

    Raises ValueError for a negative ``beta``.
    """

    name: ClassVar[str] = "all"
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_finite("beta", self.beta)

    def stimulus(self, table: ModulationTable, group: dict[str, Any]) -> dict[str, float]:
        modality = group.get("modality")
        if modality not in table.weak or not group.get("modulated"):
            return {}
        return {"step_under": 1.0 + self.beta * table.weak_kappa[modality][group["depth"]]}


#: Choices of ``decouple`` by their names.
DECOUPLES: dict[str, type[Decouple]] = {cls.name: cls for cls in (DecoupleDominant, DecoupleAll)}
