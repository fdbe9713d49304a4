"""Every error of the public surface, raised before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import RULES, Gradients, assign, build, frozen, parameter, parameters_of, same_bits, set_row
from lockstep import Twin, run_twin

import aim_kernels as ak

AK = ak.AIMFusedOptimizer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"eps": -1e-8}, "eps"),
        ({"betas": (1.0, 0.9)}, "beta"),
        ({"betas": (0.9, 1.0)}, "beta"),
        ({"betas": (-0.1, 0.9)}, "beta"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"rule": "sgd", "momentum": -0.1}, "momentum"),
        ({"rule": "sgd", "nesterov": True}, "esterov"),
        ({"rule": "sgd", "nesterov": True, "momentum": 0.9, "dampening": 0.1}, "esterov"),
        ({"rule": "lamb"}, "lamb"),
        *(({"rule": "rmsprop", "alpha": alpha}, "alpha") for alpha in (-0.1, 1.0, 1.5, "high", None)),
        ({"rule": "adagrad", "lr_decay": -0.1}, "lr_decay"),
        ({"rule": "adagrad", "initial_accumulator_value": -1.0}, "initial_accumulator_value"),
        ({"rule": "rmsprop", "momentum": -0.5}, "momentum"),
        *(({"rule": rule, "amsgrad": True}, "amsgrad") for rule in ("sgd", "adagrad", "rmsprop", "lion")),
        *(({"rule": rule, "centered": True}, "centered") for rule in ("adamw", "adam", "sgd", "adagrad", "lion")),
        *(({"rule": rule, "decouple_lr": True}, "decouple_lr") for rule in ("adam", "sgd", "adagrad", "rmsprop")),
        *(({"rule": rule, "decouple_lr": True, "lr": 0.0}, "decouple_lr") for rule in ("adamw", "lion")),
        *(({"rule": rule, "nesterov": True}, "nesterov") for rule in ("adamw", "adam", "adagrad", "lion")),
        ({"rule": "rmsprop", "nesterov": True, "momentum": 0.9}, "nesterov"),
        ({"rule": "rmsprop", "dampening": 0.5, "momentum": 0.9}, "dampening"),
        ({"rule": "lion", "betas": (0.9, 1.0)}, "beta"),
        ({"backend": "quantum"}, "quantum"),
        ({"anchor": "moon"}, "moon"),
        ({"under_optimized": ("share", 0.1)}, "share"),
        ({"under_optimized": ("fraction", 1.5)}, "1.5"),
        ({"under_optimized": ("absolute", -0.5)}, "0.5"),
        ({"threshold_rate": -0.1}, "threshold_rate"),
        ({"unknown": 1}, "unknown"),
        *(
            ({"rule": "sgd", name: float("nan")}, name)
            for name in ("lr", "eps", "weight_decay", "momentum", "dampening", "threshold_rate")
        ),
        ({"betas": (float("nan"), 0.9)}, r"betas\[0\]"),
        ({"betas": (0.9, float("nan"))}, r"betas\[1\]"),
        ({"betas": 0.9}, "betas"),
        ({"lr": "fast"}, "lr"),
        ({"under_optimized": ("fraction", float("nan"))}, "under_optimized"),
        ({"under_optimized": 0.1}, "under_optimized"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        *(({"state_dtype": bad}, rf"state_dtype.*'int8'.*got {bad!r}") for bad in ("float16", "uint8", 8)),
        *(({"rounding": bad}, "rounding.*'stochastic', 'nearest'") for bad in ("up", None)),
        *(({"master": bad}, "master.*'split', 'float32', got") for bad in ("bfloat16", True)),
        ({"state_dtype": "int8", "rounding": "nearest"}, r"rounding.*8 bits.*leave it 'stochastic'"),
        *(({"ema_decay": bad}, "ema_decay") for bad in (1.0, -0.1, float("nan"), "slow")),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
        AK([parameter((3,))], **options)


NUMBERS = {
    "adamw": ("lr", "eps", "weight_decay", "betas"),
    "sgd": ("momentum", "dampening"),
    "adagrad": ("lr_decay", "initial_accumulator_value"),
    "rmsprop": ("alpha", "momentum"),
    "lion": ("lr", "weight_decay", "betas"),
}


@pytest.mark.parametrize(("rule", "option"), [(rule, option) for rule in NUMBERS for option in NUMBERS[rule]])
def test_options_that_are_not_a_number(rule: str, option: str) -> None:
    """In the constructor, in a group, in a checkpoint."""
    nan: Any = float("nan")
    for bad in [(nan, 0.9), (0.9, nan)] if option == "betas" else [nan]:
        with pytest.raises(ValueError, match=option):
            AK([parameter((3,))], rule=rule, **{option: bad})
        with pytest.raises(ValueError, match=rf"{option}.*group 1"):
            AK([{"params": [parameter((3,))]}, {"params": [parameter((2,))], "rule": rule, option: bad}])
        optimizer = AK([parameter((3,))], rule=rule, backend="cpu")
        saved = optimizer.state_dict()
        saved["param_groups"][0][option] = bad
        before = {**optimizer.param_groups[0]}
        with pytest.raises(ValueError, match=option):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0] == before


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"eps": -1.0}, {"betas": (0.9, 1.5)}, {"weight_decay": -1.0}, {"alpha": 1.0}], ids=str
)
def test_options_of_a_group(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))[:4]):
        AK([{"params": [parameter((3,))], **bad}])
    optimizer = AK([parameter((3,))])
    with pytest.raises(ValueError, match=next(iter(bad))[:4]):
        optimizer.add_param_group({"params": [parameter((2,))], **bad})
    assert len(optimizer.param_groups) == 1 and optimizer.tables.rows.shape[0] == 1


def test_repeated_parameters() -> None:
    p, q = parameter((3,)), parameter((2,))
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*more than once"):
        AK([p, p])
    with pytest.raises(ValueError, match=r"'w' .parameter 0 of group 1.*group 0"):
        AK([{"params": [("v", p), ("b", q)]}, {"params": [("w", p)]}])
    optimizer = AK([p])
    before = optimizer.tables.rows.clone()
    with pytest.raises(ValueError, match=r"parameter 1 of group 1.*group 0"):
        optimizer.add_param_group({"params": [q, p]})
    assert len(optimizer.param_groups) == 1
    same_bits(before, optimizer.tables.rows)


def test_parameters_that_cannot_be_stepped() -> None:
    with pytest.raises(ValueError, match="complex"):
        AK([torch.zeros(3, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises((TypeError, ValueError), match="meta"):
        AK([torch.zeros(3, device="meta", requires_grad=True)])
    with pytest.raises(ValueError, match="leaf"):
        AK([parameter((3,)) * 2])
    with pytest.raises(ValueError, match="empty"):
        AK([])


def wrong_shape(p: torch.Tensor) -> torch.Tensor:
    return torch.ones(p.numel() + 1)


def sparse(p: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(p).detach().to_sparse()


def complex_values(p: torch.Tensor) -> torch.Tensor:
    return torch.ones(p.shape, dtype=torch.complex64)


def other_precision(p: torch.Tensor) -> torch.Tensor:
    return torch.ones(p.shape, dtype=torch.float64)


def transposed_shape(p: torch.Tensor) -> torch.Tensor:
    return torch.ones(tuple(reversed(p.shape)))


def forced(p: torch.Tensor, grad: torch.Tensor) -> bool:
    """Puts a gradient there that torch's own setter refuses, by giving the parameter its shape for a moment."""
    original = p.data
    try:
        if grad.dtype != p.dtype:
            p.grad_dtype = None
        if grad.shape != p.shape:
            p.grad = None
            p.data = torch.zeros(grad.shape)
        p.grad = grad
    except (RuntimeError, TypeError, AttributeError):
        return False
    finally:
        p.data = original
    return True


