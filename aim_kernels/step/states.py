"""Per-parameter state: names, types and memory order, and initial values."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from aim_kernels.step import codecs
from aim_kernels.step.placement import spread
from aim_kernels.step.sharding import is_dtensor, like, local_of
from aim_kernels.step.supported import is_estimated

#: States of parameters up to this many elements share a buffer: fewer allocations, and one version counter to bump.
_SMALL = 1 << 16
_LINE = 64  # bytes, so that every state in a buffer starts on a cache line

#: The buffers of the states that lie side by side.
_BUFFERS: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of moments, masters and arithmetic for parameters of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments_of(group: dict[str, Any]) -> dict[str, str]:
    """The moments that a group keeps: field of ``layout.TENSOR_RECORD`` -> state key, torch.optim's where it has one.

    Modulated groups keep a first and a second moment under every rule: what the classes are made of.
    """
    rule, modulated, momentum = group["rule"], group["modulated"], group["momentum"]
    first: Any = None
    second: Any = None
    extra: Any = None
    if rule in ("adamw", "adam"):
        first, second = "exp_avg", "exp_avg_sq"
        extra = "max_exp_avg_sq" if group["amsgrad"] else None
    elif rule == "sgd":
        first = "momentum_buffer" if momentum else "exp_avg" if modulated else None
        second = "exp_avg_sq" if modulated else None
    elif rule == "adagrad":
        first, second = "exp_avg" if modulated else None, "sum"
    elif rule == "rmsprop":
        first, second = "grad_avg" if group["centered"] else "exp_avg" if modulated else None, "square_avg"
        extra = "momentum_buffer" if momentum else None
    elif rule == "lion":
        first, second = "exp_avg", "exp_avg_sq" if modulated else None
    names = {"exp_avg": first, "exp_avg_sq": second, "extra": extra}
    return {field: name for field, name in names.items() if name}


#: Moments that are never negative.
_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg")

#: Parameters of fewer elements keep float32 moments where 8 bits are asked for: they are biases and norms, whose
#: bytes nobody counts.
SMALLEST_PACKED = 4096

#: What a 16-bit parameter keeps beside its weights, by the group's ``master``: state key and type (None: its own).
_RESTS: dict[str, tuple[str, torch.dtype | None]] = {
    "split": ("remainder", torch.int16),
    "kahan": ("compensation", None),
}

#: Their keys.
RESTS = tuple(name for name, _ in _RESTS.values())

_HALVES = (torch.bfloat16, torch.float16)


def format_of(name: str) -> codecs.Format:
    """How a moment is stored in 8 bits, by its state key."""
    return codecs.SECOND if name in _SECOND else codecs.FIRST


def moments_dtype(group: dict[str, Any], p: Tensor) -> torch.dtype:
    """The type in which a parameter's moments are stored; uint8 means codes, with exponents beside them."""
    wide = arithmetic_dtype(p.dtype)
    if wide == torch.float64 or group["state_dtype"] in (None, "float32"):
        return wide
    if group["state_dtype"] == "bfloat16":
        return torch.bfloat16
    return torch.uint8 if p.numel() >= SMALLEST_PACKED else wide


def weights_of(group: dict[str, Any], p: Tensor) -> str | None:
    """What a parameter without live weights does for its true weights: the group's ``master``, where it is of 16
    bits."""
    storage: str | None = group["master"] if p.dtype in _HALVES else None
    return storage


def always_has_master(group: dict[str, Any], p: Tensor) -> bool:
    """Whether a parameter has float32 weights beside it, degraded or not."""
    return weights_of(group, p) == "float32"


