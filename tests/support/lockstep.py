"""An optimizer and its oracle, stepped together and compared element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import oracle_packing
import tolerances as tol
import torch
from helpers import NAMES, assign, flat, parameters_of

import aim_kernels as ak


def moment_names(group: dict[str, Any], rule: str) -> tuple[str, str, str | None]:
    """State keys of the first, second and third moment, as docs/design.md has them; whether they exist is the rule's
    business."""
    if rule == "rmsprop":
        return (
            "grad_avg" if group["centered"] else "exp_avg",
            "square_avg",
            "momentum_buffer" if group["momentum"] else None,
        )
    first = "momentum_buffer" if rule == "sgd" and group["momentum"] else "exp_avg"
    second = "sum" if rule == "adagrad" else "exp_avg_sq"
    return first, second, "max_exp_avg_sq" if group.get("amsgrad") else None


def moment(state: dict[str, Any], name: str | None, p: torch.Tensor) -> np.ndarray | None:
    """A moment as float64 in the memory order of its parameter, however it is stored."""
    if name not in state:
        return None
    if state[name].dtype != torch.uint8:
        return flat(state[name], p)
    unsigned = name in ("exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg")
    fmt = oracle_packing.SECOND if unsigned else oracle_packing.FIRST
    codes = flat(state[name], p).astype(np.int64)
    return oracle_packing.decode(codes, state[f"{name}_scale"].cpu().numpy(), fmt)


def true_weights(state: dict[str, Any], p: torch.Tensor) -> np.ndarray:
    """The true weights as float64: a master, or the parameter with what it lacks beside it."""
    if "master" in state:
        return flat(state["master"], p)
    if "compensation" in state:
        return (flat(p, p) + flat(state["compensation"], p)).astype(np.float32).astype(np.float64)
    if "remainder" in state:
        upper = flat(p.detach().view(torch.int16), p).astype(np.int64) & 0xFFFF
        lower = flat(state["remainder"], p).astype(np.int64)
        nan = (upper & 0x7FFF) > 0x7F80  # whose lower half counts from 0
        bits = (upper << 16) + np.where(nan, lower & 0xFFFF, lower)
        return (bits & 0xFFFFFFFF).astype(np.uint32).view(np.float32).astype(np.float64)
    return flat(p, p)


class Twin:
    """An optimizer and its oracle, stepped together and compared element by element.

    In lock step the oracle starts every step from what the optimizer holds, so a comparison covers one step;
    free-running it starts once, and its error bounds grow with the steps.
    """

    def __init__(
        self,
        optimizer: ak.AIMFusedOptimizer,
        rule: str,
        *,
        free: bool = False,
        under_optimized: tuple[str, float] = ("fraction", 0.4),
        threshold_rate: float = 0.3,
        anchors: dict[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.optimizer, self.rule, self.free, self.anchors = optimizer, rule, free, anchors or {}
        self.target = under_optimized[1] if under_optimized[0] == "fraction" else 0.0
        self.rate = threshold_rate if under_optimized[0] == "fraction" else 0.0
        self.oracle = oracle.Oracle([])
        self.masks = {True: 0, False: 0}  # classes seen, so that a test can ask for both
        self.reload()

    def hyper(self, group: dict[str, Any]) -> oracle.Hyper:
        return oracle.Hyper(
            rule=self.rule,
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=group.get("momentum", 0.0),
            dampening=group.get("dampening", 0.0),
            nesterov=group.get("nesterov", False),
            amsgrad=group.get("amsgrad", False),
            lr_decay=group.get("lr_decay", 0.0),
            initial=group.get("initial_accumulator_value", 0.0),
            alpha=group.get("alpha", 0.99),
            centered=group.get("centered", False),
            decouple_lr=group.get("decouple_lr", False),
            reference_lr=float(group.get("reference_lr") or 0.0),
            maximize=group["maximize"],
            modulated=bool(group.get("modulated", False)),
            target=self.target,
            rate=self.rate,
            ema_decay=group.get("ema_decay"),
            measure=group.get("measure", "snr"),
        )

    def reload(self) -> None:
        """Starts the oracle from what the optimizer holds now."""
        tables, blocks, first = self.optimizer.tables, [], 0
        for index, group in enumerate(self.optimizer.param_groups):
            leaves = []
            for p in group["params"]:
                leaves.append(self.leaf(p, group, first))
                first += p.numel()
            row = dict(zip(oracle.COLUMNS, tables.rows[index].tolist(), strict=True))
            sums = dict(zip(oracle.SUMS, tables.statistics[index].tolist(), strict=True))
            blocks.append(oracle.Block(self.hyper(group), row, leaves, sums))
        self.oracle.blocks = blocks
        self.oracle.seed, self.oracle.counter, self.oracle.draw_limit, self.oracle.phase = tables.control.tolist()

    def leaf(self, p: torch.Tensor, group: dict[str, Any], first: int) -> oracle.Leaf:
        state = self.optimizer.state.get(p, {})
        live = flat(p, p) if "master" in state else None
        names = moment_names(group, self.rule)
        more = {f"{name}_scale" for name in names} | {"ema", "remainder", "compensation"}
        assert state.keys() <= {"step", "master", "anchor", *names, *more}, f"{sorted(state)} are not of {self.rule}"
        m, v, w = (moment(state, name, p) for name in names)
        # Parameters of fewer than 4096 elements have no moments in 8 bits.
        as_stored = group.get("state_dtype")
        if as_stored == "float32" or (as_stored == "int8" and p.numel() < 4096):
            as_stored = None
        return oracle.Leaf(
            theta=true_weights(state, p),
            stored=as_stored,
            stochastic=group.get("rounding", "stochastic") == "stochastic",
            weights=group.get("master") if p.dtype in (torch.bfloat16, torch.float16) else None,
            ema=flat(state["ema"], p) if "ema" in state else None,
            dtype=NAMES[p.dtype],
            first=first,
            t=int(state["step"]) if "step" in state else 0,
            m=m,
            v=v,
            w=w,
            live=live,
            follows=self.optimizer.anchor == "ema" and bool(group.get("modulated")),
            anchor=flat(self.anchors[p], p) if p in self.anchors else 0.0,
        )

    def step(self, grads: Sequence[torch.Tensor | None], closure: Callable[[], Any] | None = None) -> None:
        """Steps both with these gradients (in the order of the groups) and compares everything."""
        params = parameters_of(self.optimizer)
        if self.free:
            for block, group in zip(self.oracle.blocks, self.optimizer.param_groups, strict=True):
                block.hyper = self.hyper(group)
        else:
            self.reload()
        flat_grads = [None if grad is None else flat(grad, p) for p, grad in zip(params, grads, strict=True)]
        assign(params, grads)
        versions = [p._version for p in params]
        self.optimizer.step(closure)
        for p, grad, version in zip(params, grads, versions, strict=True):
            if grad is not None and p.numel():
                assert p._version > version, "a parameter was written without bumping its version"
        nested, seen, begin = [], [], 0
        for group in self.optimizer.param_groups:
            count = len(group["params"])
            nested.append(flat_grads[begin : begin + count])
            begin += count
            leaves = [self.leaf(p, group, 0) for p in group["params"]]
            seen.append([self.observed(p, group, leaf) for p, leaf in zip(group["params"], leaves, strict=True)])
        if getattr(self.optimizer, "zero_grad_in_step", False):
            assert not any(bool(grad.any()) for grad in grads if grad is not None), "gradients are left"
        under = self.optimizer.tables.statistics[:, oracle.SUMS.index("under")].tolist()
        self.oracle.step(nested, seen, under)
        self.compare()

    def observed(self, p: torch.Tensor, group: dict[str, Any], leaf: oracle.Leaf) -> oracle.Observed:
        """What is seen of a parameter after a step."""
        state, exponents = self.optimizer.state.get(p, {}), {}
        for short, name in zip("mvw", moment_names(group, self.rule), strict=True):
            if name in state:
                wanted = {"bfloat16": torch.bfloat16, "int8": torch.uint8}.get(leaf.stored or "")
                assert wanted in (None, state[name].dtype), f"{name} is {state[name].dtype}"
            if f"{name}_scale" in state:
                exponents[short] = state[f"{name}_scale"].cpu().numpy().copy()
        return oracle.Observed(leaf.theta, leaf.m, leaf.live, leaf.v, leaf.w, exponents, flat(p, p))

    def compare(self) -> None:
        """Every element of parameters, states, rows, statistics and control."""
        tables = self.optimizer.tables
        o = self.oracle
        assert tables.control.tolist() == [o.seed, o.counter, o.draw_limit, o.phase]
        for index, (block, group) in enumerate(zip(o.blocks, self.optimizer.param_groups, strict=True)):
            for position, (leaf, p) in enumerate(zip(block.leaves, group["params"], strict=True)):
                where = f"group {index}, parameter {position} {tuple(p.shape)}"
                self._compare_leaf(leaf, self.leaf(p, group, leaf.first), block.hyper.initial, where)
            row = dict(zip(oracle.COLUMNS, tables.rows[index].tolist(), strict=True))
            for name, value in block.row.items():
                slack = tol.THRESHOLD if name.startswith("tau") else 0.0
                assert abs(row[name] - value) <= slack, f"group {index}, row {name}: {row[name]} is not {value}"
            sums = dict(zip(oracle.SUMS, tables.statistics[index].tolist(), strict=True))
            for name, value in block.sums.items():
                slack = tol.SAFETY * block.slack[name]
                agree = (
                    abs(sums[name] - value) <= slack
                    or (np.isnan(value) and np.isnan(sums[name]))
                    or sums[name] == value
                )
                assert agree or not np.isfinite(slack), f"group {index}, {name}: {sums[name]} is not {value} +- {slack}"

    def _compare_leaf(self, want: oracle.Leaf, have: oracle.Leaf, initial: float, where: str) -> None:
        assert have.t == want.t, f"{where}: step count {have.t} is not {want.t}"
        assert (have.live is None) == (want.live is None), (
            f"{where}: master {'absent' if have.live is None else 'present'}"
        )
        for name in ("theta", "m", "v", "w", "live", "ema"):
            expected, found = getattr(want, name), getattr(have, name)
            if name == "ema" and expected is None and not have.t and found is not None:
                expected = have.theta  # begun with a master, before the first step
            if expected is None and not have.t and name in ("m", "v", "w"):
                # A parameter with a master that has met no gradient yet may keep moments, as they begin.
                begin = initial if self.rule == "adagrad" and name == "v" else 0.0
                begin = begin if have.dtype == "float64" else float(np.float32(begin))
                expected = None if found is None else np.full_like(found, begin)
            assert (expected is None) == (found is None), f"{where}: {name} is {'absent' if found is None else 'there'}"
            if expected is not None:
                close(found, expected, getattr(want, f"e_{name}"), f"{where}: {name}")
        if want.under is not None:
            for value in (True, False):
                self.masks[value] += int(np.count_nonzero(want.under == value))

    def finish(self) -> None:
        """Near ties must have been rare."""
        o = self.oracle
        assert o.ties <= max(tol.TIES_FLOOR, tol.TIES_SHARE * o.decisions), (
            f"{o.ties} near ties in {o.decisions} decisions"
        )


def close(found: np.ndarray, expected: np.ndarray, bound: np.ndarray | float, where: str) -> None:
    """Asserts that every element is within SAFETY times its bound, with equal infinities and NaN."""
    bound = np.broadcast_to(np.asarray(bound, dtype=np.float64), expected.shape)
    with np.errstate(invalid="ignore"):
        ok = np.abs(found - expected) <= tol.SAFETY * bound
    ok |= (found == expected) | (np.isnan(found) & np.isnan(expected))
    if not ok.all():
        bad = np.flatnonzero(~ok)
        i = bad[0]
        raise AssertionError(
            f"{where}: {bad.size} of {ok.size} elements differ; "
            f"[{i}] is {found[i]!r}, not {expected[i]!r} +- {tol.SAFETY * bound[i]:.3g}"
        )


def run_twin(twin: Twin, gradients: Callable[[], Sequence[torch.Tensor | None]], steps: int) -> Twin:
    for _ in range(steps):
        twin.step(gradients())
    twin.finish()
    return twin
