"""Numbers in fewer bits: the torch twin and every instruction set of the kernel against an oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle_packing as want
import pytest
import tolerances as tol
import torch

import aim_kernels as ak
from aim_kernels import _C
from aim_kernels.step import codecs
from aim_kernels.step.philox import rounding_bits

ISAS = [name for name, _, supported in _C.isas() if supported]
FORMATS = {"first": (want.FIRST, codecs.FIRST), "second": (want.SECOND, codecs.SECOND)}
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN on purpose

HUGE = float(np.finfo(np.float32).max)


def of_bits(bits: Any) -> np.ndarray:
    """float32 numbers of their bits."""
    return np.asarray(bits, np.uint32).view(np.float32)


def blocks(signed: bool) -> np.ndarray:
    """float32 numbers, 128 at a time: every exponent with all its neighbours, and the ends of the range."""
    random = np.random.default_rng(0)
    made = []
    for exponent in range(0, 256, 3):  # up to 40 powers of two below the greatest
        below = np.maximum(exponent - random.integers(0, 40, 128), 0)
        below[0] = exponent
        made.append(of_bits((below << 23) | random.integers(0, 1 << 23, 128)))
    for greatest in (0x0F, 0xF7, 0xF8, 0xF9):  # the top code, and what carries to the next exponent
        for exponent in (0, 6, 7, 14, 15, 16, 127, 253, 254):
            block = of_bits(random.integers(0, max(exponent, 1) << 23, 128))
            block[5] = of_bits((exponent << 23) | (greatest << 15) | (greatest == 0xF9))
            made.append(block)
    subnormal = of_bits(random.integers(0, 1 << 12, 128))
    zeros, huge, edge = np.zeros(128, np.float32), np.full(128, 1e-3, np.float32), of_bits(np.arange(128))
    huge[77] = 1e30
    made += [zeros, -zeros, subnormal, huge, edge]
    for odd in (np.inf, -np.inf, np.nan, HUGE, -HUGE):
        block = random.standard_normal(128).astype(np.float32)
        block[100] = odd
        made.append(block)
    made.append(random.standard_normal(37).astype(np.float32))  # not whole
    x = np.concatenate(made)
    if signed:
        return x * np.where(random.uniform(size=len(x)) < 0.5, np.float32(-1), np.float32(1))
    return np.abs(x)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal element by element, zeros by sign too, NaN where NaN."""
    assert found.shape == expected.shape
    nan = np.isnan(found) & np.isnan(expected)
    bad = np.flatnonzero(~(nan | ((found == expected) & (np.signbit(found) == np.signbit(expected)))))
    assert not len(bad), f"{len(bad)} differ; [{bad[0]}] is {found[bad[0]]!r}, not {expected[bad[0]]!r}"


def draws(count: int, seed: int = 1) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 1 << 16, count)
    bits[::7] = 0xFFFF
    bits[3::7] = 0
    return bits


# -- the torch twin --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_random", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_8_bits(name: str, at_random: bool) -> None:
    fmt, theirs = FORMATS[name]
    x = blocks(fmt.signed)
    random = draws(len(x)) if at_random else None
    codes, exponents = want.encode(x, fmt, random)
    drawn = None if random is None else torch.from_numpy(random).to(torch.int32)
    found, scales = codecs.encode(torch.from_numpy(x), theirs, drawn)
    same(scales.numpy(), exponents)
    same(found.numpy(), codes)
    values = want.decode(codes, exponents, fmt)
    same(codecs.decode(found, scales, theirs).double().numpy(), values)
    finite = np.repeat(exponents != 255, 128)[: len(x)]
    assert 5 < (~finite).sum() / 128 < 20  # blocks with something not finite, or nearly so
    # Either neighbour: an error of one step, half of one to nearest.
    step = np.maximum(np.abs(x), np.ldexp(1.0, np.repeat(exponents.astype(int), 128)[: len(x)] - 125 - fmt.binades))
    bound = (1.0 if at_random else 0.5) * step / 16
    assert np.all((np.abs(values - x) <= bound)[finite] | ((codes == 1) & (not fmt.signed))[finite])
    assert np.all((values != 0)[finite & (x != 0)]) or fmt.signed


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_its_documented_value_and_stays(name: str) -> None:
    """Read and stored again, with whatever bits: the value stays, and the code where the greatest code is in use."""
    fmt, theirs = FORMATS[name]
    for exponent in (fmt.binades - 1, fmt.binades, 100, 127, 200, 254):
        codes = np.arange(256).astype(np.uint8)
        exponents = np.full(2, exponent, np.uint8)
        if not fmt.signed:
            codes[5] = 255  # the first block has the greatest code, too
        values = codecs.decode(torch.from_numpy(codes), torch.from_numpy(exponents), theirs)
        same(values.double().numpy(), want.decode(codes, exponents, fmt))
        top, low = 2.0 ** (exponent - 127), 2.0 ** (exponent - 127 - fmt.binades + 2)
        assert values[127 if fmt.signed else 255] == 1.9375 * top and values[16] == low and values[1] == low / 16
        assert torch.equal(values.bfloat16().float(), values)
        for random in (None, 0, 0xFFFF):
            bits = None if random is None else torch.full((256,), random, dtype=torch.int32)
            again, scales = codecs.encode(values, theirs, bits)
            same(again.numpy(), codes)
            same(scales.numpy(), exponents)


