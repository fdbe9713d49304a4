"""Options of the benchmark suites."""

from __future__ import annotations

import pytest

from aim_kernels.bench.shapes import SETS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("aim_kernels benchmarks")
    group.addoption("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="sets of tensors to time")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "set_name" in metafunc.fixturenames:
        metafunc.parametrize("set_name", metafunc.config.getoption("--sets"), scope="module")
