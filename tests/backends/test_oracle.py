"""The oracle itself: known answers, and torch.optim in float64 as its peer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
import tolerances as tol
import torch

KNOWN = [  # Random123's kat_vectors for philox4x32-10: counter, key, output
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

PEERS = {
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "adamw-amsgrad": (torch.optim.AdamW, {"betas": (0.8, 0.6), "eps": 1e-6, "amsgrad": True}),
    "adam-amsgrad": (torch.optim.Adam, {"betas": (0.8, 0.6), "eps": 1e-6, "amsgrad": True}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-6}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-6}),
    "rmsprop-momentum": (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-6, "momentum": 0.7}),
    "rmsprop-centered": (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-6, "centered": True}),
    "rmsprop-both": (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-6, "centered": True, "momentum": 0.7}),
}
NEUTRAL = dict.fromkeys(oracle.COLUMNS, 1.0) | {"noise": 0.0, "tau": 0.0, "tau_prev": 0.0}


def hyper_of(rule: str, options: dict[str, Any]) -> oracle.Hyper:
    """Options as torch.optim takes them."""
    names = {"initial_accumulator_value": "initial"}
    options = {names.get(name, name): value for name, value in options.items()}
    beta1, beta2 = options.pop("betas", (0.9, 0.999))
    return oracle.Hyper(rule=rule, beta1=beta1, beta2=beta2, **options)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    assert oracle.philox(key, counter).reshape(4).tolist() == list(words)


def test_normals_are_normal() -> None:
    z, _ = oracle.normals(seed=3, counter=11, first=2, count=400_000)
    n = z.size
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    shifted, _ = oracle.normals(seed=3, counter=11, first=7, count=100)
    assert np.array_equal(shifted, z[5:105])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_rounds_as_torch_does(dtype: str) -> None:
    random = np.random.default_rng(0)
    values = (random.standard_normal(20_000) * 10.0 ** random.uniform(-9, 6, 20_000)).astype(np.float32)
    edges = np.float32(
        [0.0, -0.0, 65504, 65519.996, 65520, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 1 + 2.0**-9, 1 + 3 * 2.0**-9, np.inf]
    )
    values = np.concatenate([values, edges, -edges])
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).to(torch.float64).numpy()
    assert np.array_equal(oracle.narrow(values.astype(np.float64), dtype), expected)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("peer", PEERS)
def test_row_of_ones_is_torch_in_float64(peer: str, maximize: bool) -> None:
    make, options = PEERS[peer]
    random = np.random.default_rng(5)
    start = random.standard_normal(50)
    p = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = make([p], lr=0.03, weight_decay=0.1, maximize=maximize, foreach=False, **options)
    hyper = hyper_of(peer.split("-")[0], {"lr": 0.03, "weight_decay": 0.1, "maximize": maximize} | options)
    leaf = oracle.Leaf(start.copy(), "float64", 0)
    model = oracle.Oracle([oracle.Block(hyper, dict(NEUTRAL), [leaf])])
    for number in range(20):
        # Shrinking, so that AMSGrad's maximum is not just the latest second moment.
        grad = random.standard_normal(50) * 0.8**number
        p.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        model.step([[grad]])
        np.testing.assert_allclose(leaf.theta, p.detach().numpy(), rtol=1e-12, atol=1e-14)
    for name, third in (("max_exp_avg_sq", leaf.w), ("momentum_buffer", leaf.w if "rmsprop" in peer else None)):
        if third is not None and optimizer.state[p].get(name) is not None:
            np.testing.assert_allclose(third, optimizer.state[p][name].numpy(), rtol=1e-12, atol=1e-15)
    assert leaf.live is None and leaf.t == 20 and model.counter == 20
    assert np.all(leaf.e_theta < 1e-12)


def block(
    moments: tuple[list[float], list[float]], t: int, tau: float
) -> tuple[oracle.Oracle, oracle.Leaf, oracle.Hyper]:
    hyper = oracle.Hyper(rule="adam", lr=0.1)
    m, v = (np.asarray(x, dtype=np.float64) for x in moments)
    leaf = oracle.Leaf(np.ones_like(m), "float32", 0, t=t, m=m, v=v)
    return oracle.Oracle([]), leaf, hyper


def test_class_is_the_ratio_of_the_design() -> None:
    random = np.random.default_rng(2)
    m, v, t, tau = random.standard_normal(1000) * 0.1, random.uniform(0, 0.01, 1000), 7, 0.4
    model, leaf, hyper = block((m, v), t, tau)
    under, tie = model._class(hyper, leaf, t, tau)
    m_hat, v_hat = m / (1 - hyper.beta1**t), v / (1 - hyper.beta2**t)
    ratio = m_hat**2 / (v_hat + hyper.eps**2)
    assert np.array_equal(under[~tie], (ratio >= tau**2)[~tie]) and 0 < under.sum() < 1000
    assert tie.sum() <= 1 and model.decisions == 1000


def test_near_ties_are_seen_and_follow_the_observation() -> None:
    hyper = oracle.Hyper(rule="adam", lr=0.1)
    tau, t = 0.5, 3
    b, bc2 = 1 - hyper.beta1**t, 1 - hyper.beta2**t
    v = np.array([0.01, 0.01, 0.01])
    m = np.sqrt(tau**2 * b**2 * (v / bc2 + hyper.eps**2)) * np.array([1.0, 1.0 + 1e-3, 1.0 - 1e-3])
    model, leaf, _ = block((m, v), t, tau)
    under, tie = model._class(hyper, leaf, t, tau)
    assert tie.tolist() == [True, False, False] and under.tolist()[1:] == [True, False] and model.ties == 1


def test_buffer_weight_is_what_a_constant_gradient_accumulates() -> None:
    for mu, dampening in ((0.9, 0.0), (0.7, 0.4), (0.5, 1.0)):
        buffer = 1.0
        for t in range(1, 12):
            hyper = oracle.Hyper(rule="sgd", lr=1.0, momentum=mu, dampening=dampening, modulated=True)
            assert oracle.first_weight(hyper, t) == pytest.approx(buffer, rel=1e-12)
            buffer = mu * buffer + (1 - dampening)


def sign(x: float) -> int:
    return int(x > 0) - int(x < 0)


@pytest.mark.parametrize("decouple_lr", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("rule", ["lion", "adamw"])
def test_what_torch_does_not_have(rule: str, maximize: bool, decouple_lr: bool) -> None:
    """Lion (arXiv 2302.06675, algorithm 2) and a decay that follows the schedule, an element at a time."""
    random = np.random.default_rng(6)
    start = random.standard_normal(30)
    hyper = oracle.Hyper(
        rule=rule, lr=0.02, beta1=0.8, beta2=0.95, weight_decay=0.1, maximize=maximize, decouple_lr=decouple_lr
    )
    hyper.reference_lr = 0.02
    leaf = oracle.Leaf(start.copy(), "float64", 0)
    model = oracle.Oracle([oracle.Block(hyper, dict(NEUTRAL), [leaf])])
    thetas, ms, vs = list(start), [0.0] * 30, [0.0] * 30
    for t in range(1, 16):
        hyper.lr = 0.02 / t  # a schedule
        grad = random.standard_normal(30) * (random.uniform(size=30) > 0.1)
        model.step([[grad]])
        for i, g in enumerate(-grad if maximize else grad):
            share = 0.1 * (1 / t) if decouple_lr else 0.1 * 0.02 / t
            thetas[i] -= share * thetas[i]
            if rule == "lion":
                thetas[i] -= 0.02 / t * sign(0.8 * ms[i] + 0.2 * g)
                ms[i] = 0.95 * ms[i] + 0.05 * g
            else:
                ms[i], vs[i] = 0.8 * ms[i] + 0.2 * g, 0.95 * vs[i] + 0.05 * g * g
                m_hat, v_hat = ms[i] / (1 - 0.8**t), vs[i] / (1 - 0.95**t)
                thetas[i] -= 0.02 / t * m_hat / (math.sqrt(v_hat) + 1e-8)
        np.testing.assert_allclose(leaf.theta, thetas, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(leaf.m, ms, rtol=1e-12, atol=1e-14)
    assert model.ties == 0


def test_signs_of_near_ties_follow_the_observation() -> None:
    """The mean of momentum and gradient cancels: three outcomes are right, and zeros are exact."""
    hyper = oracle.Hyper(rule="lion", lr=0.1, beta1=0.75, beta2=0.5)
    m = np.array([1.0, 1.0, 1.0, 0.0, 1.0])
    grad = np.array([-3.0, -3.0, -3.0, 0.0, -3.0 + 1e-5])
    start = np.ones(5)
    for moves in ([0.1, -0.1, 0.0, 0.1, 0.1], [0.0, 0.0, 0.0, -0.1, -0.1]):
        leaf = oracle.Leaf(start.copy(), "float32", 0, t=3, m=m.copy())
        model = oracle.Oracle([oracle.Block(hyper, dict(NEUTRAL), [leaf])])
        seen = oracle.Observed(start - np.array(moves), None, None)
        model.step([[grad]], [[seen]])
        assert model.ties == 3
        np.testing.assert_allclose(leaf.theta, start - np.array([*moves[:3], 0.0, 0.1]))
        assert np.all(leaf.e_theta < 1e-6)


def test_class_weights_of_the_rules() -> None:
    """``b`` and ``bc2`` are what gradients of one accumulate in the two moments."""
    cases = [
        {"rule": "adagrad", "beta1": 0.8},
        {"rule": "rmsprop", "beta1": 0.8, "alpha": 0.9},
        {"rule": "rmsprop", "alpha": 0.9, "centered": True},
        {"rule": "rmsprop", "alpha": 0.9, "centered": True, "momentum": 0.5},
        {"rule": "lion", "beta1": 0.8, "beta2": 0.95},
        {"rule": "adam", "beta1": 0.8, "beta2": 0.95, "amsgrad": True},
    ]
    for options in cases:
        hyper = oracle.Hyper(lr=0.01, modulated=True, **options)
        leaf = oracle.Leaf(np.ones(1), "float64", 0)
        model = oracle.Oracle([oracle.Block(hyper, dict(NEUTRAL), [leaf])])
        for t in range(1, 8):
            model.step([[np.ones(1)]])
            assert leaf.m[0] == pytest.approx(oracle.first_weight(hyper, t), rel=1e-12)
            assert leaf.v[0] == pytest.approx(oracle.second_weight(hyper, t), rel=1e-12)


def float32_step(rule: str, h: oracle.Hyper, theta: Any, m: Any, v: Any, w: Any, g: Any) -> tuple[Any, ...]:
    """The fifth step of a rule in numpy float32, in an order of operations like torch's."""
    f = np.float32
    if rule == "lion":
        mean = f(h.beta1) * m + f(1 - h.beta1) * g
        m = f(h.beta2) * m + f(1 - h.beta2) * g
        return theta * f(1 - h.lr * h.weight_decay) - f(h.lr) * np.sign(mean), m, v, w
    if rule in ("adamw", "adagrad", "rmsprop"):
        g = g if rule == "adamw" else g + f(h.weight_decay) * theta
    if rule == "adagrad":
        v = v + g * g
        return theta - f(h.lr / (1 + 4 * h.lr_decay)) * (g / (np.sqrt(v) + f(h.eps))), m, v, w
    if rule == "rmsprop":
        v = f(h.alpha) * v + f(1 - h.alpha) * g * g
        m = f(h.alpha) * m + f(1 - h.alpha) * g if h.centered else m
        root = np.sqrt(np.maximum(v - m * m, f(0))) if h.centered else np.sqrt(v)
        w = f(h.momentum) * w + g / (root + f(h.eps))
        return theta - f(h.lr) * w, m, v, w
    m = f(h.beta1) * m + f(1 - h.beta1) * g
    v = f(h.beta2) * v + f(1 - h.beta2) * g * g
    w = np.maximum(w, v)
    direction = m / (np.sqrt(w if h.amsgrad else v) * f(1 / math.sqrt(1 - h.beta2**5)) + f(h.eps))
    return theta * f(1 - h.lr * h.weight_decay) - f(h.lr / (1 - h.beta1**5)) * direction, m, v, w


