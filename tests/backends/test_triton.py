"""The Triton kernels: bit for bit the CPU kernels' (interpreted), and what the compiler makes of them for NVIDIA GPUs.

test_device_step.py runs them against the float64 oracle as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DTYPES, RULES, Gradients, assign, build, frozen, parameters_of, same_bits, same_numbers, set_row

import aim_kernels as ak
from aim_kernels.backends import device
from aim_kernels.backends import triton as backend
from aim_kernels.step.inputs import StepInputs
from aim_kernels.step.layout import DTYPES as STORED
from aim_kernels.step.layout import STATISTIC

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.slow,
    # Infinities and NaN are what some tests are about.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or torch.xpu.is_available(),
    reason="with a GPU, Triton compiles for it instead of interpreting (tests/conftest.py)",
)

#: By elements of a chunk, which are stepped in three blocks of 64 or of 512; sizes at the edges of chunks and blocks.
SIZES = {192: ((1, 63, 0, 64, 193), (65, 384)), 1536: ((1535, 1, 64), (1537, 0, 4097))}
ROWS = ("chain", "all", "alternate", "noise", "grad", "step", "whole")


def pair(
    monkeypatch: pytest.MonkeyPatch, rule: str, chunk: int = 192, sizes: Any = None, **options: Any
) -> tuple[ak.AIMFusedOptimizer, ak.AIMFusedOptimizer]:
    """The same optimizer on the CPU kernels and on the interpreted ones."""
    monkeypatch.setattr(backend._Kernels, "CHUNK", chunk)
    shapes = [[(size,) for size in group] for group in sizes or SIZES[chunk]]
    cpu, device = (
        build(rule, shapes, layouts=("contiguous", "offset"), backend=b, **options) for b in ("cpu", "triton")
    )
    return cpu, device


def compare(cpu: ak.AIMFusedOptimizer, device: ak.AIMFusedOptimizer) -> None:
    """Parameters, states, rows, control and counts to the bit; sums, which are added up in another order, closely."""
    one, other = frozen(cpu), frozen(device)
    sums, others = one.pop("statistics"), other.pop("statistics")
    same_bits(one, other)
    counts = [STATISTIC[name] for name in ("numel", "under", "nonfinite")]
    same_numbers(sums[:, counts], others[:, counts])
    squares = [STATISTIC[name] for name in ("grad_sq", "update_sq", "param_sq")]
    torch.testing.assert_close(sums[:, squares], others[:, squares], rtol=1e-5, atol=0.0, equal_nan=True)
    # The gradients' sum cancels: what it may lose goes by their size.
    size = (sums[:, STATISTIC["numel"]] * sums[:, STATISTIC["grad_sq"]]).sqrt()
    difference = (sums - others)[:, STATISTIC["grad_sum"]].abs()
    assert ((difference <= 1e-5 * size) | ~size.isfinite()).all(), (sums, others)


def step_both(optimizers: tuple[ak.AIMFusedOptimizer, ...], grads: list[torch.Tensor | None]) -> None:
    for optimizer in optimizers:
        # The same statistics, so that the noise has the same deviation: nothing else depends on them.
        optimizer.tables.statistics.copy_(optimizers[0].tables.statistics)
    for optimizer in optimizers:
        assign(parameters_of(optimizer), [None if grad is None else grad.clone() for grad in grads])
        optimizer.step()
    compare(*optimizers)


#: The first seven meet every type, the others half of them: loading and storing a type is none of their business.
CASES = [
    (rule, dtype)
    for number, rule in enumerate(RULES)
    for position, dtype in enumerate(DTYPES)
    if number < 7 or (number + position) % 2
]


@interpreted
@pytest.mark.parametrize(("rule", "dtype"), CASES)
def test_the_bits_of_the_cpu_kernels(monkeypatch: pytest.MonkeyPatch, rule: str, dtype: str) -> None:
    """Every rule in every type, with rows in turn; a parameter without gradient, then with one again."""
    turn = list(RULES).index(rule) + list(DTYPES).index(dtype)
    both = pair(monkeypatch, rule, (192, 1536)[turn % 2], dtype=dtype)
    for optimizer in both:
        for group in range(2):
            set_row(optimizer, group, ROWS[(turn + 3 * group) % len(ROWS)])
    draw = Gradients(parameters_of(both[0]))
    for number in range(3):
        grads: list[torch.Tensor | None] = list(draw())
        if number == 1:
            grads[1] = grads[-1] = None
        step_both(both, grads)


@interpreted
@pytest.mark.parametrize("rule", ["sgd", "sgd-momentum", "sgd-dampening", "sgd-nesterov"])
def test_groups_without_optimization_state(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    both = pair(monkeypatch, rule, modulated=False)
    for optimizer in both:
        set_row(optimizer, 0, "whole")
        optimizer.set_modulation(1, noise=0.5, live_under=0.5, live_well=0.5)
    draw = Gradients(parameters_of(both[0]))
    for _ in range(3):
        step_both(both, list(draw()))


@interpreted
@pytest.mark.parametrize("first", [0, 1, 2, 3, 4 * 2**32 - 2, 2**40 + 1])
def test_noise_by_the_global_index(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Indices beyond 32 bits, and fours that straddle blocks."""
    both = pair(monkeypatch, "sgd-momentum", sizes=((200,),), seed=2**63 - 25)
    draw = Gradients(parameters_of(both[0]))
    for optimizer in both:
        optimizer.set_modulation(0, noise=0.5)
    step_both(both, list(draw()))
    for optimizer in both:
        assert optimizer._plan is not None
        optimizer._plan.records["first"] += first
    before = frozen(both[0])["params"]
    step_both(both, list(draw()))
    assert not torch.equal(before[0], parameters_of(both[0])[0])


