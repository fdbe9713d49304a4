"""A step inside of a graph of ``torch.compile``: one operator, ``torch.ops.aim_kernels.step``, declared with everything
that it writes.

What is traced of ``AIMFusedOptimizer.step`` only gathers tensors and calls the operator. Hyperparameters are no part of
a graph: the operator reads them from the optimizer when it runs, so a learning rate or a strength that changes never
recompiles. It writes the tensors that it is handed, which may be copies that the graph puts back later: the compiler
makes functions of operators that write, and undoes that where it can.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from aim_kernels.optim.preparation import ensure_states, sync_with_module
from aim_kernels.step import validation
from aim_kernels.step.arrangement import arrange_all
from aim_kernels.step.inputs import StepInputs
from aim_kernels.step.ownership import own_tensors
from aim_kernels.step.plan import StepPlan
from aim_kernels.step.states import RESTS, arithmetic_dtype, buffer_of, is_dense, true_weights

if TYPE_CHECKING:
    from aim_kernels.optim.interface import FusedOptimizer

P = ParamSpec("P")
T = TypeVar("T")

#: Optimizers by the handle that a trace knows them by, and graph inputs by their number. Neither is kept alive.
_OPTIMIZERS: weakref.WeakValueDictionary[str, FusedOptimizer] = weakref.WeakValueDictionary()
_INPUTS: weakref.WeakValueDictionary[int, GraphInputs] = weakref.WeakValueDictionary()
_handles, _numbers = itertools.count(), itertools.count()

_ALIGN = 16  # elements, so that every master in a buffer starts on a cache line

#: What a step does to a parameter: nothing, a step, or at most the emission of live weights.
_NOTHING, _STEPPED, _EMITTED = "-", "s", "e"

_SCHEMA = (
    "(Tensor inputs, str actions, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] masters, "
    "Tensor(d!) rows, Tensor(e!) statistics, Tensor(f!) control, Tensor[] anchors, Tensor[] lrs, Tensor? grad_scale, "
    "Tensor? found_inf) -> ()"
)


def _tags() -> tuple[Any, ...]:
    """The operator reads hyperparameters on the host: no CUDA graph of the compiler's making may replay it."""
    names = ("pt2_compliant_tag", "cudagraph_unsafe")  # the latter since torch 2.8
    return tuple(getattr(torch.Tag, name) for name in names if hasattr(torch.Tag, name))


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """What reads or writes an optimizer's records in Python runs between graphs: a graph breaks where it is called.

    ``torch.compiler.disable``, but the compiler is loaded at the first call (as any torch.optim.Optimizer does).
    """
    disabled: Callable[P, T] | None = None

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return wrapper


def register(optimizer: FusedOptimizer) -> str:
    """A handle by which graphs find the optimizer again, as long as it lives."""
    _load_compiler()
    handle = str(next(_handles))
    _OPTIMIZERS[handle] = optimizer
    return handle


@functools.cache
def _load_compiler() -> None:
    """With the first optimizer, which loads it anyway, and not with the package."""
    for function in (_prepare_params, _prepare_states):
        torch.compiler.assume_constant_result(function)  # which marks the function itself


