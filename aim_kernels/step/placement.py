"""Places of large states in memory: streams of one step do not begin at the same place of a page.

Every large block that torch allocates on the CPU begins 64 bytes behind a page. A step reads and writes four to six of
them at once, and a load whose lower 12 address bits are those of an earlier store waits for it ("4K aliasing").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels.step.sharding import is_dtensor, like, local_of
from aim_kernels.step.supported import is_estimated

PAGE = 4096
#: Where torch's large blocks begin behind a page.
USUAL = 64
#: Bytes from the place of one state to that of the next: 13 cache lines, so that five are far from each other.
APART = 832
#: Smaller states lie in the caches, and side by side.
LARGE = 1 << 18


def spread(p: Tensor, state: dict[str, Any]) -> None:
    """Moves large states that lie where torch's blocks do to places of their own, the n-th ``n * 832`` bytes further.

    A tensor that was moved once stays. Only on the CPU, and of what fills one block of memory.
    """
    if p.device.type != "cpu" or is_estimated(p) or p.numel() * p.element_size() < LARGE // 4:
        return
    number = 0
    for name, value in state.items():
        if not isinstance(value, Tensor) or name == "step":
            continue
        local = local_of(value)
        if local.device.type != "cpu" or local.nbytes < LARGE or local.layout != torch.strided:
            continue
        number += 1
        if local.data_ptr() % PAGE == USUAL and local.untyped_storage().nbytes() == local.nbytes:
            made = placed(local, (USUAL + number * APART) % PAGE)
            state[name] = like(p, made) if is_dtensor(value) else made


@torch.no_grad()
def placed(values: Tensor, offset: int) -> Tensor:
    """A copy that begins ``offset`` bytes behind a page, with a storage of its own size."""
    memory: Any = np.empty(values.nbytes + PAGE, dtype=np.uint8)
    first = (offset - memory.ctypes.data) % PAGE
    flat = torch.frombuffer(memoryview(memory), dtype=values.dtype, count=values.numel(), offset=first)
    return flat.as_strided(values.shape, values.stride()).copy_(values)
