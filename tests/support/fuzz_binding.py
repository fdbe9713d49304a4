"""Calls every function of ``aim_kernels._C`` with arguments that hypothesis spoils: a program of its own, so that a
crash is an exit status (test_binding.py).

Addresses in records are numbers, and a wrong one cannot be told from a right one: they point into one arena here, which
is large enough for every size and type that a record can name. Everything else may be anything. A call that raises has
written nothing; one that does not has stayed inside its buffers.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from aim_kernels import _C
from aim_kernels.step import layout
from aim_kernels.step.watch import _quick

SIZE, GUARD = 40, 64
FIELDS = tuple(name for name in layout.TENSOR_RECORD.names if layout.TENSOR_RECORD[name] == np.uint64)  # addresses
RAISED = (ValueError, TypeError, RuntimeError, IndexError, OverflowError, AttributeError, KeyError)
outcomes = {"worked": 0, "raised": 0}

INTEGER = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 6, 7, 8])
REAL = st.floats(width=64) | st.sampled_from([0.0, 0.5, 1.0, 0.999])
JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.just([]),
    st.just({}),
    st.just([[1.0] * 19]),
    st.just(len),
    st.just(object()),
    st.sampled_from(["f8", "i8", "f4", "u1", "?", "O", "S112", "V160", "V120", "V24", "V8"]).flatmap(
        lambda dtype: st.sampled_from([(), (0,), (1,), (2,), (1, 19), (2, 19), (1, 7), (4,), (3, 2, 2)]).map(
            lambda shape: np.zeros(shape, dtype)
        )
    ),
)


#: Bytes of an element of a stream; some are none.
SIZES = (1, 2, 4, 8, 8, 3, 0)


class Arena:
    """The memory that records point to, with guards between its parts, and the tables beside it."""

    def __init__(self, tensor_count: int, group_count: int) -> None:
        parts = [8 * SIZE + 8] * len(FIELDS)
        self.ends = np.cumsum([GUARD, *[part + GUARD for part in parts * tensor_count]])
        random = np.random.default_rng(0)
        self.bytes = random.integers(0, 128, int(self.ends[-1]), np.uint8)
        self.tensors = np.zeros(tensor_count, layout.TENSOR_RECORD)
        self.groups = np.zeros(group_count, layout.GROUP_RECORD)
        starts = iter(self.ends[:-1])
        for tensor, field in itertools.product(range(tensor_count), FIELDS):
            start = int(next(starts))
            self.tensors[field][tensor] = self.bytes.ctypes.data + start + (-(self.bytes.ctypes.data + start)) % 8
        self.tensors["numel"], self.groups["scale"], self.groups["lr"] = SIZE, 1.0, 0.1
        self.rows = np.array([layout.neutral_row()] * group_count).reshape(group_count, len(layout.ROW_COLUMNS))
        self.statistics = np.zeros((group_count, len(layout.STATISTICS_COLUMNS)))
        self.sums = np.zeros_like(self.statistics)
        self.control = np.zeros(4, np.int64)
        self.runs = np.zeros(3 if tensor_count else 0, layout.STREAM_RECORD)
        for run, field in zip(self.runs, FIELDS, strict=False):
            run["address"] = self.tensors[field][0]

    def snapshot(self) -> list[bytes]:
        tables = (self.bytes, self.tensors, self.groups, self.rows, self.statistics, self.sums, self.control)
        return [table.tobytes() for table in tables]

    def guards(self) -> bytes:
        return b"".join(self.bytes[end - GUARD : end].tobytes() for end in self.ends)


def reordered(table: np.ndarray, how: str) -> Any:
    """The same table as something that the binding cannot read as it is."""
    doubled = np.zeros((2 * table.shape[0], *table.shape[1:]), table.dtype)
    frozen = table.copy()
    frozen.setflags(write=False)
    return {
        "strided": doubled[::2],
        "reversed": table[::-1],
        "columns first": np.asfortranarray(table) if table.ndim > 1 else table[::-1],
        "read-only": frozen,
        "longer": doubled,
        "shorter": table[:-1],
        "list": table.tolist(),
        "other bytes": table.view(np.uint8),
        "swapped": table.astype(table.dtype.newbyteorder()) if table.dtype.names is None else doubled,
        "floats": np.zeros(table.shape, np.float32) if table.dtype.names is None else table.view(np.uint8),
    }[how]


HOW = st.sampled_from(
    [
        "strided",
        "reversed",
        "columns first",
        "read-only",
        "longer",
        "shorter",
        "list",
        "other bytes",
        "swapped",
        "floats",
    ]
)


#: What rows, statistics and control may not be, whatever the rest (one row in other strides is the same row).
REFUSED = ("read-only", "longer", "shorter", "list", "other bytes", "floats")


@st.composite
def arenas(draw: st.DrawFn) -> Arena:
    """Valid tables, or tables some of whose numbers are anything."""
    arena = Arena(draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    tensors, groups = arena.tensors, arena.groups
    for index in range(len(tensors)):
        tensors["group"][index] = draw(st.integers(0, max(len(groups) - 1, 0)))
        for field in FIELDS:
            # Absent, or not where its type may lie; never past the arena.
            tensors[field][index] = draw(st.sampled_from([1, 1, 1, 1, 1, 0])) and int(tensors[field][index]) + draw(
                st.sampled_from([0] * 12 + [1, 2, 4])
            )
        tensors["numel"][index] = draw(st.integers(0, SIZE) | st.sampled_from([SIZE, SIZE, SIZE, -1, -(2**63)]))
        tensors["first"][index] = draw(st.sampled_from([0, 0, 7, 2**40, 2**63 - 1, -1]))
        tensors["dtype"][index] = draw(st.sampled_from([0, 1, 2, 3]) | INTEGER)
        tensors["uncounted"][index], tensors["flags"][index] = draw(
            st.sampled_from([(0, 0), (1, 1), (-5, 3), (0, 2), (0, -1)])
        )
        tensors["offset"][index] = draw(st.sampled_from([0, 0, 0, 7, 2**40, -1]))
        for field, most in (("moments", 2), ("weights", 3), ("stochastic", 1), ("zero_grad", 1)):
            tensors[field][index] = draw(st.sampled_from([0, 0]) | st.integers(0, most) | INTEGER)
        if draw(st.sampled_from([False] * 6 + [True])):
            tensors["group"][index] = draw(INTEGER)
    for index in range(len(groups)):
        groups["rule"][index] = draw(st.sampled_from(range(len(layout.RULES))))
        for field in groups.dtype.names:
            if draw(st.sampled_from([False] * 5 + [True])):
                groups[field][index] = (
                    draw(REAL)
                    if groups.dtype[field].kind == "f"
                    else draw(st.integers(0, 2**64 - 1) if groups.dtype[field].kind == "u" else INTEGER)
                )
    for table in (arena.rows, arena.statistics):
        if table.size and draw(st.booleans()):
            table.flat[draw(st.integers(0, table.size - 1))] = draw(REAL)
    arena.control[:] = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4))
    return arena


def call(arena: Arena, function: Any, *arguments: Any, refused: bool = False) -> None:
    before, guards = arena.snapshot(), arena.guards()
    try:
        function(*arguments)
        outcomes["worked"] += 1
        assert not refused, "a table of another size or type was taken"
    except RAISED:
        outcomes["raised"] += 1
        assert arena.snapshot() == before, "a call that raised has written"
    assert arena.guards() == guards, "a call wrote outside of its buffers"


@examples(600)
@given(arenas(), st.data())
def fuzz_tables(arena: Arena, data: st.DataObject) -> None:
    """step, emit, check, stream, squares and others: at most one argument is no table at all."""
    tables = {
        "step": ("tensors", "groups", "rows", "statistics", "control"),
        "emit": ("tensors", "groups", "rows"),
        "check": ("tensors", "groups"),
        "stream": ("tensors",),
        "squares": ("tensors",),
        "update": ("tensors", "groups", "rows", "statistics", "control", "sums"),
        "finish": ("groups", "sums", "rows", "statistics", "control"),
        "stream_runs": ("runs",),
    }
    name = data.draw(st.sampled_from(["step", *tables]))
    arguments: list[Any] = [getattr(arena, table) for table in tables[name]]
    if name == "stream":
        arena.tensors["dtype"] = data.draw(st.sampled_from([0, 0, 1]))
        chunk = data.draw(st.sampled_from([0, 1, 16, -1, 2**62, 2**63 - 1]))
        arguments += [data.draw(st.booleans()), data.draw(st.booleans()), chunk, data.draw(st.floats(width=32))]
    if name == "stream_runs":
        for run in arena.runs:
            run["size"], run["reads"], run["writes"] = (data.draw(st.sampled_from(x)) for x in (SIZES, (0, 1), (0, 1)))
        numel = data.draw(st.integers(0, SIZE) | st.sampled_from([-1, -(2**63)]))
        arguments += [numel, data.draw(st.sampled_from([0, 1, 16, -1, 2**62, 2**63 - 1])), data.draw(INTEGER)]
    if name not in ("check", "finish"):
        arguments.append(data.draw(st.sampled_from([1, 2, 3, 300, 2**31 - 1, 0, -1])))
    refused = False
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(arguments)))
        if position < len(tables[name]) and data.draw(st.booleans()):
            how = data.draw(HOW)
            refused = (
                tables[name][position] not in ("tensors", "groups") and arguments[position].size > 0 and how in REFUSED
            )
            arguments[position] = reordered(arguments[position], how)
        else:
            arguments[position : position + 1] = [data.draw(JUNK)]
    call(arena, getattr(_C, name), *arguments, refused=refused)


class Thing:
    """Answers what a tensor is asked, anything."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = itertools.cycle(answers)

    @property
    def grad(self) -> Any:
        return next(self.answers)

    def __eq__(self, other: object) -> Any:
        return next(self.answers)

    __hash__ = object.__hash__


