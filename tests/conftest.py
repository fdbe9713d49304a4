"""Settings of the whole suite."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch

if not (torch.cuda.is_available() or torch.xpu.is_available()):
    # Before anything imports Triton, which reads it where a kernel is decorated.
    os.environ.setdefault("TRITON_INTERPRET", "1")


#: Parameters of tests that take a compiler or an interpreter.
_COMPILED = ("cuda", "triton", "inductor")

#: Of these `make test` has each kind of kernel once, in Triton's interpreter.
_OF_EVERY_DAY = re.compile(r"test_oracle_in_lock_step\[triton-(adamw|sgd-nesterov|amsgrad|lion)-all\]")


def pytest_configure(config: pytest.Config) -> None:
    """Gives the run, with all its processes, a cache of compiled graphs of its own.

    The keys of torch's cache do not tell which inputs share memory: a graph that an older version left behind, whose
    states shared theirs, would be loaded for states that do not, and fail on their sizes.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="aim-kernels-tests-inductor-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves tests on emulated devices, and those of torch's compiler, to `make test-all`."""
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        each = [part for value in given for part in (value if isinstance(value, tuple) else (value,))]
        compiled = any(isinstance(part, str) and part in _COMPILED for part in each)
        if compiled and not _OF_EVERY_DAY.fullmatch(item.name):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _same_world_for_every_test() -> Iterator[None]:
    """A fixed seed, and the thread count left as it was found."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_graphs(one_thread: None) -> Iterator[None]:
    """Compiled graphs of this test only, and their counters."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
