"""Steps of the Triton backend by Triton's own just-in-time path, on a stand-in for the driver of an NVIDIA GPU: binding
of arguments, specialization, options, compilation and launch are Triton's, and only the launched kernel does nothing.

Run as a program, with TRITON_INTERPRET unset and TRITON_CACHE_DIR an empty folder: `python triton_just_in_time.py
rules`. It prints, as JSON, a list of actions: [case, action, what was compiled, what was launched].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from helpers import DTYPES, RULES, assign, build, layout, parameters_of
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver as runtime

import aim_kernels as ak
from aim_kernels.backends import device
from aim_kernels.backends import triton as backend
from aim_kernels.backends.triton import driver
from aim_kernels.step.layout import DTYPES as STORED
from aim_kernels.step.layout import MOMENTS

#: Two chunks and a tail, one chunk, nothing, a scalar; a second group.
SHAPES = (((20000,), (7,), (0,), ()), ((33, 16),))


def described(kernel: Any) -> str:
    """What a kernel is compiled for, by what it is told and which arguments it has."""
    names = kernel.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.constants.items()}
    words = [kernel.fn.__name__.removesuffix("_kernel")]
    if "NUMBER" in constants:
        words.append(STORED[constants["NUMBER"]])
    if "OTHER" in constants:
        words += ["other"] if constants["OTHER"] else []
        words += ["general"] if constants["GENERAL"] else []
    if "MOMENTS" in constants:
        words.append(MOMENTS[constants["MOMENTS"]])
    present = [name for name in ("grad_scale", "found_inf", "sums", "others") if name in names]
    return " ".join([*words, *(f"+{name}" for name in present if name not in constants)])


class StandIn:
    """What Triton's runtime asks of a driver. Kernels are made ready as on a device, then launched into nothing."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.launched: list[str] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """(module, function, registers, spills, threads of a block at most)"""
        return object(), object(), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(self, source, metadata)


class Launcher:
    """One compiled kernel: looks at what it is launched with as the launchers do that Triton compiles."""

    def __init__(self, owner: StandIn, source: Any, metadata: Any) -> None:
        self.owner, self.signature, self.name = owner, source.signature, source.fn.__name__
        # By the options of driver.py, not those of Triton's: contraction into FMA is on there.
        limited = metadata.maxnreg is not None
        assert not metadata.enable_fp_fusion and metadata.num_stages == 1 and limited == (self.name == "update_kernel")
        owner.compiled.append(described(source))

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        _packed, _metadata, _enter, _exit, *arguments = rest
        assert 0 < x < 2**31 and (y, z) == (1, 1), (self.name, x, y, z)
        for (name, type_name), value in zip(self.signature.items(), arguments, strict=True):
            if type_name.startswith("*"):
                bits = 8 * value.element_size()
                assert type_name.endswith(str(bits)) and type_name[1:3] == (
                    "fp" if value.is_floating_point() else f"i{bits}"[:2]
                )
            else:
                assert type_name == "constexpr" or (type_name == "i32" and 0 <= value < 2**31), (
                    f"{self.name}: {name} is {type_name}"
                )
        self.owner.launched.append(f"{self.name} {x}")


def front_end_only() -> None:
    """Has Triton read, check and translate the kernels, which takes half a second each, but make no machine code of
    them, which takes ten."""
    add_stages = CUDABackend.add_stages

    def fewer(self: Any, stages: dict[str, Any], *arguments: Any) -> None:
        add_stages(self, stages, *arguments)
        first = next(iter(stages))
        stages.clear()
        stages[first] = lambda module, metadata: metadata.update(shared=0, name="") or ""
        stages[self.binary_ext] = lambda module, metadata: b""

    CUDABackend.add_stages = fewer


class Record:
    """What every action of a case had compiled and launched."""

    def __init__(self, stand_in: StandIn, case: str) -> None:
        self.stand_in, self.case = stand_in, case
        self.lines: list[tuple[str, str, list[str], list[str]]] = []

    @contextmanager
    def action(self, name: str) -> Iterator[None]:
        self.stand_in.compiled, self.stand_in.launched = [], []
        yield
        self.lines.append((self.case, name, self.stand_in.compiled, self.stand_in.launched))


