"""One optimizer step in float64 numpy, written from the contract (docs/design.md), with a bound of the rounding error.

Nothing here reads the package. A ``Leaf`` is one parameter, flat in memory order; a ``Block`` is one param group. Every
value has an error bound beside it (``e_theta`` beside ``theta``): what an implementation in the arithmetic type may
differ by.

The class decision is discontinuous: where ``m*m`` and ``c_v*v + c_0`` agree within their error bounds either class is
right, and the trajectories part. For exactly these near ties the oracle follows the implementation: it computes both
outcomes and keeps the one nearer to what was observed. It counts them, and a test bounds their share. The sign of Lion
is another such decision, with three outcomes. All other elements are on their own.

``oracle_rules.py`` has the moments and directions of the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import tolerances as tol
from oracle_packing import (
    FIRST,
    MOMENTS,
    SECOND,
    WEIGHTS,
    all_rounding_bits,
    bfloat16,
    check_bfloat16,
    check_int8,
    decode,
    encode,
)
from oracle_rules import (
    Direction,
    Hyper,
    Leaf,
    direction,
    first_moment,
    first_weight,
    hold,
    second_moment,
    second_weight,
)

COLUMNS = (
    "grad_under grad_well tau_prev tau noise emitted_under emitted_well "
    "true_grad_under true_grad_well true_step_under true_step_well true_live_under true_live_well "
    "aux_grad_under aux_grad_well aux_step_under aux_step_well aux_live_under aux_live_well"
).split()
SUMS = ["numel", "under", "grad_sum", "grad_sq", "update_sq", "param_sq", "nonfinite"]


def philox(seed: int, counter: tuple[np.ndarray | int, ...]) -> np.ndarray:
    """Philox4x32-10: ``[4, n]`` words for key ``seed`` and four counter words (arrays or integers)."""
    mask = np.uint64(0xFFFFFFFF)
    x = [np.asarray(word, dtype=np.uint64) for word in np.broadcast_arrays(*counter)]
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        high0, low0 = p0 >> np.uint64(32), p0 & mask
        high1, low1 = p1 >> np.uint64(32), p1 & mask
        x = [high1 ^ x[1] ^ np.uint64(k0), low1, high0 ^ x[3] ^ np.uint64(k1), low0]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(x)


def normals(seed: int, counter: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard normals of elements ``first .. first + count`` at a step, and the Box-Muller radius of each."""
    index = np.arange(count, dtype=np.uint64) + np.uint64(first)
    k = index // np.uint64(4)
    words = philox(seed, (k & np.uint64(0xFFFFFFFF), k >> np.uint64(32), counter & 0xFFFFFFFF, 0))
    lane = (index % np.uint64(4)).astype(int)
    draws = (words >> np.uint64(8)).astype(np.float64) * 2.0**-24
    pair = lane // 2 * 2
    each = np.arange(count)
    radius = np.sqrt(-2.0 * np.log(draws[pair, each] + 2.0**-24))
    angle = 2.0 * np.pi * draws[pair + 1, each]
    return radius * np.where(lane % 2 == 0, np.cos(angle), np.sin(angle)), radius


def draw_phase(seed: int, counter: int, limit: int) -> int:
    """The phase of the step after step ``counter``: 0 true, 1 auxiliary."""
    return int(int(philox(seed, (0, 0, counter & 0xFFFFFFFF, 1)).reshape(4)[0]) < limit)


def narrow(value: np.ndarray, dtype: str) -> np.ndarray:
    """Nearest representable value (ties to even) of a 16-bit type; others unchanged."""
    if dtype not in tol.NARROW:
        return value
    bits, least = tol.NARROW[dtype]
    with np.errstate(all="ignore"):
        exponent = np.maximum(np.frexp(value)[1], least + 1)
        ulp = np.ldexp(1.0, exponent - bits)
        rounded = np.rint(value / ulp) * ulp
        largest = (2.0 - 2.0 ** (1 - bits)) * 2.0 ** (127 if dtype == "bfloat16" else 15)
        rounded = np.where(np.abs(rounded) > largest, np.copysign(np.inf, value), rounded)
    return np.where(np.isfinite(value), rounded, value)


