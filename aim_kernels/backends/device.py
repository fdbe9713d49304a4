"""Device side of a plan: its tables in device memory, cut into chunks, sent only when they changed.

The device backends (cuda, triton) share it; they differ in the kernels. A step is ``update`` and ``finish`` of
``csrc/include/aim/cuda.h``, on the current stream of every device, and never waits for one. Tensors on several devices
form one shard per device. One device, that of the optimizer's tables, is the primary: it reduces the others' sums.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aim_kernels._native import load
from aim_kernels.step.inputs import StepInputs
from aim_kernels.step.layout import CHUNK_RECORD, DTYPES, FAMILIES, FLAGS, RULES, SPAN_RECORD, STATISTICS_COLUMNS

_C, _ = load("_C")  # without it tables are not checked a second time

if TYPE_CHECKING:
    from aim_kernels.step.plan import StepPlan

_WORD = 8  # bytes; tables travel as int64


class Kernels(Protocol):
    """A device backend."""

    @property
    def CHUNK(self) -> int: ...  # noqa: N802

    def update(self, shard: DeviceShard) -> None: ...
    def finish(self, shard: DeviceShard) -> None: ...
    def emit(self, shard: DeviceShard) -> None: ...


def step(plan: StepPlan, inputs: StepInputs, kernels: Kernels) -> None:
    """One step over all tensors of the plan."""
    launch = _launch_of(plan, kernels)
    plan.load_staged()
    launch.send(inputs)
    launch.send_tables_away()
    for shard in launch.shards:
        with shard.current():
            kernels.update(shard)
            if shard is not launch.primary:
                kernels.finish(shard)
    launch.fetch_sums()
    if plan.exchange is not None:
        with launch.primary.current():
            plan.exchange(launch.add_up())
    with launch.primary.current():
        kernels.finish(launch.primary)
    plan.store_staged()


def emit(plan: StepPlan, kernels: Kernels) -> None:
    """Writes the live weights of all parameters that have a master."""
    launch = _launch_of(plan, kernels)
    plan.load_staged()
    launch.send(StepInputs())
    launch.send_tables_away()
    for shard in launch.shards:
        with shard.current():
            kernels.emit(shard)
    plan.store_staged()


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def chunk_table(
    numel: NDArray[np.int64], group_of: NDArray[np.int64], group_count: int, chunk_size: int
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Cuts tensors, which stand in the order of their groups, into chunks.

    Returns:
        ``layout.CHUNK_RECORD`` in the order of the tensors (an empty tensor has none), and ``layout.SPAN_RECORD``, one
        per group.
    """
    counts = -(-numel // chunk_size)
    first = np.cumsum(counts) - counts
    chunks = np.zeros(int(counts.sum()), CHUNK_RECORD)
    chunks["tensor"] = np.repeat(np.arange(len(numel)), counts)
    chunks["index"] = np.arange(len(chunks)) - np.repeat(first, counts)
    spans = np.zeros(group_count, SPAN_RECORD)
    numbers = np.arange(group_count)
    ends = np.append(first, len(chunks))  # of the chunks before tensor i
    for edge, side in (("begin", "left"), ("end", "right")):
        at = np.searchsorted(group_of, numbers, side=side)  # type: ignore[call-overload]
        spans[f"tensor_{edge}"] = at
        spans[f"chunk_{edge}"] = ends[at]
    return chunks, spans


def families_of(groups: NDArray[np.void], tensors: NDArray[np.void]) -> tuple[int, ...]:
    """The families (numbers in ``layout.FAMILIES``) among some tensor records, with the records of all groups."""
    general = needs_general_kernel(tensors)
    rules = rule_families(groups)[np.unique(tensors["group"][~general])]
    return (*np.unique(rules).tolist(), *([FAMILIES.index("general")] if general.any() else []))


def rule_families(groups: NDArray[np.void]) -> NDArray[np.int64]:
    """The family of each group's rule, by its number in ``layout.FAMILIES``."""
    names = [{"adamw": "adam", "adam": "adam", "sgd": "sgd"}.get(rule, "other") for rule in RULES]
    numbers: NDArray[np.int64] = np.array([FAMILIES.index(name) for name in names])[groups["rule"]]
    numbers[(groups["flags"] & FLAGS["amsgrad"]) != 0] = FAMILIES.index("other")
    return numbers


def needs_general_kernel(tensors: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which tensors keep something in fewer bytes, or ask for something beside the update."""
    general = np.zeros(len(tensors), bool)
    for field in ("moments", "weights", "zero_grad", "ema"):
        general |= tensors[field] != 0
    return general


class Launch:
    """A plan split by device.

    ``assignments``: devices, each with the numbers of its parameters in the plan. The first is the primary device,
    which holds the tables and reduces the others' sums. If sums are exchanged between processes, none of the shards is
    primary: all are finished up to their sums, and the primary is a shard without parameters that takes the total of
    all processes.
    """

    def __init__(
        self, plan: StepPlan, chunk_size: int, assignments: Sequence[tuple[torch.device, NDArray[np.int64]]]
    ) -> None:
        # The plan holds the launch: a cycle would leave both to the garbage collector, which may come while a graph is
        # captured.
        self.plan: StepPlan = weakref.proxy(plan)
        self.chunk_size = chunk_size
        (device, indices), *peers = assignments
        if plan.exchange is None:
            self.primary = DeviceShard(plan, device, indices, chunk_size, peers=len(peers))
            self.shards = [self.primary, *(DeviceShard(plan, *peer, chunk_size, primary=False) for peer in peers)]
        else:
            self.shards = [DeviceShard(plan, *peer, chunk_size, primary=False) for peer in assignments]
            self.primary = DeviceShard(plan, device, indices[:0], chunk_size, peers=len(assignments))
            self.primary.phases = self.shards[0].phases

    def send(self, inputs: StepInputs) -> None:
        for shard in self.shards if self.primary in self.shards else (*self.shards, self.primary):
            with shard.current():
                shard.send(inputs)

    def send_tables_away(self) -> None:
        """Copies rows, statistics and control from the primary device to the others."""
        tables = self.plan.tables
        for shard in self.shards:
            if shard is self.primary:
                continue
            for name in ("rows", "statistics", "control"):
                getattr(shard, name).copy_(getattr(tables, name), non_blocking=True)

    def fetch_sums(self) -> None:
        """Copies the peers' sums to the primary device."""
        for number, shard in enumerate(shard for shard in self.shards if shard is not self.primary):
            assert self.primary.peer_sums is not None and shard.sums is not None
            self.primary.peer_sums[number].copy_(shard.sums, non_blocking=True)

    def add_up(self) -> Tensor:
        """The sums of all devices, [G, 7], in ``peer_sums[0]`` of the primary; the other entries become zero."""
        assert self.primary.peer_sums is not None
        total, rest = self.primary.peer_sums[0], self.primary.peer_sums[1:]
        if len(rest):
            total.add_(rest.sum(0))
            rest.zero_()
        return total


class DeviceShard:
    """One device's part of a plan. All tensors are in that device's memory.

    Attributes:
        tensors, groups: the plan's records as int64 words, [T, words] and [G, words].
        rows, statistics, control: the optimizer's own on the primary, copies elsewhere.
        chunks, spans: int32 [C, 2] and int64 [G, 4], see :func:`chunk_table`.
        chunk_sums: float64 [C, 7], what every chunk measured; phases: int64 [2], this step's and the next,
            which update() leaves for finish().
        sums: float64 [G, 7], unless this is the primary; peer_sums: float64 [devices, G, 7], the other devices' sums,
            if it is.
        grad_scale, found_inf: one float32 number each, or None.
        call: what a backend made of all this for its calls; None again where anything moved.
        dtypes, families: what there is among the parameters, numbered as in ``layout.DTYPES`` and ``layout.FAMILIES``.
    """

    tensors: Tensor
    groups: Tensor
    phases: Tensor
    call: Any = None

    def __init__(
        self,
        plan: StepPlan,
        device: torch.device,
        indices: NDArray[np.int64],
        chunk_size: int,
        *,
        primary: bool = True,
        peers: int = 0,
    ) -> None:
        self.plan: StepPlan = weakref.proxy(plan)
        self.device, self.indices, self.chunk_size = device, indices, chunk_size
        tables, records = plan.tables, plan.records[indices]
        group_count = len(plan.groups)
        if primary:
            self.rows, self.statistics, self.control = tables.rows, tables.statistics, tables.control
        else:
            self.rows, self.statistics, self.control = (
                torch.empty_like(table, device=device) for table in (tables.rows, tables.statistics, tables.control)
            )
        chunks, spans = chunk_table(records["numel"], records["group"].astype(np.int64), group_count, chunk_size)
        self.chunks = torch.from_numpy(chunks.view(np.int32).reshape(-1, 2)).to(device)
        self.spans = torch.from_numpy(spans.view(np.int64).reshape(-1, 4)).to(device)
        columns = len(STATISTICS_COLUMNS)
        self.chunk_sums = torch.zeros(len(chunks), columns, dtype=torch.float64, device=device)
        self.phases = torch.zeros(2, dtype=torch.int64, device=device)
        self.sums = None if primary else torch.zeros(group_count, columns, dtype=torch.float64, device=device)
        self.peer_sums = torch.zeros(peers, group_count, columns, dtype=torch.float64, device=device) if peers else None
        self.dtypes: tuple[int, ...] = tuple(np.unique(records["dtype"]).tolist())
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._made_on = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._lr_copies: dict[int, Tensor] = {}
        self._upload = Upload(len(records) * records.itemsize + plan.groups.nbytes, device)
        self._sent = b""

    def keep_for_stream(self) -> None:
        """Tells the allocator that the current stream uses the tables, where it is not the one they were made on: their
        memory must not be handed out again before it has finished."""
        if self.device.type != "cuda" or capturing(self.device):
            return
        stream = torch.cuda.current_stream(self.device)
        if stream == self._made_on:
            return
        tables = (self.chunks, self.spans, self.chunk_sums, self.phases, self.sums, self.peer_sums, self.tensors)
        for table in (*tables, self.rows, self.statistics, self.control):
            if table is not None:
                table.record_stream(stream)

    def current(self) -> AbstractContextManager[Any]:
        """Makes the device the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def send(self, inputs: StepInputs) -> None:
        """This step's records, where they are not there already."""
        plan = self.plan
        records, groups = plan.records[self.indices], plan.groups.copy()
        for number, lr in plan.lr_tensors.items():
            local = self._here(lr, self._lr_copies, number)
            groups["lr_tensor"][number] = local.data_ptr()
            groups["lr_dtype"][number] = DTYPES.index(str(local.dtype).removeprefix("torch."))
        scaling = self.grad_scale, self.found_inf
        self.grad_scale = None if inputs.grad_scale is None else self._float(inputs.grad_scale)
        self.found_inf = None if inputs.found_inf is None else self._float(inputs.found_inf)
        if scaling[0] is not self.grad_scale or scaling[1] is not self.found_inf:
            self.call = None
        content = records.tobytes() + groups.tobytes()
        # A graph that is being captured reads tables of its own: later steps overwrite these.
        if content != self._sent or capturing(self.device):
            if _C is not None:
                _C.check(records, groups)
            self.call = None
            words = self._upload.send(content)
            width = records.itemsize // _WORD
            self.tensors = words[: len(records) * width].view(len(records), width)
            self.groups = words[len(records) * width :].view(len(groups), groups.itemsize // _WORD)
            self.families = families_of(groups, records)
            self._sent = b"" if capturing(self.device) else content
        self.keep_for_stream()

    def _here(self, value: Tensor, copies: dict[int, Tensor], key: int) -> Tensor:
        """A tensor of the user's: itself, or a copy that keeps its address where it is on another device."""
        if value.device == self.device:
            return value
        if key not in copies or copies[key].dtype != value.dtype:
            copies[key] = torch.empty_like(value, device=self.device)
        return copies[key].copy_(value, non_blocking=True)

    def _float(self, value: Tensor) -> Tensor:
        return value.to(device=self.device, dtype=torch.float32, non_blocking=True)


class Upload:
    """Bytes that the host makes and the device reads, sent in stream order without waiting.

    The host's copy is pinned and fresh for every sending: torch's allocator hands it out again only when the device
    has read it. While a graph is captured nothing may be allocated on the host, so one spare lies ready; graph and
    optimizer keep it, and the device's copy, for good.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self._words = torch.empty(size // _WORD, dtype=torch.int64, device=device)
        self._spare: Tensor | None = None
        self._captured: list[tuple[Tensor, Tensor]] = []

    def _staging(self) -> Tensor:
        pinned = self.device.type == "cuda"
        return torch.empty(self.size // _WORD, dtype=torch.int64, device="cpu", pin_memory=pinned)

    def send(self, content: bytes) -> Tensor:
        """The words in the device's memory."""
        if capturing(self.device):
            host, self._spare = self._spare, None
            if host is None:
                raise RuntimeError(
                    "optimizer.step() was captured twice in a row; run one step outside of torch.cuda.graph first"
                )
            words = torch.empty_like(self._words)
            self._captured.append((host, words))
        else:
            host, words = self._staging(), self._words
            if self._spare is None and self.device.type == "cuda":
                self._spare = self._staging()
        host.numpy().view(np.uint8)[:] = np.frombuffer(content, np.uint8)
        return words.copy_(host, non_blocking=True)


def _launch_of(plan: StepPlan, kernels: Kernels) -> Launch:
    if plan.launch is None or plan.launch.chunk_size != kernels.CHUNK:
        devices = list(dict.fromkeys([plan.tables.rows.device, *(p.device for p in plan.params)]))
        numbers = np.array([devices.index(p.device) for p in plan.params], dtype=np.int64)
        assignments = [(device, np.flatnonzero(numbers == number)) for number, device in enumerate(devices)]
        plan.launch = Launch(plan, kernels.CHUNK, assignments)
    return plan.launch
