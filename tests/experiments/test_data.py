"""The demo's data sets: shapes, splits, and that the shortcut is where it should be."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from aim_kernels.experiments.data import MissingPackageError, MultimodalData, Split, coloured_digits, smartwatch


def equal(first: MultimodalData, second: MultimodalData) -> bool:
    pairs = zip(
        (first.train, first.validation, first.test), (second.train, second.validation, second.test), strict=True
    )
    return all(
        len(a) == len(b) and torch.equal(a.labels, b.labels) and all(map(torch.equal, a.inputs, b.inputs))
        for a, b in pairs
    )


def hue_of(split: Split) -> torch.Tensor:
    """The palette colour nearest to each image's colour, by comparison with the grey image."""
    grey, colour = split.inputs
    tint = (colour * grey).sum((2, 3)) / (grey * grey).sum((2, 3))
    hues = torch.tensor([[abs(h - 3) - 1, 2 - abs(h - 2), 2 - abs(h - 4)] for h in torch.arange(10) * 0.6]).clamp(0, 1)
    return torch.cdist(tint, hues).argmin(1)


def test_digits_colour_is_the_class_in_training_only() -> None:
    data = coloured_digits(3)
    assert (data.modalities, data.num_classes) == (("grey", "colour"), 10)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [800, 400, 597]
    assert data.train.inputs[0].shape == (800, 1, 8, 8)
    assert data.train.inputs[1].shape == (800, 3, 8, 8)
    assert (hue_of(data.train) == data.train.labels).float().mean() > 0.7
    for split in (data.validation, data.test):
        assert 0.05 < (hue_of(split) == split.labels).float().mean() < 0.16
        assert set(hue_of(split).tolist()) == set(range(10))
    exact = coloured_digits(3, jitter=0.0)
    assert torch.equal(hue_of(exact.train), exact.train.labels)


def test_digits_are_all_of_them_once() -> None:
    from sklearn.datasets import load_digits

    data = coloured_digits(1)
    grey = torch.cat([s.inputs[0] for s in (data.train, data.validation, data.test)])
    images = torch.as_tensor(load_digits().images, dtype=torch.float32) / 16
    assert torch.equal(grey.flatten(1).sum(1).sort()[0], images.flatten(1).sum(1).sort()[0])


def test_digits_seed_decides() -> None:
    assert equal(coloured_digits(0), coloured_digits(0))
    assert not equal(coloured_digits(0), coloured_digits(1))
    with pytest.raises(ValueError, match="jitter"):
        coloured_digits(0, jitter=-1.0)


def test_watch_windows_are_standardized_and_people_kept_apart() -> None:
    data = smartwatch(2)
    assert (data.modalities, data.num_classes) == (("accelerometer", "gyroscope"), 7)
    assert sum(len(s) for s in (data.train, data.validation, data.test)) == 4677
    for x in data.train.inputs:
        assert x.shape[1:] == (3, 100)
        assert x.mean((0, 2)).abs().max() < 1e-4
        assert (x.std((0, 2)) - 1.0).abs().max() < 1e-3
    assert set(data.test.labels.tolist()) == set(range(7))
    # windows overlap by half, so a person in two splits would show as equal halves
    halves = [{x[i, :, 50:].numpy().tobytes() for i in range(len(x))} for x in (data.train.inputs[0],)]
    starts = {x[:, :50].numpy().tobytes() for s in (data.validation, data.test) for x in s.inputs[0]}
    assert not halves[0] & starts
    within = {x[:, :50].numpy().tobytes() for x in data.train.inputs[0]}
    assert len(halves[0] & within) > 1000


def test_watch_seed_decides() -> None:
    assert equal(smartwatch(0), smartwatch(0))
    assert not equal(smartwatch(0), smartwatch(1))


def test_splits_move_and_select() -> None:
    data = coloured_digits(0).to("cpu")
    part = data.train.take(torch.tensor([3, 1]))
    assert torch.equal(part.labels, data.train.labels[[3, 1]])
    assert torch.equal(part.inputs[1], data.train.inputs[1][[3, 1]])


@pytest.mark.parametrize(
    ("make", "package", "name"), [(coloured_digits, "sklearn", "scikit-learn"), (smartwatch, "seglearn", "seglearn")]
)
def test_a_missing_package_names_the_cure(
    monkeypatch: pytest.MonkeyPatch, make: object, package: str, name: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda p, *rest: None if p == package else find(p, *rest))
    with pytest.raises(
        MissingPackageError, match=rf'{name}, which is not installed: pip install "aim-kernels\[demo\]"'
    ):
        make(0)  # type: ignore[operator]


def test_watch_does_not_import_seglearn() -> None:
    before = "seglearn" in sys.modules
    smartwatch(0)
    assert ("seglearn" in sys.modules) == before
