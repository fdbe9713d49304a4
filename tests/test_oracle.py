"""The oracle itself: known answers, and torch.optim in float64 as its peer."""

from __future__ import annotations

import math

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
}


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
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    hyper = oracle.Hyper(
        rule=peer.split("-")[0],
        lr=0.03,
        beta1=beta1,
        beta2=beta2,
        eps=options.get("eps", 1e-8),
        weight_decay=0.1,
        momentum=options.get("momentum", 0.0),
        dampening=options.get("dampening", 0.0),
        nesterov=options.get("nesterov", False),
        maximize=maximize,
    )
    row = dict.fromkeys(oracle.COLUMNS, 1.0) | {"noise": 0.0, "tau": 0.0, "tau_prev": 0.0}
    leaf = oracle.Leaf(start.copy(), "float64", 0)
    model = oracle.Oracle([oracle.Block(hyper, row, [leaf])])
    for _ in range(20):
        grad = random.standard_normal(50)
        p.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        model.step([[grad]])
        np.testing.assert_allclose(leaf.theta, p.detach().numpy(), rtol=1e-13, atol=1e-14)
    assert leaf.live is None and leaf.t == 20 and model.counter == 20
    assert np.all(leaf.e_theta < 1e-12)


def block(
    moments: tuple[list[float], list[float]], t: int, tau: float
) -> tuple[oracle.Oracle, oracle.Leaf, oracle.Hyper]:
    hyper = oracle.Hyper(rule="adam", lr=0.1)
    m, v = (np.asarray(x, dtype=np.float64) for x in moments)
    leaf = oracle.Leaf(np.ones_like(m), "float32", 0, t=t, m=m, v=v)
    return oracle.Oracle([]), leaf, hyper


def test_class_is_the_ratio_of_the_specification() -> None:
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


def test_error_bounds_hold_for_float32_arithmetic() -> None:
    """The same formulas in numpy float32 stay within the bound: it is a bound, and not a thousand times too wide."""
    random = np.random.default_rng(8)
    n, hyper = 20_000, oracle.Hyper(rule="adamw", lr=0.01, weight_decay=0.1, beta2=0.98)
    f = np.float32
    theta, m, v, g = (random.standard_normal(n).astype(f) for _ in range(4))
    v = v * v
    leaf = oracle.Leaf(*(theta.astype(float), "float32", 0), t=4, m=m.astype(float), v=v.astype(float))
    row = dict.fromkeys(oracle.COLUMNS, 1.0) | {"noise": 0.0, "tau": 0.0, "tau_prev": 0.0}
    oracle.Oracle([oracle.Block(hyper, row, [leaf])]).step([[g.astype(float)]])
    m = f(0.9) * m + f(1 - 0.9) * g
    v = f(0.98) * v + f(1 - 0.98) * (g * g)
    direction = m / (np.sqrt(v) * f(1 / math.sqrt(1 - 0.98**5)) + f(1e-8))
    theta = theta * f(1 - 0.01 * 0.1) - f(0.01 / (1 - 0.9**5)) * direction
    for have, want, bound in ((m, leaf.m, leaf.e_m), (v, leaf.v, leaf.e_v), (theta, leaf.theta, leaf.e_theta)):
        excess = np.abs(have - want) / bound
        assert excess.max() <= tol.SAFETY
        assert excess.max() > 0.05
