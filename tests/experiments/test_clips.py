"""Published data sets in their layouts on disk, made tiny; sound and pictures against what was written."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from written_files import names, sine, write_frames, write_video, write_wav

from aim_kernels.experiments.data import MissingPackageError, ave, crema_d, kinetics_sounds, ucf101
from aim_kernels.experiments.data.clips import EMOTIONS
from aim_kernels.experiments.data.media import (
    IMAGENET,
    Flow,
    Frames,
    LogSpectrogram,
    pictures,
    random_part,
    spaced,
    waveform,
)
from aim_kernels.experiments.networks import network_of

pytestmark = pytest.mark.usefixtures("one_thread")

SOUND = LogSpectrogram(rate=4000, seconds=0.5, n_fft=64, hop=50)
SIGHT = Frames(2, 16)
#: JPEG and video codecs change flat colours by a few of 256 levels.
CODEC = 12 / 255


# -- sound and pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
def test_sound_is_read_in_mono_at_the_rate_asked_for(tmp_path: Path, width: int) -> None:
    left, right = sine(0.25, 4000), sine(0.25, 4000, 700.0)
    write_wav(tmp_path / "x.wav", np.stack([left, right], 1), width=width)
    found = waveform(tmp_path / "x.wav", 4000)
    assert found.dtype == torch.float32
    # one level of the file's numbers, whose largest is 2^n - 1 when written and 2^n when read
    np.testing.assert_allclose(found.numpy(), (left + right) / 2, atol=2.0 / 2 ** (8 * width - 1) + 1e-7)
    half = waveform(tmp_path / "x.wav", 2000)
    assert len(half) == 500
    # in the middle, away from the filter's ends
    np.testing.assert_allclose(half[100:400].numpy(), ((left + right) / 2)[::2][100:400], atol=0.02)


def test_log_spectrogram_is_its_formula(tmp_path: Path) -> None:
    write_wav(tmp_path / "x.wav", sine(0.2, 4000))
    found = SOUND(tmp_path / "x.wav")
    assert found.shape == (1, 33, 41)
    x = np.tile(waveform(tmp_path / "x.wav", 4000).numpy(), 3)[:2000].astype(np.float64)
    padded = np.pad(x, 32)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(64) / 64)
    columns = [np.fft.rfft(window * padded[50 * t : 50 * t + 64]) for t in range(41)]
    expected = np.log(np.abs(np.stack(columns, 1)) + 1e-7)
    # where hardly anything is left, the logarithm magnifies the rounding of float32: compare what it is of
    np.testing.assert_allclose(np.exp(found[0].numpy()), np.exp(expected), rtol=1e-4, atol=1e-5)
    assert LogSpectrogram()(tmp_path / "x.wav").shape == (1, 257, 188)  # as the published code has it


def test_frames_are_spaced_evenly() -> None:
    assert spaced(10, 3) == [1, 5, 8]
    assert spaced(3, 3) == [0, 1, 2]
    assert spaced(2, 4) == [0, 0, 1, 1]
    assert spaced(1, 2) == [0, 0]


def test_frames_of_a_folder(tmp_path: Path) -> None:
    write_frames(tmp_path / "clip", [0, 50, 100, 150, 200, 250], end=".png")
    (tmp_path / "clip" / "notes.txt").write_text("not a frame")
    found = Frames(3, 8)(tmp_path / "clip")
    assert found.shape == (3, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in IMAGENET)
    pixels = found * std + mean
    for t, level in enumerate((50, 150, 250)):
        for c, value in enumerate((level, 255 - level, 0)):
            torch.testing.assert_close(pixels[c, t], torch.full((8, 8), value / 255), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="has no frames"):
        pictures(tmp_path, 1)


def test_augmented_frames_are_one_part_of_all(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 64, 3))
    for t in range(2):
        Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "clip" / f"{t}.png")
    read = Frames(2, 16, augment=True)
    torch.manual_seed(5)
    drawn = [read(tmp_path / "clip") for _ in range(8)]
    assert all(torch.equal(x[:, 0], x[:, 1]) for x in drawn)
    assert len({x.numpy().tobytes() for x in drawn}) == 8
    rising = [bool((x[0, 0, 0, -1] > x[0, 0, 0, 0]).item()) for x in drawn]
    assert 0 < sum(rising) < 8  # some are flipped
    torch.manual_seed(5)
    assert torch.equal(read(tmp_path / "clip"), drawn[0])
    for _ in range(200):
        left, upper, right, lower, _flip = random_part()
        assert 0 <= left < right <= 1 and 0 <= upper < lower <= 1
        assert 0.07 < (right - left) * (lower - upper) <= 1.0 + 1e-6


def test_flow_has_two_channels(tmp_path: Path) -> None:
    for axis, levels in (("u", [0, 255]), ("v", [255, 51])):
        write_frames(tmp_path / axis / "clip", levels, "L", ".png")
    found = Flow(2, 8)(tmp_path / "{}" / "clip")
    expected = torch.tensor([[-1.0, 1.0], [1.0, -0.6]])
    torch.testing.assert_close(found, expected[:, :, None, None].expand(2, 2, 8, 8), rtol=0, atol=1e-6)
    torch.testing.assert_close(Flow(2, 8, augment=True)(tmp_path / "{}" / "clip"), found, rtol=0, atol=1e-6)


def test_videos_give_frames_and_sound(tmp_path: Path) -> None:
    sound = sine(1.0, 8000)
    write_video(tmp_path / "x.avi", [20, 60, 100, 140, 180, 220], sound)
    levels = [np.asarray(image).mean() / 255 for image in pictures(tmp_path / "x.avi", 3)]
    np.testing.assert_allclose(levels, [60 / 255, 140 / 255, 220 / 255], atol=CODEC)
    twice = [np.asarray(image).mean() for image in pictures(tmp_path / "x.avi", 12)]
    assert len(twice) == 12 and twice[0] == twice[1]
    np.testing.assert_allclose(waveform(tmp_path / "x.avi", 8000).numpy(), sound, atol=2 / 32768)
    assert abs(len(waveform(tmp_path / "x.avi", 4000)) - 4000) <= 32
    write_video(tmp_path / "silent.avi", [20, 60])
    with pytest.raises(ValueError, match=r"silent\.avi has no sound"):
        waveform(tmp_path / "silent.avi", 8000)
    write_wav(tmp_path / "sound.wav", sound)
    with pytest.raises(ValueError, match=r"sound\.wav has no picture"):
        pictures(tmp_path / "sound.wav", 1)


@pytest.mark.parametrize(
    ("package", "name", "extra"), [("av", "av", "video"), ("PIL", "pillow", "compare"), ("scipy", "scipy", "compare")]
)
def test_a_missing_library_names_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, name: str, extra: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda p, *rest: None if p == package else find(p, *rest))
    wav, avi = tmp_path / "x.wav", tmp_path / "x.avi"
    with pytest.raises(MissingPackageError, match=rf'{name}, which is not installed: pip install ".*\[{extra}\]"'):
        waveform(wav, 4000) if package == "scipy" else pictures(avi, 1)
    if package == "av":
        with pytest.raises(MissingPackageError, match="reading the sound of videos"):
            waveform(tmp_path / "x.avi", 4000)


# -- layouts -----------------------------------------------------------------------------------------------------------


def make_crema(root: Path, actors: int = 10) -> list[str]:
    made = []
    for actor in range(actors):
        for number, emotion in enumerate(EMOTIONS):
            name = f"{1001 + actor}_DFA_{emotion}_XX"
            write_wav(root / "AudioWAV" / f"{name}.wav", sine(0.1, 4000, 300.0 + 50 * number))
            write_frames(root / "Image-01-FPS" / name, [40 * number])
            made.append(name)
    return made


def test_crema_d_by_actors(tmp_path: Path) -> None:
    made = make_crema(tmp_path)
    parts = {
        split: crema_d(tmp_path, split, audio=SOUND, video=SIGHT, seed=3) for split in ("train", "validation", "test")
    }
    assert sorted(name for clips in parts.values() for name in names(clips)) == sorted(made)
    people = {split: {name[:4] for name in names(clips)} for split, clips in parts.items()}
    assert [len(p) for p in people.values()] == [7, 1, 2]
    assert not people["train"] & people["test"] and not people["validation"] & (people["train"] | people["test"])
    clips = parts["train"]
    assert (clips.modalities, clips.classes, clips.num_classes) == (("audio", "video"), EMOTIONS, 6)
    assert [EMOTIONS[k] for k in clips.labels.tolist()] == [name.split("_")[2] for name in names(clips)]
    assert clips.shapes() == {"audio": (1, 33, 41), "video": (3, 2, 16, 16)}
    again = crema_d(tmp_path, "train", audio=SOUND, video=SIGHT, seed=4)
    assert names(again) != names(clips)


def test_crema_d_by_the_published_lists_and_into_a_network(tmp_path: Path) -> None:
    made = make_crema(tmp_path)
    for split, own in (("train", made[:48]), ("test", made[48:])):
        (tmp_path / f"{split}.csv").write_text("".join(f"{n},{n.split('_')[2]}\n" for n in own), encoding="utf-8-sig")
    parts = [crema_d(tmp_path, s, audio=SOUND, video=SIGHT, validation=0.25) for s in ("train", "validation", "test")]
    assert names(parts[2]) == made[48:]
    assert sorted(names(parts[0]) + names(parts[1])) == sorted(made[:48])
    assert Counter(parts[1].labels.tolist()) == dict.fromkeys(range(6), 2)  # a quarter of the eight of each class
    audio, video, labels = next(iter(DataLoader(parts[0], batch_size=4)))
    assert audio.shape == (4, 1, 33, 41) and video.shape == (4, 3, 2, 16, 16)
    assert labels.tolist() == parts[0].labels[:4].tolist()
    model = network_of(parts[0].shapes(), parts[0].num_classes, "resnet18")
    assert model(audio, video).shape == (4, 6)


def test_crema_d_videos_and_missing_files(tmp_path: Path) -> None:
    made = make_crema(tmp_path, 2)
    for image in (tmp_path / "Image-01-FPS" / made[0]).iterdir():
        image.unlink()
    rows = "".join(f"{n},{n.split('_')[2]}\n" for n in made)
    (tmp_path / "train.csv").write_text(rows)
    with pytest.raises(
        FileNotFoundError, match=rf"1 of 12 clips lack a file for audio or video, '{made[0]}' the first"
    ):
        crema_d(tmp_path, validation=0.0)
    with pytest.warns(UserWarning, match=rf"1 of 12 clips are left out: 1 lack a file .* '{made[0]}' the first"):
        clips = crema_d(tmp_path, validation=0.0, missing="skip-missing")
    assert (names(clips), clips.left_out) == (made[1:], (made[0],))
    write_video(tmp_path / "VideoFlash" / f"{made[0]}.avi", [10, 20, 30])
    clips = crema_d(tmp_path, audio=SOUND, video=SIGHT, validation=0.0)
    assert names(clips) == made
    assert isinstance(clips[0][1], Tensor) and clips[0][1].shape == (3, 2, 16, 16)
    with pytest.raises(ValueError, match="no clip has files for audio, video"):
        crema_d(tmp_path, "validation", validation=0.0)
    (tmp_path / "train.csv").write_text(f"{made[0]},JOY\n")
    with pytest.raises(ValueError, match="unknown class 'JOY'"):
        crema_d(tmp_path, validation=0.0)


def test_kinetics_sounds_in_both_layouts(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("test", 2)):
        rows = []
        for number in range(count):
            name = f"id{number}_{split}_000001_000011"
            write_wav(tmp_path / "a" / split / name / f"{name}.wav", sine(0.1, 4000))
            write_frames(tmp_path / "a" / split / name, [100])
            rows.append(f"{name},10,{number % 2}\n")
        (tmp_path / "a" / f"my_{split}.txt").write_text("".join(rows))
    parts = [
        kinetics_sounds(tmp_path / "a", s, audio=SOUND, video=SIGHT, validation=0.25)
        for s in ("train", "validation", "test")
    ]
    assert [len(p) for p in parts] == [6, 2, 2]
    assert [Counter(p.labels.tolist()) for p in parts] == [{0: 3, 1: 3}, {0: 1, 1: 1}, {0: 1, 1: 1}]
    audio, video, label = parts[2][1]
    assert isinstance(audio, Tensor) and isinstance(video, Tensor)
    assert audio.shape == (1, 33, 41) and video.shape == (3, 2, 16, 16) and label == 1

    for split, name in (("train", "x"), ("train", "y"), ("val", "z")):
        for action in ("singing", "bowling"):
            write_video(tmp_path / "b" / split / action / f"{name}.avi", [90, 90, 90], sine(0.2, 8000))
    write_wav(tmp_path / "b" / "train" / "bowling" / "x.wav", sine(0.2, 4000))
    train = kinetics_sounds(tmp_path / "b", "train", audio=SOUND, video=SIGHT, validation=0.0)
    test = kinetics_sounds(tmp_path / "b", "test", audio=SOUND, video=SIGHT)
    assert train.classes == test.classes == ("bowling", "singing")
    assert names(train) == ["bowling/x", "bowling/y", "singing/x", "singing/y"]
    assert [clip.sources[0].suffix for clip in train.clips] == [".wav", ".avi", ".avi", ".avi"]
    assert names(test) == ["bowling/z", "singing/z"] and test.labels.tolist() == [0, 1]
    assert isinstance(test[0][0], Tensor) and test[0][0].shape == (1, 33, 41)


def test_ave_by_its_lists(tmp_path: Path) -> None:
    lists = {
        "trainSet": ["Church bell&aa&good&0&10", "Bark&bb&good&2&6", "Truck&bb&good&6&9"],
        "valSet": ["Truck&cc&good&0&10"],
        "testSet": ["Category&VideoID&Quality&StartTime&EndTime", "Bark&dd&good&0&4", ""],
    }
    for name, written in lists.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(written))
    for name in ("aa", "cc", "dd"):
        write_video(tmp_path / "AVE" / f"{name}.mp4.avi", [90, 90], sine(0.2, 8000))
        (tmp_path / "AVE" / f"{name}.mp4.avi").rename(tmp_path / "AVE" / f"{name}.mp4")
    write_wav(tmp_path / "audio" / "bb.wav", sine(0.2, 4000))
    write_frames(tmp_path / "visual" / "bb", [30, 60])
    train = ave(tmp_path, audio=SOUND, video=SIGHT)
    assert train.classes == ("Bark", "Church bell", "Truck")
    assert names(train) == ["aa", "bb"] and train.labels.tolist() == [1, 0]  # bb once, with its first class
    for part, expected in ((train, 2), (ave(tmp_path, "validation", audio=SOUND, video=SIGHT), 1)):
        audio, video, labels = next(iter(DataLoader(part, batch_size=2)))
        assert audio.shape == (expected, 1, 33, 41) and video.shape == (expected, 3, 2, 16, 16)
        assert len(labels) == expected
    test = ave(tmp_path, "test", audio=SOUND, video=SIGHT)
    assert names(test) == ["dd"] and test.labels.tolist() == [0]


def test_ucf101_holds_groups_out(tmp_path: Path) -> None:
    (tmp_path / "ucfTrainTestlist").mkdir()
    classes = ["Archery", "Basketball"]
    (tmp_path / "ucfTrainTestlist" / "classInd.txt").write_text("1 Archery\n2 Basketball\n")
    train = [f"{c}/v_{c}_g{g:02d}_c0{n}.avi" for c in classes for g in range(8, 12) for n in (1, 2)]
    test = [f"{c}/v_{c}_g01_c01.avi" for c in classes]
    (tmp_path / "ucfTrainTestlist" / "trainlist02.txt").write_text(
        "".join(f"{entry} {1 + classes.index(entry.split('/')[0])}\n" for entry in train)
    )
    (tmp_path / "ucfTrainTestlist" / "testlist02.txt").write_text("\n".join(test))
    for entry in [*train, *test]:
        name = Path(entry).stem
        write_frames(tmp_path / "jpegs_256" / name, [70, 80])
        for axis in "uv":
            write_frames(tmp_path / "tvl1_flow" / axis / name, [127], "L")
    readers = {"rgb": SIGHT, "flow": Flow(2, 16)}
    parts = [ucf101(tmp_path, s, fold=2, readers=readers, validation=0.25) for s in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [12, 4, 2]
    groups = [{name.rsplit("_c", 1)[0] for name in names(p)} for p in parts]
    assert not groups[0] & groups[1] and len(groups[1]) == 2
    rgb, flow, label = parts[2][1]
    assert isinstance(rgb, Tensor) and isinstance(flow, Tensor) and label == 1
    assert rgb.shape == (3, 2, 16, 16) and flow.shape == (2, 2, 16, 16)
    for name in ("v_Archery_g01_c01", "v_Basketball_g01_c01"):
        write_video(tmp_path / "UCF-101" / name.split("_")[1] / f"{name}.avi", [60, 60], sine(0.2, 8000))
    heard = ucf101(tmp_path, "test", modalities=("audio", "rgb"), fold=2, readers={"rgb": SIGHT, "audio": SOUND})
    assert heard.shapes() == {"audio": (1, 33, 41), "rgb": (3, 2, 16, 16)}
    assert [clip.sources[1].parent.name for clip in heard.clips] == ["jpegs_256"] * 2  # frames go before videos


def test_what_is_asked_for_wrongly(tmp_path: Path) -> None:
    for options, message in (
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"validation": 1.0}, "validation is a share"),
        ({"validation": math.nan}, "validation is a share"),
        ({"missing": "ignore"}, "unknown missing 'ignore'"),
    ):
        with pytest.raises(ValueError, match=message):
            crema_d(tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="modalities must be at least two different ones"):
        ucf101(tmp_path, modalities=("rgb", "depth"))
    with pytest.raises(ValueError, match="fold must be 1, 2 or 3"):
        ucf101(tmp_path, fold=4)
    with pytest.raises(FileNotFoundError, match=r"trainSet\.txt is missing"):
        ave(tmp_path)
    for make in (crema_d, kinetics_sounds):
        with pytest.raises(FileNotFoundError, match="root"):
            make(tmp_path / "nowhere")
