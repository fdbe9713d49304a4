"""Controls: what is left of a method when its clever part is taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aim_kernels.aim.blocks import block_modules
from aim_kernels.aim.hooks import BlockHook
from aim_kernels.aim.inputs import Layout, count_of
from aim_kernels.aim.interface import Modulator
from aim_kernels.aim.mixing import Alternate, Mixing, as_mixing
from aim_kernels.aim.strengths import ModulationTable
from aim_kernels.methods.aim import AIMMethod
from aim_kernels.methods.base import Blocks, Method, Outputs, check_apply_to
from aim_kernels.methods.losses import Loss
from aim_kernels.methods.trees import by_sample, changed, frames_of
from aim_kernels.step.arguments import check_at_least
from aim_kernels.step.layout import PHASE_COLUMNS, PHASES, ROW


@dataclass(frozen=True, kw_only=True)
class DropFeatures(Mixing):
    """Zeroes the last block's output of a dominant modality, sample by sample; probability: the mean of its kappa.

    No auxiliary blocks: every row of the optimizer stays at one. Cheap and strong against a shortcut, so it belongs in
    every table beside AIM. Only in training mode, without rescaling. Draws come from a generator of its own, on the
    CPU, so that a seed gives the same masks on every device. Call :meth:`AIM.remove` to take the hooks off the model
    again.

    Raises ValueError where the groups name no modules. Source: this library's control, not the paper's.
    """

    name: ClassVar[str] = "drop-features"
    #: Whether rows of features are told apart.
    by_sample: ClassVar[bool] = True

    @property
    def writes_rows(self) -> bool:
        return False

    def install(self, aim: Modulator) -> Sequence[Any]:
        modules = aim.scoring.modules or block_modules(aim.model, aim.optimizer)
        counts: list[int] = []  # of the samples in a forward pass of the model, while it lasts
        layout = getattr(aim, "layout", None)
        hooks = {m: BlockHook(self._hook_of(m, aim.mixing_state, counts)) for m in aim.modalities}

        def begins(_module: nn.Module, args: Any, keywords: Any) -> None:
            counts[:] = [_samples_in(layout, args, keywords)]

        return [
            aim.model.register_forward_pre_hook(BlockHook(begins), with_kwargs=True),
            *(modules[m][-1].register_forward_hook(hook) for m, hook in hooks.items()),
            aim.model.register_forward_hook(BlockHook(lambda *_: counts.clear()), always_call=True),
        ]

    def initial_state(self, modalities: Sequence[str], seed: int) -> dict[str, Any]:
        """``drop``: modality to probability; ``drop_generator``: of the draws."""
        return {"drop": dict.fromkeys(modalities, 0.0), "drop_generator": torch.Generator().manual_seed(seed + 1)}

    def _hook_of(self, modality: str, state: dict[str, Any], counts: list[int]) -> Callable[..., Any]:
        where = f"the last block of {modality!r}"

        def hook(module: nn.Module, _args: Any, output: Any) -> Any:
            probability = state["drop"][modality]
            if not module.training or probability == 0.0:
                return None

            def change(z: Tensor) -> Tensor:
                # Outside of the model's own forward pass a row is a sample.
                count = counts[0] if counts and counts[0] else len(z)
                each = frames_of(where, z, count) if self.by_sample else 1
                return self.treat(z, probability, state["drop_generator"], each)

            return changed(where, output, change)

        return hook

    def treat(self, output: Tensor, probability: float, generator: torch.Generator, each: int = 1) -> Tensor:
        """What becomes of the output of a dominant modality's last block, ``[B, ...]``, or ``[B * each, ...]``."""
        drawn = torch.rand(len(output) // each, generator=generator, dtype=torch.float32, device=generator.device)
        return output * by_sample((drawn >= probability).to(output), output, each)

    def write(self, aim: Modulator, table: ModulationTable) -> None:
        aim.mixing_state["drop"] = {
            m: sum(row) / len(row) if m in table.dominant else 0.0 for m, row in table.kappa.items()
        }


@dataclass(frozen=True, kw_only=True)
class ScaleFeatures(DropFeatures):
    """Multiplies the last block's output of a dominant modality by ``1 - kappa`` (the mean over depths), in training
    mode. Otherwise :class:`DropFeatures`; source: this library's control."""

    name: ClassVar[str] = "scale-features"
    by_sample: ClassVar[bool] = False

    def treat(self, output: Tensor, probability: float, generator: torch.Generator, each: int = 1) -> Tensor:
        return output * (1.0 - probability)


@dataclass(frozen=True, kw_only=True)
class WithoutMask(Mixing):
    """Another mixing whose rows do not tell classes apart: under-optimized weights of a dominant block get what
    well-optimized ones get."""

    name: ClassVar[str] = "without-mask"
    inner: Mixing = field(default_factory=Alternate)

    def __post_init__(self) -> None:
        if not self.inner.tells_classes_by_rows:
            raise ValueError(
                f"mixing={self.inner.name!r} tells classes apart by itself, and not by rows; without a mask use "
                "'alternate', 'split' or 'weights'"
            )

    @property
    def two_passes(self) -> bool:
        return self.inner.two_passes

    @property
    def needs_whole_parameters(self) -> bool:
        return self.inner.needs_whole_parameters

    def install(self, aim: Modulator) -> Sequence[Any]:
        return self.inner.install(aim)

    def backward(self, aim: Modulator, closure: Callable[[], Tensor], run: Callable[[Tensor], Any]) -> Tensor:
        return self.inner.backward(aim, closure, run)

    def write(self, aim: Modulator, table: ModulationTable) -> None:
        self.inner.write(aim, table)
        for index, group in enumerate(aim.optimizer.param_groups):
            if group.get("modulated") and group.get("modality") in table.dominant:
                row = aim.optimizer.tables.rows[index].tolist()
                columns = {
                    phase: {c: row[ROW[f"{phase}_{c.replace('under', 'well')}"]] for c in PHASE_COLUMNS}
                    for phase in PHASES
                }
                aim.optimizer.set_phase_rows(index, **columns)


def _samples_in(layout: Layout | None, args: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """The number of samples in a call of a model; 0 if no argument tells."""
    values: dict[Any, Any] = {**dict(enumerate(args)), **keywords}
    names = [name for row in (() if layout is None else layout.names) for name in row or ()]
    return count_of([values[name] for name in names if name in values] or list(values.values())) or 0


class Drop(AIMMethod):
    """AIM's strengths, but the dominant modality's features are dropped: see :class:`DropFeatures`. Takes the options
    of AIM but ``mixing`` and ``decouple``, which are about rows."""

    reads_rows = True
    features: ClassVar[Mixing] = DropFeatures()

    def options_of_aim(self, options: dict[str, Any]) -> dict[str, Any]:
        if "mixing" in options:
            raise ValueError(f"mixing means nothing to {type(self).__name__}, which writes no rows; leave it out")
        return {**options, "mixing": self.features}

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self.aim.remove()


class FeatureScale(Drop):
    """AIM's strengths, but the dominant modality's features are multiplied by ``1 - kappa``."""

    reads_rows = False
    features = ScaleFeatures()


class NoMask(AIMMethod):
    """AIM where every weight of a dominant block counts as well optimized: all of them are degraded, and learn as those
    do. In the auxiliary phase ``live_under = live_well = 1 - kappa``. Source: this library's control."""

    def options_of_aim(self, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "mixing": WithoutMask(inner=as_mixing(options.get("mixing", "alternate")))}


class SumOfLosses(Method):
    """The loss of the joint logits plus ``unimodal_weight`` times that of each modality's own; encoders' gradients
    (or updates) times ``encoder_factor``. With ``unimodal_weight=0.3`` it is AIM's own losses without AIM.

    With ``encoder_factor=3`` it is what BalanceBenchmark's port of MMPareto (4c1482f) comes to: its gradients are
    cloned after all losses were summed, so no Pareto weight is ever found, and encoders get 3 times the sum's gradient.

    Raises ValueError for a negative ``encoder_factor`` or ``unimodal_weight``, an unknown ``apply_to``.
    """

    writes_rows_only = False

    def __init__(
        self,
        blocks: Blocks,
        optimizer: Any,
        *,
        unimodal_weight: float = 1.0,
        encoder_factor: float = 1.0,
        apply_to: str = "grad",
        loss: Loss | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(blocks, optimizer, loss=loss, seed=seed)
        check_at_least("encoder_factor", encoder_factor, 0.0)
        check_at_least("unimodal_weight", unimodal_weight, 0.0)
        self.unimodal_weight = unimodal_weight
        check_apply_to(apply_to)
        self.encoder_factor, self.apply_to = encoder_factor, apply_to
        if encoder_factor != 1.0:
            factors = torch.full((len(blocks.modalities),), encoder_factor, dtype=torch.float64, device=self.device)
            self.scale(factors, apply_to=apply_to, biases=True)

    def loss(self, outputs: Outputs) -> Tensor:
        return super().loss(outputs) + self.unimodal_weight * self.unimodal_losses(outputs).sum()