ANSWER = st.one_of(JUNK, st.integers(0, 2**64 - 1), st.booleans(), st.just(()), st.just((1, 2)))
LISTS = st.lists(JUNK, max_size=3)


@examples(600)
@given(st.data())
def fuzz_watch(data: st.DataObject) -> None:
    """Things that are no tensors, methods that answer anything, lists of any length, shortened between calls."""
    answers = data.draw(st.lists(ANSWER, min_size=1, max_size=4))
    things: list[Any] = [Thing(answers) for _ in range(data.draw(st.integers(0, 3)))]
    supply = itertools.cycle(answers)
    plain = data.draw(st.booleans())
    described = (64, 6, (2, 3), (3, 1), 24, 4)
    groups: list[Any] = [{"params": things}] if data.draw(st.booleans()) else data.draw(LISTS)
    states: Any = {} if plain else {thing: data.draw(st.just({}) | JUNK) for thing in things}
    lists: list[Any] = [
        groups,
        list(groups) if data.draw(st.booleans()) else data.draw(LISTS),
        list(things) if data.draw(st.booleans()) else data.draw(LISTS),
        [data.draw(st.booleans()) for _ in things] if plain else data.draw(LISTS),
        [(3, 1) for _ in things] if plain else data.draw(LISTS),
        states,
        list(states) if data.draw(st.booleans()) else data.draw(LISTS),
        [list(state) if isinstance(state, dict) else None for state in states.values()] if plain else data.draw(LISTS),
        [list(state.values()) if isinstance(state, dict) else [] for state in states.values()],
        data.draw(st.sampled_from([None, Thing, 5])),
        (lambda thing: described) if plain else (lambda thing: next(supply)),
        lambda thing: next(supply),
        data.draw(st.sampled_from([None, _quick(), _quick()[:3], (Thing, *_quick()[1:])])),
    ]
    if data.draw(st.sampled_from([False] * 4 + [True])):
        lists[data.draw(st.integers(0, len(lists) - 1))] = data.draw(JUNK)
    count = len(things)
    arena = Arena(0, 0)
    made: list[Any] = []
    call(arena, lambda: made.append(_C.Watch(*lists)))
    for _ in range(2):
        if not made:
            return
        if data.draw(st.booleans()):
            each = data.draw(st.sampled_from([entry for entry in lists if isinstance(entry, list)]))
            each.append(None) if data.draw(st.booleans()) else each.clear()
        size = data.draw(st.sampled_from([count, count, count, 0, 5]))
        arguments: list[Any] = [np.zeros(size, np.uint64), np.zeros(size, bool), [None] * size]
        if data.draw(st.sampled_from([False] * 3 + [True])):
            arguments[data.draw(st.integers(0, 2))] = data.draw(JUNK)
        call(arena, made[0].read, *arguments)


@examples(150)
@given(st.data())
def fuzz_others(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["philox", "isas", "active_isa", "build_info", "layout"]))
    words = st.lists(st.integers(-1, 2**32), max_size=6)
    arguments = data.draw(
        st.tuples(st.integers(-1, 2**64), words) if name == "philox" else st.lists(JUNK, max_size=2).map(tuple)
    )
    call(Arena(1, 1), getattr(_C, name), *arguments)


if __name__ == "__main__":
    public = {name for name in dir(_C) if not name.startswith("_")}
    covered = set(
        (
            "CHUNK Watch active_isa build_info check emit finish isas layout philox squares step stream stream_runs "
            "update"
        ).split()
    )
    assert public == covered, f"nobody fuzzes {sorted(public ^ covered)}"
    for fuzz in (fuzz_tables, fuzz_watch, fuzz_others):
        fuzz()
    print(f"{outcomes['worked']} worked, {outcomes['raised']} raised")
    sys.exit(0)
