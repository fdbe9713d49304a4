"""What a device needs to take a step: a plan's tables in its memory, cut into chunks, sent only where they changed.

The device backends (cuda, triton) share it; they differ in who moves the elements. A step is ``update`` and ``finish``
of ``csrc/include/aim/cuda.h``, on the current stream of every device, and never waits for one. Tensors on several
devices form one share a device. One device, that of the optimizer's tables, is home: it adds up what the others
measured.
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
from aim_kernels.step.layout import CHUNK_RECORD, DTYPES, FAMILIES, FLAGS, RULES, SPAN_RECORD, STATISTICS_COLUMNS

_C, _ = load("_C")  # without it tables are not checked a second time

if TYPE_CHECKING:
    from aim_kernels.step.plan import StepPlan

_WORD = 8  # bytes; tables travel as int64


class Kernels(Protocol):
    """A device backend."""

    @property
    def CHUNK(self) -> int: ...  # noqa: N802

    def update(self, share: Share) -> None: ...
    def finish(self, share: Share) -> None: ...
    def emit(self, share: Share) -> None: ...


def step(plan: StepPlan, kernels: Kernels) -> None:
    """One step over all tensors of the plan."""
    launch = _launch_of(plan, kernels)
    plan.load_staged()
    launch.send()
    launch.send_tables_away()
    for share in launch.shares:
        with share.current():
            kernels.update(share)
            if share is not launch.home:
                kernels.finish(share)
    launch.fetch_sums()
    if plan.exchange is not None:
        with launch.home.current():
            plan.exchange(launch.add_up())
    with launch.home.current():
        kernels.finish(launch.home)
    plan.store_staged()


def emit(plan: StepPlan, kernels: Kernels) -> None:
    """Writes the live weights of all parameters that have a master."""
    launch = _launch_of(plan, kernels)
    plan.load_staged()
    launch.send()
    launch.send_tables_away()
    for share in launch.shares:
        with share.current():
            kernels.emit(share)
    plan.store_staged()


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def chunk_table(
    numel: NDArray[np.int64], group_of: NDArray[np.int64], group_count: int, chunk_size: int
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Cuts tensors, which stand in the order of their groups, into chunks.

    Returns:
        ``rows.CHUNK_RECORD`` in the order of the tensors (an empty tensor has none), and ``rows.SPAN_RECORD``, one a
        group.
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
    """The families (numbers in ``rows.FAMILIES``) among some tensor records, with the records of all groups."""
    packed = are_packed(tensors)
    rules = rule_families(groups)[np.unique(tensors["group"][~packed])]
    return (*np.unique(rules).tolist(), *([FAMILIES.index("packed")] if packed.any() else []))


def rule_families(groups: NDArray[np.void]) -> NDArray[np.int64]:
    """The family of each group's rule, by its number in ``rows.FAMILIES``."""
    names = [{"adamw": "adam", "adam": "adam", "sgd": "sgd"}.get(rule, "other") for rule in RULES]
    numbers: NDArray[np.int64] = np.array([FAMILIES.index(name) for name in names])[groups["rule"]]
    numbers[(groups["flags"] & FLAGS["amsgrad"]) != 0] = FAMILIES.index("other")
    return numbers