def stored(value: np.ndarray, error: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """What is kept of a value known within an error: exact away from rounding boundaries, either neighbour at one."""
    if dtype not in tol.NARROW:
        return value, error
    reach = tol.SAFETY * error
    kept, low, high = (narrow(x, dtype) for x in (value, value - reach, value + reach))
    with np.errstate(invalid="ignore"):
        spread = np.maximum(np.abs(high - kept), np.abs(kept - low))
    return kept, np.where(np.isfinite(spread), spread, 0.0)


@dataclass
class Observed:
    """What the implementation holds after the step (flat, float64); read at near ties only."""

    theta: np.ndarray
    m: np.ndarray | None
    live: np.ndarray | None
    v: np.ndarray | None = None
    w: np.ndarray | None = None
    exponents: dict[str, np.ndarray] = field(default_factory=dict)  # of moments in 8 bits: "m", "v", "w"
    param: np.ndarray | None = None  # what the parameter itself holds


@dataclass
class Block:
    hyper: Hyper
    row: dict[str, float]
    leaves: list[Leaf]
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))
    slack: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))  # error bounds of the sums

    @property
    def emitting(self) -> bool:
        """Whether the group has live weights."""
        return any(self.row[name] != 1.0 for name in COLUMNS if "_live_" in name)