class GraphInputs:
    """The tensors that a graph takes from an optimizer, in lists that it can take them from.

    Attributes:
        number: int64, 0-dim, on the CPU: tells the operator, when it runs, which inputs the graph was given.
        params: all parameters, in the order of the groups.
        emits: whether a parameter's group ever had live weights: without gradient it is then written all the same.
        states: moments and step counts; small ones share buffers, and a buffer stands for all its views.
        masters: one buffer for each device and type, of all masters. Their number changes with the strengths; the size
            of a tensor can be left open in a graph, the length of a list cannot.
        anchors, lrs: what is only read.
        rows, statistics, control: the tables.
    """

    states: list[Tensor]
    anchors: list[Tensor]
    lrs: list[Tensor]

    def __init__(
        self,
        optimizer: FusedOptimizer,
        former: GraphInputs | None = None,
        elsewhere: dict[int, Tensor] | None = None,
    ) -> None:
        key = next(_numbers)
        _INPUTS[key] = self
        self.number = torch.tensor(key, device="cpu")
        self.optimizer = weakref.ref(optimizer)
        self.params = _params_of(optimizer)
        self.emits = [False] * len(self.params)
        if former is not None and _same(former.params, self.params):
            self.emits = former.emits
        self.masters: list[Tensor] = [] if former is None else former.masters
        self.plan: StepPlan | None = None
        # Alive as long as a graph may run that was given it.
        self.former = former
        self.gather(elsewhere)

    def gather(self, elsewhere: dict[int, Tensor] | None = None) -> None:
        """Takes what the optimizer holds now; ``elsewhere`` says where the masters' values are."""
        optimizer = self.optimizer()
        assert optimizer is not None
        first = 0
        for number, group in enumerate(optimizer.param_groups):
            self.note_live_weights(number, first)
            first += len(group["params"])
        self.masters = _pack_masters(optimizer, self.params, self.masters, elsewhere or {})
        states: list[Tensor] = []
        anchors: list[Tensor] = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                for name, value in own_tensors(group["rule"], optimizer.state.get(p, {})).items():
                    if name != "master":
                        (anchors if name == "anchor" else states).append(buffer_of(value))
        self.states, self.anchors = _unique(states), _unique(anchors)
        self.lrs = _unique([g["lr"] for g in optimizer.param_groups if isinstance(g["lr"], Tensor)])
        tables = optimizer.tables
        self.rows, self.statistics, self.control = tables.rows, tables.statistics, tables.control

    def note_live_weights(self, number: int, first: int | None = None) -> None:
        """After a change of rows: a group that has live weights may write parameters without a gradient from now on.
        ``first``: number of its first parameter among all."""
        optimizer = self.optimizer()
        assert optimizer is not None
        params = optimizer.param_groups[number]["params"]
        if optimizer._tables.has_live_weights(number) or any("master" in optimizer.state.get(p, ()) for p in params):
            if first is None:
                first = sum(len(group["params"]) for group in optimizer.param_groups[:number])
            self.emits[first : first + len(params)] = [True] * len(params)

    def tensors(self, actions: str) -> list[Tensor]:
        """What a graph hands over, but for gradients, in the order of the operator's arguments."""
        params = [p for p, action in zip(self.params, actions, strict=True) if action != _NOTHING]
        tables = (self.rows, self.statistics, self.control)
        return [*params, *self.states, *self.masters, *tables, *self.anchors, *self.lrs]


