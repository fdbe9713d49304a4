"""Places of large states in memory: streams of one step do not begin at the same place of a page.

Every large block that torch allocates on the CPU begins 64 bytes behind a page. A step reads and writes four to six of
them at once, and a load whose lower 12 address bits are those of an earlier store waits for it ("4K aliasing"; that the
places matter was measured, that this is the cause was not).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels.step.sharding import is_dtensor, like, local_of
from aim_kernels.step.supported import is_estimated

PAGE = 4096
#: Smaller states lie in the caches, and side by side.
LARGE = 1 << 18
#: Bytes behind a page, by state; parameters and gradients lie at 64. 13 cache lines apart, as far as there is room.
PLACES: dict[str, int] = {
    **dict.fromkeys(("exp_avg", "sum", "square_avg"), 896),
    **dict.fromkeys(("exp_avg_sq", "grad_avg"), 1728),
    **dict.fromkeys(("master", "remainder", "compensation"), 2560),
    "ema": 3392,
    **dict.fromkeys(("max_exp_avg_sq", "momentum_buffer"), 2144),
    "anchor": 3008,
}


def spread(p: Tensor, state: dict[str, Any]) -> None:
    """Moves large states to places of their own (:data:`PLACES`), where they are not there. Only on the CPU."""
    if p.device.type != "cpu" or is_estimated(p) or p.numel() < LARGE // 8:
        return
    for name, place in PLACES.items():
        value = state.get(name)
        if not isinstance(value, Tensor):
            continue
        local = local_of(value)
        if local.device.type != "cpu" or local.nbytes < LARGE or local.data_ptr() % PAGE == place:
            continue
        made = placed(local, place)
        state[name] = like(p, made) if is_dtensor(value) else made


@torch.no_grad()
def placed(values: Tensor, offset: int) -> Tensor:
    """A copy that begins ``offset`` bytes behind a page, with a storage of its own size."""
    memory: Any = np.empty(values.nbytes + PAGE, dtype=np.uint8)
    first = (offset - memory.ctypes.data) % PAGE
    flat = torch.frombuffer(memoryview(memory), dtype=values.dtype, count=values.numel(), offset=first)
    return flat.as_strided(values.shape, values.stride()).copy_(values)
