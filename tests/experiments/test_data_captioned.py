"""Data sets with text: MVSA-Single, UPMC Food-101, IEMOCAP, CMU-MOSI and CMU-MOSEI, made tiny."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from written_files import names, sine, write_frames, write_wav

from aim_kernels.experiments.data import (
    BagOfWords,
    BrokenFileError,
    StoredTokens,
    Tokens,
    cmu_mosei,
    cmu_mosi,
    food101,
    iemocap,
    mvsa_single,
    vocabulary,
)
from aim_kernels.experiments.data.media import Frames, LogSpectrogram, Picture
from aim_kernels.experiments.networks import network_of

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURE = Picture(16)
TOKENS = Tokens(8)
SOUND = LogSpectrogram(rate=4000, seconds=0.5, n_fft=64, hop=50)


def picture(path: Path, level: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (level, 0, 0)).save(path)


# -- MVSA-Single -------------------------------------------------------------------------------------------------------


def test_mvsa_as_released(tmp_path: Path) -> None:
    pairs = ["positive,positive", "positive,neutral", "neutral,negative", "neutral,neutral", "positive,negative"]
    rows = ["ID\ttext,image"]
    for number in range(50):
        rows.append(f"{number + 1}\t{pairs[number % 5]}")
        picture(tmp_path / "data" / f"{number + 1}.jpg")
        (tmp_path / "data" / f"{number + 1}.txt").write_bytes(f"tweet {number + 1} caf\xe9\r\n".encode("latin-1"))
    (tmp_path / "data" / "._1.jpg").write_bytes(b"stray")
    (tmp_path / "labelResultAll.txt").write_bytes(("\r\n".join(rows) + "\r\n").encode())
    parts = {s: mvsa_single(tmp_path, s, image=PICTURE, text=TOKENS) for s in ("train", "validation", "test")}
    # 20 positive, 10 negative, 10 neutral, 10 left out; 80 / 10 / 10 % a class
    assert [torch.bincount(p.labels).tolist() for p in parts.values()] == [[8, 8, 16], [1, 1, 2], [1, 1, 2]]
    every = [name for part in parts.values() for name in names(part)]
    assert sorted(every) == sorted(f"{n + 1}.jpg" for n in range(50) if n % 5 != 4)
    train = parts["train"]
    assert train.classes == ("negative", "neutral", "positive") and train.modalities == ("image", "text")
    kinds = {0: 2, 1: 2, 2: 0, 3: 1}
    assert train.labels.tolist() == [kinds[(int(Path(name).stem) - 1) % 5] for name in names(train)]
    image, text, _ = train[0]
    assert isinstance(image, Tensor) and image.shape == (3, 16, 16)
    assert isinstance(text, Tensor)
    assert torch.equal(text, TOKENS(f"tweet {Path(names(train)[0]).stem} café"))
    assert "café" in vocabulary(train.sources("text"), 2)
    bags = mvsa_single(tmp_path, image=PICTURE, text=BagOfWords(32))
    assert network_of(bags.shapes(), 3)(*next(iter(DataLoader(bags, 4)))[:2]).shape == (4, 3)
    (tmp_path / "data" / f"{Path(names(train)[0]).stem}.txt").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 32 clips lack a file for image or text"):
        mvsa_single(tmp_path)
    (tmp_path / "labelResultAll.txt").write_text("ID\ttext,image\n1\tpositive,happy\n")
    with pytest.raises(ValueError, match=r"labelResultAll\.txt, ID 1: expected two sentiments"):
        mvsa_single(tmp_path)
    (tmp_path / "labelResultAll.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"labelResultAll\.txt is missing"):
        mvsa_single(tmp_path)


def test_mvsa_by_json_lists(tmp_path: Path) -> None:
    for number, (part, label) in enumerate((("train", "positive"), ("dev", "neutral"), ("test", "negative"))):
        line = {"id": number, "img": f"data/{number}.jpg", "text": f"It is {label}, \u00e9", "label": label}
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(line) + "\n")
        picture(tmp_path / "data" / f"{number}.jpg")
    for split, label, text in (("train", 2, "positive"), ("validation", 1, "neutral"), ("test", 0, "negative")):
        clips = mvsa_single(tmp_path, split, image=PICTURE, text=TOKENS)
        assert clips.labels.tolist() == [label] and clips.sources("text") == [f"It is {text}, \u00e9"]
    with pytest.raises(ValueError, match="unknown modality 'audio'"):
        clips.sources("audio")


def test_mvsa_and_food_as_mla_has_them(tmp_path: Path) -> None:
    for name, classes, load in (("mvsa", ("negative", "positive"), mvsa_single), ("food", ("pie", "tart"), food101)):
        root = tmp_path / name
        for part, count in (("train", 8), ("test", 2)):
            lines = []
            (root / "text_token" / f"{part}_token").mkdir(parents=True)
            for number in range(count):
                own = f"{part}_{number}"
                lines.append(f"{own}.jpg {classes[number % 2]}")
                picture(root / "visual" / f"{part}_imgs" / f"{own}.jpg")
                tokens = root / "text_token" / f"{part}_token"
                np.save(tokens / f"{own}_token.npy", np.array([[7, number, 0, 0]]))
                np.save(tokens / f"{own}_pm.npy", np.array([[0, 0, 1, 1]], dtype=np.float32))
            (root / f"my_{part}_{name}.txt").write_text("\n".join(lines))
        parts = [load(root, s, image=PICTURE, validation=0.25) for s in ("train", "validation", "test")]
        assert [len(p) for p in parts] == [6, 2, 2]
        assert [c for c in parts[2].classes if c in classes] == list(classes)
        text = parts[2][1][1]
        assert isinstance(text, Tensor) and text.dtype == torch.int64 and text.tolist() == [7, 1, 0, 0]
        with pytest.raises(FileNotFoundError, match="clips lack a file"):
            load(root, text=TOKENS)  # there are numbers only, no text


# -- UPMC Food-101 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [False, True])
def test_food_by_titles(tmp_path: Path, header: bool) -> None:
    dishes = ("apple_pie", "tuna_tartare")
    for part, count in (("train", 4), ("test", 1)):
        lines = ["label,text,Image_path"] if header else []
        for dish in dishes:
            for number in range(count):
                file, title = f"{dish}_{number}.jpg", f'"Best {dish}, ever | Blog"'
                lines.append(f"{dish},{title},{file}" if header else f"{file},{title},{dish}")
                picture(tmp_path / "images" / part / dish / file)
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{part}_titles.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "images" / "train" / "zzz").mkdir()  # an empty folder is no class
    parts = [food101(tmp_path, s, image=PICTURE, text=TOKENS, validation=0.25) for s in ("train", "validation", "test")]
    assert [p.labels.tolist() for p in parts] == [[0, 0, 0, 1, 1, 1], [0, 1], [0, 1]]
    assert all(p.classes == dishes for p in parts)
    assert parts[2].sources("text")[1] == "Best tuna_tartare, ever | Blog"
    assert parts[0].shapes() == {"image": (3, 16, 16), "text": (8,)}


def test_food_by_json_lists_and_repeated_names(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "train" / "pie" / "pie_0.jpg")
    for part in ("train", "dev", "test"):
        line = {"img": "images/train/pie/pie_0.jpg", "label": "pie", "text": "first"}
        (tmp_path / f"{part}.jsonl").write_text("\n".join(json.dumps({**line, "text": t}) for t in ("first", "second")))
    clips = food101(tmp_path, image=PICTURE, text=TOKENS)
    assert clips.sources("text") == ["first", "second"] and len(set(names(clips))) == 2
    with pytest.raises(FileNotFoundError, match=r"train_titles\.csv is missing"):
        food101(tmp_path / "images")


# -- IEMOCAP -----------------------------------------------------------------------------------------------------------


def test_iemocap_as_released(tmp_path: Path) -> None:
    marks = ["neu", "ang", "sad", "hap", "exc", "fru", "xxx"]
    for session in range(1, 6):
        dialog = tmp_path / f"Session{session}" / "dialog"
        for scene in ("impro01", "script01_1"):
            dialogue = f"Ses0{session}F_{scene}"
            emotions, spoken = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""], []
            for number, mark in enumerate(marks):
                name = f"{dialogue}_F{number:03d}"
                emotions += [f"[6.2901 - 8.2357]\t{name}\t{mark}\t[2.5000, 2.5000, 2.5000]", "C-E2:\tNeutral;\t()", ""]
                spoken.append(f"{name} [006.2901-008.2357]: I said: {mark} [twice].")
                write_wav(
                    tmp_path / f"Session{session}" / "sentences" / "wav" / dialogue / f"{name}.wav", sine(0.1, 4000)
                )
            for folder, lines in (("EmoEvaluation", emotions), ("transcriptions", [*spoken, "M: yes", ""])):
                (dialog / folder).mkdir(parents=True, exist_ok=True)
                (dialog / folder / f"{dialogue}.txt").write_text("\n".join(lines))
                (dialog / folder / f"._{dialogue}.txt").write_bytes(b"\0\5stray")
    load = lambda split, **o: iemocap(tmp_path, split, readers={"audio": SOUND, "text": TOKENS}, **o)  # noqa: E731
    parts = [load(s, validation=0.25) for s in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [30, 10, 10]
    assert {name[:5] for name in names(parts[2])} == {"Ses05"}
    dialogues = [{name.rsplit("_", 1)[0] for name in names(p)} for p in parts]
    assert not dialogues[0] & dialogues[1]  # whole dialogues are held out
    assert parts[2].classes == ("Neutral", "Angry", "Sad", "Happy")
    assert parts[2].labels.tolist() == [0, 1, 2, 3, 3] * 2
    assert parts[2].sources("text")[4] == "I said: exc [twice]."
    assert parts[2].shapes() == {"audio": (1, 33, 41), "text": (8,)}
    assert {name[:5] for name in names(load("test", fold=2))} == {"Ses02"}
    with pytest.raises(FileNotFoundError, match="lack a file for text or video"):
        iemocap(tmp_path, "test", modalities=("text", "video"))
    for options in ({"fold": 6}, {"fold": 0}):
        with pytest.raises(ValueError, match="fold must be 1 to 5"):
            load("test", **options)
    with pytest.raises(ValueError, match="modalities must be at least two different ones"):
        iemocap(tmp_path, modalities=("audio",))
    with pytest.raises(FileNotFoundError, match="EmoEvaluation is missing"):
        iemocap(tmp_path / "Session1")


def test_iemocap_as_mla_has_it(tmp_path: Path) -> None:
    for part, count in (("train", 8), ("test", 4)):
        lines = []
        for number in range(count):
            name, label = (
                f"Ses0{number % 5 + 1}F_{part}_{number}_F000",
                ("Neutral", "Angry", "Sad", "Happy")[number % 4],
            )
            lines.append(f"{name}.mp4 [split|sign] Oh, right,  well. [split|sign] {label}\n")
            for folder in (tmp_path / "audio" / f"{part}_fbank", tmp_path / "text_token" / f"{part}_token"):
                folder.mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "audio" / f"{part}_fbank" / f"{name}.npy", np.zeros((16, 8)))
            np.save(tmp_path / "text_token" / f"{part}_token" / f"{name}_token.npy", np.array([[5, 6, 0]]))
            write_frames(tmp_path / "visual" / f"{part}_imgs" / name, [90, 90])
        (tmp_path / f"my_{part}_iemo.txt").write_text("".join(lines))
    three = ("audio", "text", "video")
    readers = {"text": StoredTokens(), "video": Frames(1, 16)}
    parts = [
        iemocap(tmp_path, s, modalities=three, readers=readers, validation=0.5) for s in ("train", "validation", "test")
    ]
    assert [len(p) for p in parts] == [4, 4, 4] and parts[2].labels.tolist() == [0, 1, 2, 3]
    assert parts[0].shapes() == {"audio": (1, 16, 8), "text": (3,), "video": (3, 1, 16, 16)}
    assert iemocap(tmp_path, "test").sources("text") == ["Oh, right,  well."] * 4
    (tmp_path / "my_dev_iemo.txt").write_text((tmp_path / "my_test_iemo.txt").read_text())
    assert len(iemocap(tmp_path, "train", validation=0.5)) == 8  # nothing is held out of it then
    with pytest.raises(FileNotFoundError, match="4 of 4 clips lack a file"):
        iemocap(tmp_path, "validation")  # listed, but no features in dev_fbank


# -- CMU-MOSI and CMU-MOSEI --------------------------------------------------------------------------------------------

SCORES = [-3.0, -1.4, -0.2, 0.0, 0.4, 2.6]


def mmsa(**other: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    part = {
        "raw_text": np.array([f"opinion {k}" for k in range(6)]),
        "audio": rng.normal(size=(6, 10, 3)),
        "vision": rng.normal(size=(6, 10, 2)).astype(np.float32),
        "id": [f"v{k}$_${k}" for k in range(6)],
        "text": rng.normal(size=(6, 10, 5)),
        "text_bert": np.stack([np.tile([[101, 7, 55], [1, 1, 0], [0, 0, 0]], 1) for _ in range(6)]).astype(np.float32),
        "audio_lengths": [10] * 6,
        "annotations": ["Negative"] * 6,
        "regression_labels": np.array(SCORES),
        **other,
    }
    return dict.fromkeys(("train", "valid", "test"), part)


@pytest.mark.parametrize(("load", "folder"), [(cmu_mosi, "MOSI"), (cmu_mosei, "MOSEI")])
def test_mosi_as_mmsa_has_it(tmp_path: Path, load: Any, folder: str) -> None:
    data = mmsa()
    file = tmp_path / folder / "Processed" / "aligned_50.pkl"
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps(data, 4))
    for root in (tmp_path, tmp_path / folder, file.parent, file):
        clips = load(root, "validation")
        assert clips.shapes() == {"text": (5, 10), "audio": (3, 10), "video": (2, 10)}
    assert clips.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert load(tmp_path, num_classes=3).labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert load(tmp_path, num_classes=7).labels.tolist() == [0, 2, 3, 3, 3, 6]
    assert names(clips)[2] == "v2$_$2"
    audio = clips[4][1]
    assert isinstance(audio, Tensor)
    np.testing.assert_allclose(audio.numpy(), data["valid"]["audio"][4].T, rtol=1e-6)  # float64 to float32
    assert network_of(clips.shapes(), 2)(*next(iter(DataLoader(clips, 4)))[:3]).shape == (4, 2)
    two = load(tmp_path, modalities=("video", "text"), text="bert")
    assert two.shapes() == {"video": (2, 10), "text": (3,)} and two[0][1].tolist() == [101, 7, 0]
    read = load(tmp_path, modalities=("text", "audio"), text=TOKENS)
    assert torch.equal(read[3][0], TOKENS("opinion 3"))
    with pytest.raises(FileNotFoundError, match=r"unaligned_50\.pkl or mos.*_noalign\.pkl"):
        load(tmp_path, aligned=False)


def test_mosei_as_balancebenchmark_has_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    audio = rng.normal(size=(6, 9, 3))
    audio[0, 0, 0] = -np.inf
    part = {
        "vision": rng.normal(size=(6, 8, 2)),
        "text": rng.normal(size=(6, 5, 4)),
        "audio": audio,
        "labels": np.array(SCORES).reshape(6, 1, 1),
        "id": np.array([[b"v", b"0.5", b"1.5"]] * 6),
    }
    data = dict.fromkeys(("train", "valid", "test"), part)
    (tmp_path / "mosei_senti_data_noalign.pkl").write_bytes(pickle.dumps(data, 2))
    clips = cmu_mosei(tmp_path, "test", aligned=False)
    assert clips.labels.tolist() == [0, 0, 0, 1, 1, 1] and names(clips)[0] == "v$_$0.5$_$1.5"
    found = clips[0][1]
    assert isinstance(found, Tensor) and found[0, 0] == 0.0 and bool(torch.isfinite(found).all())
    audio[0, 0, 1] = np.nan
    (tmp_path / "mosei_senti_data_noalign.pkl").write_bytes(pickle.dumps(data, 2))
    with pytest.warns(UserWarning, match="1 values of 'audio' are not finite and become 0"):
        cmu_mosei(tmp_path, "test", aligned=False)


def test_mosi_files_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "aligned_50.pkl"
    for content, message in (
        (mmsa(regression_labels=np.array([[1.0, 2.0]] * 6)), "expected one number a sample"),
        (mmsa(regression_labels=np.array([9.0] * 6)), "outside -3 to 3"),
        (mmsa(regression_labels=np.array([np.nan] * 6)), "outside -3 to 3"),
        (mmsa(audio=np.zeros((5, 10, 3))), r"'audio' has the shape \(5, 10, 3\), expected 3 dimensions and 6 rows"),
        (mmsa(vision=np.zeros((6, 3))), "'vision' has the shape"),
        (mmsa(text=np.full((6, 2, 2), "a")), "'text' has elements of the type <U1, expected numbers"),
        (mmsa(id=["a"]), "1 names of 'id', 6 labels"),
        ({"train": {"text": 1}}, "expected the key 'labels' among text"),
        ({"test": {}}, "expected the key 'train' among test"),
        ([1], "expected a dictionary with 'train', got list"),
    ):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            cmu_mosi(tmp_path)
    for content in (b"", b"\x80\x04cos\nsystem\n(S'true'\ntR.", pickle.dumps(mmsa())[:500]):
        file.write_bytes(content)
        with pytest.raises(BrokenFileError, match=r"aligned_50\.pkl cannot be read"):
            cmu_mosi(tmp_path)
    for options, message in (
        ({"split": "dev"}, "unknown split"),
        ({"num_classes": 5}, r"num_classes must be one of \[2, 3, 7\], got 5"),
        ({"text": "glove"}, "unknown text 'glove'"),
        ({"modalities": ("text", "vision")}, "modalities must be at least two"),
    ):
        with pytest.raises(ValueError, match=message):
            cmu_mosi(tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"aligned_50\.pkl or mosi_data\.pkl"):
        cmu_mosi(tmp_path / "nowhere")
