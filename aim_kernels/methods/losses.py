"""Losses that methods train with: which are of class numbers, and whether labels are what a method needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aim_kernels.step import validation

#: ``loss(logits, labels) -> scalar``, of what the model returns and of labels of any kind.
Loss = Callable[[Any, Any], Tensor]

#: Names of the methods whose formulas need losses and gradients only.
TAKE_ANY_LOSS = (
    "joint",
    "aim",
    "mmpareto",
    "sam",
    "m-sam",
    "mla",
    "drop",
    "feature-scale",
    "no-mask",
    "sum-of-losses",
    "train-on-held",
    "best-subset",
    "modality-dropout",
    "weight-averaging",
)
#: What ``ignore_index`` is by torch's default.
IGNORED = -100

_FUNCTIONS: tuple[Any, ...] = (
    nn.functional.cross_entropy,
    nn.functional.nll_loss,
    nn.functional.multi_margin_loss,
)
_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)


def of_classes(loss: Loss) -> bool | None:
    """Whether a loss is of class numbers: True or False of those of torch, also in ``functools.partial``; None of
    others, of which nobody knows."""
    function: Any = loss
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, _MODULES) or any(function is each for each in _FUNCTIONS):
        return True
    known = isinstance(function, nn.modules.loss._Loss) or getattr(function, "__module__", "") == "torch.nn.functional"
    return False if known or isinstance(function, nn.CosineSimilarity) else None


def ignored_label(loss: Loss) -> int:
    """``ignore_index`` of a loss: that of its object or of its ``functools.partial``, else torch's default."""
    function: Any = loss
    while isinstance(function, functools.partial):
        if "ignore_index" in function.keywords:
            return int(function.keywords["ignore_index"])
        function = function.func
    found = getattr(function, "ignore_index", IGNORED)
    return found if isinstance(found, int) else IGNORED


def name_of(loss: Loss) -> str:
    """What a message calls a loss."""
    function: Any = loss
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__name__))


def refuse_other_losses(method: str, needs: str, loss: Loss) -> None:
    """Raises ValueError for a loss of torch that is not of class numbers. ``needs``: what of."""
    if of_classes(loss) is False:
        raise ValueError(
            f"{method} needs {needs}, which loss={name_of(loss)} has not; use a loss of class numbers [B] and logits "
            f"[B, K], or a method that takes any loss: {', '.join(TAKE_ANY_LOSS)}"
        )


def check_numbers(why: str, labels: Any, *, flat: bool, what: str = "") -> None:
    """Raises ValueError for labels that are no class numbers: int64, ``[B]`` if ``flat``, without waiting for the
    device. ``why``: the beginning of the message."""
    shape = "[B]" if flat else "[B] or [B, ...]"
    if isinstance(labels, Tensor) and labels.dtype == torch.int64 and (labels.dim() == 1 if flat else labels.dim()):
        return
    got = (
        f"{str(labels.dtype).removeprefix('torch.')} of shape {list(labels.shape)}"
        if isinstance(labels, Tensor)
        else type(labels).__name__
    )
    if flat:
        do = f"use a method that takes any loss=: {', '.join(TAKE_ANY_LOSS)}"
    else:
        do = "give loss=, called as loss(logits, labels), for labels of another kind"
    raise ValueError(f"{why}, so {what}labels must be class numbers, int64 of shape {shape}; got {got}. {do}")


def check_logits(why: str, logits: Any, labels: Tensor, ignored: int, *, flat: bool) -> None:
    """Raises ValueError for logits that are not ``[B, K, ...]`` beside labels ``[B, ...]``, and for numbers beyond
    K, if labels are in the host's memory."""
    fits = isinstance(logits, Tensor) and logits.dim() == 1 + labels.dim() and (logits.dim() == 2 or not flat)
    if not fits or logits.shape[:1] + logits.shape[2:] != labels.shape:
        got = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"{why}, so the model must return logits [B, K{'' if flat else ', ...'}]; it returns {got} beside labels "
            f"of shape {list(labels.shape)}. Methods that take any loss=: {', '.join(TAKE_ANY_LOSS)}"
        )
    refuse_one_class(why, logits)
    classes = logits.shape[1]
    if labels.numel() and labels.device.type == "cpu" and not validation.on_device(labels):
        low, high = (int(x) for x in labels.aminmax())
        if low >= 0 and high < classes:
            return
        valid = labels[labels != ignored]
        if valid.numel() and not (int(valid.min()) >= 0 and int(valid.max()) < classes):
            raise ValueError(
                f"labels range from {int(valid.min())} to {int(valid.max())}, and the model returns {classes} logits; "
                "labels to be left out are those of the loss's ignore_index"
            )


def refuse_one_class(why: str, logits: Any) -> None:
    """Raises ValueError for one logit a sample, of which cross entropy is always 0."""
    if isinstance(logits, Tensor) and logits.dim() > 1 and logits.shape[1] == 1:
        raise ValueError(
            f"{why}, and of one logit a sample cross entropy is always 0; give loss=, such as "
            "torch.nn.functional.mse_loss or binary_cross_entropy_with_logits"
        )