@pytest.mark.parametrize("make", [wrong_shape, sparse, complex_values, other_precision, transposed_shape])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("running", [False, True])
def test_bad_gradients_change_nothing(
    make: Callable[[torch.Tensor], torch.Tensor], backend: str, running: bool
) -> None:
    """The bad gradient is the last of the last group, so that a half-made step would show."""
    optimizer = build("adamw", (((4, 3), (5,)), ((2, 6), (3, 2))), backend=backend)
    set_row(optimizer, 0, "all")
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    if running:
        for _ in range(3):
            assign(params, gradients())
            optimizer.step()
    assign(params, gradients())
    if not forced(params[-1], make(params[-1])):
        pytest.skip(f"torch {torch.__version__} lets nobody set a gradient like {make.__name__}")
    before, versions = frozen(optimizer), [p._version for p in params]
    with pytest.raises(
        (RuntimeError, ValueError, TypeError),
        match=r"parameter 1 of group 1.*(sparse|complex|shape|device|meta|float64)",
    ):
        optimizer.step()
    after = frozen(optimizer)
    if not running:  # states may have been created; they must not have been stepped
        assert all(not s or float(s["step"]) == 0 for s in after["state"])
        before["state"] = after["state"] = []
    same_bits(before, after)
    assert versions == [p._version for p in params]
    assign(params, gradients())
    optimizer.step()


def test_error_names_the_parameter() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    optimizer = AK(model.named_parameters(), backend="cpu")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[1].bias.grad = torch.zeros(2).to_sparse()
    with pytest.raises(RuntimeError, match=r"1\.bias"):
        optimizer.step()


@pytest.mark.parametrize("kappa", [-0.1, 1.0, 1.5, float("nan")])
def test_strength_outside_its_range(kappa: float) -> None:
    optimizer = build()
    before = optimizer.tables.rows.clone()
    with pytest.raises(ValueError, match="kappa"):
        optimizer.set_strength("audio", 0, kappa)
    same_bits(before, optimizer.tables.rows)


