"""What the optimizer tests share: tensors in every layout, rows, gradients, and the comparison with the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import oracle
import oracle_packing
import tolerances as tol
import torch

import aim_kernels as ak

#: Where parameters are made; tests on a GPU change it.
DEVICE = "cpu"

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Rules in all their variants: options of the optimizer. Decay is never zero, so that its place in the step shows.
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"rule": "adamw", "lr": 3e-2, "betas": (0.85, 0.98), "weight_decay": 0.1},
    "adam": {"rule": "adam", "lr": 3e-2, "betas": (0.85, 0.98), "weight_decay": 0.1},
    "adam-maximize": {"rule": "adam", "lr": 3e-2, "weight_decay": 0.05, "maximize": True, "eps": 1e-3},
    "sgd": {"rule": "sgd", "lr": 3e-2, "betas": (0.85, 0.98), "weight_decay": 0.1},
    "sgd-momentum": {"rule": "sgd", "lr": 2e-2, "betas": (0.85, 0.98), "momentum": 0.8, "weight_decay": 0.1},
    "sgd-dampening": {
        "rule": "sgd",
        "lr": 2e-2,
        "momentum": 0.7,
        "dampening": 0.4,
        "weight_decay": 0.1,
        "maximize": True,
    },
    "sgd-nesterov": {"rule": "sgd", "lr": 2e-2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    # A short memory, so that the maximum is often an earlier second moment.
    "amsgrad": {"rule": "adamw", "lr": 3e-2, "betas": (0.85, 0.7), "weight_decay": 0.1, "amsgrad": True},
    "adagrad": {
        "rule": "adagrad",
        "lr": 0.1,
        "betas": (0.85, 0.98),
        "lr_decay": 0.05,
        "initial_accumulator_value": 0.1,
        "weight_decay": 0.1,
    },
    "rmsprop": {"rule": "rmsprop", "lr": 1e-2, "betas": (0.85, 0.98), "alpha": 0.9, "weight_decay": 0.1},
    # Alpha is none of the betas, which centered groups have no use for.
    "rmsprop-centered": {"rule": "rmsprop", "lr": 1e-2, "alpha": 0.85, "centered": True, "weight_decay": 0.1},
    "rmsprop-momentum": {
        "rule": "rmsprop",
        "lr": 1e-2,
        "alpha": 0.85,
        "centered": True,
        "momentum": 0.7,
        "weight_decay": 0.1,
        "maximize": True,
    },
    "lion": {"rule": "lion", "lr": 1e-2, "betas": (0.85, 0.95), "weight_decay": 0.1},
    "adamw-decoupled-lr": {
        "rule": "adamw",
        "lr": 3e-2,
        "betas": (0.85, 0.98),
        "weight_decay": 0.02,
        "decouple_lr": True,
    },
}

#: Rows by name: columns of ``set_modulation``. "alternate" differs between the phases, see ``set_row``.
ROWS: dict[str, dict[str, float]] = {
    "ones": {},
    "chain": {"grad_well": 0.7, "live_well": 0.7},
    "straight-through": {"live_well": 0.3},
    "step": {"step_under": 1.5, "step_well": 0.25},
    "grad": {"grad_under": 0.5, "grad_well": 2.0},
    "whole": {"grad_under": 0.5, "grad_well": 0.5, "step_under": 0.75, "step_well": 0.75},
    "noise": {"noise": 0.5},
    "all": {
        "grad_under": 1.25,
        "grad_well": 0.5,
        "step_under": 1.5,
        "step_well": 0.5,
        "live_under": 0.9,
        "live_well": 0.4,
        "noise": 0.3,
    },
    "alternate": {},
}
TRUE_PHASE = {
    "grad_under": 1.0,
    "grad_well": 1.0,
    "step_under": 1.0,
    "step_well": 0.8,
    "live_under": 1.0,
    "live_well": 1.0,
}
AUX_PHASE = {
    "grad_under": 0.5,
    "grad_well": 0.0,
    "step_under": 1.25,
    "step_well": 1.0,
    "live_under": 1.0,
    "live_well": 0.4,
}


def set_row(optimizer: ak.AIMFusedOptimizer, group: int, name: str) -> None:
    """Sets a row of ROWS; "alternate" also makes the phase a fair draw."""
    if name == "alternate":
        optimizer.set_phases(0.5)
        optimizer.set_phase_rows(group, true=TRUE_PHASE, aux=AUX_PHASE)
    elif ROWS[name]:
        optimizer.set_modulation(group, **ROWS[name])


def layout(values: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values in another memory layout, never aliasing ``values``."""

    def sevens(shape: Sequence[int]) -> torch.Tensor:
        return torch.full(tuple(shape), 7.0, dtype=values.dtype, device=values.device)

    if kind == "transposed":
        order = list(reversed(range(values.dim())))
        return values.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if kind == "channels_last":
        form = torch.channels_last if values.dim() == 4 else torch.contiguous_format
        return values.clone(memory_format=form)
    if kind == "sliced":
        base = sevens((*values.shape[:-1], 2 * values.shape[-1]) if values.dim() else (2,))
        view = base[..., ::2] if values.dim() else base[0]
        return view.copy_(values)
    if kind == "rows":
        base = sevens((2 * values.shape[0], *values.shape[1:]) if values.dim() else (2,))
        view = base[::2] if values.dim() else base[1]
        return view.copy_(values)
    if kind == "offset":
        return sevens((values.numel() + 3,))[1:-2].view(values.shape).copy_(values)
    if kind == "expanded":
        return (
            values.flatten()[:1].clone().reshape([1] * values.dim()).expand(values.shape)
            if values.numel()
            else values.clone()
        )
    assert kind == "contiguous", kind
    return values.clone(memory_format=torch.contiguous_format)


