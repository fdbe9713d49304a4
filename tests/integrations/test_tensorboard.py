"""Scalars: every number of the statistics and of AIM's tables, by tag, for any writer and TensorBoard's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from integration_helpers import CLASSES, Network, Recorder, columns, samples
from torch.nn.functional import cross_entropy

import aim_kernels as ak
from aim_kernels.integrations.tensorboard import MEASURED, statistics_scalars, write_statistics, write_update


def stepped(strength: float = 0.25) -> tuple[Network, ak.AIMFusedOptimizer]:
    network = Network()
    optimizer = network.make_optimizer(strength)
    audio, video, labels = columns()
    cross_entropy(network(audio, video), labels).backward()
    optimizer.step()
    return network, optimizer


def test_every_statistic_has_a_tag_of_its_own() -> None:
    _, optimizer = stepped()
    found = statistics_scalars(optimizer)
    expected = {}
    for number, (row, group) in enumerate(zip(optimizer.statistics(), optimizer.param_groups, strict=True)):
        tag = f"group{number}" if row["modality"] is None else f"{row['modality']}/{row['depth']}"
        if row["modality"] is not None and not group["modulated"]:
            tag += "/rest"
        expected |= {f"aim/{tag}/{name}": row[name] for name in MEASURED}
        if group["modulated"]:
            expected[f"aim/{tag}/strength"] = 0.25 if tag == "video/1" else 0.0
    assert found == expected
    # Two modalities of two blocks: weights and biases of each, and the head.
    assert len(found) == 9 * len(MEASURED) + 4


def test_strength_is_that_of_the_auxiliary_phase_whatever_was_drawn() -> None:
    _, optimizer = stepped(0.0)
    optimizer.set_phase_rows(0, aux={"live_well": 0.375})
    optimizer.set_phases(0.0)
    assert optimizer.modulation()[0]["live_well"] == 1.0
    assert statistics_scalars(optimizer)["aim/audio/0/strength"] == 0.625


def test_what_was_not_measured_is_not_written() -> None:
    network = Network()
    optimizer = network.make_optimizer()
    assert math.isnan(optimizer.statistics()[0]["under_fraction"])
    found = statistics_scalars(optimizer)
    assert "aim/audio/0/under_fraction" not in found
    assert found["aim/audio/0/grad_norm"] == 0.0
    assert not any(math.isnan(value) for value in found.values())


def test_updates_are_written() -> None:
    network, optimizer = stepped(0.0)
    aim = ak.AIM(network, optimizer, CLASSES)
    writer = Recorder()
    inputs, labels, _ = samples()
    for step, held_out in ((3, None), (4, (inputs, labels))):
        table = aim.update(inputs, labels, held_out=held_out)
        write_update(writer, table, step)
    seen = {(tag, step): value for tag, value, step in writer.seen}
    for modality, depth in (("audio", 0), ("audio", 1), ("video", 0), ("video", 1)):
        first, second = aim.history
        tag = f"aim/{modality}/{depth}"
        for step, table in ((3, first), (4, second)):
            for name, cells in (("score", table.scores), ("excess", table.excess), ("kappa", table.kappa)):
                assert seen.pop((f"{tag}/{name}", step)) == cells[modality][depth]
        assert second.held_out_scores is not None
        assert seen.pop((f"{tag}/held_out_score", 4)) == second.held_out_scores[modality][depth]
    assert seen == {}


def test_summary_writer_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    _, optimizer = stepped()
    with SummaryWriter(str(tmp_path)) as writer:
        write_statistics(writer, optimizer, 7)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    expected = statistics_scalars(optimizer)
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, value in expected.items():
        (event,) = events.Scalars(tag)
        assert event.step == 7
        assert event.value == pytest.approx(value, rel=1e-6)  # TensorBoard keeps float32
