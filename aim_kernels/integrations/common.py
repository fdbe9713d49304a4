"""Common parts of the callbacks: the optimizer, the weights of a state dict, when strengths are updated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from aim_kernels.aim.accuracies import unimodal_accuracies
from aim_kernels.aim.aim import AIM
from aim_kernels.aim.inputs import moved
from aim_kernels.aim.prototypes import probing
from aim_kernels.aim.statistics import Kept, batches_of, refresh_statistics, trained_layers
from aim_kernels.aim.trials import Train
from aim_kernels.optim.modulation import unwrapped
from aim_kernels.optim.optimizer import AIMFusedOptimizer
from aim_kernels.step.arguments import check_at_least, numbers_checked

#: What :meth:`AIM.update` takes: inputs, labels and, or None, held-out inputs and labels.
Samples = Callable[[], tuple[Any, Any, Any]]


def aim_optimizer(optimizers: Any) -> AIMFusedOptimizer:
    """The one AIMFusedOptimizer among an optimizer or a list of them, wrapped or not.

    Raises TypeError where there is none, or more than one.
    """
    candidates = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
    found = [inner for inner in map(unwrapped, candidates) if isinstance(inner, AIMFusedOptimizer)]
    if len(found) != 1:
        names = ", ".join(type(candidate).__name__ for candidate in candidates) or "none"
        raise TypeError(f"expected exactly one AIMFusedOptimizer, got {len(found)} among: {names}")
    return found[0]


def true_state_dict(model: nn.Module, optimizer: AIMFusedOptimizer) -> RemovableHandle:
    """Makes ``model.state_dict()`` return the true weights, also while the module trains on live ones.

    Checkpoint writers of training frameworks ask the module in the midst of training and have no hook before it. The
    entries are the optimizer's masters, in the dtype of the parameters: no copy where the two agree. What the module
    holds after ``optimizer.eval()`` is left as it is. Remove the handle when training ends.
    """

    optimizer.replaces_saved_weights = True

    def replace(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
        if optimizer.holds_true_weights:
            return
        masters = optimizer.masters()
        for name, p in module.named_parameters(remove_duplicate=False):
            master = masters.get(p)
            if master is not None and prefix + name in state_dict:
                state_dict[prefix + name] = master.detach().to(p.dtype)

    return model.register_state_dict_post_hook(replace)


def step_of(aim: AIM, context: Callable[[], AbstractContextManager[Any]]) -> Train:
    """A training step as trials take it: AIM's ``loss`` of its model, backward, and the optimizer's step."""

    def step(inputs: Any, labels: Any, **keywords: Any) -> None:
        aim.optimizer.zero_grad()
        with context():
            loss = aim.scoring.loss(aim.layout.read("", inputs, **keywords).call(aim.wrapped), labels)
        loss.backward()
        aim.optimizer.step()

    return step


def refuse_two_passes(aim: AIM | None, where: str) -> None:
    """Raises ValueError for a mixing of two passes a step, which ``where`` does not take."""
    if aim is not None and aim.mixing.two_passes:
        raise ValueError(
            f"mixing={aim.mixing.name!r} takes two passes a step by aim.backward(closure), and {where} takes its own "
            "steps; use mixing='alternate'"
        )


class Updates:
    """Calls ``aim.update(*samples())`` every so many epochs, also in a run that is resumed in mid-epoch."""

    @numbers_checked
    def __init__(self, samples: Samples | None, every_n_epochs: int, train: Train | None = None) -> None:
        check_at_least("every_n_epochs", every_n_epochs, 1)
        self.samples, self.every_n_epochs, self.train = samples, every_n_epochs, train
        self.accuracies: dict[str, float] = {}  # of the latest update's held-out samples, or of its others
        self.latest = -1  # epoch of the latest update
        self.inputs: Any = None  # of the latest update
        self.layers: list[str] = []  # those with running statistics that train; an evaluation's flags do not tell
        self._kept: Kept | None = None

    def at(self, epoch: int, aim: AIM | None, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> bool:
        """Whether this epoch's start brought an update. ``context``: around forward passes of steps that are tried."""
        if aim is None or self.samples is None or epoch % self.every_n_epochs or epoch == self.latest:
            return False
        inputs, labels, held_out = self.samples()
        device = next(aim.model.parameters()).device
        inputs, self.layers = moved(inputs, device), list(trained_layers(aim.model))
        self.inputs = inputs if self.layers else None
        labels, held_out = moved(labels, device), moved(held_out, device)
        aim.update(inputs, labels, held_out=held_out, train=self.train or step_of(aim, context))
        judged = held_out if held_out is not None else (inputs, labels)
        self.accuracies = {} if held_out is None and labels is None else unimodal_accuracies(aim, judged)
        self.latest = epoch
        return True

    def refresh(self, aim: AIM | None, *, for_good: bool = False) -> None:
        """Gives layers that keep running statistics those of the weights in the module, if training has degraded any.

        Estimated from the inputs of the latest update; in a resumed run before its first, from those of ``samples()``.
        ``for_good``: they stay, also where only earlier epochs saw degraded weights; else until :meth:`put_back`.
        """
        if aim is None or self.samples is None or self._kept is not None:
            return
        if not (aim.degrades or (for_good and any(table.dominant for table in aim.history))):
            return
        layers = self.layers or list(trained_layers(aim.model))
        if not layers:
            return
        if self.inputs is None:
            with probing(aim.model):  # for the random state
                self.inputs = moved(self.samples()[0], next(aim.model.parameters()).device)
        batches = batches_of(aim.layout.read("", self.inputs), aim.scoring.batch_size)
        if not batches:
            return
        kept = None if for_good else Kept(aim.model.get_submodule(name) for name in layers)
        refresh_statistics(aim.model, batches, layers=layers)
        self._kept = kept

    def put_back(self) -> None:
        """Gives layers the running statistics of training again."""
        if self._kept is not None:
            self._kept.restore()
            self._kept = None

    def state_dict(self, aim: AIM | None) -> dict[str, Any]:
        return {"latest": self.latest, "aim": None if aim is None else aim.state_dict()}

    def load_state_dict(self, state: dict[str, Any], aim: AIM | None) -> None:
        self.latest = int(state["latest"])
        if aim is not None and state["aim"] is not None:
            aim.load_state_dict(state["aim"])
