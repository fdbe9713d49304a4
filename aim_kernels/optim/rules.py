"""``AdamW``, ``Adam``, ``SGD``, ``Adagrad``, ``RMSprop`` and ``Lion``: one rule each, with the signature and the
defaults that ``torch.optim`` has for it (Lion: those of its paper).

Each is an ``AIMFusedOptimizer`` of one rule, and takes its other options by keyword. One that the rule does not know is
refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, TypedDict, Unpack

from torch import Tensor

from aim_kernels.optim.optimizer import AIMFusedOptimizer
from aim_kernels.step.validation import check_flag

Params = Iterable[Any]
Betas = tuple[float | Tensor, float | Tensor]


class Options(TypedDict, total=False):
    """Options of ``AIMFusedOptimizer`` that every rule knows, and torch.optim has not."""

    state_dtype: str | None
    rounding: str
    master: str | None
    ema_decay: float | None
    under_optimized: tuple[str, float]
    measure: str
    threshold_rate: float
    anchor: str
    backend: str
    seed: int
    fused_scaling: bool
    max_grad_norm: float | None
    process_group: Any
    sync_every: int
    keep_masters: bool
    zero_grad_in_step: bool


class DecoupledOptions(Options, total=False):
    """Options of rules whose weight decay is decoupled from the gradient."""

    decouple_lr: bool


class LionOptions(DecoupledOptions, total=False):
    """Options of Lion, which has an ``eps`` for its classes of elements only."""

    eps: float


class BetasOptions(Options, total=False):
    """Options of rules without ``betas``, which ``modulated`` groups need for their classes of elements."""

    betas: Betas


class SGDOptions(BetasOptions, total=False):
    """Options of SGD, which has neither ``betas`` nor ``eps``."""

    eps: float


def _known(made: type, options: Any, known: Any) -> dict[str, Any]:
    """The options that were given beyond the signature. Raises TypeError on the first that the class does not have."""
    for option in options:
        if option not in known.__optional_keys__:
            raise TypeError(
                f"{option}: {made.__name__} has no such option; leave it out. Beside its arguments it has "
                f"{', '.join(sorted(known.__optional_keys__))}"
            )
    return dict(options)


class _OneRule(AIMFusedOptimizer):
    """An optimizer whose groups are of one rule."""

    def _rule_of(self, param_group: dict[str, Any], number: int, rule: str) -> str:
        if param_group.get("rule", rule) != rule:
            raise ValueError(
                f"rule (group {number}): {type(self).__name__} steps it by rule {rule!r}, got {param_group['rule']!r}; "
                "use AIMFusedOptimizer, whose groups may have different rules"
            )
        return rule


class _AdamLike(_OneRule):
    """What torch.optim says of Adam and AdamW in ``decoupled_weight_decay``, which may stand in a group as well."""

    _always_decoupled: ClassVar[bool] = False

    def _rule_of(self, param_group: dict[str, Any], number: int, rule: str) -> str:
        given = param_group.get("decoupled_weight_decay", rule == "adamw")
        decoupled = check_flag(f"decoupled_weight_decay (group {number})", given)
        if self._always_decoupled and not decoupled:
            raise ValueError(
                f"decoupled_weight_decay (group {number}): AdamW decouples the decay of all groups; use Adam, whose "
                "groups may choose"
            )
        return super()._rule_of(param_group, number, "adamw" if decoupled else "adam")

    def _completed(self, param_group: dict[str, Any], number: int) -> dict[str, Any]:
        complete = super()._completed(param_group, number)
        if complete["rule"] == "adamw":  # for torch.optim.Adam, which reads it in a checkpoint
            complete["decoupled_weight_decay"] = True
        return complete


class AdamW(_AdamLike):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with the signature of ``torch.optim.AdamW``.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in ``torch.optim.AdamW``.
        foreach, capturable, differentiable, fused: taken if they ask for what is so anyway, refused if not.
        options: ``decouple_lr`` and the options of :class:`AIMFusedOptimizer` that every rule has, in
            :class:`Options`.

    Raises:
        ValueError, TypeError: options or parameters that a step cannot work with, by name.
    """

    _always_decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[DecoupledOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            rule="adamw",
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **_known(AdamW, options, DecoupledOptions),
        )