def every_bfloat16_and_between() -> np.ndarray:
    """All upper halves, each with lower halves around the ties."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    return of_bits(np.concatenate([upper | lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]))


@pytest.mark.parametrize("at_random", [False, True])
def test_bfloat16(at_random: bool) -> None:
    x = every_bfloat16_and_between()
    random = draws(len(x)) if at_random else None
    drawn = None if random is None else torch.from_numpy(random).to(torch.int32)
    found = codecs.to_bfloat16(torch.from_numpy(x), drawn)
    same(found.double().numpy(), want.bfloat16(x.astype(np.float64), random))


def test_split_is_exact() -> None:
    x = every_bfloat16_and_between()
    upper, lower = codecs.split_bf16(torch.from_numpy(x))
    halves = np.array([want.split_bits(int(b)) for b in x.view(np.uint32)])
    # Of NaN the sign may not survive a conversion, so bits are compared as integers.
    assert np.array_equal(upper.view(torch.int16).numpy().view(np.uint16), halves[:, 0])
    assert np.array_equal(lower.numpy(), halves[:, 1])
    bits = codecs.join_bf16(upper, lower).numpy().view(np.uint32)
    quiet = np.where(np.isnan(x), x.view(np.uint32) | 0x400000, x.view(np.uint32))
    assert np.array_equal(bits, quiet)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compensation(dtype: torch.dtype) -> None:
    """The nearest number, and the nearest to the rest: the sum is off by a half unit of the rest."""
    random = np.random.default_rng(3)
    x = (random.standard_normal(40_000) * 10.0 ** random.uniform(-3, 3, 40_000)).astype(np.float32)
    x = np.concatenate([x, np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, HUGE, 65519.0, 65520.0])])
    kept, rest = codecs.compensated(torch.from_numpy(x), dtype)
    same(kept.double().numpy(), torch.from_numpy(x).to(dtype).double().numpy())
    finite = np.isfinite(kept.double().numpy())
    exact = x.astype(np.float64) - kept.double().numpy()
    same(rest.double().numpy()[finite], torch.from_numpy(exact[finite]).to(dtype).double().numpy())
    assert not rest[torch.from_numpy(~finite)].any()
    bits = 8 if dtype == torch.bfloat16 else 11
    whole = (kept.double() + rest.double()).numpy()[finite]
    least = 0.0 if dtype == torch.bfloat16 else 2.0**-25
    assert np.all(np.abs(whole - x[finite]) <= np.abs(x[finite]) * 2.0 ** (-2 * bits) + least)


# -- random bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [(0, 0, 2, 0, 0), (2**62 + 7, 9, 3, 5, 0), (1, 2**33 + 1, 2, 2**34 + 3, 250), (5, 1, 3, 7, 2**32 - 200)],
    ids=str,
)
def test_rounding_bits_are_the_documented_ones(at: tuple[int, ...]) -> None:
    found = rounding_bits(*at, 700)
    one_by_one = [want.rounding_bits(*at[:4], i) for i in range(at[4], at[4] + 700)]
    same(found.astype(np.int64), np.array(one_by_one))
    same(want.all_rounding_bits(*at, 700), np.array(one_by_one))


def test_rounding_bits_are_uniform() -> None:
    """Each bit a fair coin, and the 16 halves of a draw independent of each other (but for those that mirror)."""
    bits = rounding_bits(3, 4, 2, 0, 0, 1 << 18).reshape(-1, 2, 128)
    assert np.array_equal(bits[:, 0] + bits[:, 1], np.full((1024, 128), 0xFFFF))
    half = bits[:, 0].ravel()
    for shift in range(16):
        ones = (half >> shift & 1).mean()
        assert abs(ones - 0.5) < tol.SIGMAS * 0.5 / math.sqrt(half.size)
    centred = half.reshape(-1, 128) / 65535.0 - 0.5
    correlation = np.corrcoef(centred[:, :32].T) - np.eye(32)
    assert np.abs(correlation).max() < tol.SIGMAS / math.sqrt(1024)


@pytest.mark.parametrize("name", ["first", "second", "bfloat16"])
def test_random_rounding_is_right_on_average(name: str) -> None:
    count, trials = 128, 4096
    x = (np.abs(np.random.default_rng(4).standard_normal(count)) + 0.01).astype(np.float32)
    drawn = np.stack([rounding_bits(11, step, 2, 0, 0, count) for step in range(trials)])
    many = torch.from_numpy(np.tile(x, trials))
    bits = torch.from_numpy(drawn.ravel())
    if name == "bfloat16":
        kept = codecs.to_bfloat16(many, bits).double()
    else:
        kept = codecs.decode(*codecs.encode(many, FORMATS[name][1], bits), FORMATS[name][1]).double()
    found = kept.view(trials, count).numpy()
    step = found.max(0) - found.min(0)
    # A share p of the draws lies one step above the others.
    p = (x - found.min(0)) / np.where(step > 0, step, 1.0)
    error = np.abs(found.mean(0) - x)
    bound = tol.SIGMAS * step * np.sqrt(p * (1 - p) / trials) + step * 2.0**-16
    assert np.all(error <= bound + 1e-12) and (step > 0).sum() > 100


# -- the kernel ------------------------------------------------------------------------------------------------------


def stepped(p: torch.Tensor, grad: torch.Tensor, **options: Any) -> ak.AIMFusedOptimizer:
    optimizer = ak.AIMFusedOptimizer(
        [{"params": [p], "modulated": options.pop("modulated", True)}],
        **({"lr": 0.0, "weight_decay": 0.0, "backend": "cpu", "seed": 77} | options),
    )
    p.grad = grad
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("moments", ["bfloat16-nearest", "bfloat16-stochastic", "int8-stochastic"])
def test_the_kernel_stores_moments_so(moments: str, rule: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With betas of 0 the moments are the gradient and its square."""
    monkeypatch.setenv("AIM_KERNELS_ISA", isa)
    state_dtype, rounding = moments.split("-")
    grad = blocks(signed=True)
    if state_dtype == "bfloat16":
        grad = np.concatenate([grad, every_bfloat16_and_between()[::17]])
    with np.errstate(over="ignore", under="ignore"):
        square = grad * grad
    p = torch.zeros(len(grad), requires_grad=True)
    options = {"rule": rule, "betas": (0.0, 0.0), "state_dtype": state_dtype, "rounding": rounding}
    state = stepped(p, torch.from_numpy(grad), **options).state[p]
    bits = want.all_rounding_bits(77, 0, want.MOMENTS, 0, 0, len(grad)) if rounding == "stochastic" else None
    for name, x, how in (("exp_avg", grad, want.FIRST), ("exp_avg_sq", square, want.SECOND)):
        if state_dtype == "bfloat16":
            assert state[name].dtype == torch.bfloat16
            # 0 * m + 1 * g: a zero has lost its sign.
            same(np.abs(state[name].double().numpy()), np.abs(want.bfloat16(x.astype(np.float64), bits)))
            assert torch.equal(
                state[name].float().sign().nan_to_num(), torch.from_numpy(x).sign().nan_to_num() * (state[name] != 0)
            )
            continue
        codes, exponents = want.encode(x + np.float32(0), how, bits)
        same(state[f"{name}_scale"].numpy(), exponents)
        same(state[name].numpy(), codes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("master", ["stochastic", "split", "kahan", None])
def test_the_kernel_stores_weights_so(master: str | None, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD from bfloat16 weights with a learning rate of many bits: theta is one product and one difference."""
    monkeypatch.setenv("AIM_KERNELS_ISA", isa)
    random = np.random.default_rng(6)
    start = torch.from_numpy(every_bfloat16_and_between()[: 1 << 16]).bfloat16()
    grad = torch.from_numpy(random.standard_normal(1 << 16)).bfloat16() * start.abs().nan_to_num(posinf=1.0)
    p = start.clone().requires_grad_()
    lr = np.float32(0.0123456789)
    options = {"rule": "sgd", "lr": float(lr), "modulated": False, "master": master}
    state = stepped(p, grad, **options).state[p]
    with np.errstate(all="ignore"):
        # A weight and its compensation are a sum, of which the negative zero has no sign.
        theta = start.float().numpy() + np.float32(-0.0 if master != "kahan" else 0.0) - lr * grad.float().numpy()
    if master == "split":
        halves = np.array([want.split_bits(int(b)) for b in theta.view(np.uint32)])
        number = ~np.isnan(theta)  # a NaN has many bit patterns
        assert np.array_equal(p.detach().view(torch.int16).numpy().view(np.uint16)[number], halves[number, 0])
        assert np.array_equal(state["remainder"].numpy()[number], halves[number, 1])
        assert np.array_equal(p.detach().isnan().numpy(), ~number)
        return
    bits = want.all_rounding_bits(77, 0, want.WEIGHTS, 0, 0, len(theta)) if master == "stochastic" else None
    same(p.detach().double().numpy(), want.bfloat16(theta.astype(np.float64), bits))
    if master == "kahan":
        kept = p.detach().double().numpy()
        with np.errstate(invalid="ignore"):
            lost = np.where(np.isfinite(kept), theta - kept, 0.0)
        same(state["compensation"].double().numpy(), want.bfloat16(lost))