def train(record: Record, optimizer: ak.AIMFusedOptimizer, scaled: bool = False) -> None:
    """Whatever changes between steps, one after the other."""
    params = parameters_of(optimizer)

    def step(name: str, memory: str = "contiguous") -> None:
        with record.action(name):
            assign(params, [layout(torch.ones_like(p), memory) for p in params])
            optimizer.step()

    step("first")
    step("gradients moved")
    step("gradients of other alignment", "offset")
    with record.action("no gradient"):
        params[0].grad = None
        optimizer.step()
    for rate in (1e-4, torch.tensor(0.5), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        step("learning rate")
    modulated = optimizer.param_groups[0]["modulated"]
    for strength in (0.5, 0.0, 1.0):
        columns = ("step_well", "grad_well") + (() if modulated else ("step_under", "grad_under"))
        optimizer.set_modulation(0, **dict.fromkeys(columns, strength))
        step("strength")
    if modulated:
        optimizer.set_phases(0.5)
        for strength in (0.5, 0.25):
            optimizer.set_modulation(0, live_well=strength)
            step("live weights")
        for _ in range(2):
            with record.action("emit"):
                optimizer.eval()
                optimizer.train()
        optimizer.set_modulation(0, live_well=1.0)
        step("live weights end")
    if scaled:
        scale(record, optimizer)
        step("scale taken back")


def scale(record: Record, optimizer: ak.AIMFusedOptimizer) -> None:
    """Steps with what GradScaler hands over: numbers of any address, and of any type."""
    params = parameters_of(optimizer)
    for dtype in (torch.float32, torch.float32, torch.float64):
        with record.action("scaled"):
            optimizer.grad_scale, optimizer.found_inf = torch.ones((), dtype=dtype), torch.zeros(3, dtype=dtype)[1]
            assign(params, [torch.ones_like(p) for p in params])
            optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def rules(stand_in: StandIn) -> Iterator[Record]:
    """Every rule in float32, and two ways of keeping fewer bytes."""
    cases: list[tuple[str, str, dict[str, Any]]] = [(rule, "float32", {}) for rule in RULES]
    cases += [("sgd-momentum", "float32", {"modulated": False}), ("lion", "float32", {"modulated": False})]
    cases += [("adamw", "bfloat16", {"state_dtype": "int8", "master": "split", "ema_decay": 0.9})]
    for rule, dtype, options in cases:
        record = Record(stand_in, f"{rule} {dtype}")
        shapes = SHAPES if "state_dtype" not in options else (((9000,),),)
        train(record, build(rule, shapes, dtype, backend="triton", **options), scaled=rule in ("adamw", "lion"))
        yield record


def counts(stand_in: StandIn) -> Iterator[Record]:
    """Numbers of chunks, tensors, groups and devices, those among them that Triton would make constants of."""
    chunk = backend.CHUNK
    for groups in (
        [[(1,)]],
        [[(15 * chunk + 1,)], [(2,), (3,)]],
        [[(chunk,)] * 17],
        [[(0,)]],
        [[(3,)]] * 16,
    ):
        record = Record(stand_in, f"{sum(map(len, groups))} tensors in {len(groups)} groups")
        train(record, build("adamw", groups, backend="triton"), scaled=True)
        yield record
    for devices in (2, 3, 17):
        record = Record(stand_in, f"{devices} devices")
        optimizer = build("adamw", [[(5,)] * 20, [(9,)]], backend="triton")
        with split(devices):
            train(record, optimizer, scaled=True)
        yield record
    record = Record(stand_in, "exchanged sums")
    train(record, build("adamw", SHAPES, backend="triton", sync_every=2))
    yield record
    record = Record(stand_in, "in backward")
    model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 1))
    optimizer = ak.AIMFusedOptimizer(model.parameters(), backend="triton")
    ak.step_in_backward(optimizer, model)
    for _ in range(3):
        with record.action("step"):
            model(torch.randn(2, 9)).sum().backward()
            optimizer.step()
    yield record


@contextmanager
def split(count: int) -> Iterator[None]:
    """Parameters lie on so many devices, each of which is this one."""
    given = device._launch_of

    def of(plan: device.StepPlan, kernels: device.Kernels) -> device.Launch:
        if plan.launch is None:
            numbers = np.arange(len(plan.params))
            assignments = [(plan.params[0].device, numbers[number::count]) for number in range(count)]
            plan.launch = device.Launch(plan, kernels.CHUNK, assignments)
        return plan.launch

    device._launch_of = of
    try:
        yield
    finally:
        device._launch_of = given


#: By storage type: options of everything that is stored in a way of its own.
STORAGE: dict[str, tuple[dict[str, Any], ...]] = {
    "float32": ({}, {"ema_decay": 0.9}, {"state_dtype": "bfloat16"}, {"state_dtype": "int8"}),
    "float64": ({}, {"zero_grad_in_step": True}),
    "bfloat16": (
        {},
        {"master": "stochastic"},
        {"master": "split", "state_dtype": "bfloat16", "rounding": "nearest"},
        {"master": "kahan", "state_dtype": "int8"},
    ),
    "float16": ({}, {"master": "kahan"}, {"state_dtype": "bfloat16"}, {"master": "float32", "state_dtype": "int8"}),
}


def storage(stand_in: StandIn) -> Iterator[Record]:
    """Every storage type with every way of keeping moments, of rules of both families; every second one only with what
    GradScaler hands over."""
    number = 0
    for dtype in DTYPES:
        for options in STORAGE[dtype]:
            for rule in ("adam", "rmsprop-momentum"):
                record = Record(stand_in, " ".join([rule, dtype, *map(str, options.values())]))
                optimizer = build(rule, (((9000,),),), dtype, backend="triton", **options)
                (scale if number % 2 else train)(record, optimizer)
                number += 1
                yield record


def whole(stand_in: StandIn) -> Iterator[Record]:
    """One of the kernels down to machine code."""
    record = Record(stand_in, "whole")
    train(record, build("adamw", SHAPES, backend="triton"))
    yield record


CASES = {"rules": rules, "counts": counts, "storage": storage, "whole": whole}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    stand_in = StandIn()
    runtime.set_active(stand_in)
    if names != ["whole"]:
        front_end_only()
    backend.unavailable = lambda device=None: ""
    backend.runs_on = lambda device: True
    driver.limits_registers = lambda device: True
    lines = [line for name in names for record in CASES[name](stand_in) for line in record.lines]
    json.dump(lines, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
