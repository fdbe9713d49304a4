"""Memory that several parameters of a step share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def waves_of(
    records: NDArray[np.void],
    itemsize: NDArray[np.uint64],
    elsewhere: dict[int, Tensor],
    name_of: Callable[[int], str],
    *,
    shared: bool,
) -> list[list[int]] | None:
    """Parameters that share memory which a step writes are stepped one after the other, in their order, as torch.optim
    steps them. Returns the numbers of the parameters in lists to be stepped in turn; None if none share any.

    Args:
        records: ``layout.TENSOR_RECORD``; ``itemsize``: bytes of an element, by parameter.
        elsewhere: parameters that are stepped in a copy, by their numbers; these, too, are written.
        name_of: what errors call a parameter.
        shared: whether parameters have parts in several processes.

    Raises RuntimeError: they have live weights, or parts in several processes; or what is to be two tensors of one
    parameter lies in one memory.
    """
    begins, ends, owners = [], [], []
    for field, size in _written(records, itemsize).items():
        there = np.flatnonzero((records[field] != 0) & (records["numel"] != 0))
        begins.append(records[field][there].astype(np.int64))
        ends.append(begins[-1] + (size * records["numel"])[there])
        owners.append(there)
    counts = np.flatnonzero(records["step"])
    begins.append(records["step"][counts].astype(np.int64))
    ends.append(begins[-1] + 4)
    owners.append(counts)
    for index, p in elsewhere.items():  # the copy is no other's
        extent = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)) + 1
        begins.append(np.array([p.data_ptr()]))
        ends.append(begins[-1] + extent * p.element_size())
        owners.append(np.array([index]))
    pairs = overlaps(np.concatenate(begins), np.concatenate(ends), np.concatenate(owners))
    if not pairs:
        return None
    for pair in pairs:
        if pair[0] == pair[1]:
            raise RuntimeError(
                f"{name_of(pair[0])}: two of its states, or one and the parameter, share memory; give each "
                "its own (clone())"
            )
        if shared or records["master"][list(pair)].any():
            raise RuntimeError(
                f"{name_of(pair[0])} and {name_of(pair[1])} share memory, which neither live weights nor "
                "steps of several processes can have; make them one parameter"
            )
    wave = [0] * len(records)
    for first, later in sorted(pairs, key=lambda pair: (pair[1], pair[0])):
        wave[later] = max(wave[later], wave[first] + 1)
    return [[index for index, at in enumerate(wave) if at == number] for number in range(max(wave) + 1)]


def _written(records: NDArray[np.void], itemsize: NDArray[np.uint64]) -> dict[str, NDArray[np.int64]]:
    """What a step writes: fields of the records, and the bytes that an element takes there."""
    stored = itemsize.astype(np.int64)
    wide = np.where(stored == 8, 8, 4)
    moment = np.select([records["moments"] == 1, records["moments"] == 2], [2, 1], wide)
    sizes = {"param": stored, "master": wide, "ema": wide, "rest": np.full_like(wide, 2)}
    return sizes | dict.fromkeys(("exp_avg", "exp_avg_sq", "extra"), moment)


def overlaps(begin: NDArray[np.int64], end: NDArray[np.int64], owner: NDArray[np.int64]) -> set[tuple[int, int]]:
    """Pairs of owners, the lesser first, of which some ranges [begin, end) of addresses overlap: twice the same owner
    for two ranges of its own."""
    order = np.argsort(begin, kind="stable")
    begin, end, owner = begin[order], end[order], owner[order]
    if not (begin[1:] < np.maximum.accumulate(end)[:-1]).any():
        return set()
    pairs = set()
    for i in range(len(begin)):
        for j in range(i + 1, len(begin)):
            if begin[j] >= end[i]:
                break
            pairs.add((min(int(owner[i]), int(owner[j])), max(int(owner[i]), int(owner[j]))))
    return pairs