def _params_of(optimizer: FusedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _within(buffer: Tensor, view: Tensor) -> Tensor:
    """What ``view`` is in its own buffer, in another of the same layout."""
    base = buffer_of(view)
    if base is view:
        return buffer
    # By address, which only an empty one has not: states that lie side by side have storages of their own.
    offset = (view.data_ptr() - base.data_ptr()) // view.element_size() if view.numel() else 0
    return buffer.as_strided(view.shape, view.stride(), offset + buffer.storage_offset())


# -- masters -----------------------------------------------------------------------------------------------------------


def _pack_masters(
    optimizer: FusedOptimizer, params: list[Tensor], buffers: list[Tensor], elsewhere: dict[int, Tensor]
) -> list[Tensor]:
    """Moves all masters into one buffer for each device and type, unless that is where they are."""
    state = optimizer.state
    members: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        with_masters = members.setdefault((p.device, arithmetic_dtype(p.dtype)), [])
        if "master" in state.get(p, ()):
            with_masters.append(p)
    if len(buffers) != len(members):
        buffers = [torch.empty(0, device="cpu")] * len(members)
    result = []
    for ((device, dtype), with_masters), buffer in zip(members.items(), buffers, strict=True):
        sizes = [-(-p.numel() // _ALIGN) * _ALIGN for p in with_masters]
        # Sizes 0 and 1 would be another graph.
        size = max(sum(sizes), _ALIGN)
        kept = buffer.numel() == size and buffer.dtype == dtype and buffer.device == device
        if not kept or any(buffer_of(state[p]["master"]) is not buffer for p in with_masters):
            buffer = torch.zeros(size, dtype=dtype, device=device)
            torch._dynamo.maybe_mark_dynamic(buffer, 0)
            offset = 0
            for p, length in zip(with_masters, sizes, strict=True):
                master = state[p]["master"]
                strides = p.stride() if is_dense(p) else torch.empty(p.shape, device="meta").stride()
                state[p]["master"] = buffer.as_strided(p.shape, strides, offset).copy_(_resolve(master, elsewhere))
                offset += length
            optimizer._plan = None
            optimizer._weights.known.note(optimizer.param_groups, state)
        result.append(buffer)
    return result


# -- what is traced ----------------------------------------------------------------------------------------------------


def _refuse_release(optimizer: FusedOptimizer) -> None:
    if optimizer._release is not None:
        raise RuntimeError(
            "optimizer.step() cannot be compiled after step_in_backward, which steps in backward(); call "
            "torch.compiler.disable(optimizer.step)() there instead"
        )


def _refuse_clearing(optimizer: FusedOptimizer) -> None:
    if optimizer.zero_grad_in_step:
        raise RuntimeError(
            "zero_grad_in_step=True has no place inside of a compiled function, where gradients are the compiler's "
            "own; set optimizer.zero_grad_in_step = False, and call zero_grad() there"
        )


def _prepare_params(handle: str) -> None:
    """Called while a graph is traced, not when it runs: makes the lists that the trace reads from."""
    optimizer = _OPTIMIZERS[handle]
    _refuse_release(optimizer)
    _refuse_clearing(optimizer)
    if any(hasattr(p, "device_mesh") for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            "parameters that are DTensors cannot be stepped inside of a compiled function; call "
            "torch.compiler.disable(optimizer.step)() there instead"
        )
    if optimizer._inputs is None or not _same(optimizer._inputs.params, _params_of(optimizer)):
        optimizer._inputs = GraphInputs(optimizer)


def _prepare_states(handle: str, actions: str) -> None:
    """Called while a graph is traced: makes the states that the graph will be given. Masters, which hold the
    parameters' values, begin when the graph runs."""
    optimizer = _OPTIMIZERS[handle]
    sync_with_module(optimizer)
    inputs = optimizer._inputs
    assert inputs is not None
    stepped = {id(p) for p, action in zip(inputs.params, actions, strict=True) if action == _STEPPED}
    ensure_states(optimizer, lambda p: id(p) in stepped, masters=False)
    inputs.gather()


def trace_step(optimizer: FusedOptimizer) -> None:
    """``AIMFusedOptimizer._step`` as a graph has it."""
    handle = optimizer._handle
    _prepare_params(handle)
    inputs: Any = optimizer._inputs
    params, grads, actions = [], [], ""
    for index, p in enumerate(inputs.params):
        grad = p.grad
        if grad is not None:
            params.append(p)
            grads.append(grad)
            actions += _STEPPED
        # Asked last: what is asked here becomes a condition of the graph.
        elif inputs.emits[index]:
            params.append(p)
            actions += _EMITTED
        else:
            actions += _NOTHING
    if not grads and optimizer.process_group is None:  # of which others may have gradients, and wait for this process
        return
    _prepare_states(handle, actions)
    torch.ops.aim_kernels.step(
        inputs.number,
        actions,
        params,
        grads,
        inputs.states,
        inputs.masters,
        inputs.rows,
        inputs.statistics,
        inputs.control,
        inputs.anchors,
        inputs.lrs,
        getattr(optimizer, "grad_scale", None),
        getattr(optimizer, "found_inf", None),
    )


# -- the operator ------------------------------------------------------------------------------------------------------


def _step(
    inputs: Tensor,
    actions: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    masters: list[Tensor],
    rows: Tensor,
    statistics: Tensor,
    control: Tensor,
    anchors: list[Tensor],
    lrs: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    given = _INPUTS.get(int(inputs))
    optimizer = None if given is None else given.optimizer()
    if given is None or optimizer is None:
        raise RuntimeError("the optimizer of this compiled step is gone")
    _refuse_release(optimizer)
    _refuse_clearing(optimizer)
    optimizer._opt_called = True  # not where it is traced: the compiler loses what is set there
    optimizer._weights.refuse_true()
    each = iter(grads)
    all_grads = [next(each) if action == _STEPPED else None for action in actions]
    passed = [*params, *states, *masters, rows, statistics, control, *anchors, *lrs]
    own = given.tensors(actions)

    elsewhere = {} if _same(passed, own) else _elsewhere(own, passed)
    plan = optimizer._current_plan() if given.plan is optimizer._plan else None
    if plan is None:
        plan = _rebuild(optimizer, given, all_grads, elsewhere)
    given.former = None
    step_inputs = StepInputs(grad_scale, found_inf)
    if elsewhere:
        with _substituted(optimizer, elsewhere) as plan:
            plan.take(all_grads)
            optimizer._run(plan, step_inputs)
        return
    if not _same(plan.grads, all_grads):
        plan.take(all_grads)
    optimizer._run(plan, step_inputs)


def _elsewhere(own: list[Tensor], passed: list[Tensor]) -> dict[int, Tensor]:
    """Those tensors that stand for others, by the identity of the others: copies that the graph will put back."""
    return {
        id(mine): other
        for mine, other in zip(own, passed, strict=True)
        if mine is not other and (mine.data_ptr() != other.data_ptr() or mine.stride() != other.stride())
    }


def _resolve(tensor: Tensor, elsewhere: dict[int, Tensor]) -> Tensor:
    """A state, or what stands for it."""
    buffer = elsewhere.get(id(buffer_of(tensor)))
    return tensor if buffer is None else _within(buffer, tensor)


def _rebuild(
    optimizer: FusedOptimizer, given: GraphInputs, grads: list[Tensor | None], elsewhere: dict[int, Tensor]
) -> StepPlan:
    """Makes what the step needs and does not have: states, masters, the plan; and the inputs of the next graph.

    What is made here is written at once, though no graph knows of it: nothing else can have read it before.
    """
    if not _same(given.params, _params_of(optimizer)):
        optimizer._inputs = None
        raise RuntimeError(
            "the lists of parameters were edited after the step was compiled; nothing was changed, and the next step "
            "will be compiled anew (add_param_group is the way to add parameters)"
        )
    for p in optimizer._weights.restore_astray():
        if id(p) in elsewhere:  # which the graph puts back
            elsewhere[id(p)].copy_(p)
    sync_with_module(optimizer)
    validation.check_gradients(optimizer.param_groups, grads)
    stepped = {id(p) for p, grad in zip(given.params, grads, strict=True) if grad is not None}
    # Of those that may get a master: what they keep beside their weights, which the master takes up.
    rests = {
        id(p): {name: _resolve(value, elsewhere) for name, value in optimizer.state.get(p, {}).items() if name in RESTS}
        for p in given.params
        if id(p) in elsewhere and "master" not in optimizer.state.get(p, ())
    }
    ensure_states(optimizer, lambda p: id(p) in stepped)
    for p in given.params:
        if id(p) in rests and "master" in optimizer.state.get(p, ()):
            optimizer.state[p]["master"].copy_(true_weights(elsewhere[id(p)], rests[id(p)]))
            elsewhere[id(p)].copy_(optimizer.state[p]["master"])
    inputs = GraphInputs(optimizer, given, elsewhere)
    optimizer._inputs = inputs
    inputs.plan = plan = optimizer._make_plan(grads)
    return plan


@contextmanager
def _substituted(optimizer: FusedOptimizer, elsewhere: dict[int, Tensor]) -> Iterator[StepPlan]:
    """A plan over what stands for the optimizer's tensors, for one step."""

    def there(value: Any) -> Any:
        return elsewhere.get(id(value), value)

    tables = copy.copy(optimizer.tables)
    tables.rows, tables.statistics, tables.control = map(there, (tables.rows, tables.statistics, tables.control))
    groups = [
        {**group, "params": list(map(there, group["params"])), "lr": there(group["lr"])}
        for group in optimizer.param_groups
    ]
    states = {
        there(p): {name: _resolve(v, elsewhere) if isinstance(v, Tensor) else v for name, v in state.items()}
        for p, state in ((p, optimizer.state[p]) for p in _params_of(optimizer) if p in optimizer.state)
    }
    before = [(state, name, value) for state in states.values() for name, value in state.items()]
    sources = optimizer._sources()._replace(param_groups=groups, state=states, tables=tables)
    arrange_all(sources)
    yield StepPlan(sources)
    optimizer.tables.steps = tables.steps
    for state, name, value in before:
        if state[name] is not value:  # it was arranged
            value.copy_(state[name])


# Not torch.library.custom_op, whose layers in Python take five times as long over hundreds of tensors. What it would
# add, version counters, the step moves by itself.
torch.library.define("aim_kernels::step", _SCHEMA, tags=_tags())
torch.library.impl("aim_kernels::step", "CompositeExplicitAutograd")(_step)


@torch.library.register_fake("aim_kernels::step")
def _(inputs: Tensor, actions: str, params: list[Tensor], grads: list[Tensor], *others: Any) -> None:
    """Nothing comes out."""