@interpreted
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_number(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Widened, stepped by nothing, narrowed: as it was. Infinities and NaN too."""
    monkeypatch.setattr(backend._Kernels, "CHUNK", 8192)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[dtype])
    p = numbers.clone().requires_grad_()
    optimizer = ak.AIMFusedOptimizer([p], rule="sgd", lr=0.0, backend="triton")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    nan = numbers.isnan()
    assert torch.equal(p.detach()[~nan].view(torch.int16), numbers[~nan].view(torch.int16))
    assert p.detach()[nan].isnan().all()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_emission_rounds_as_the_cpu_does(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """True weights of every magnitude, ties of the narrow types among them; infinities and NaN."""
    both = pair(monkeypatch, "adamw", sizes=((3000,),), dtype=dtype)
    draw = Gradients(parameters_of(both[0]))
    random = np.random.default_rng(3)
    bits = random.integers(0, 2**32, 3000, dtype=np.uint32)
    bits[::3] &= np.uint32(0xFFFFF000)  # halfway between two float16, or near it
    bits[1::3] = (bits[1::3] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)  # between two bfloat16
    bits[:6] = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x80000000, 0x477FF000, 0x33000000], np.uint32)
    weights = torch.from_numpy(bits.view(np.float32).astype(np.float64))
    for optimizer in both:
        set_row(optimizer, 0, "chain")
    step_both(both, list(draw()))
    shown = []
    for optimizer in both:
        (p,) = parameters_of(optimizer)
        optimizer.state[p]["master"].copy_(weights)
        optimizer.eval()
        optimizer.train()
        shown.append(p.detach())
    nan = shown[0].isnan()
    assert torch.equal(nan, shown[1].isnan()) and 0 < int(nan.sum()) < 100
    same_bits(shown[0][~nan], shown[1][~nan])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_read_scales_and_learning_rates(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A learning rate, a gradient scale and found_inf in memory, as plain numbers on the CPU; then a step skipped."""
    both = pair(monkeypatch, "adamw")
    monkeypatch.setattr(device.Launch, "send", send_with_rates(both[1], torch.tensor(0.0625, dtype=dtype)))
    for optimizer in both:
        set_row(optimizer, 0, "alternate")
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.0625
    draw = Gradients(parameters_of(both[0]))
    for _ in range(2):
        step_both(both, list(draw()))
    before = frozen(both[1])
    both[1].found_inf = torch.tensor(1.0)
    assign(parameters_of(both[1]), draw())
    both[1].step()
    same_bits(before, frozen(both[1]))


def send_with_rates(optimizer: ak.AIMFusedOptimizer, rate: torch.Tensor) -> Any:
    """``Launch.send`` for learning rates in a device's memory, which on a CPU are none."""
    send = device.Launch.send

    def wrapped(self: Any, inputs: StepInputs) -> None:
        if self.plan.param_groups is optimizer.param_groups:
            self.plan.lr_tensors = dict.fromkeys(range(len(self.plan.groups)), rate)
            self.plan.groups["lr"] = np.nan
        send(self, inputs)

    return wrapped


@interpreted
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3e38, 1e-30])
def test_statistics_of_gradients_out_of_range(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    both = pair(monkeypatch, "sgd-momentum", weight_decay=0.0, lr=1e-3)
    draw = Gradients(parameters_of(both[0]))
    grads = list(draw())
    if value == 1e-30:
        grads = [torch.full_like(grad, value) for grad in grads]
    else:
        grads[4][7] = grads[6][383] = value
    for optimizer in both:
        assign(parameters_of(optimizer), [grad.clone() for grad in grads])
        optimizer.step()
    one, other = (optimizer.tables.statistics for optimizer in both)
    for name in ("nonfinite", "grad_sq"):
        torch.testing.assert_close(
            one[:, STATISTIC[name]], other[:, STATISTIC[name]], rtol=1e-6, atol=0, equal_nan=True
        )
    assert other[:, STATISTIC["nonfinite"]].tolist() == [float(not np.isfinite(value))] * 2


@interpreted
def test_a_step_of_empty_tensors_draws_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair(monkeypatch, "adamw", sizes=((0,), (0, 0)))
    for optimizer in both:
        optimizer.set_phases(0.5)
    for _ in range(6):
        step_both(both, [torch.zeros(0) for _ in range(3)])


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable(cpu) == "" and backend.runs_on(cpu)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in backend.unavailable(cpu) and not backend.runs_on(cpu)
    assert backend.runs_on(torch.device("cuda"))
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert "pip install 'aim-kernels[triton]'" in backend.unavailable(torch.device("cuda"))


def test_triton_is_imported_by_the_first_step_only() -> None:
    code = "import sys; sys.modules['triton'] = None; import aim_kernels as ak; print(ak.backends()['triton'].reason)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "triton is not installed" in done.stdout


@pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.nightly)])
def test_what_the_compiler_makes_of_it(capability: int, tmp_path: Path) -> None:
    """128-bit accesses for every array of a step, nothing spilled, nothing contracted, nothing approximate."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(ak.__file__).parent.parent)}
    program = [sys.executable, str(Path(__file__).parents[1] / "support" / "triton_ahead_of_time.py"), str(capability)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    for name, made in kernels.items():
        assert not made["contracted"] and not made["approximate"], f"{name}: {made}"
        assert not made["in_local_memory"] and made["stack"] == made["local"] == 0, f"{name}: {made}"
    if capability >= 90:
        assert kernels["update general bfloat16 int8"]["reg"] <= 168 and len(kernels) == 18
        assert all(kernels[f"update other {dtype}"]["reg"] <= 255 for dtype in STORED)
    for dtype in STORED if capability >= 90 else ("float32", "bfloat16"):
        made = kernels[f"update {dtype}"]
        wide = "v2.b64" if dtype == "float64" else "v4.b32"
        # A round takes 16 bytes a thread and array of the storage type (twice, in float64), and of the wider states
        # what belongs to them. Loads: parameter, gradient; two moments, master, anchor. Stores: all that are written.
        narrow, states = {"float32": (1, 1), "float64": (2, 2), "bfloat16": (1, 2), "float16": (1, 2)}[dtype]
        assert made["accesses"][f"ld.global.{wide}"] == 2 * narrow + 4 * states, f"{dtype}: {made}"
        assert made["accesses"][f"st.global.{wide}"] == narrow + 3 * states, f"{dtype}: {made}"
        assert made["reg"] <= 168, f"{dtype}: {made}"