@pytest.mark.parametrize(
    ("rule", "options", "excess"),
    [
        ("adamw", {"beta2": 0.98}, 0.05),
        ("adamw", {"beta2": 0.98, "amsgrad": True}, 0.05),
        ("adagrad", {"lr_decay": 0.1}, 0.05),
        ("rmsprop", {"momentum": 0.8}, 0.05),
        # The root at zero variance may be off by the root of the error; the bound of that is seldom reached.
        ("rmsprop", {"momentum": 0.8, "centered": True, "alpha": 0.9}, 0.02),
        ("lion", {"beta2": 0.98}, 0.05),
    ],
)
def test_error_bounds_hold_for_float32_arithmetic(rule: str, options: dict[str, Any], excess: float) -> None:
    """The same formulas in numpy float32 stay within the bound: it is a bound, and not a thousand times too wide."""
    random = np.random.default_rng(8)
    n, hyper = 20_000, oracle.Hyper(rule=rule, lr=0.01, weight_decay=0.1, modulated=rule == "lion", **options)
    f = np.float32
    theta, m, v, g, w = (random.standard_normal(n).astype(f) for _ in range(5))
    v = v * v
    if hyper.centered:  # variances from zero to well above it
        v = m * m * (1 + np.exp2(random.uniform(-30, 2, n))).astype(f)
        g[: n // 2] = m[: n // 2]
    w = w * w if hyper.amsgrad else w
    leaf = oracle.Leaf(theta.astype(float), "float32", 0, t=4, m=m.astype(float), v=v.astype(float), w=w.astype(float))
    model = oracle.Oracle([oracle.Block(hyper, dict(NEUTRAL), [leaf])])
    theta, m, v, w = float32_step(rule, hyper, theta, m, v, w, g)
    model.step([[g.astype(float)]], [[oracle.Observed(theta.astype(float), None, None)]])
    found = [(theta, leaf.theta, leaf.e_theta)]
    found += [(m, leaf.m, leaf.e_m)] * (rule in ("adamw", "lion") or hyper.centered)
    found += [(v, leaf.v, leaf.e_v)] * (rule != "lion")
    found += [(w, leaf.w, leaf.e_w)] * bool(hyper.amsgrad or hyper.momentum)
    for have, want, bound in found:
        with np.errstate(invalid="ignore"):
            ratio = np.where(have == want, 0.0, np.abs(have - want) / bound)
        assert ratio.max() <= tol.SAFETY
        assert ratio.max() > excess
    assert model.ties <= 2


def test_variance_that_rounding_makes_negative_is_zero() -> None:
    """Centered RMSprop with gradients that never change: torch.optim writes NaN."""
    hyper = oracle.Hyper(rule="rmsprop", lr=1.0, eps=0.5, alpha=0.5, centered=True)
    leaf = oracle.Leaf(np.zeros(1), "float32", 0, t=9, m=np.ones(1), v=np.array([1.0 - 2.0**-24]))
    oracle.Oracle([oracle.Block(hyper, dict(NEUTRAL), [leaf])]).step([[np.ones(1)]])
    assert leaf.theta.tolist() == [-2.0]
    # v is below m*m by 2^-25, with an error of some 2^-22: the root may be 5e-4 where it is 0.
    assert 1e-4 < leaf.e_theta[0] < 1e-2
