"""What a device is sent: chunk tables that cover every element once, records in place, captured steps on their own."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from backends_under_test import enter
from helpers import Gradients, assign, build, parameters_of
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_kernels.backends import device
from aim_kernels.step.inputs import StepInputs
from aim_kernels.step.layout import GROUP_RECORD, TENSOR_RECORD
from aim_kernels.step.plan import StepPlan

CPU = torch.device("cpu")
NUMEL = st.lists(st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129, 1000]) | st.integers(0, 5000), max_size=12)


def covered(numel: np.ndarray, chunks: np.ndarray, chunk_size: int) -> list[np.ndarray]:
    """How often every element of every tensor is stepped."""
    counts = [np.zeros(n, int) for n in numel]
    for tensor, index in chunks.tolist():
        begin = index * chunk_size
        assert begin < numel[tensor], "a chunk without elements"
        counts[tensor][begin : begin + chunk_size] += 1
    return counts


@settings(deadline=None)
@given(numel=NUMEL, breaks=st.lists(st.integers(0, 12), max_size=4), chunk_size=st.sampled_from([64, 128, 1024]))
def test_every_element_lies_in_one_chunk_of_one_span(numel: list[int], breaks: list[int], chunk_size: int) -> None:
    sizes = np.array(numel, dtype=np.int64)
    group_count = len(breaks) + 1
    group_of = np.searchsorted(np.sort(np.array(breaks, dtype=np.int64)), np.arange(len(sizes)), side="right")
    chunks, spans = device.chunk_table(sizes, group_of.astype(np.int64), group_count, chunk_size)
    for count in covered(sizes, chunks, chunk_size):
        assert (count == 1).all()
    for number, span in enumerate(spans):
        mine = group_of[chunks["tensor"]] == number
        assert mine[span["chunk_begin"] : span["chunk_end"]].all()
        assert mine.sum() == span["chunk_end"] - span["chunk_begin"]
        tensors = np.arange(len(sizes))[span["tensor_begin"] : span["tensor_end"]]
        assert np.array_equal(tensors, np.flatnonzero(group_of == number))


def test_a_tensor_of_more_than_2_to_the_31_elements_is_covered() -> None:
    numel, chunk_size = np.array([5, 2**31 + 8192 + 3], dtype=np.int64), 8192
    chunks, spans = device.chunk_table(numel, np.zeros(2, np.int64), 1, chunk_size)
    assert len(chunks) == 1 + 2**18 + 2
    assert chunks[-1].tolist() == (1, 2**18 + 1)
    begins = chunks["index"].astype(np.int64) * chunk_size
    assert begins.max() == 2**31 + 8192
    assert spans[0].tolist() == (0, 2, 0, len(chunks))


def ready(**options: object) -> tuple[StepPlan, device.DeviceShard]:
    """A plan with gradients and its only shard, sent."""
    optimizer = build("adamw", (((5, 7), (33,), (0,)), ((129,),)), **options)
    params = parameters_of(optimizer)
    assign(params, Gradients(params)())
    plan = optimizer._ready_plan()
    assert plan is not None
    plan.read_hyperparameters(StepInputs(), on_device=True)
    shard = device.DeviceShard(plan, CPU, np.arange(len(params)), 64)
    shard.send(StepInputs())
    return plan, shard


def test_records_arrive_as_they_are() -> None:
    plan, shard = ready()
    assert shard.tensors.numpy().tobytes() == plan.records.tobytes()
    assert shard.groups.numpy().tobytes() == plan.groups.tobytes()
    assert shard.tensors.shape == (4, TENSOR_RECORD.itemsize // 8)
    assert shard.groups.shape == (2, GROUP_RECORD.itemsize // 8)
    assert shard.dtypes == (0,)


def test_nothing_is_sent_where_nothing_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, shard = ready()
    sent, send = [], device.Upload.send
    monkeypatch.setattr(device.Upload, "send", lambda self, content: sent.append(content) or send(self, content))
    shard.send(StepInputs())
    assert not sent
    plan.records["grad"][0] += 4
    shard.send(StepInputs())
    assert len(sent) == 1


def test_learning_rate_tensors_are_read_where_they_are() -> None:
    plan, shard = ready()
    lr = torch.tensor(0.25, dtype=torch.float64)
    plan.lr_tensors = {1: lr}
    shard.send(StepInputs())
    groups = np.frombuffer(shard.groups.numpy().tobytes(), GROUP_RECORD)
    assert groups["lr_tensor"].tolist() == [0, lr.data_ptr()]
    assert groups["lr_dtype"].tolist() == [0, 1]
    assert plan.groups["lr_tensor"].tolist() == [0, 0], "the plan's own table knows no device"


def test_a_captured_step_keeps_tables_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph replays the addresses it was captured with, whatever later steps send."""
    plan, shard = ready()
    eager = shard.tensors.data_ptr()
    shard._upload._spare = shard._upload._staging()  # as on a CUDA device, where a spare is pinned beforehand
    monkeypatch.setattr(device, "capturing", lambda device: True)
    shard.send(StepInputs())
    captured, content = shard.tensors, shard.tensors.clone()
    assert captured.data_ptr() != eager
    with pytest.raises(RuntimeError, match="captured twice"):
        shard.send(StepInputs())
    monkeypatch.setattr(device, "capturing", lambda device: False)
    plan.records["grad"][0] += 64
    shard.send(StepInputs())
    assert shard.tensors.data_ptr() == eager
    assert torch.equal(captured, content)


def test_an_eager_step_after_a_capture_sends_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, shard = ready()
    shard._upload._spare = shard._upload._staging()
    eager = shard.tensors.data_ptr()
    monkeypatch.setattr(device, "capturing", lambda device: True)
    shard.send(StepInputs())
    monkeypatch.setattr(device, "capturing", lambda device: False)
    shard.send(StepInputs())
    assert shard.tensors.data_ptr() == eager
    assert shard.tensors.numpy().tobytes() == plan.records.tobytes()


def test_capture_before_the_first_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = build("adamw", (((5,),),))
    params = parameters_of(optimizer)
    assign(params, Gradients(params)())
    monkeypatch.setattr("aim_kernels.optim.optimizer.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"captured.*side stream"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.slow  # compiles the emulated device
def test_what_a_graph_uses_outlives_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step goes on reading tables and states, also when the optimizer has planned anew since."""
    name = enter("cuda", monkeypatch)
    optimizer = build("adamw", (((5,), (70,)),), backend=name)
    params = parameters_of(optimizer)
    gradients = Gradients(params)
    assign(params, gradients())
    optimizer.step()
    assert optimizer._plan is not None and optimizer._plan.launch is not None
    shard = optimizer._plan.launch.primary
    shard._upload._spare = shard._upload._staging()
    with monkeypatch.context() as patch:
        patch.setattr(device, "capturing", lambda device: True)
        patch.setattr("aim_kernels.optim.optimizer.capturing", lambda device: True)
        optimizer.step()
    used = [weakref.ref(tensor) for tensor in (shard.chunk_sums, shard.chunks, optimizer.state[params[0]]["exp_avg"])]
    del shard
    optimizer.load_state_dict(optimizer.state_dict())
    assign(params, gradients())
    optimizer.step()
    gc.collect()
    assert all(ref() is not None for ref in used)
    assert not copy.deepcopy(optimizer)._captured
