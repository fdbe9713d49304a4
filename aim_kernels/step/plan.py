"""The plan of a step: which memory it touches. Built once, rebuilt when something moved, otherwise only re-read.

A plan holds the state tensors whose addresses stand in its records, and their storages, so that no memory can be freed
under the kernel, and notices when a state was replaced.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels.step import sharding
from aim_kernels.step.arrangement import contiguous_strides, fills_block, is_arranged
from aim_kernels.step.inputs import StepInputs, StepSources
from aim_kernels.step.layout import FLAGS, GROUP_RECORD, MOMENTS, RULES, TENSOR_FLAGS, TENSOR_RECORD, WEIGHTS
from aim_kernels.step.options import OF_GROUPS, check_hyperparameters, deciding, in_floats
from aim_kernels.step.overlap import overlaps, waves_of
from aim_kernels.step.ownership import WRITTEN
from aim_kernels.step.states import (
    always_has_master,
    arithmetic_dtype,
    buffer_of,
    exponents_key,
    moments_dtype,
    states_of,
    weights_of,
)
from aim_kernels.step.supported import DTYPE_NUMBER, has_memory, is_idle, numel_of
from aim_kernels.step.validation import name_of
from aim_kernels.step.watch import watch_over

#: Options that a record is made of, beside lr, betas and under_optimized.
_READ = operator.itemgetter(
    *(o.name for o in OF_GROUPS if o.recorded and o.name not in ("lr", "betas", "under_optimized"))
)

#: Options that decide which states a group keeps: all of whose values count, and those of which only the truth or the
#: presence does.
_VALUES = operator.itemgetter(*deciding("value"))
(_TRUTH,), (_PRESENCE,) = deciding("truth"), deciding("presence")

#: Values of a group's record, out of a dict of them.
_FIELDS = operator.itemgetter(*(GROUP_RECORD.names or ()))

#: Types of options that nobody can write in place.
_PLAIN = {float, int, bool, str, type(None)}

_AMSGRAD, _CENTERED = FLAGS["amsgrad"], FLAGS["centered"]
_MOMENTS = {torch.bfloat16: MOMENTS.index("bfloat16"), torch.uint8: MOMENTS.index("int8")}

if TYPE_CHECKING:
    from aim_kernels.step.tables import Tables


class StepPlan:
    """All parameters of an optimizer, in group order, as the kernel's tables.

    Attributes:
        owners, group_of: the parameters as the groups hold them, by which states are kept, and their group numbers.
        params: what is stepped of them here: a DTensor's local part, others as they are. In the place of one that is
            passed by (``supported.is_idle``) stands an empty tensor.
        grads: this step's gradients as the user's tensors; None where there is none.
        records: ``layout.TENSOR_RECORD``, one a parameter; groups: ``layout.GROUP_RECORD``, one a group.
        lr_tensors: learning rates that a device reads by itself, by group.
        exchange: how the sums of a step become those of all processes; None where this process has everything.
        waves: numbers of the parameters, in lists to be stepped one after the other, if parameters share memory that a
            step writes; None if none do.
        staged: copies in which parameters are stepped that fill no aligned block of memory, by their numbers.
        itemsize: bytes of an element, by parameter.
        launch, pieces: the same tables on devices, and those of single parameters; made by those backends that need
            them.
    """

    launch: Any = None
    pieces: Any = None

    def __init__(self, sources: StepSources) -> None:
        self.sources = sources
        self.param_groups, self.state, self.tables = sources.param_groups, sources.state, sources.tables
        self.owners: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        primary = self.tables.rows.device
        self._idle = [is_idle(p, primary) for p in self.owners]
        self._sharded = [index for index, p in enumerate(self.owners) if sharding.is_dtensor(p)]
        self.params = [sharding.local_of(p) for p in self.owners] if self._sharded else self.owners
        if any(self._idle):
            nothing = torch.empty(0, dtype=torch.float32, device=primary)
            self.params = [nothing if idle else p for p, idle in zip(self.params, self._idle, strict=True)]
        self.exchange = sharding.exchange_of(self.owners, sources.process_group, sources.sync_every, sources.tables)
        self._zero_grad = sources.zero_grad
        self.group_of = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        self.grads: list[Tensor | None] = [None] * len(self.params)
        self.records = np.zeros(len(self.params), TENSOR_RECORD)
        self.groups = np.zeros(len(self.param_groups), GROUP_RECORD)
        self.lr_tensors: dict[int, Tensor] = {}
        self._hyperparameters: list[Any] = [None] * len(self.param_groups)
        self._in_tensors: set[int] = set()  # groups of which some may be tensors
        # What gradients are multiplied by: the sign of each group, and one multiplier of all. None: not yet.
        self._signs = np.ones(len(self.param_groups))
        self._multiplier: float | None = None
        self._states: list[Tensor] = []
        self._anchors: list[Tensor] = []
        # The states that records point to, by parameter and name: others are nobody's business here.
        self._known: dict[Tensor, dict[str, Tensor]] = {}
        # Parameters whose elements do not fill one aligned block are stepped in a contiguous copy.
        self.staged: dict[int, Tensor] = {}
        # Gradients copied into the memory order of their parameters, alive during the step.
        self._matched: list[Tensor] = []
        self._written: list[Tensor] = []
        # What read() fills in: where the gradients are, and which of them do not lie in the order of their parameter.
        self._grad_addresses = np.zeros(len(self.params), np.uint64)
        self._odd = np.zeros(len(self.params), bool)
        self._build()

    def _build(self) -> None:
        records, params = self.records, self.params
        records["numel"] = [p.numel() for p in params]
        process_group = self.sources.process_group
        if self._sharded or process_group is not None:
            first = sharding.first_indices(self.param_groups, process_group)
            # None: there is no noise, and for rounding the place in an order of this process's will do.
            sizes = [numel_of(p) for p in self.owners]
            starts = np.cumsum(sizes) - sizes
            records["first"] = [at if index is None else index for index, at in zip(first, starts, strict=True)]
            records["uncounted"] = sharding.uncounted(self.owners)
        else:
            each = np.array([numel_of(p) for p in self.owners]) if any(self._idle) else records["numel"]
            records["first"] = np.cumsum(each) - each
        if self._sharded:
            # Where elements here are not consecutive in the whole, they are rounded as if they were.
            offsets = [sharding.offset_of(p) or 0 for p in self.owners]
            records["offset"] = np.minimum(offsets, records["first"])
        records["group"] = self.group_of
        records["dtype"] = [DTYPE_NUMBER[p.dtype] for p in params]
        self.itemsize = np.array([p.element_size() for p in params], np.uint64)
        records["param"] = [p.data_ptr() for p in params]
        for index, p in enumerate(params):
            if not fills_block(p):
                buffer = torch.empty(p.shape, dtype=p.dtype, device=p.device)
                self.staged[index] = buffer
                records["param"][index] = buffer.data_ptr()
            self._read_state(index)
        elsewhere = {index: params[index] for index in self.staged}
        self.waves = waves_of(records, self.itemsize, elsewhere, self.name_of, shared=self.exchange is not None)
        # The strides of a gradient that can be read as it is.
        strides = [contiguous_strides(p) if index in self.staged else p.stride() for index, p in enumerate(params)]
        self._watch = watch_over(self.param_groups, self.owners, self._idle, strides, self.state, self._known)
        self._decisive = list(map(_decisive, self.param_groups))
        # A tensor can be given other memory and stay the same object (tensor.data = ...); the old one must not go.
        self._storages = [tensor.untyped_storage() for tensor in (*self._states, *self._anchors)]
        # A buffer has the version counter of all states that lie in it.
        self._written = list({id(t): t for t in map(buffer_of, self._states)}.values())
        # A DTensor's version is its own, not that of its local part.
        self._written += [self.owners[index] for index in self._sharded]

    def _read_state(self, index: int) -> None:
        group, record = self.param_groups[self.group_of[index]], self.records[index]
        record["moments"] = _MOMENTS.get(moments_dtype(group, self.owners[index]), 0)
        record["stochastic"] = record["moments"] and group["rounding"] == "stochastic"
        record["zero_grad"] = self._zero_grad
        record["flags"] = 0
        state = self.state.get(self.owners[index])
        if not state or self._idle[index]:
            return
        has_master = "master" in state
        if has_master and adopts_edits(self.tables, self.group_of[index], group, self.owners[index]):
            record["flags"] |= TENSOR_FLAGS["adopts"]
        if has_master and "step" not in state:
            record["flags"] |= TENSOR_FLAGS["frozen"]
        kept = states_of(group, self.owners[index], has_master)
        how = weights_of(group, self.owners[index])
        record["weights"] = WEIGHTS.index(how) if how in WEIGHTS and not has_master else 0
        for field, (name, dtype) in kept.items():
            if name in state:
                self._keep_state_alive(index, field, name, dtype)
            if dtype == torch.uint8 and exponents_key(name) in state:
                exponents = state[exponents_key(name)]
                record[f"{field}_scale"] = exponents.data_ptr()
                self._keep_alive(index, exponents_key(name), exponents)
        wide = arithmetic_dtype(self.params[index].dtype)
        for name in ("master", "anchor"):
            if name in state:
                self._keep_state_alive(index, name, name, wide)
        if self.sources.follows_average and group["modulated"]:
            record["anchor"] = record["ema"]
        step = state.get("step")
        if step is not None:
            record["step"] = step.data_ptr()
            self._keep_alive(index, "step", step)

    def _keep_state_alive(self, index: int, field: str, name: str, dtype: torch.dtype) -> None:
        """Takes a state of one number an element into the record; it is arranged (``arrangement.arrange``)."""
        local = sharding.local_of(self.state[self.owners[index]][name])
        assert is_arranged(self.params[index], local, dtype), f"{self.name_of(index)}: {name} is not arranged"
        self.records[field][index] = local.data_ptr()
        self._keep_alive(index, name, local)

    def _keep_alive(self, index: int, name: str, tensor: Tensor) -> None:
        # An anchor is only read: kept alive, but its version stays.
        (self._anchors if name == "anchor" else self._states).append(tensor)
        owner = self.owners[index]
        self._known.setdefault(owner, {})[name] = self.state[owner][name]

    def anchor_of(self, index: int) -> Tensor | None:
        """What the live weights of a parameter are withdrawn to, of DTensors the local part; None: zero."""
        record, state = self.records[index], self.state_of(index)
        return None if not record["anchor"] else state["ema" if record["anchor"] == record["ema"] else "anchor"]

    def name_of(self, index: int) -> str:
        """What errors call a parameter."""
        number = self.group_of[index]
        return name_of(self.param_groups, number, index - self.group_of.index(number))

    def state_of(self, index: int) -> dict[str, Any]:
        """The states of a parameter, of DTensors their local parts."""
        state = self.state.get(self.owners[index], {})
        return {name: sharding.local_of(value) for name, value in state.items()} if self._sharded else state

    # -- before a step -----------------------------------------------------------------------------------------------

    def is_of(self, sources: StepSources) -> bool:
        """Whether the plan was made of the very same groups, states, tables and options."""
        return all(map(operator.is_, self.sources, sources))

    def read(self) -> bool:
        """Takes this step's gradients. False where something has to be built anew, or is wrong, first."""
        addresses = self._grad_addresses
        try:
            if self._watch is None or not self._watch.read(addresses, self._odd, self.grads):
                return False
        except RuntimeError:  # a gradient without plain memory (sparse, meta, ...)
            return False
        if self._sharded and not self._take_local():
            return False
        records = self.records
        if (records["step"][addresses != 0] == 0).any() or not self._keeps_the_same_moments():
            return False
        records["grad"] = addresses
        self._matched = []
        odd = self._odd | (addresses % self.itemsize != 0)
        for index in odd.nonzero()[0] if odd.any() else ():
            grad = self.grads[index]
            assert grad is not None
            if not has_memory(grad):
                return False
            records["grad"][index] = self._match(index, grad)
        self._spare_shared_gradients()
        return True

    def _keeps_the_same_moments(self) -> bool:
        try:
            return self._decisive == list(map(_decisive, self.param_groups))
        except (RuntimeError, TypeError, ValueError):  # no number; the checks before building name it
            return False

    def take(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """The same without shortcuts, for a plan just built, whose gradients were checked: ``grads``, one a parameter,
        or those that the parameters hold."""
        self.grads = [p.grad for p in self.owners] if grads is None else list(grads)
        self._take_local()
        self._matched = []
        for index, grad in enumerate(self.grads):
            self.records["grad"][index] = 0 if grad is None else self._match(index, grad)
        self._spare_shared_gradients()

    def _spare_shared_gradients(self) -> None:
        """Leaves it to :meth:`clear_gradients` to clear a gradient that several parameters have, which the step of the
        first of them would clear for the others."""
        if not self._zero_grad:
            return
        records = self.records
        there = np.flatnonzero((records["grad"] != 0) & (records["numel"] != 0))
        begin = records["grad"][there].astype(np.int64)
        end = begin + records["numel"][there] * self.itemsize[there].astype(np.int64)
        records["zero_grad"] = 1
        for pair in overlaps(begin, end, there):
            records["zero_grad"][list(pair)] = 0

    def _take_local(self) -> bool:
        """Makes gradients local. False where one is placed in another way than its parameter."""
        for index in self._sharded:
            grad = self.grads[index]
            if grad is not None:
                if not sharding.placed_alike(grad, self.owners[index]):
                    return False
                self.grads[index] = sharding.local_of(grad)
        return True

    def _match(self, index: int, grad: Tensor) -> int:
        """Address of the gradient's values in the memory order of its parameter."""
        p = self.params[index]
        flat = index in self.staged or p.is_contiguous()
        same = grad.is_contiguous() if flat else grad.stride() == p.stride()
        # Values in memory as they are: autograd makes gradients that are to be negated when they are read.
        plain = not (grad.is_neg() or grad._is_zerotensor())
        if same and plain and grad.data_ptr() % grad.element_size() == 0:
            return grad.data_ptr() or 8  # an empty gradient has no address, but it is there; nothing reads it
        strides = contiguous_strides(p) if flat else p.stride()
        copy = torch.empty_strided(p.shape, strides, dtype=grad.dtype, device=grad.device)
        self._matched.append(copy.copy_(grad))
        return copy.data_ptr()

    def has_gradients(self) -> bool:
        return bool(self.records["grad"].any())

    def read_hyperparameters(self, inputs: StepInputs, *, on_device: bool) -> None:
        """Takes the groups' hyperparameters, which schedulers change between steps.

        ``on_device``: learning rates and gradient scales in a device's memory are left for its kernels to read;
        otherwise they are read here, which waits for the device.
        """
        try:
            self._read_hyperparameters(inputs, on_device)
        except Exception:
            # What is no number at all fails before it is checked; the check names the option and the group.
            for number, group in enumerate(self.param_groups):
                check_hyperparameters(group, number)
            raise

    def _read_hyperparameters(self, inputs: StepInputs, on_device: bool) -> None:
        multiplier = 1.0 if on_device or inputs.grad_scale is None else 1.0 / float(inputs.grad_scale)
        self.lr_tensors = {}
        for number, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                if on_device and lr.device.type != "cpu":
                    self.lr_tensors[number] = lr
                    lr = 0.0
                else:
                    lr = float(lr)
            # As they were given, so that a string is not taken for the number that it spells.
            given = (lr, *group["betas"], *group["under_optimized"], *_READ(group))
            if given == self._hyperparameters[number] and number not in self._in_tensors:
                continue
            check_hyperparameters(group, number)
            self._take_hyperparameters(number, in_floats({**group, "lr": lr}))
            self._hyperparameters[number] = given
            # Whoever has the tensor may write it, which none of the above would see.
            if _PLAIN.issuperset(map(type, given)):
                self._in_tensors.discard(number)
            else:
                self._in_tensors.add(number)
        multiplier *= inputs.clip_factor
        if multiplier != self._multiplier:  # NaN too
            self.groups["scale"] = self._signs * multiplier
            self._multiplier = multiplier

    def _take_hyperparameters(self, number: int, group: dict[str, Any]) -> None:
        """Writes a group's record, all but how to read a learning rate on a device."""
        rule, decay = group["rule"], group["weight_decay"]
        beta1, beta2 = group["betas"]
        if rule == "rmsprop":
            beta2 = group["alpha"]
            beta1 = beta2 if group["centered"] else beta1
        if group["decouple_lr"]:
            decay = decay / group["reference_lr"]
        how, target = group["under_optimized"]
        flags = FLAGS.get(group["measure"], 0)
        record = {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": decay,
            "momentum": group["momentum"] if rule in ("sgd", "rmsprop") else 0.0,  # schedulers write it under any rule
            "dampening": group["dampening"],
            "scale": -1.0 if group["maximize"] else 1.0,
            "target": target,
            "rate": group["threshold_rate"] if how == "fraction" else 0.0,
            "lr_decay": group["lr_decay"],
            "ema_decay": group["ema_decay"] or 0.0,
            "lr_tensor": 0,  # by device.py, as is lr_dtype
            "rule": RULES.index(rule),
            "nesterov": bool(group["nesterov"]),
            "lr_dtype": 0,
            "flags": flags | (_AMSGRAD if group["amsgrad"] else 0) | (_CENTERED if group["centered"] else 0),
        }
        self.groups[number] = _FIELDS(record)
        self._signs[number] = self.groups["scale"][number]
        self._multiplier = None

    # -- around the kernel -------------------------------------------------------------------------------------------

    def load_staged(self, indices: Iterable[int] | None = None) -> None:
        for index in self.staged if indices is None or not self.staged else indices:
            if index in self.staged:
                self.staged[index].copy_(self.params[index])

    def store_staged(self, indices: Iterable[int] | None = None) -> None:
        for index in self.staged if indices is None or not self.staged else indices:
            if index in self.staged:
                self.params[index].copy_(self.staged[index])

    # -- one parameter at a time (gradient release) -------------------------------------------------------------------

    def view(self, tables: Tables) -> StepPlan:
        """The same plan over other tables, with records of its own: what is done to it in the middle of a step leaves
        this one as it was. Call :meth:`freeze_hyperparameters` before each step."""
        view = copy.copy(self)
        view.tables, view.records, view._zero_grad = tables, self.records.copy(), False
        view.launch = view.pieces = None
        return view

    def freeze_hyperparameters(self, plan: StepPlan) -> None:
        """Takes from the plan that this is a view of what holds for one step, whatever is set before it ends."""
        self.records[:] = plan.records
        self.records["grad"], self.records["zero_grad"] = 0, 0
        # Copies: a scheduler may write them before the step ends.
        self.lr_tensors = {number: lr.clone() for number, lr in plan.lr_tensors.items()}
        self.param_groups = [
            {**group, "lr": lr.clone() if isinstance(lr := group["lr"], Tensor) and lr.device.type == "cpu" else lr}
            for group in plan.param_groups
        ]
        self.forget_gradients()

    def take_one(self, index: int, grad: Tensor) -> None:
        """Takes the gradient of one parameter, and its states if they are new."""
        if not self.records["step"][index]:
            self._read_state(index)
        self._matched = []
        self.grads[index] = grad
        self.records["grad"][index] = self._match(index, grad)

    def forget_one(self, index: int) -> None:
        self._matched = []
        self.grads[index] = None
        self.records["grad"][index] = 0

    def bump_versions_of(self, indices: Iterable[int]) -> None:
        """``bump_versions`` of some parameters that were stepped or emitted."""
        changed = []
        for index in indices:
            changed.append(self.params[index])
            written = WRITTEN[self.param_groups[self.group_of[index]]["rule"]]
            changed += [t for name, t in self.state_of(index).items() if name in written and isinstance(t, Tensor)]
        torch.autograd.graph.increment_version(changed)

    def bump_versions(self) -> None:
        """Tells autograd which tensors changed under it: a backward through old values must fail, not be wrong."""
        changed: Iterable[Tensor] = self.params
        if not self.records["grad"].all():
            touched = (self.records["grad"] != 0) | (self.records["master"] != 0)
            changed = [self.params[i] for i in touched.nonzero()[0]]
        torch.autograd.graph.increment_version([*changed, *self._written])

    def clear_gradients(self, *, of_step: bool) -> None:
        """What is left to do for gradients that a step leaves as zeros. ``of_step``: its kernel has cleared those that
        it read where they lie."""
        if not self._zero_grad:
            return
        given = [grad for grad in self.grads if grad is not None and not grad._is_zerotensor()]
        if not of_step:
            if given:
                torch._foreach_zero_(given)
            return
        for index, grad in enumerate(self.grads):
            if grad is None or grad._is_zerotensor():
                continue
            # The kernel has read a copy in another order, or others have the gradient, too.
            if self.records["grad"][index] != (grad.data_ptr() or 8) or not self.records["zero_grad"][index]:
                grad.zero_()
        torch.autograd.graph.increment_version(given)

    def forget_gradients(self) -> None:
        """Lets zero_grad() free them: a plan that held on would double their memory during the next backward."""
        self.grads = [None] * len(self.params)
        self._matched = []


def adopts_edits(tables: Tables, number: int, group: dict[str, Any], p: Tensor) -> bool:
    """Whether the master of a parameter takes what was written to the module while that held undegraded weights: not
    where the group's live weights come and go, which edits would not survive."""
    return always_has_master(group, p) or tables.keeps_masters(number) or not tables.degrades(number)


def _decisive(group: dict[str, Any]) -> tuple[Any, ...]:
    """The options that decide which moments a group keeps (``states.moments_of``), cheaper to compare than those; the
    measure, of which a backend may not have all; and torch's name for two of the rules, which may contradict them."""
    return (_VALUES(group), not group[_TRUTH], group[_PRESENCE] is None, group.get("decoupled_weight_decay"))
