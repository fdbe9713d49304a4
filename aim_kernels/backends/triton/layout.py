"""Offsets of the tables' fields, counted in their own type, which the kernels add to pointers."""

from __future__ import annotations

import numpy as np
import triton.language as tl

from aim_kernels.step.layout import (
    CHUNK_RECORD,
    CONTROL,
    DTYPES,
    FLAGS,
    GROUP_RECORD,
    MOMENTS,
    PHASE_COLUMNS,
    PHASES,
    ROW,
    ROW_COLUMNS,
    RULES,
    SPAN_RECORD,
    STATISTIC,
    STATISTICS_COLUMNS,
    TENSOR_FLAGS,
    TENSOR_RECORD,
    WEIGHTS,
)
from aim_kernels.step.layout import PACKED_BLOCK as _PACKED_BLOCK


def _at(record: np.dtype[np.void], name: str) -> tl.constexpr:
    dtype, offset = record.fields[name][:2]  # type: ignore[index]
    return tl.constexpr(offset // dtype.itemsize)


def _words(record: np.dtype[np.void], size: int = 8) -> tl.constexpr:
    return tl.constexpr(record.itemsize // size)


TENSOR_WORDS = _words(TENSOR_RECORD)
PARAM = _at(TENSOR_RECORD, "param")
GRAD = _at(TENSOR_RECORD, "grad")
EXP_AVG = _at(TENSOR_RECORD, "exp_avg")
EXP_AVG_SQ = _at(TENSOR_RECORD, "exp_avg_sq")
EXTRA = _at(TENSOR_RECORD, "extra")
MASTER = _at(TENSOR_RECORD, "master")
ANCHOR = _at(TENSOR_RECORD, "anchor")
STEP = _at(TENSOR_RECORD, "step")
EXP_AVG_SCALE = _at(TENSOR_RECORD, "exp_avg_scale")
EXP_AVG_SQ_SCALE = _at(TENSOR_RECORD, "exp_avg_sq_scale")
EXTRA_SCALE = _at(TENSOR_RECORD, "extra_scale")
REST = _at(TENSOR_RECORD, "rest")
EMA = _at(TENSOR_RECORD, "ema")
NUMEL = _at(TENSOR_RECORD, "numel")
FIRST = _at(TENSOR_RECORD, "first")
OFFSET = _at(TENSOR_RECORD, "offset")
GROUP = _at(TENSOR_RECORD, "group")
DTYPE = _at(TENSOR_RECORD, "dtype")
UNCOUNTED = _at(TENSOR_RECORD, "uncounted")
MOMENT_STORAGE = _at(TENSOR_RECORD, "moments")
WEIGHT_STORAGE = _at(TENSOR_RECORD, "weights")
STOCHASTIC = _at(TENSOR_RECORD, "stochastic")
ZERO_GRAD = _at(TENSOR_RECORD, "zero_grad")
MARKS = _at(TENSOR_RECORD, "flags")

GROUP_WORDS = _words(GROUP_RECORD)
LR = _at(GROUP_RECORD, "lr")
BETA1 = _at(GROUP_RECORD, "beta1")
BETA2 = _at(GROUP_RECORD, "beta2")
EPS = _at(GROUP_RECORD, "eps")
WEIGHT_DECAY = _at(GROUP_RECORD, "weight_decay")
MOMENTUM = _at(GROUP_RECORD, "momentum")
DAMPENING = _at(GROUP_RECORD, "dampening")
SCALE = _at(GROUP_RECORD, "scale")
TARGET = _at(GROUP_RECORD, "target")
RATE = _at(GROUP_RECORD, "rate")
LR_DECAY = _at(GROUP_RECORD, "lr_decay")
EMA_DECAY = _at(GROUP_RECORD, "ema_decay")
LR_TENSOR = _at(GROUP_RECORD, "lr_tensor")
RULE = _at(GROUP_RECORD, "rule")
NESTEROV = _at(GROUP_RECORD, "nesterov")
LR_DTYPE = _at(GROUP_RECORD, "lr_dtype")
FLAG_BITS = _at(GROUP_RECORD, "flags")

CHUNK_WORDS = _words(CHUNK_RECORD, 4)
CHUNK_TENSOR = _at(CHUNK_RECORD, "tensor")
CHUNK_INDEX = _at(CHUNK_RECORD, "index")

SPAN_WORDS = _words(SPAN_RECORD)
TENSOR_BEGIN = _at(SPAN_RECORD, "tensor_begin")
TENSOR_END = _at(SPAN_RECORD, "tensor_end")
CHUNK_BEGIN = _at(SPAN_RECORD, "chunk_begin")
CHUNK_END = _at(SPAN_RECORD, "chunk_end")

# Pairs of columns {under, well} are named by their first. Those of a phase are counted from the phase's first column.
ROW_WORDS = tl.constexpr(len(ROW_COLUMNS))
ROW_GRAD = tl.constexpr(ROW["grad_under"])
TAU_PREV = tl.constexpr(ROW["tau_prev"])
TAU = tl.constexpr(ROW["tau"])
NOISE = tl.constexpr(ROW["noise"])
EMITTED = tl.constexpr(ROW["emitted_under"])
PHASE_ROWS = tl.constexpr(ROW[f"{PHASES[0]}_{PHASE_COLUMNS[0]}"])
PHASE_WORDS = tl.constexpr(len(PHASE_COLUMNS))
PHASE_GRAD = tl.constexpr(PHASE_COLUMNS.index("grad_under"))
PHASE_STEP = tl.constexpr(PHASE_COLUMNS.index("step_under"))
PHASE_LIVE = tl.constexpr(PHASE_COLUMNS.index("live_under"))

STATISTICS = tl.constexpr(len(STATISTICS_COLUMNS))
COUNT = tl.constexpr(STATISTIC["numel"])
UNDER = tl.constexpr(STATISTIC["under"])
GRAD_SUM = tl.constexpr(STATISTIC["grad_sum"])
GRAD_SQ = tl.constexpr(STATISTIC["grad_sq"])
UPDATE_SQ = tl.constexpr(STATISTIC["update_sq"])
PARAM_SQ = tl.constexpr(STATISTIC["param_sq"])
NONFINITE = tl.constexpr(STATISTIC["nonfinite"])

SEED = tl.constexpr(CONTROL["seed"])
COUNTER = tl.constexpr(CONTROL["counter"])
THRESHOLD = tl.constexpr(CONTROL["threshold"])
PHASE = tl.constexpr(CONTROL["phase"])

ADAMW = tl.constexpr(RULES.index("adamw"))
ADAM = tl.constexpr(RULES.index("adam"))
SGD = tl.constexpr(RULES.index("sgd"))
ADAGRAD = tl.constexpr(RULES.index("adagrad"))
RMSPROP = tl.constexpr(RULES.index("rmsprop"))
LION = tl.constexpr(RULES.index("lion"))
AMSGRAD = tl.constexpr(FLAGS["amsgrad"])
CENTERED = tl.constexpr(FLAGS["centered"])
BY_FISHER = tl.constexpr(FLAGS["fisher"])
BY_GRAD = tl.constexpr(FLAGS["grad"])
ADOPTS = tl.constexpr(TENSOR_FLAGS["adopts"])
FROZEN = tl.constexpr(TENSOR_FLAGS["frozen"])
FLOAT64 = tl.constexpr(DTYPES.index("float64"))

WIDE = tl.constexpr(MOMENTS.index("wide"))
INT8 = tl.constexpr(MOMENTS.index("int8"))
STOCHASTIC_WEIGHTS = tl.constexpr(WEIGHTS.index("stochastic"))
SPLIT = tl.constexpr(WEIGHTS.index("split"))
KAHAN = tl.constexpr(WEIGHTS.index("kahan"))
PACKED_BLOCK = tl.constexpr(_PACKED_BLOCK)