def keeps_master(group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> bool:
    """Whether the master of a parameter stays when its group degrades nothing any more."""
    return always_has_master(group, p) and "step" in state


def is_frozen(p: Tensor, state: dict[str, Any]) -> bool:
    """Whether nothing has ever moved a parameter of a group with live weights that gets no gradient in this step, and
    nothing is about to: it requires none, or was so when its master was made. Then it keeps a master alone."""
    return "step" not in state and (not p.requires_grad or "master" in state)


class Kept(NamedTuple):
    """A state of one number an element: its key and its type."""

    name: str
    dtype: torch.dtype


def states_of(group: dict[str, Any], p: Tensor, master: bool = False) -> dict[str, Kept]:
    """The states of a parameter that a step reads and writes, but for master, anchor and step: field of
    ``layout.TENSOR_RECORD`` -> state. ``master``: whether it has one. Exponents are not listed."""
    dtype = moments_dtype(group, p)
    found = {field: Kept(name, dtype) for field, name in moments_of(group).items()}
    storage = weights_of(group, p)
    if storage in _RESTS and not master:
        name, rest = _RESTS[storage]
        found["rest"] = Kept(name, rest or p.dtype)
    if group["ema_decay"] is not None:
        found["ema"] = Kept("ema", arithmetic_dtype(p.dtype))
    return found


def exponents_key(name: str) -> str:
    """State key of the exponents of a moment in 8 bits."""
    return f"{name}_scale"


def in_memory_order(t: Tensor) -> Tensor:
    """The elements as one line, as they lie in memory; of a tensor that fills one block of it."""
    return t.as_strided((t.numel(),), (1,)) if is_dense(t) else t.contiguous().view(-1)


def read_moment(state: dict[str, Any], name: str) -> Tensor:
    """A moment in the arithmetic type; itself where that is how it is stored."""
    value: Tensor = local_of(state[name])
    if value.dtype == torch.uint8:
        flat = codecs.decode(in_memory_order(value), state[exponents_key(name)], format_of(name))
        return torch.empty_like(value, dtype=torch.float32).copy_(flat.as_strided(value.shape, value.stride()))
    return value.float() if value.dtype == torch.bfloat16 else value


def keep_moment(
    p: Tensor, state: dict[str, Any], name: str, value: Tensor, dtype: torch.dtype, random: Tensor | None = None
) -> None:
    """Stores a moment (local values in the arithmetic type) as ``dtype``, in place where it is so already.

    Args:
        random: 16 bits for every element, in memory order; None rounds to nearest.
    """
    old = state.get(name)
    had_codes = old is not None and old.dtype == torch.uint8
    if old is None or old.dtype != dtype:
        kept = torch.empty_like(value, dtype=dtype)
        state[name] = old = like(p, kept)
    kept = local_of(old)
    if dtype == torch.uint8:
        codes, exponents = codecs.encode(in_memory_order(value), format_of(name), random)
        in_memory_order(kept).copy_(codes)
        key = exponents_key(name)
        if had_codes and state[key].shape == exponents.shape:
            state[key].copy_(exponents)
        else:
            state[key] = exponents
        return
    if had_codes:
        state.pop(exponents_key(name), None)
    if dtype == torch.bfloat16 and random is not None:
        in_memory_order(kept).copy_(codecs.to_bfloat16(in_memory_order(value), random))
    elif kept is not value:
        kept.copy_(value)


def true_weights(p: Tensor, state: dict[str, Any]) -> Tensor:
    """A parameter's true weights in the arithmetic type: its master, or itself with what it lacks. A copy, but for the
    master."""
    if "master" in state:
        master: Tensor = state["master"]
        return master
    here = local_of(p).detach()
    # float16 has not all bits of the bfloat16 that the remainder belongs to.
    if "remainder" in state and p.dtype != torch.float16:
        rest = local_of(state["remainder"])
        # In the remainder's memory order, whatever became of the parameter's.
        here = torch.empty_like(rest, dtype=torch.bfloat16).copy_(here)
        made = torch.empty_like(rest, dtype=torch.float32)
        flat = codecs.join_bf16(in_memory_order(here), in_memory_order(rest))
        made.copy_(flat.as_strided(rest.shape, rest.stride()))
        return like(p, made)
    theta = master_of(p)
    if "compensation" in state:
        local_of(theta).add_(local_of(state["compensation"]))
    return theta


@torch.no_grad()
def store_weights(p: Tensor, state: dict[str, Any], theta: Tensor, storage: str | None) -> None:
    """Puts true weights into a parameter that is to have no master, with what it keeps of them beside it."""
    here, values = local_of(p), local_of(theta)
    for name in RESTS:
        state.pop(name, None)
    stored, rest = codecs.to_storage(in_memory_order(values), storage, p.dtype)
    here.copy_(stored.as_strided(values.shape, values.stride()))
    if rest is not None and storage is not None:
        kept = torch.empty_like(values, dtype=rest.dtype).copy_(rest.as_strided(values.shape, values.stride()))
        state[_RESTS[storage][0]] = like(p, kept)


def conform(group: dict[str, Any], p: Tensor, state: dict[str, Any], live: bool) -> None:
    """Makes the states of a parameter those that its group's options ask for, from whatever there is: after options
    changed, or a checkpoint of other ones was loaded. Rounds to nearest.

    Args:
        live: whether the group has live weights, which need a master.
    """
    dtype = moments_dtype(group, p)
    for name in moments_of(group).values():
        if name in state and state[name].dtype != dtype:
            keep_moment(p, state, name, read_moment(state, name), dtype)
    storage = weights_of(group, p)
    has = next((other for other, (name, _) in _RESTS.items() if name in state), None)
    if live or storage == "float32":
        if has is not None:
            theta = true_weights(p, state)
            if "master" not in state:
                state["master"] = theta
                # The nearest to it may be another where two are as near, and would pass for an edit. Through .data,
                # since no version is to move: the step moves it, and a backward may be under way.
                local_of(p).data.copy_(local_of(theta))
            for name in RESTS:
                state.pop(name, None)
    elif has is not None and has != storage and "master" not in state:
        store_weights(p, state, true_weights(p, state), storage)
    if group["ema_decay"] is None:
        state.pop("ema", None)


def adopt_edits(p: Tensor, master: Tensor, where: Tensor | None = None) -> None:
    """A master takes the elements whose parameter is not what a step leaves of them. Waits for no device.

    Args:
        where: a 0-dim boolean tensor: whether it is to; None: yes.
    """
    here, kept = local_of(p).detach(), local_of(master)
    here = here.to(kept.device, non_blocking=True)
    edited = _bits(here) != _bits(kept.to(here.dtype))
    if where is not None:
        edited &= where.to(kept.device, non_blocking=True)
    kept.copy_(torch.where(edited, here.to(kept.dtype), kept))


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def has_classes(group: dict[str, Any]) -> bool:
    """Whether a group's moments tell under-optimized elements from others."""
    return moments_of(group).keys() >= {"exp_avg", "exp_avg_sq"}


def step_count(p: Tensor, steps: float = 0.0) -> Tensor:
    """A parameter's state "step": 0-dim float32, beside the parameter, where its kernel counts."""
    return torch.tensor(steps, dtype=torch.float32, device=p.device)


def _step_counts(params: Sequence[Tensor]) -> list[Tensor]:
    here = [p.device.type == "cpu" and not is_estimated(p) for p in params]
    near = iter(_side_by_side([torch.Size(())] * sum(here), torch.float32, 1) if any(here) else [])
    return [
        next(near) if is_here else local_of(p).new_zeros((), dtype=torch.float32, requires_grad=False)
        for p, is_here in zip(params, here, strict=True)
    ]


def state_layout(p: Tensor) -> torch.memory_format:
    """Memory order of a parameter's states: its own, or contiguous where it fills no block of memory."""
    return torch.preserve_format if is_dense(local_of(p)) else torch.contiguous_format


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of the dimensions."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def master_of(p: Tensor) -> Tensor:
    """A copy in the arithmetic type, in the memory order of ``p`` (contiguous where ``p`` fills no block of memory)."""
    return like(p, local_of(p).detach().to(dtype=arithmetic_dtype(p.dtype), memory_format=state_layout(p), copy=True))


@torch.no_grad()
def zeros_like_all(params: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> list[Tensor]:
    """A zero state for every parameter (by default a moment in the arithmetic type), small ones side by side
    (:func:`_side_by_side`)."""
    wanted = [arithmetic_dtype(p.dtype) for p in params] if dtypes is None else dtypes
    result: dict[int, Tensor] = {}
    buffers: dict[torch.dtype, list[int]] = {}
    for index, (p, dtype) in enumerate(zip(params, wanted, strict=True)):
        is_small = p.device.type == "cpu" and p.is_contiguous() and 0 < p.numel() <= _SMALL
        if is_small and not is_dtensor(p) and not is_estimated(p):
            buffers.setdefault(dtype, []).append(index)
        else:
            local = local_of(p)
            zeros = torch.zeros_like(local, dtype=dtype, memory_format=state_layout(p), requires_grad=False)
            result[index] = like(p, zeros)
    for dtype, members in buffers.items():
        made = _side_by_side([params[index].shape for index in members], dtype, _LINE // dtype.itemsize)
        result.update(zip(members, made, strict=True))
    return [result[index] for index in range(len(params))]


@torch.no_grad()
def _side_by_side(shapes: Sequence[torch.Size], dtype: torch.dtype, align: int) -> list[Tensor]:
    """Zeros on the CPU, in one allocation and with one version counter, which their buffer has as well
    (:func:`buffer_of`).

    Each has a storage of its own size: who saves, pickles or copies one does not take the others along. None is a view
    of the buffer: compilers take views for a part of the storage of their base.

    Args:
        align: elements that each begins at a multiple of.
    """
    sizes = [-(-shape.numel() // align) * align for shape in shapes]
    buffer = torch.zeros(sum(sizes), dtype=dtype, device="cpu")
    memory, result, offset = buffer.view(torch.uint8).numpy(), [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        count = shape.numel()
        own = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset * dtype.itemsize)
        made = buffer.detach()
        made.data = own.view(shape)
        _BUFFERS[made] = buffer
        result.append(made)
        offset += size
    return result


def buffer_of(state: Tensor) -> Tensor:
    """The tensor in whose memory a state lies, and whose version counter it shares: a common buffer, or itself."""
    buffer = _BUFFERS.get(state)
    if buffer is None:
        buffer = state._base
        return buffer if buffer is not None and buffer.is_contiguous() and buffer.dtype == state.dtype else state
    # A state may have been given other memory since.
    first, size = state.data_ptr() - buffer.data_ptr(), state.numel() * state.element_size()
    return buffer if state.dtype == buffer.dtype and 0 <= first <= buffer.nbytes - size else state


def exponents_of(p: Tensor) -> Tensor:
    """Exponents of moments in 8 bits that are all zero; of what is here of a parameter."""
    here = local_of(p)
    return torch.zeros(codecs.blocks_of(here.numel()), dtype=torch.uint8, device=here.device)


def make_states(
    group: dict[str, Any], params: Sequence[Tensor], state: dict[Tensor, dict[str, Any]], *, live: bool, masters: bool
) -> None:
    """The states of some parameters of one group, as its options ask for them: what is missing begins, what is there is
    converted.

    Args:
        state: of the optimizer, by parameter.
        live: whether the group has live weights.
        masters: whether masters may be made; they hold the parameters' values.
    """
    fresh = [p for p in params if "step" not in state[p]]
    for p, step in zip(fresh, _step_counts(fresh), strict=True):
        state[p]["step"] = step
    for p in params:
        conform(group, p, state[p], live)
        if masters and "master" not in state[p] and (live or always_has_master(group, p)):
            state[p]["master"] = true_weights(p, state[p])
    missing = [
        (p, kept)
        for p in params
        for kept in states_of(group, p, "master" in state[p] or always_has_master(group, p)).values()
        if kept.name not in state[p]
    ]
    made = zeros_like_all([p for p, _ in missing], [kept.dtype for _, kept in missing])
    for (p, (name, dtype)), value in zip(missing, made, strict=True):
        state[p][name] = value
        if name == "ema":
            local_of(value).copy_(local_of(true_weights(p, state[p])))
        if dtype == torch.uint8:
            state[p][exponents_key(name)] = exponents_of(p)
        if name == "sum" and group["initial_accumulator_value"]:
            begin = torch.full_like(local_of(value), 0, dtype=arithmetic_dtype(p.dtype))
            keep_moment(p, state[p], name, begin.fill_(float(group["initial_accumulator_value"])), dtype)
    for p in params:
        spread(p, state[p])