@dataclass
class Oracle:
    blocks: list[Block]
    seed: int = 0
    counter: int = 0
    draw_limit: int = 0
    phase: int = 0
    decisions: int = 0
    ties: int = 0

    def step(
        self,
        grads: list[list[np.ndarray | None]],
        observed: list[list[Observed]] | None = None,
        under_counts: list[float] | None = None,
    ) -> None:
        """One step. ``observed`` and ``under_counts`` (one a group) are consulted at near ties only."""
        if all(grad is None for group in grads for grad in group):
            return
        upcoming = draw_phase(self.seed, self.counter, self.draw_limit)
        for index, (block, block_grads) in enumerate(zip(self.blocks, grads, strict=True)):
            sigma = noise_level(block)
            new = dict.fromkeys(SUMS, 0.0)
            slack = dict.fromkeys(SUMS, 0.0)
            open_count = 0
            names = ("true", "aux")
            step = [block.row[f"{names[self.phase]}_step_{side}"] for side in ("under", "well")]
            live = [block.row[f"{names[upcoming]}_live_{side}"] for side in ("under", "well")]
            for number_in_block, (leaf, grad) in enumerate(zip(block.leaves, block_grads, strict=True)):
                seen = observed[index][number_in_block] if observed else None
                if grad is None:
                    emitting = block.emitting or (leaf.weights == "float32" and leaf.live is not None)
                    if leaf.live is not None and not emitting:
                        self._store(leaf, seen, drawn=False)
                        leaf.live = None
                    elif emitting:
                        under, tie = self._class(block.hyper, leaf, leaf.t, block.row["tau"])
                        self._emit(leaf, live, under, tie, seen)
                    continue
                open_count += self._update(block, leaf, grad, sigma, step, live, seen, new, slack)
            if any(grad is not None for grad in block_grads):
                held = not any((block.row["grad_under"], block.row["grad_well"], *step))
                self._control(block, new, slack, open_count, under_counts[index] if under_counts else None, held)
            else:
                block.row["tau_prev"] = block.row["tau"]
            for side in (0, 1):
                end = ("under", "well")[side]
                block.row[f"grad_{end}"] = block.row[f"{names[upcoming]}_grad_{end}"]
                block.row[f"emitted_{end}"] = live[side]
        self.phase, self.counter = upcoming, self.counter + 1

    def _class(self, hyper: Hyper, leaf: Leaf, t: int, tau: float) -> tuple[np.ndarray, np.ndarray]:
        """(under, near tie) from the leaf's moments, which have seen ``t`` steps."""
        size = leaf.theta.size
        if t == 0 or not hyper.classes:
            return np.ones(size, bool), np.zeros(size, bool)
        b, bc2 = first_weight(hyper, t), second_weight(hyper, t)
        unit, tiny = tol.UNIT[leaf.dtype], tol.TINY[leaf.dtype]
        c_v, c_0 = tau**2 * b**2 / bc2, tau**2 * hyper.eps**2 * b**2
        with np.errstate(all="ignore"):
            c = (tau / (1 - tau)) ** 16 if tau < 1 else math.inf
            if hyper.measure == "grad":
                c_v, c_0 = 0.0, c * b**2
            left, right = leaf.m * leaf.m, c_v * leaf.v + c_0
            margin = (2 * np.abs(leaf.m) + leaf.e_m) * leaf.e_m + c_v * leaf.e_v
            if hyper.measure == "fisher":
                # The kernels' m*m decides within 2^-80 of it.
                left, right, margin = leaf.v, np.full(size, c * bc2), leaf.e_v + leaf.m**2 * 2.0**-80
            margin = margin + tol.CLASS_ROUNDOFFS * unit * (left + right) + 2 * tiny
            under = left >= right
            tie = (np.abs(left - right) <= tol.SAFETY * margin) if tau else np.zeros(size, bool)
        self.decisions += size
        self.ties += int(tie.sum())
        return under, tie

    def _update(
        self,
        block: Block,
        leaf: Leaf,
        raw: np.ndarray,
        sigma: tuple[float, float],
        step: list[float],
        live: list[float],
        seen: Observed | None,
        new: dict[str, float],
        slack: dict[str, float],
    ) -> int:
        """Steps one parameter; returns how many near ties its count is open by."""
        hyper, row, unit, tiny = block.hyper, block.row, tol.UNIT[leaf.dtype], tol.TINY[leaf.dtype]
        before = leaf.theta
        if leaf.stored and hyper.initial and leaf.v is None and hyper.rule == "adagrad":
            begin = np.full_like(leaf.theta, np.float32(hyper.initial))
            leaf.v = bfloat16(begin) if leaf.stored == "bfloat16" else decode(*encode(begin, SECOND), SECOND)
        with np.errstate(all="ignore"):
            g0 = -raw if hyper.maximize else raw.copy()
            coupled = hyper.coupled_decay
            g, e_g = g0, np.zeros_like(g0)
            if coupled:
                g = g0 + coupled * leaf.theta
                e_g = coupled * leaf.e_theta + 2 * unit * np.abs(coupled * leaf.theta) + unit * np.abs(g)

            held = not any((row["grad_under"], row["grad_well"], *step))
            under, tie = self._class(hyper, leaf, leaf.t, row["tau_prev"])
            leaf.t += not held
            noise, e_noise = 0.0, 0.0
            if row["noise"] and not held:
                z, radius = normals(self.seed, self.counter, leaf.first, g.size)
                noise = sigma[0] * z
                e_noise = sigma[0] * tol.NORMAL_ROUNDOFFS * tol.NORMAL_UNIT * radius + (
                    sigma[1] + 3 * unit * sigma[0]
                ) * np.abs(z)

            def moments(mask: np.ndarray) -> tuple[np.ndarray, ...]:
                c = np.where(mask, row["grad_under"], row["grad_well"])
                scaled = c * g + noise
                e = (
                    np.abs(c) * e_g
                    + 2 * unit * np.abs(c * g) * (c != 1)
                    + e_noise
                    + unit * np.abs(scaled) * bool(row["noise"])
                )
                return (scaled, e, *first_moment(hyper, leaf, scaled, e, unit, tiny))

            if held:
                hold(hyper, leaf)
            scaled, e_scaled, m, e_m = (g, e_g, leaf.m, leaf.e_m) if held else moments(under)
            if tie.any() and seen is not None and row["grad_under"] != row["grad_well"]:
                other = moments(~under)
                swap = tie & (np.abs(other[2] - seen.m) < np.abs(m - seen.m))
                scaled, e_scaled, m, e_m = (
                    np.where(swap, b, a) for a, b in zip((scaled, e_scaled, m, e_m), other, strict=True)
                )
            if hyper.keeps_second and not held:
                leaf.v, leaf.e_v = second_moment(hyper, leaf, scaled, e_scaled, unit, tiny)
            m_old, e_m_old = leaf.m, leaf.e_m
            leaf.m, leaf.e_m = m, e_m

            if hyper.decay != 1.0 and not held:
                leaf.e_theta = abs(hyper.decay) * leaf.e_theta + 3 * unit * np.abs(leaf.theta)
                leaf.theta = leaf.theta * hyper.decay

            if held:
                way = Direction(np.zeros_like(g), np.zeros_like(g), 0.0)
            else:
                way = direction(hyper, leaf, m_old, e_m_old, scaled, e_scaled)
            if leaf.stored is not None:
                assert seen is not None, "only what was stored tells which of two neighbours it is"
                self._keep_moments(hyper, leaf, seen)
            under, tie = self._class(hyper, leaf, leaf.t, row["tau"])

            def move(mask: np.ndarray) -> tuple[np.ndarray, ...]:
                factor = way.rate * np.where(mask, step[0], step[1])
                delta = factor * way.value
                e_delta = np.abs(factor) * way.error + 4 * unit * np.abs(delta) + tiny
                theta = leaf.theta - delta
                return delta, e_delta, theta, leaf.e_theta + e_delta + unit * np.abs(theta)

            if way.tie is not None:
                self._signs(way, move, under, seen)
            delta, e_delta, theta, e_theta = move(under)
            undecided = tie.copy()
            if tie.any() and seen is not None and step[0] != step[1]:
                other = move(~under)
                swap = tie & (np.abs(other[2] - seen.theta) < np.abs(theta - seen.theta))
                under = under ^ swap
                delta, e_delta, theta, e_theta = move(under)
                undecided &= np.abs(other[2] - theta) <= e_theta
            leaf.theta, leaf.e_theta = theta, e_theta

            new["numel"] += g.size
            new["grad_sum"] += g0.sum()
            new["grad_sq"] += (g0 * g0).sum()
            new["nonfinite"] += np.count_nonzero(~np.isfinite(g0))
            new["update_sq"] += (delta * delta).sum()
            new["param_sq"] += (theta * theta).sum()
            adding = tol.SUM_ROUNDOFFS * unit
            slack["grad_sum"] += adding * np.abs(g0).sum()
            for name, values, errors in (
                ("grad_sq", g0, 0.0),
                ("update_sq", delta, e_delta),
                ("param_sq", theta, e_theta),
            ):
                slack[name] += (2 * np.abs(values) * errors + adding * values * values + tiny).sum()

            if hyper.ema_decay is not None:
                keep, old = hyper.ema_decay, before if leaf.ema is None else leaf.ema
                leaf.e_ema = (
                    keep * leaf.e_ema
                    + (1 - keep) * e_theta
                    + 3 * unit * (np.abs(keep * old) + np.abs((1 - keep) * theta))
                    + 2 * tiny
                )
                leaf.ema = keep * old + (1 - keep) * theta
            if block.emitting or leaf.weights == "float32":
                under = self._emit(leaf, live, under, undecided, seen)
            else:
                # The step that drops a master has written it as a live weight.
                self._store(leaf, seen, drawn=leaf.live is None)
                leaf.live = None
            leaf.under, leaf.tie = under, tie
            new["under"] += np.count_nonzero(under) if hyper.classes else math.nan
            return int(np.count_nonzero(tie))

    def _keep_moments(self, hyper: Hyper, leaf: Leaf, seen: Observed) -> None:
        """Moments as they were stored, which must be what rounding with the documented bits makes of them."""
        bits = None
        if leaf.stochastic:
            bits = all_rounding_bits(self.seed, self.counter, MOMENTS, leaf.first, 0, leaf.theta.size)
        for name in ("m", "v", "w"):
            x, error, found = getattr(leaf, name), getattr(leaf, f"e_{name}"), getattr(seen, name)
            if x is None:
                continue
            where = f"{hyper.rule}, {name}"
            if leaf.stored == "bfloat16":
                check_bfloat16(found, x, error, bits, where)
            else:
                fmt = FIRST if name == "m" or (name == "w" and not hyper.amsgrad) else SECOND
                check_int8(found, seen.exponents[name], fmt, x, error, bits, where)
            setattr(leaf, name, found)
            setattr(leaf, f"e_{name}", 0.0)

    def _store(self, leaf: Leaf, seen: Observed | None, drawn: bool) -> None:
        """True weights without a master. ``drawn``: a step has rounded them, which may be at random."""
        if leaf.weights == "stochastic" and drawn:
            bits = all_rounding_bits(self.seed, self.counter, WEIGHTS, leaf.first, 0, leaf.theta.size)
            check_bfloat16(seen.param, leaf.theta, leaf.e_theta, bits, "weights")
            leaf.theta, leaf.e_theta = seen.param, 0.0
        elif leaf.weights in ("split", "kahan"):
            # Nearest; where two are as near, split takes the one away from zero, and either is half a unit away.
            kept, spread = stored(leaf.theta, leaf.e_theta, leaf.dtype)
            away = np.abs(kept - leaf.theta)
            with np.errstate(invalid="ignore"):
                ok = np.abs(seen.param - leaf.theta) <= away + spread + tol.SAFETY * leaf.e_theta
            assert np.all(ok | ~np.isfinite(kept)), "the parameter is not the number nearest to its true weight"
            if leaf.weights == "kahan":
                bits, least = tol.NARROW[leaf.dtype]
                leaf.e_theta = leaf.e_theta + tol.rest_error(np.abs(leaf.theta), bits, least)
        else:
            leaf.theta, leaf.e_theta = stored(leaf.theta, leaf.e_theta, leaf.dtype)

    def _signs(
        self,
        way: Direction,
        move: Callable[[np.ndarray], tuple[np.ndarray, ...]],
        under: np.ndarray,
        seen: Observed | None,
    ) -> None:
        """Settles the signs of near ties by the weights that were observed."""
        self.decisions += way.tie.size
        self.ties += int(way.tie.sum())
        if not way.tie.any() or seen is None:
            return
        found = way.value
        distance = np.abs(move(under)[2] - seen.theta)
        for sign in (-1.0, 0.0, 1.0):
            way.value = np.where(way.tie, sign, found)
            other = np.abs(move(under)[2] - seen.theta)
            nearer = way.tie & (other < distance)
            found = np.where(nearer, sign, found)
            distance = np.where(nearer, other, distance)
        way.value = found

    def _emit(
        self, leaf: Leaf, live: list[float], under: np.ndarray, tie: np.ndarray, seen: Observed | None
    ) -> np.ndarray:
        """Writes the live weight; returns the class, settled at near ties by what was observed."""
        unit = tol.UNIT[leaf.dtype]
        anchor, e_anchor = (leaf.ema, leaf.e_ema) if leaf.follows else (leaf.anchor, 0.0)
        if anchor is None:  # an average begins with the weights
            anchor, e_anchor = leaf.theta, leaf.e_theta

        def emit(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            c = np.where(mask, live[0], live[1])
            with np.errstate(all="ignore"):
                part = leaf.theta - anchor
                value = anchor + part * c
                error = (
                    np.abs(1 - c) * e_anchor
                    + np.abs(c) * (leaf.e_theta + unit * np.abs(part))
                    + 2 * unit * np.abs(c * part)
                    + unit * np.abs(value)
                )
            whole = c == 1
            return np.where(whole, leaf.theta, value), np.where(whole, leaf.e_theta, error)

        value, error = emit(under)
        if tie.any() and seen is not None and seen.live is not None and live[0] != live[1]:
            other, _ = emit(~under)
            with np.errstate(invalid="ignore"):
                under = under ^ (tie & (np.abs(other - seen.live) < np.abs(value - seen.live)))
            value, error = emit(under)
        leaf.live, leaf.e_live = stored(value, error, leaf.dtype)
        leaf.under, leaf.tie = under, tie
        return under

    @staticmethod
    def _control(
        block: Block,
        new: dict[str, float],
        slack: dict[str, float],
        open_count: int,
        seen: float | None,
        held: bool,
    ) -> None:
        """Statistics and threshold of a stepped group; the observed count stands in where near ties leave it open."""
        if open_count and seen is not None and abs(seen - new["under"]) <= open_count:
            new["under"] = seen
        row = block.row
        row["tau_prev"] = row["tau"]
        if not new["numel"]:
            return
        block.sums, block.slack = new, slack
        if block.hyper.classes and not held:
            moved = row["tau"] + block.hyper.rate * (new["under"] / new["numel"] - block.hyper.target)
            row["tau"] = min(max(moved, 0.0), 1.0)


def noise_level(block: Block) -> tuple[float, float]:
    """Standard deviation of the noise of a group in this step, and its error bound."""
    sums, slack, n = block.sums, block.slack, block.sums["numel"]
    if not n or not block.row["noise"]:
        return 0.0, 0.0
    variance = max(sums["grad_sq"] / n - (sums["grad_sum"] / n) ** 2, 0.0)
    error = slack["grad_sq"] / n + 2 * abs(sums["grad_sum"] / n) * slack["grad_sum"] / n
    sigma = block.row["noise"] * math.sqrt(variance)
    return sigma, block.row["noise"] * (math.sqrt(variance + error) - math.sqrt(max(variance - error, 0.0)))
