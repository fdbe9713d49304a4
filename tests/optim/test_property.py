"""Hypothesis over whole runs, against the oracle: sizes, layouts, types, missing gradients, groups with options of
their own, and whatever happens to an optimizer between its steps."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from backends_under_test import CHUNK as SMALL_CHUNK
from backends_under_test import EMULATED, enter
from fuzzing import examples
from helpers import (
    DTYPES,
    GRADIENT_LAYOUTS,
    PARAMETER_LAYOUTS,
    ROWS,
    RULES,
    Gradients,
    assign,
    build,
    frozen,
    parameter,
    parameters_of,
    same_bits,
    set_row,
)
from hypothesis import assume, event, given
from hypothesis import strategies as st
from lockstep import Twin

import aim_kernels as ak
from aim_kernels import _C

#: Rows that do not tell classes apart: all that a group without optimization state can have.
WHOLE_ROWS = ("ones", "whole", "noise")
COLUMN = st.sampled_from([0.0, 0.25, 0.9, 1.0, 1.7])
NAMES = ("grad_under", "grad_well", "step_under", "step_well", "live_under", "live_well")
OPTIONS = {
    "lr": st.sampled_from([0.0, 1e-3, 0.03, 0.2]),
    "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.0), (0.85, 0.98)]),
    "eps": st.sampled_from([1e-8, 1e-3]),
    "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
    "maximize": st.booleans(),
    "modulated": st.sampled_from([True, True, True, False]),
}


def shapes(chunk: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Anything of few elements, every size to 70, and now and then the edges of chunks and tiles."""
    edges = st.sampled_from([1023, 1025, chunk - 1, chunk, chunk + 1, 2 * chunk + 33])
    several = st.lists(st.integers(0, 5) | st.sampled_from([8, 17]), max_size=4).map(tuple)
    return several | st.integers(0, 70).map(lambda n: (n,)) | edges.map(lambda n: (n,))


def groups(chunk: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"shapes": st.lists(shapes(chunk), min_size=1, max_size=4), "row": st.sampled_from(sorted(ROWS))},
        optional=OPTIONS,
    )


def changes(chunk: int) -> st.SearchStrategy[tuple[str, Any]]:
    """What happens between two steps: a name of ``Run`` and its argument."""
    return st.one_of(
        st.tuples(st.just("option"), st.one_of(*(st.tuples(st.just(k), OPTIONS[k]) for k in list(OPTIONS)[:5]))),
        st.tuples(st.just("row"), st.sampled_from(sorted(ROWS))),
        st.tuples(st.just("columns"), st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, COLUMN))),
        st.tuples(st.just("neutral"), st.none()),
        st.tuples(st.just("tensor_lr"), st.sampled_from([torch.float32, torch.float64])),
        st.tuples(st.just("add"), groups(chunk)),
        st.tuples(st.just("resume"), st.sampled_from(["in place", "file", "deepcopy"])),
        st.tuples(st.just("threads"), st.integers(1, 5)),
        st.tuples(st.just("evaluate"), st.none()),
        st.tuples(st.just("layout"), st.sampled_from(PARAMETER_LAYOUTS)),
        st.tuples(st.just("replace_states"), st.none()),
        st.tuples(st.just("edit"), st.none()),
    )


