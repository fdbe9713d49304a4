"""The layouts in aim_kernels/step/layout.py are those of csrc/include/aim/step.h, as compiled and as written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from helpers import build

from aim_kernels import _C
from aim_kernels.step import layout

HEADER = Path(__file__).parents[2] / "csrc" / "include" / "aim" / "step.h"


@pytest.mark.parametrize(("record", "name"), [(layout.TENSOR_RECORD, "tensor"), (layout.GROUP_RECORD, "group")])
def test_records_have_the_compiled_offsets(record: np.dtype, name: str) -> None:
    compiled = _C.layout()
    assert {field: record.fields[field][1] for field in record.names} == compiled[name]
    assert record.itemsize == compiled[f"{name}_size"]


def test_tables_have_the_compiled_number_of_columns() -> None:
    compiled = _C.layout()
    assert compiled["row_columns"] == len(layout.ROW_COLUMNS)
    assert compiled["statistics_columns"] == len(layout.STATISTICS_COLUMNS)
    assert compiled["control_columns"] == len(layout.CONTROL_COLUMNS)


def test_columns_are_those_of_the_contract() -> None:
    assert list(layout.ROW_COLUMNS) == oracle.COLUMNS
    assert list(layout.STATISTICS_COLUMNS) == oracle.SUMS
    assert all(layout.ROW_COLUMNS[index] == name for name, index in layout.ROW.items())


def fields(struct: str) -> list[tuple[str, str]]:
    """(type, name) of the members of a struct in the header, in order; arrays of two give two names."""
    body = re.search(rf"struct {struct} {{(.*?)\n}};", HEADER.read_text(), re.S)
    assert body, struct
    found = []
    for line in re.sub(r"//[^\n]*", "", body[1]).split(";"):
        words = line.strip()
        if words:
            type_name, names = re.match(r"((?:const )?\w+\s*\*?)\s*(.*)", words, re.S).groups()  # type: ignore[union-attr]
            found += [(type_name.strip(), name.strip()) for name in names.split(",")]
    return found


def test_header_names_the_columns_in_order() -> None:
    expected = []
    for _, name in fields("Row"):
        base = name.split("[")[0]
        if base == "phases":
            expected += [
                f"{phase}_{member.split('[')[0]}_{side}"
                for phase in layout.PHASES
                for _, member in fields("PhaseRow")
                for side in ("under", "well")
            ]
        elif "[2]" in name:
            expected += [f"{base}_{side}" for side in ("under", "well")]
        else:
            expected.append(base)
    assert expected == list(layout.ROW_COLUMNS)
    assert [name for _, name in fields("Statistics")] == list(layout.STATISTICS_COLUMNS)
    assert [name for _, name in fields("Control")] == list(layout.CONTROL_COLUMNS)


def test_sizes_and_indices_are_64_bit_everywhere() -> None:
    """More than 2^31 elements do not fit into a test, so the types are looked at."""
    types = {name: type_name for type_name, name in fields("Tensor")}
    assert types["numel"] == types["first"] == types["offset"] == "int64_t"
    assert {type_name for type_name, _ in fields("Control")} == {"int64_t"}
    for field in layout.TENSOR_RECORD.names:
        if types[field] != "int32_t":
            assert layout.TENSOR_RECORD[field].itemsize == 8
    sources = [path for folder in ("bench", "cpu") for path in sorted((HEADER.parents[2] / folder).iterdir())]
    assert sources
    for source in sources:
        for line in source.read_text().splitlines():
            assert not re.search(r"\bint(32_t)? (numel|begin|end|at|first|index|count) *[=,);]", line), (
                f"{source.name}: {line}"
            )


def test_orders_of_dtypes_and_rules() -> None:
    text = HEADER.read_text()
    dtypes = re.search(r"enum class DType : int32_t { (.*?) }", text)[1]  # type: ignore[index]
    rules = re.search(r"enum class Rule : int32_t { (.*?) }", text)[1]  # type: ignore[index]
    assert [d.strip()[1:].lower() for d in dtypes.split(",")] == list(layout.DTYPES)
    assert [r.strip()[1:].lower() for r in rules.split(",")] == list(layout.RULES)


def test_tables_of_an_optimizer() -> None:
    optimizer = build("adamw", (((3,),), ((4,),)), seed=42)
    tables = optimizer.tables
    assert tables.rows.shape == (2, 19) and tables.rows.dtype == torch.float64
    assert tables.statistics.shape == (2, 7) and tables.statistics.dtype == torch.float64
    assert tables.control.tolist() == [42, 0, 0, 0] and tables.control.dtype == torch.int64
    assert tables.rows.tolist() == [layout.neutral_row()] * 2