class Adam(_AdamLike):
    """Adam (Kingma and Ba, arXiv 1412.6980) with the signature of ``torch.optim.Adam``.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in ``torch.optim.Adam``.
        foreach, capturable, differentiable, fused: taken if they ask for what is so anyway, refused if not.
        decoupled_weight_decay: makes it AdamW, whose decay is no part of the gradient; also by group.
        options: the options of :class:`AIMFusedOptimizer` that every rule has, in :class:`Options`; and
            ``decouple_lr`` with ``decoupled_weight_decay=True``.

    Raises:
        ValueError, TypeError: options or parameters that a step cannot work with, by name.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[DecoupledOptions],
    ) -> None:
        decoupled = check_flag("decoupled_weight_decay", decoupled_weight_decay)
        super().__init__(
            params,
            lr,
            rule="adamw" if decoupled else "adam",
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **_known(Adam, options, DecoupledOptions),
        )


class SGD(_OneRule):
    """Stochastic gradient descent, with or without momentum, with the signature of ``torch.optim.SGD``.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        foreach, differentiable, fused: taken if they ask for what is so anyway, refused if not.
        options: ``betas`` and ``eps`` of ``modulated`` groups, and the options of :class:`AIMFusedOptimizer` that
            every rule has, in :class:`Options`.

    Raises:
        ValueError, TypeError: options or parameters that a step cannot work with, by name.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[SGDOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            rule="sgd",
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            **_known(SGD, options, SGDOptions),
        )


class Adagrad(_OneRule):
    """Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011) with the signature of ``torch.optim.Adagrad``.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as in ``torch.optim.Adagrad``.
        foreach, differentiable, fused: taken if they ask for what is so anyway, refused if not.
        options: ``betas`` of ``modulated`` groups, and the options of :class:`AIMFusedOptimizer` that every rule has,
            in :class:`Options`.

    Raises:
        ValueError, TypeError: options or parameters that a step cannot work with, by name.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[BetasOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            rule="adagrad",
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
            **_known(Adagrad, options, BetasOptions),
        )


class RMSprop(_OneRule):
    """RMSprop (Tieleman and Hinton, 2012) with the signature of ``torch.optim.RMSprop``.

    Args:
        params, lr, alpha, eps, weight_decay, momentum, centered, maximize: as in ``torch.optim.RMSprop``.
        capturable, foreach, differentiable: taken if they ask for what is so anyway, refused if not.
        options: ``betas`` of ``modulated`` groups, and the options of :class:`AIMFusedOptimizer` that every rule has,
            in :class:`Options`.

    Raises:
        ValueError, TypeError: options or parameters that a step cannot work with, by name.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[BetasOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            rule="rmsprop",
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            **_known(RMSprop, options, BetasOptions),
        )


class Lion(_OneRule):
    """Lion (Chen et al., arXiv 2302.06675, Algorithm 2) with the signature of its authors' implementation.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or groups.
        lr: learning rate, a number or a one-element tensor.
        betas: decay rates of the direction and of the moment.
        weight_decay: decoupled from the gradient.
        maximize: ascends instead of descending.
        foreach, capturable, differentiable, fused: of torch.optim: taken if they ask for what is so anyway, refused if
            not.
        options: ``decouple_lr``, ``eps`` of ``modulated`` groups, and the options of :class:`AIMFusedOptimizer` that
            every rule has, in :class:`Options`.

    Raises:
        ValueError, TypeError: options or parameters that a step cannot work with, by name.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[LionOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            rule="lion",
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **_known(Lion, options, LionOptions),
        )