def are_packed(tensors: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which tensors keep something in fewer bytes, or ask for something beside the update."""
    packed = np.zeros(len(tensors), bool)
    for field in ("moments", "weights", "zero_grad", "ema"):
        packed |= tensors[field] != 0
    return packed


class Launch:
    """A plan as shares, one a place. A place is a device and the parameters there, by their numbers in the plan; the
    first is home.

    Where sums are exchanged between processes, none of the shares is home: all are finished up to their sums, and home
    is a share without parameters, which takes what the processes have together.
    """

    def __init__(
        self, plan: StepPlan, chunk_size: int, places: Sequence[tuple[torch.device, NDArray[np.int64]]]
    ) -> None:
        # The plan holds the launch: a cycle would leave both to the garbage collector, which may come while a graph is
        # captured.
        self.plan: StepPlan = weakref.proxy(plan)
        self.chunk_size = chunk_size
        (device, indices), *others = places
        if plan.exchange is None:
            self.home = Share(plan, device, indices, chunk_size, others=len(others))
            self.shares = [self.home, *(Share(plan, *place, chunk_size, home=False) for place in others)]
        else:
            self.shares = [Share(plan, *place, chunk_size, home=False) for place in places]
            self.home = Share(plan, device, indices[:0], chunk_size, others=len(places))
            self.home.phases = self.shares[0].phases

    def send(self) -> None:
        for share in self.shares if self.home in self.shares else (*self.shares, self.home):
            with share.current():
                share.send()

    def send_tables_away(self) -> None:
        """Rows, statistics and control as they are at home."""
        tables = self.plan.tables
        for share in self.shares:
            if share is self.home:
                continue
            for name in ("rows", "statistics", "control"):
                getattr(share, name).copy_(getattr(tables, name), non_blocking=True)

    def fetch_sums(self) -> None:
        """Home learns what the other devices measured."""
        for number, share in enumerate(share for share in self.shares if share is not self.home):
            assert self.home.others is not None and share.sums is not None
            self.home.others[number].copy_(share.sums, non_blocking=True)

    def add_up(self) -> Tensor:
        """The sums of all devices, [G, 7], where home finds them: in the place of the first, and the rest zero."""
        assert self.home.others is not None
        total, rest = self.home.others[0], self.home.others[1:]
        if len(rest):
            total.add_(rest.sum(0))
            rest.zero_()
        return total


class Share:
    """One device's share of a plan. All tensors are in that device's memory.

    Attributes:
        tensors, groups: the plan's records as int64 words, [T, words] and [G, words].
        rows, statistics, control: at home the optimizer's own, elsewhere copies.
        chunks, spans: int32 [C, 2] and int64 [G, 4], see :func:`chunk_table`.
        partials: float64 [C, 7], what every chunk measured; phases: int64 [2], this step's and the next,
            which update() leaves for finish().
        sums: float64 [G, 7] where this is not home; others: float64 [devices, G, 7] at home, of the other devices.
        grad_scale, found_inf: one float32 number each, or None.
        call: what a backend made of all this for its calls; None again where anything moved.
        dtypes, families: what there is among the parameters, numbered as in ``rows.DTYPES`` and ``rows.FAMILIES``.
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
        home: bool = True,
        others: int = 0,
    ) -> None:
        self.plan: StepPlan = weakref.proxy(plan)
        self.device, self.indices, self.chunk_size = device, indices, chunk_size
        tables, records = plan.tables, plan.records[indices]
        group_count = len(plan.groups)
        if home:
            self.rows, self.statistics, self.control = tables.rows, tables.statistics, tables.control
        else:
            self.rows, self.statistics, self.control = (
                torch.empty_like(table, device=device) for table in (tables.rows, tables.statistics, tables.control)
            )
        chunks, spans = chunk_table(records["numel"], records["group"].astype(np.int64), group_count, chunk_size)
        self.chunks = torch.from_numpy(chunks.view(np.int32).reshape(-1, 2)).to(device)
        self.spans = torch.from_numpy(spans.view(np.int64).reshape(-1, 4)).to(device)
        columns = len(STATISTICS_COLUMNS)
        self.partials = torch.zeros(len(chunks), columns, dtype=torch.float64, device=device)
        self.phases = torch.zeros(2, dtype=torch.int64, device=device)
        self.sums = None if home else torch.zeros(group_count, columns, dtype=torch.float64, device=device)
        self.others = torch.zeros(others, group_count, columns, dtype=torch.float64, device=device) if others else None
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
        tables = (self.chunks, self.spans, self.partials, self.phases, self.sums, self.others, self.tensors)
        for table in (*tables, self.rows, self.statistics, self.control):
            if table is not None:
                table.record_stream(stream)

    def current(self) -> AbstractContextManager[Any]:
        """Makes the device the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def send(self) -> None:
        """This step's records, where they are not there already."""
        plan = self.plan
        records, groups = plan.records[self.indices], plan.groups.copy()
        for number, lr in plan.lr_tensors.items():
            local = self._here(lr, self._lr_copies, number)
            groups["lr_tensor"][number] = local.data_ptr()
            groups["lr_dtype"][number] = DTYPES.index(str(local.dtype).removeprefix("torch."))
        scaling = self.grad_scale, self.found_inf
        self.grad_scale = None if plan.grad_scale is None else self._float(plan.grad_scale)
        self.found_inf = None if plan.found_inf is None else self._float(plan.found_inf)
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
        where = np.array([devices.index(p.device) for p in plan.params], dtype=np.int64)
        places = [(device, np.flatnonzero(where == number)) for number, device in enumerate(devices)]
        plan.launch = Launch(plan, kernels.CHUNK, places)
    return plan.launch
