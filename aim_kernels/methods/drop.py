"""A control: AIM's probe and strengths, but the dominant modality's features are dropped; no auxiliary blocks, no row.

Cheap and strong against a shortcut, so it belongs in every table beside AIM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.aim.aim import AIM
from aim_kernels.aim.strengths import ModulationTable


class FeatureDrop(AIM):
    """Zeroes the last block's output of a dominant modality, sample by sample; probability: the mean of its kappa.

    Takes AIM's arguments (those about rows are without effect) and is used like it; every row of the optimizer stays at
    one. Only in training mode, without rescaling. Draws come from a generator of its own, on the CPU, so that a seed
    gives the same masks on every device. Call :meth:`remove` to take the hooks off the model again.

    Raises ValueError like AIM, and where the groups name no modules. Source: this library's control, not the paper's.
    """

    def __init__(self, model: nn.Module, optimizer: Any, num_classes: int, **options: Any) -> None:
        super().__init__(model, optimizer, num_classes, **options)
        self.drop = dict.fromkeys(self.modalities, 0.0)
        self.drop_generator = torch.Generator().manual_seed(options.get("seed", 0) + 1)

    def _install(self) -> list[Any]:
        modules = self._modules or self._find_modules()
        return [modules[m][-1].register_forward_hook(self._hook_of(m)) for m in self.modalities]

    def _hook_of(self, modality: str) -> Any:
        def hook(module: nn.Module, _args: Any, output: Any) -> Any:
            probability = self.drop[modality]
            if not module.training or probability == 0.0:
                return None
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"the last block of {modality!r} returns a {type(output).__name__}; FeatureDrop needs a tensor"
                )
            return self._treat(output, probability)

        return hook

    def _treat(self, output: Tensor, probability: float) -> Tensor:
        generator = self.drop_generator
        drawn = torch.rand(len(output), generator=generator, dtype=torch.float32, device=generator.device)
        keep = drawn >= probability
        return output * keep.to(output).view(-1, *[1] * (output.dim() - 1))

    def _write_rows(self, table: ModulationTable) -> None:
        self.drop = {m: sum(row) / len(row) if m in table.dominant else 0.0 for m, row in table.kappa.items()}

    def _remembered(self) -> Callable[[], None]:
        rest, drop, state = super()._remembered(), self.drop, self.drop_generator.get_state()

        def back() -> None:
            rest()
            self.drop = drop
            self.drop_generator.set_state(state)

        return back

    def backward(self, closure: Callable[[], Tensor], backward: Callable[[Tensor], Any] | None = None) -> Tensor:
        """One plain pass: features are dropped in it, whatever ``mixing`` says."""
        loss = closure()
        (torch.Tensor.backward if backward is None else backward)(loss)
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "drop": dict(self.drop), "drop_generator": self.drop_generator.get_state()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.drop = dict(state["drop"])
        self.drop_generator.set_state(state["drop_generator"].cpu())
