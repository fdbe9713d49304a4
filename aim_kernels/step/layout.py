"""The tables that a step reads and writes: column names in one place.

The same layouts stand in ``csrc/include/aim/step.h``; ``tests/step/test_tables.py`` compares the two.
``docs/design.md`` says what each column means.
"""

from __future__ import annotations

import numpy as np

PHASES = ("true", "aux")
PHASE_COLUMNS = ("grad_under", "grad_well", "step_under", "step_well", "live_under", "live_well")

#: Columns of one modulation row, in memory order (float64).
ROW_COLUMNS = (
    "grad_under",
    "grad_well",
    "tau_prev",
    "tau",
    "noise",
    "emitted_under",
    "emitted_well",
    *(f"{phase}_{column}" for phase in PHASES for column in PHASE_COLUMNS),
)
ROW = {name: index for index, name in enumerate(ROW_COLUMNS)}

#: The columns that users read and write: ``modulation()``, ``set_modulation()``.
PUBLIC_COLUMNS = (*PHASE_COLUMNS, "tau_prev", "tau", "noise")

#: Columns of the statistics table (float64), raw sums of the latest step.
STATISTICS_COLUMNS = ("numel", "under", "grad_sum", "grad_sq", "update_sq", "param_sq", "nonfinite")
STATISTIC = {name: index for index, name in enumerate(STATISTICS_COLUMNS)}

#: Columns of the control table (int64), one row an optimizer.
CONTROL_COLUMNS = ("seed", "counter", "threshold", "phase")
CONTROL = {name: index for index, name in enumerate(CONTROL_COLUMNS)}

#: Storage types of a parameter, as numbered in ``aim::DType``.
DTYPES = ("float32", "float64", "bfloat16", "float16")

#: Base rules, as numbered in ``aim::Rule``.
RULES = ("adamw", "adam", "sgd", "adagrad", "rmsprop", "lion")

#: How moments are stored, as numbered in ``aim::Moments``.
MOMENTS = ("wide", "bfloat16", "int8")

#: What a 16-bit parameter without a master keeps of its true weights, as numbered in ``aim::Weights``.
WEIGHTS = ("nearest", "stochastic", "split", "kahan")

#: Elements that share an exponent where moments have 8 bits (``aim::kPackedBlock``).
PACKED_BLOCK = 128

#: One parameter of a step (``aim::Tensor``). Pointers are addresses; 0 means absent.
TENSOR_RECORD = np.dtype(
    [
        ("param", np.uint64),  # live weights; the true weights where there is no master
        ("grad", np.uint64),  # 0: not stepped
        ("exp_avg", np.uint64),  # first moment, or SGD's momentum buffer
        ("exp_avg_sq", np.uint64),  # second moment, or Adagrad's sum
        ("extra", np.uint64),  # a third moment: AMSGrad's maximum, RMSprop's momentum buffer
        ("master", np.uint64),  # true weights, where live weights exist
        ("anchor", np.uint64),  # what live weights are withdrawn to; 0: zero
        ("step", np.uint64),  # float32 step count; 0: frozen, or nothing is kept
        ("exp_avg_scale", np.uint64),  # moments of 8 bits: exponents of the blocks
        ("exp_avg_sq_scale", np.uint64),
        ("extra_scale", np.uint64),
        ("rest", np.uint64),  # 16 bits an element: what a parameter lacks of its true weights
        ("ema", np.uint64),  # moving average of the true weights
        ("numel", np.int64),
        ("first", np.int64),  # global index of the first element (noise)
        ("offset", np.int64),  # its index in the whole parameter (rounding)
        ("group", np.int32),
        ("dtype", np.int32),
        ("uncounted", np.int32),  # another process adds it to the statistics
        ("moments", np.int32),  # as numbered in MOMENTS
        ("weights", np.int32),  # as numbered in WEIGHTS
        ("stochastic", np.int32),  # stored moments are rounded at random
        ("zero_grad", np.int32),  # the gradient is left as zeros
        ("flags", np.int32),  # a sum of TENSOR_FLAGS
    ],
    align=True,
)

#: What is special about a tensor (``aim::Mark``): its master takes what was written to undegraded weights since the
#: last step; nothing has ever moved it, and it has a master alone.
TENSOR_FLAGS = {"adopts": 1, "frozen": 2}

#: Hyperparameters of one group (``aim::Group``).
GROUP_RECORD = np.dtype(
    [
        ("lr", np.float64),
        ("beta1", np.float64),
        ("beta2", np.float64),  # RMSprop's alpha; where it is centered, beta1 as well
        ("eps", np.float64),
        ("weight_decay", np.float64),
        ("momentum", np.float64),
        ("dampening", np.float64),
        ("scale", np.float64),  # -1 to maximize
        ("target", np.float64),  # q of the threshold controller
        ("rate", np.float64),  # its step size; 0 holds the threshold
        ("lr_decay", np.float64),  # Adagrad's
        ("ema_decay", np.float64),
        ("lr_tensor", np.uint64),  # devices: address of the number that is read instead of lr; 0: lr
        ("rule", np.int32),
        ("nesterov", np.int32),
        ("lr_dtype", np.int32),  # of lr_tensor, as numbered in DTYPES
        ("flags", np.int32),  # a sum of FLAGS
    ],
    align=True,
)

#: Variants of a rule, and measures other than "snr" (``aim::Flag``).
FLAGS = {"amsgrad": 1, "centered": 2, "fisher": 4, "grad": 8}

#: What shares a CUDA kernel (``aim::cuda::Family``): rules (AMSGrad is of the others), and, of any rule, the tensors
#: that keep moments or weights in fewer bits, have an average or leave their gradient as zeros (``kPackedFamily``).
FAMILIES = ("adam", "sgd", "other", "general")

#: The elements [index * chunk_size, (index + 1) * chunk_size) of a tensor (``aim::cuda::Chunk``): one block's work.
CHUNK_RECORD = np.dtype([("tensor", np.int32), ("index", np.int32)], align=True)

#: What belongs to one group on a device: tensors and chunks [begin, end) (``aim::cuda::Span``).
SPAN_RECORD = np.dtype(
    [(name, np.int64) for name in ("tensor_begin", "tensor_end", "chunk_begin", "chunk_end")], align=True
)

#: One device's share of a step (``aim::cuda::Work``), which has what the fields mean.
WORK_RECORD = np.dtype(
    [
        *(
            (name, np.uint64)
            for name in (
                "tensors",
                "groups",
                "rows",
                "statistics",
                "control",
                "chunks",
                "spans",
                "partials",
                "phases",
                "sums",
                "others",
                "grad_scale",
                "found_inf",
            )
        ),
        ("chunk_count", np.int64),
        ("group_count", np.int64),
        ("others_count", np.int64),
        ("chunk_size", np.int32),
        ("threads", np.int32),
        ("dtypes", np.int32),
        ("families", np.int32),
    ],
    align=True,
)

#: One run of memory that the memory floor goes over (``aim::StreamRun``).
STREAM_RECORD = np.dtype(
    [("address", np.uint64), ("size", np.int64), ("reads", np.int32), ("writes", np.int32)], align=True
)


def neutral_row(tau: float = 0.0) -> list[float]:
    """A row that leaves the base rule as it is, with threshold ``tau``."""
    row = [1.0] * len(ROW_COLUMNS)
    row[ROW["tau_prev"]] = row[ROW["tau"]] = tau
    row[ROW["noise"]] = 0.0
    return row