def test_blocks_columns_and_groups_that_do_not_exist() -> None:
    optimizer = build()
    before = optimizer.tables.rows.clone()
    for modality, depth in (("video", 0), ("audio", 1), ("audio", -1)):
        with pytest.raises((KeyError, ValueError, IndexError), match=f"{modality}|{depth}"):
            optimizer.set_strength(modality, depth, 0.5)
        with pytest.raises((KeyError, ValueError, IndexError), match=f"{modality}|{depth}"):
            optimizer.set_modulation((modality, depth), live_well=0.5)
    with pytest.raises((ValueError, TypeError), match=r"coefficients|bend"):
        optimizer.set_strength("audio", 0, 0.5, coefficients="bend")
    with pytest.raises((ValueError, TypeError, KeyError), match="live_middle"):
        optimizer.set_modulation(0, live_well=0.5, live_middle=0.5)
    with pytest.raises((ValueError, IndexError, KeyError), match="1"):
        optimizer.set_modulation(1, live_well=0.5)
    same_bits(before, optimizer.tables.rows)


def test_groups_without_classes_refuse_rows_that_split() -> None:
    for rule in ("sgd", "sgd-momentum", "adagrad", "rmsprop", "lion"):
        optimizer = build(rule, modulated=False)
        before = optimizer.tables.rows.clone()
        for columns in ({"grad_well": 0.5}, {"step_under": 0.5}, {"live_well": 0.5}):
            with pytest.raises(ValueError, match=r"modulated|class"):
                optimizer.set_modulation(0, **columns)
        same_bits(before, optimizer.tables.rows)
        optimizer.set_modulation(0, grad_under=0.5, grad_well=0.5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", float("nan")),
        ("lr", "fast"),
        ("lr", None),
        ("eps", float("nan")),
        ("betas", 0.9),
        ("betas", (0.9,)),
        ("betas", ("a", "b")),
        ("weight_decay", None),
        ("momentum", float("nan")),
        ("rule", "lamb"),
        ("under_optimized", None),
        ("threshold_rate", -1.0),
    ],
    ids=str,
)
def test_options_spoiled_in_mid_run_are_named(option: str, value: Any) -> None:
    """By whatever writes to param_groups, in the second of two groups: nothing of the first was stepped."""
    optimizer = build("sgd-momentum", (((4,),), ((3,),)))
    set_row(optimizer, 0, "all")
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    for _ in range(2):
        assign(params, gradients())
        optimizer.step()
    good = optimizer.param_groups[1][option]
    optimizer.param_groups[1][option] = value
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=rf"{option}.*\(group 1\)"):
        optimizer.step()
    same_bits(before, frozen(optimizer))
    optimizer.param_groups[1][option] = good
    optimizer.step()


@pytest.mark.parametrize("rule", ["adam", "amsgrad", "rmsprop-centered", "rmsprop-momentum"])
def test_groups_that_keep_both_moments_take_rows_that_split(rule: str) -> None:
    optimizer = build(rule, modulated=False)
    optimizer.set_modulation(0, grad_well=0.5, step_under=0.5, live_well=0.5)
    run_twin(Twin(optimizer, RULES[rule]["rule"]), Gradients(parameters_of(optimizer)), 3)


def test_explicit_backend_that_cannot_be_met() -> None:
    with pytest.raises((RuntimeError, ValueError), match="cuda"):
        AK([parameter((3,))], backend="cuda")


def test_step_in_eval_mode_with_masters() -> None:
    optimizer = build()
    set_row(optimizer, 0, "chain")
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    assign(params, gradients())
    optimizer.step()
    optimizer.eval()
    before = frozen(optimizer)
    with pytest.raises(RuntimeError, match=r"train\(\)|eval"):
        optimizer.step()
    same_bits(before, frozen(optimizer))
    optimizer.train()
    optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "options", "words"),
    [
        ("float64", {"state_dtype": "int8"}, "state_dtype='int8'.*float64.*state_dtype=None"),
        ("float64", {"state_dtype": "bfloat16"}, "state_dtype='bfloat16'.*float64"),
        ("float16", {"master": "split"}, "master='split'.*float16.*'kahan' or 'float32'"),
        ("float16", {"master": "stochastic"}, "master='stochastic'.*float16"),
    ],
    ids=str,
)
def test_fewer_bytes_that_a_parameter_cannot_have(dtype: str, options: dict[str, Any], words: str) -> None:
    """In the constructor, for the default and for a group; and when an option changes between steps."""
    good, bad = parameter((3,)), parameter((2,), dtype)
    for groups, common in (
        ([{"params": [good]}, {"params": [("head", bad)]}], options),
        ([{"params": [good]}, {"params": [("head", bad)], **options}], {}),
    ):
        with pytest.raises(ValueError, match=rf"'head' \(parameter 0 of group 1\).*{words}"):
            AK([dict(group) for group in groups], **common)
    optimizer = AK([good, bad], backend="cpu")
    grads = [torch.ones_like(p) for p in (good, bad)]
    assign([good, bad], grads)
    optimizer.step()
    before = frozen(optimizer)
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=rf"parameter 1 of group 0.*{words}"):
        optimizer.step()
    same_bits(before, frozen(optimizer))


def test_cleared_gradients_are_of_the_whole() -> None:
    with pytest.raises(ValueError, match=r"zero_grad_in_step \(group 0\).*optimizer as a whole"):
        AK([{"params": [parameter((3,))], "zero_grad_in_step": True}])