PARAMETER_LAYOUTS = ("contiguous", "transposed", "channels_last", "sliced", "rows", "offset")
GRADIENT_LAYOUTS = (*PARAMETER_LAYOUTS, "expanded")


def parameter(
    shape: Sequence[int], dtype: str = "float32", kind: str = "contiguous", seed: int = 0, device: str | None = None
) -> torch.Tensor:
    """A leaf that requires a gradient, standard normal, in the given layout."""
    values = torch.from_numpy(np.asarray(np.random.default_rng(seed).standard_normal(tuple(shape)))).to(DTYPES[dtype])
    return layout(values.to(device or DEVICE), kind).requires_grad_()


class Gradients:
    """Gradients with a persistent part, so that some elements stay under-optimized and others do not; some are zero."""

    def __init__(self, params: Sequence[torch.Tensor], seed: int = 1, kinds: Sequence[str] = ("contiguous",)) -> None:
        self.random = np.random.default_rng(seed)
        self.params, self.kinds = params, kinds
        self.signal = [self._scale(p) * self.random.standard_normal(p.shape) for p in params]

    def _scale(self, p: torch.Tensor) -> np.ndarray:
        return 10.0 ** self.random.uniform(-2, 0.5, p.shape)

    def __call__(self) -> list[torch.Tensor]:
        made = []
        for index, (p, signal) in enumerate(zip(self.params, self.signal, strict=True)):
            values = np.asarray(
                signal + 0.7 * np.abs(signal).mean() * self.random.standard_normal(p.shape) if p.numel() else signal
            )
            values = values * (self.random.uniform(size=p.shape) > 0.02)
            kind = self.kinds[index % len(self.kinds)]
            made.append(layout(torch.from_numpy(np.asarray(values)).to(p.device, p.dtype), kind))
        return made


def assign(params: Iterable[torch.Tensor], grads: Iterable[torch.Tensor | None]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory."""
    return sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride(dim), dim))


def flat(tensor: torch.Tensor, like: torch.Tensor) -> np.ndarray:
    """Elements as float64 in the memory order of ``like``."""
    return tensor.detach().permute(memory_order(like)).reshape(-1).to(torch.float64).cpu().numpy().copy()


def frozen(optimizer: ak.AIMFusedOptimizer) -> dict[str, Any]:
    """Everything a step may write, copied: for "nothing changed" and bitwise comparisons."""
    params = parameters_of(optimizer)
    return {
        "params": [p.detach().clone() for p in params],
        "state": [
            {k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} if p in optimizer.state else {} for p in params
        ],
        **{name: getattr(optimizer.tables, name).clone() for name in ("rows", "statistics", "control")},
    }


def same_bits(a: Any, b: Any, where: str = "") -> None:
    """Asserts that two trees of tensors agree bit for bit (NaN included)."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {sorted(map(str, a))} and {sorted(map(str, b))}"
        for key in a:
            same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            same_bits(x, y, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{where}: {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        x, y = (
            t.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b)
        )
        unequal = int((x != y).sum())
        assert not unequal, f"{where}: {unequal} bytes differ: {a.flatten()[:8]} and {b.flatten()[:8]}"
    else:
        assert a == b, f"{where}: {a} and {b}"


def build(
    rule: str = "adamw",
    shapes: Sequence[Sequence[Sequence[int]]] = (((5, 7), (33,), (), (0,)),),
    dtype: str = "float32",
    kinds: Sequence[str] = ("contiguous",),
    modulated: bool = True,
    **options: Any,
) -> ak.AIMFusedOptimizer:
    """An optimizer with one modulated group for each list of shapes; layouts cycle through ``kinds``."""
    groups, seed = [], 0
    device = "cpu" if options.get("backend", "cpu") == "cpu" else DEVICE
    for depth, members in enumerate(shapes):
        params = []
        for shape in members:
            params.append(parameter(shape, dtype, kinds[seed % len(kinds)], seed, device))
            seed += 1
        groups.append({"params": params, "modality": "audio", "depth": depth, "modulated": modulated})
    options = {
        "backend": "cpu",
        "under_optimized": ("fraction", 0.4),
        "threshold_rate": 0.3,
        "seed": 1234567890123,
    } | options
    return ak.AIMFusedOptimizer(groups, **(RULES[rule] | options))


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
    kind = oracle_packing.SECOND if unsigned else oracle_packing.FIRST
    codes = flat(state[name], p).astype(np.int64)
    return oracle_packing.unpacked(codes, state[f"{name}_scale"].numpy(), kind)


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
        self.oracle.seed, self.oracle.counter, self.oracle.threshold, self.oracle.phase = tables.control.tolist()

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
        nested, seen, place = [], [], 0
        for group in self.optimizer.param_groups:
            count = len(group["params"])
            nested.append(flat_grads[place : place + count])
            place += count
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
                exponents[short] = state[f"{name}_scale"].numpy().copy()
        return oracle.Observed(leaf.theta, leaf.m, leaf.live, leaf.v, leaf.w, exponents, flat(p, p))

    def compare(self) -> None:
        """Every element of parameters, states, rows, statistics and control."""
        tables = self.optimizer.tables
        o = self.oracle
        assert tables.control.tolist() == [o.seed, o.counter, o.threshold, o.phase]
        for index, (block, group) in enumerate(zip(o.blocks, self.optimizer.param_groups, strict=True)):
            for place, (leaf, p) in enumerate(zip(block.leaves, group["params"], strict=True)):
                where = f"group {index}, parameter {place} {tuple(p.shape)}"
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
