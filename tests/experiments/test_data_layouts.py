"""What lies in the folders of published data sets: both spellings, strays, broken files, other people's layouts."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from written_files import names, sine, write_frames, write_video, write_wav

from aim_kernels.experiments.data import (
    Clips,
    Features,
    ave,
    crema_d,
    kinetics_sounds,
    ucf101,
    vggsound,
)
from aim_kernels.experiments.data.clips import EMOTIONS
from aim_kernels.experiments.data.media import Flow, Frames, LogSpectrogram
from aim_kernels.experiments.networks import network_of

pytestmark = pytest.mark.usefixtures("one_thread")

SOUND = LogSpectrogram(rate=4000, seconds=0.5, n_fft=64, hop=50)
SIGHT = Frames(2, 16)
STRAYS = (".DS_Store", "Thumbs.db", "._stray.wav", "._stray.jpg", "._stray.mp4")


def litter(folder: Path) -> None:
    """What operating systems and archives leave behind."""
    for name in STRAYS:
        (folder / name).write_bytes(b"stray")
    for name in ("__MACOSX", ".ipynb_checkpoints"):
        (folder / name).mkdir()
        (folder / name / "._1001_DFA_ANG_XX.wav").write_bytes(b"stray")
        (folder / name / "x.mp4").write_bytes(b"stray")


# -- UCF-101's two spellings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_list", ["HandStandPushups", "HandstandPushups"])
@pytest.mark.parametrize("in_class", ["HandStandPushups", "HandstandPushups"])
@pytest.mark.parametrize("on_disk", ["HandStandPushups", "HandstandPushups"])
def test_both_spellings_of_handstand(tmp_path: Path, in_list: str, in_class: str, on_disk: str) -> None:
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(f"1 Archery\r\n2 {in_class}\r\n3 HandstandWalking\r\n".encode())
    files = [
        "Archery/v_Archery_g01_c01.avi",
        f"{in_list}/v_HandStandPushups_g01_c01.avi",
        "HandstandWalking/v_HandstandWalking_g01_c01.avi",
    ]
    (lists / "testlist01.txt").write_text("\r\n".join(files) + "\r\n")
    for name in ("Archery", on_disk, "HandstandWalking"):
        for axis in "uv":
            write_frames(tmp_path / "tvl1_flow" / axis / f"v_{name}_g01_c01", [127], "L")
        write_frames(tmp_path / "jpegs_256" / f"v_{name}_g01_c01", [70])
        (tmp_path / "UCF-101" / name).mkdir(parents=True)
    # as released: the folder has one spelling, the file within the other
    write_video(tmp_path / "UCF-101" / on_disk / "v_HandStandPushups_g01_c01.avi", [60], sine(0.2, 8000))
    clips = ucf101(tmp_path, "test", readers={"rgb": SIGHT, "flow": Flow(2, 16)})
    assert clips.labels.tolist() == [0, 1, 2] and clips.classes[1] == in_class
    assert len(clips[1]) == 3
    videos = tmp_path / "jpegs_256"
    videos.rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="2 of 3 clips are left out"):
        clips = ucf101(tmp_path, "test", modalities=("rgb", "audio"), missing="skip-missing")
    assert clips.labels.tolist() == [1]


# -- strays ------------------------------------------------------------------------------------------------------------


def test_strays_are_neither_classes_nor_samples(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for action in ("bowling", "singing"):
            write_video(tmp_path / split / action / "x.avi", [90], sine(0.2, 8000))
            litter(tmp_path / split / action)
        for empty in ("archery", "juggling"):  # would become class 0, and move the others
            (tmp_path / split / empty).mkdir()
        (tmp_path / split / "juggling" / "notes.txt").write_text("none yet")
        litter(tmp_path / split)
    for split in ("train", "test"):
        clips = kinetics_sounds(tmp_path, split, validation=0.0)
        assert clips.classes == ("bowling", "singing")
        assert names(clips) == ["bowling/x", "singing/x"] and clips.labels.tolist() == [0, 1]

    crema = tmp_path / "crema"
    for actor in range(1001, 1006):
        write_wav(crema / "AudioWAV" / f"{actor}_DFA_ANG_XX.wav", sine(0.1, 4000))
        write_frames(crema / "Image-01-FPS" / f"{actor}_DFA_ANG_XX", [90])
        litter(crema / "Image-01-FPS" / f"{actor}_DFA_ANG_XX")
    litter(crema / "AudioWAV")
    clips = crema_d(crema, "train", audio=SOUND, video=SIGHT)
    assert len(clips) == 4 and isinstance(clips[0][1], Tensor)
    # a folder with strays only holds no frames
    for frame in (crema / "Image-01-FPS" / names(clips)[0]).glob("0*.jpg"):
        frame.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 clips lack a file"):
        crema_d(crema, "train")
    write_wav(crema / "AudioWAV" / "readme.wav", sine(0.1, 4000))
    with pytest.raises(ValueError, match=r"readme\.wav: expected names like 1001_DFA_ANG_XX"):
        crema_d(crema, "train")


# -- broken files ------------------------------------------------------------------------------------------------------


def test_broken_files_are_named_or_left_out(tmp_path: Path) -> None:
    made = [f"1001_{sentence}_ANG_XX" for sentence in ("DFA", "IEO", "ITS", "IWL", "MTI")]
    for name in made:
        write_wav(tmp_path / "AudioWAV" / f"{name}.wav", sine(0.1, 4000))
        write_frames(tmp_path / "Image-01-FPS" / name, [90, 100])
    (tmp_path / "train.csv").write_text("".join(f"{name},ANG\n" for name in made))
    (tmp_path / "AudioWAV" / f"{made[1]}.wav").write_bytes(b"")
    frame = tmp_path / "Image-01-FPS" / made[3] / "00000.jpg"
    frame.write_bytes(frame.read_bytes()[:300])
    (tmp_path / "AudioWAV" / f"{made[4]}.wav").unlink()

    def load(missing: str) -> Clips:
        return crema_d(tmp_path, audio=SOUND, video=Frames(2, 16, augment=True), validation=0.0, missing=missing)

    with pytest.raises(FileNotFoundError, match=f"1 of 5 clips lack a file for audio or video, '{made[4]}' the first"):
        load("error")
    with pytest.warns(UserWarning, match="1 of 5 clips are left out: 1 lack") as caught:
        clips = load("skip-missing")
    assert caught[0].filename == __file__  # the caller's, not the library's
    with pytest.raises(ValueError, match=rf"{made[1]}\.wav is empty") as broken:
        clips[1]
    assert f"audio of the clip '{made[1]}' of crema-d" in broken.value.__notes__[0]
    with pytest.raises(ValueError, match=rf"{made[3]}/00000\.jpg cannot be read"):
        clips[3]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    message = rf"3 of 5 clips are left out: 1 lack .*'{made[4]}' the first; 2 have one .*: .*{made[1]}\.wav is empty"
    with pytest.warns(UserWarning, match=message):
        clips = load("skip")
    assert torch.equal(torch.rand(3), expected)  # looking draws nothing
    assert names(clips) == [made[0], made[2]] and clips.left_out == (made[4], made[1], made[3])
    assert len(list(DataLoader(clips, batch_size=2))) == 1


def test_videos_without_sound_are_left_out(tmp_path: Path) -> None:
    for name in ("aa", "bb"):
        write_video(tmp_path / f"{name}.avi", [90, 90], sine(0.2, 8000) if name == "aa" else None)
    (tmp_path / "AVE").mkdir()
    for name in ("aa", "bb"):
        (tmp_path / f"{name}.avi").rename(tmp_path / "AVE" / f"{name}.mp4")
    for part in ("train", "val", "test"):
        (tmp_path / f"{part}Set.txt").write_text("Bark&aa&good&0&10\nBark&bb&good&0&10\n")
    with pytest.warns(UserWarning, match=r"1 of 2 clips are left out: 1 have one .*bb\.mp4 has no sound"):
        clips = ave(tmp_path, audio=SOUND, video=SIGHT, missing="skip")
    assert names(clips) == ["aa"]


# -- other people's layouts --------------------------------------------------------------------------------------------


def test_crema_d_as_mla_has_it(tmp_path: Path) -> None:
    spelt = ("Neutral", "Happy", "Sad", "Fear", "Disgust", "Anger")
    for split, sentence in (("train", "DFA"), ("test", "IEO")):
        rows = [f"1001_{sentence}_{e}_XX.flv {s}\n" for e, s in zip(EMOTIONS, spelt, strict=True)]
        (tmp_path / f"my_{split}_cre.txt").write_text("".join(rows))
        (tmp_path / "audio" / f"{split}_fbank").mkdir(parents=True)
        for number, emotion in enumerate(EMOTIONS):
            name = f"1001_{sentence}_{emotion}_XX"
            np.save(tmp_path / "audio" / f"{split}_fbank" / f"{name}.npy", np.full((64, 16), float(number)))
            write_frames(tmp_path / "visual" / f"{split}_imgs" / "Image-01-FPS" / name, [40 * number])
    for split in ("train", "test"):
        clips = crema_d(tmp_path, split, video=SIGHT, validation=0.0)
        assert clips.labels.tolist() == list(range(6)) and clips.classes == EMOTIONS
        assert clips.shapes() == {"audio": (1, 64, 16), "video": (3, 2, 16, 16)}
        assert isinstance(clips[3][0], Tensor) and bool((clips[3][0] == 3.0).all())
    model = network_of(clips.shapes(), 6, {"audio": "conv", "video": "resnet18"})
    *inputs, labels = next(iter(DataLoader(clips, batch_size=3)))
    assert model(*inputs).shape == (3, 6) and labels.tolist() == [0, 1, 2]
    (tmp_path / "my_train_cre.txt").write_text("1001_DFA_NEU_XX.flv Bored\n")
    with pytest.raises(ValueError, match="unknown class 'Bored'"):
        crema_d(tmp_path, validation=0.0)


@pytest.mark.parametrize("end", [".pt", ".npy", ".pkl"])
def test_crema_d_with_features_as_balancebenchmark_has_it(tmp_path: Path, end: str) -> None:
    (tmp_path / "train.csv").write_text("1001_DFA_SAD_XX,SAD\n")
    (tmp_path / "audio").mkdir()
    values = np.arange(20, dtype=np.float32).reshape(4, 5)
    file = tmp_path / "audio" / f"1001_DFA_SAD_XX{end}"
    if end == ".pt":
        torch.save(torch.from_numpy(values), file)
    elif end == ".npy":
        np.save(file, values)
    else:
        file.write_bytes(pickle.dumps(values))
    write_frames(tmp_path / "visual" / "1001_DFA_SAD_XX", [50])
    clips = crema_d(tmp_path, video=SIGHT, validation=0.0)
    assert isinstance(clips[0][0], Tensor) and torch.equal(clips[0][0][0], torch.from_numpy(values))
    with pytest.raises(FileNotFoundError, match="lack a file for audio or video"):
        crema_d(tmp_path, audio=SOUND, validation=0.0)  # it takes no features
    # with both on disk, the reader decides
    write_wav(tmp_path / "AudioWAV" / "1001_DFA_SAD_XX.wav", sine(0.1, 4000))
    assert crema_d(tmp_path, audio=SOUND, video=SIGHT, validation=0.0).shapes()["audio"] == (1, 33, 41)
    assert crema_d(tmp_path, audio=Features(), video=SIGHT, validation=0.0).shapes()["audio"] == (1, 4, 5)


def test_kinetics_sounds_with_features_and_a_header(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"my_{split}.txt").write_text("video,start,label\r\n-3M_2,10,1\r\n_x_37,10,0\r\n")
        (tmp_path / "audio" / split).mkdir(parents=True)
        for name in ("-3M_2", "_x_37"):
            np.save(tmp_path / "audio" / split / f"{name}.npy", np.zeros((3, 4)))
            write_frames(tmp_path / "visual" / split / name, [50])
    clips = kinetics_sounds(tmp_path, "test", video=SIGHT)
    assert clips.labels.tolist() == [1, 0] and clips.shapes()["audio"] == (1, 3, 4)
    (tmp_path / "my_test.txt").write_text("-3M_2,10,singing\n")
    with pytest.raises(ValueError, match="end in class numbers, got 'singing'"):
        kinetics_sounds(tmp_path, "test")


@pytest.mark.parametrize("layout", ["release", "ogm", "features"])
def test_vggsound(tmp_path: Path, layout: str) -> None:
    table = [
        ("---g-f_I2yQ", 1, "people marching", "train"),
        ("--0PQM4-hqg", 30, "waterfall burbling", "train"),
        ("2bCuw7U_Rac", 390, "donkey, ass braying", "train"),
        ("_GN9iR-8h_4", 30, "donkey, ass braying", "test"),
    ]
    (tmp_path / "vggsound.csv").write_text("".join(f'{n},{s},"{c}",{p}\n' for n, s, c, p in table))
    for name, start, _, part in table:
        if layout == "release":
            own = f"{name}_{start:06d}"
            write_video(tmp_path / "video" / f"{own}.avi", [90, 90], sine(0.2, 8000))
            (tmp_path / "video" / f"{own}.avi").rename(tmp_path / "video" / f"{own}.mp4")
        elif layout == "ogm":
            own = f"{name}_{start}"
            write_wav(tmp_path / f"{part}-audios" / f"{part}-set" / f"{own}.wav", sine(0.2, 4000))
            frames = tmp_path / f"{part}-videos" / f"{part}-set-img" / "Image-01-FPS"
            write_frames(frames / f"{own}.mp4", [90])
        else:
            own = f"{name}_{start}"
            (tmp_path / "audio" / part).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "audio" / part / f"{own}.npy", np.zeros((33, 41)))
            write_frames(tmp_path / "visual" / part / own, [90])
    audio = None if layout == "features" else SOUND
    train, test = (vggsound(tmp_path, s, audio=audio, video=SIGHT, validation=0.0) for s in ("train", "test"))
    assert train.classes == test.classes == ("donkey, ass braying", "people marching", "waterfall burbling")
    assert train.labels.tolist() == [1, 2, 0] and test.labels.tolist() == [0]
    assert train.shapes() == test.shapes() == {"audio": (1, 33, 41), "video": (3, 2, 16, 16)}
    if layout == "release":  # the lists that came with the published code
        (tmp_path / "vggsound.csv").unlink()
        (tmp_path / "train.csv").write_text("--0PQM4-hqg_000030.mp4,waterfall burbling\n")
        (tmp_path / "test.csv").write_text('_GN9iR-8h_4_000030.mp4,"donkey, ass braying"\n')
        found = vggsound(tmp_path, "test", audio=SOUND, video=SIGHT)
        assert found.labels.tolist() == [0] and found.classes == ("donkey, ass braying", "waterfall burbling")
        (tmp_path / "test.csv").unlink()
        with pytest.raises(FileNotFoundError, match=r"test\.csv is missing"):
            vggsound(tmp_path)
    (tmp_path / "vggsound.csv").write_text("a,1,b,held\n")
    with pytest.raises(ValueError, match="the fourth field is train or test, got 'held'"):
        vggsound(tmp_path)