@st.composite
def runs(draw: st.DrawFn, chunk: int = _C.CHUNK, steps: int = 6) -> dict[str, Any]:
    missing = st.lists(st.booleans(), max_size=12)
    return {
        "rule": draw(st.sampled_from(sorted(RULES))),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "groups": draw(st.lists(groups(chunk), min_size=1, max_size=3)),
        "layouts": draw(st.lists(st.sampled_from(PARAMETER_LAYOUTS), min_size=1, max_size=3)),
        "grad_layouts": draw(st.lists(st.sampled_from(GRADIENT_LAYOUTS), min_size=1, max_size=3)),
        "anchor": draw(st.sampled_from(["zero", "zero", "init"])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "steps": draw(st.lists(st.tuples(st.none() | changes(chunk), missing), min_size=2, max_size=steps)),
    }


class Run:
    """An optimizer, its oracle, and what can happen to them."""

    def __init__(self, case: dict[str, Any], backend: str) -> None:
        self.case, self.backend, self.made = case, backend, 0
        self.optimizer = ak.AIMFusedOptimizer(
            [self._group(group) for group in case["groups"]],
            **self._options(),
            seed=case["seed"],
        )
        for index, group in enumerate(case["groups"]):
            self._set_row(index, group["row"])
        self.twin = Twin(self.optimizer, RULES[case["rule"]]["rule"])
        self.follow(self.optimizer)

    def _group(self, options: dict[str, Any]) -> dict[str, Any]:
        params = []
        for shape in options["shapes"]:
            memory = self.case["layouts"][self.made % len(self.case["layouts"])]
            params.append(parameter(shape, self.case["dtype"], memory, seed=self.made))
            self.made += 1
        given = {name: value for name, value in options.items() if name in OPTIONS}
        if RULES[self.case["rule"]].get("decouple_lr") and not given.get("lr", 1.0):
            del given["lr"]  # a schedule needs a rate to be relative to; zero is refused
        return {"modulated": True, **given, "params": params, "modality": "audio", "depth": self.made}

    def _set_row(self, index: int, name: str) -> None:
        if self.optimizer.param_groups[index]["modulated"] or name in WHOLE_ROWS:
            set_row(self.optimizer, index, name)

    def follow(self, optimizer: ak.AIMFusedOptimizer) -> None:
        self.optimizer = self.twin.optimizer = optimizer
        params = parameters_of(optimizer)
        # Until their first step, parameters have no states.
        self.twin.anchors = dict(optimizer._anchors)
        self.twin.anchors |= {p: s["anchor"] for p, s in optimizer.state.items() if "anchor" in s}
        self.gradients = Gradients(params, layouts=self.case["grad_layouts"])

    def change(self, name: str, argument: Any) -> None:
        event(name)
        index = len(name) % len(self.optimizer.param_groups)
        group = self.optimizer.param_groups[index]
        params = parameters_of(self.optimizer)
        if name == "option":
            group[argument[0]] = argument[1]
        elif name == "row":
            self._set_row(index, argument)
        elif name == "columns" and group["modulated"]:
            self.optimizer.set_modulation(index, **argument)
        elif name == "neutral":
            for number in range(len(self.optimizer.param_groups)):
                self.optimizer.set_phase_rows(number)
        elif name == "tensor_lr":
            group["lr"] = torch.tensor(float(group["lr"]), dtype=argument)
        elif name == "add":
            self.optimizer.add_param_group(self._group(argument))
            self._set_row(len(self.optimizer.param_groups) - 1, argument["row"])
            self.follow(self.optimizer)
        elif name == "resume":
            self._resume(argument)
        elif name == "threads":
            torch.set_num_threads(argument)
        elif name == "evaluate":
            before = [p.detach().clone() for p in params]
            self.optimizer.eval()
            self.optimizer.train()
            self.evaluated(before)
        elif name == "layout":
            for p in params:
                p.data = helpers.layout(p.data, argument)
                p.grad = None
            self.follow(self.optimizer)
        elif name == "replace_states":
            for p in params:
                for key, value in self.optimizer.state.get(p, {}).items():
                    self.optimizer.state[p][key] = value.clone()
            self.follow(self.optimizer)
        elif name == "edit":
            for p in params:
                with torch.no_grad():
                    p.mul_(0.5)
                    master = self.optimizer.state.get(p, {}).get("master")
                    if master is not None:
                        master.mul_(0.5)

    def evaluated(self, before: Sequence[torch.Tensor]) -> None:
        """What eval() and train() leave is what they found."""
        same_bits(before, [p.detach() for p in parameters_of(self.optimizer)])

    def _resume(self, how: str) -> None:
        if how == "in place":
            self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
            self.follow(self.optimizer)
        elif how == "deepcopy":
            self.follow(copy.deepcopy(self.optimizer))
        else:
            file = io.BytesIO()
            torch.save(self.optimizer.state_dict(), file)
            file.seek(0)
            other = copy.deepcopy(self.optimizer).param_groups
            fresh = ak.AIMFusedOptimizer([dict(group) for group in other], **self._options())
            fresh.load_state_dict(torch.load(file, weights_only=True))
            same_bits(frozen(self.optimizer), frozen(fresh))
            self.follow(fresh)

    def _options(self) -> dict[str, Any]:
        controller = {"under_optimized": ("fraction", 0.4), "threshold_rate": 0.3}
        return {**RULES[self.case["rule"]], **controller, "anchor": self.case["anchor"], "backend": self.backend}

    def makes_states_only(self, grads: Sequence[torch.Tensor | None]) -> bool:
        """What torch.distributed.checkpoint does to an optimizer without states is not a step (docs/design.md)."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        fresh = not any("step" in state for state in self.optimizer.state.values())
        return fresh and not any(rates) and not any(grad is not None and grad.any() for grad in grads)

    def go(self) -> None:
        for change, missing in self.case["steps"]:
            if change is not None:
                self.change(*change)
            grads = self.gradients()
            gone = [index < len(missing) and missing[index] for index in range(len(grads))]
            given = [None if absent else grad for absent, grad in zip(gone, grads, strict=True)]
            assume(not self.makes_states_only(given))
            self.twin.step(given)
        self.twin.finish()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_run(backend: str) -> None:
    @examples({"cpu": 120, "reference": 25}[backend])
    @given(runs())
    def check(case: dict[str, Any]) -> None:
        Run(case, backend).go()

    check()


@pytest.mark.parametrize("backend", EMULATED)
def test_any_run_on_an_emulated_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = enter(backend, monkeypatch)

    @examples({"cuda": 12, "triton": 6}[backend])
    @given(runs(chunk=SMALL_CHUNK, steps=4))
    def check(case: dict[str, Any]) -> None:
        Run(case, name).go()

    check()


@st.composite
def odd_values(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(1, 70) | st.sampled_from([1023, 1024, 4099]))
    spoils = st.dictionaries(
        st.integers(0, size - 1), st.sampled_from([float("inf"), -float("inf"), float("nan")]), max_size=5
    )
    return {
        "rule": draw(st.sampled_from(sorted(RULES))),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "size": size,
        "spoils": draw(spoils),
        "row": draw(st.sampled_from(["ones", "step", "chain", "all"])),
    }


@examples(60)
@given(odd_values())
def test_odd_values_stay_where_they_are(case: dict[str, Any]) -> None:
    """NaN and infinities are counted, and spoil their own element alone."""
    made = []
    spoils = list(case["spoils"])
    for spoilt in (False, True):
        optimizer = build(case["rule"], (((case["size"],),),), case["dtype"])
        set_row(optimizer, 0, case["row"])
        (p,) = parameters_of(optimizer)
        (grad,) = Gradients([p])()
        if spoilt:
            for index, value in case["spoils"].items():
                grad[index] = value
        assign([p], [grad])
        optimizer.step()
        assert optimizer.statistics()[0]["nonfinite"] == (len(spoils) if spoilt else 0)
        made.append(frozen(optimizer))
    others = torch.from_numpy(np.setdiff1d(np.arange(case["size"]), spoils))
    for one, two in zip(*(m["params"] for m in made), strict=True):
        same_bits(one[others], two[others])
    for name, state in made[0]["state"][0].items():
        if state.dim():
            same_bits(state[others], made[1]["state"][0][name][others], name)
