"""The data sets of sound and pictures that the field reports on, in the layouts in which they are published.

Nothing is downloaded or copied: each function indexes what is on disk and returns
:class:`~aim_kernels.experiments.data.index.Clips`, which reads a clip when it is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from aim_kernels.experiments.data.features import Either
from aim_kernels.experiments.data.index import (
    Clips,
    Places,
    check,
    collect,
    existing,
    feature_files,
    folders,
    listed,
    share_of,
    subset_of,
)
from aim_kernels.experiments.data.lists import END, LABEL, NAME, QUALITY, SPLIT, START, entries, rows, visible
from aim_kernels.experiments.data.media import VIDEOS, Flow, Frames, LogSpectrogram, Reader

#: CREMA-D's emotions in the order of the published lists' class numbers, and as MLA's lists spell them.
EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
_SPELT = {"NEUTRAL": "NEU", "HAPPY": "HAP", "SAD": "SAD", "FEAR": "FEA", "DISGUST": "DIS", "ANGER": "ANG"}


def crema_d(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    audio: Reader | None = None,
    video: Reader | None = None,
    validation: float = 0.1,
    seed: int = 0,
    missing: str = "error",
) -> Clips:
    """CREMA-D: acted emotions, six classes, 7,442 clips of 91 actors, as ``audio`` and ``video``.

    ``root`` has ``AudioWAV/NAME.wav`` and either ``Image-01-FPS/NAME/*.jpg`` (any number of frames a second) or
    ``VideoFlash/NAME.flv``; other places: :func:`audio_places`, :func:`video_places`. With ``train.csv`` and
    ``test.csv`` in ``root`` (lines ``NAME,EMOTION``: the field's random split of clips), or MLA's ``my_train_cre.txt``
    and ``my_test_cre.txt`` (``NAME.flv Emotion``), these are the splits, and ``validation`` is the share of the
    training list, a class at a time, that is held out. Without, *actors* are split by ``seed``, 70 / 10 / 20 %
    (``validation`` is not used): people never seen before, a harder test (our reading).

    ``audio`` and ``video``: readers, by default ``LogSpectrogram()``, or ``Features()`` of precomputed files, and
    ``Frames()``. ``missing``: "error"; "skip-missing" to leave out clips whose files are not there; "skip" to leave out
    those whose files cannot be read as well, for which every file is read once; what is left out is counted in a
    warning.

    Raises ValueError for an unknown ``split`` or ``missing``, a share outside [0, 1), no clips; FileNotFoundError for
    missing files. A file that cannot be read raises BrokenFileError, a ValueError, with its name.
    Source: Cao et al., IEEE Transactions on Affective Computing 5, 2014 (Open Database License); lists and frames as
    the published codes of OGM-GE (343dc1d), MMPareto (a339db3) and MLA (ab6c184).
    """
    base = existing(root)
    check(split, validation, missing)
    columns = {"name": NAME, "emotion": LABEL}
    if (base / "train.csv").exists():
        pairs = [(name, label) for name, label in rows(base / f"{listed(split)}.csv", ",", columns)]
        chosen = share_of(pairs, split, validation, seed)
    elif (base / "my_train_cre.txt").exists():
        pairs = [(Path(n).stem, label) for n, label in rows(base / f"my_{listed(split)}_cre.txt", " ", columns)]
        chosen = share_of([(n, _SPELT.get(label.upper(), label)) for n, label in pairs], split, validation, seed)
    else:
        chosen = _by_actors(base / "AudioWAV", split, seed)
    frames = [f"{folder}/{{}}" for folder in folders(base, r"Image-\d+-FPS")]
    flash = [f"VideoFlash/{{}}{end}" for end in VIDEOS]
    heard = Places(base, ["AudioWAV/{}.wav", *audio_places(listed(split))], audio)
    seen = Places(base, [*frames, *flash, *video_places(base, listed(split))])
    readers = {"audio": audio or Either(LogSpectrogram()), "video": video or Frames()}
    return collect("crema-d", EMOTIONS, chosen, lambda name: (heard.find(name), seen.find(name)), readers, missing)


def _by_actors(sounds: Path, split: str, seed: int) -> list[tuple[str, str]]:
    """Names and emotions of the clips of the actors that are drawn for a split."""
    files = entries(sounds) if sounds.is_dir() else []
    names = sorted(file.stem for file in files if file.suffix.lower() == ".wav")
    for name in names:
        if not re.fullmatch(r"\d+_[^_]+_[^_]+_[^_]+", name):
            raise ValueError(
                f"{sounds / name}.wav: expected names like 1001_DFA_ANG_XX.wav, actor_sentence_emotion_level"
            )
    actors = sorted({name.split("_")[0] for name in names})
    order = torch.randperm(len(actors), generator=torch.Generator().manual_seed(seed)).tolist()
    first, second = round(0.7 * len(actors)), round(0.8 * len(actors))
    bounds = {"train": (0, first), "validation": (first, second), "test": (second, len(actors))}[split]
    drawn = {actors[i] for i in order[slice(*bounds)]}
    return [(name, name.split("_")[2]) for name in names if name.split("_")[0] in drawn]


def kinetics_sounds(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    audio: Reader | None = None,
    video: Reader | None = None,
    validation: float = 0.1,
    seed: int = 0,
    missing: str = "error",
) -> Clips:
    """Kinetics-Sounds: clips of ten seconds of some 31 actions that can be seen and heard, ``audio`` and ``video``.

    Two layouts of ``root``. With ``my_train.txt`` and ``my_test.txt`` (lines ``NAME,SECONDS,CLASS NUMBER``): the folder
    ``train/NAME`` (``test/NAME``) with frames and ``NAME.wav``, or :func:`audio_places` and :func:`video_places`.
    Without: Kinetics' own ``train/CLASS/NAME.mp4``, with sound in the video, or ``NAME.wav`` beside it; the test split
    is in ``test``, or ``val`` if that is missing; a folder without a video is no class. In both, ``validation`` is the
    share of the training clips, a class at a time, that is held out.

    Options and errors as for :func:`crema_d`; sound is ten seconds by default.
    Source: Arandjelovic and Zisserman, arXiv 1705.08168, of Kinetics, arXiv 1705.06950 (annotations CC BY 4.0); the
    first layout as the published code of OGM-GE (343dc1d).
    """
    base = existing(root)
    check(split, validation, missing)
    readers = {"audio": audio or Either(LogSpectrogram(seconds=10.0)), "video": video or Frames()}
    own = listed(split)
    if (base / "my_train.txt").exists():
        columns = {"name": NAME, "seconds": START, "class number": LABEL}
        numbers = [(name, number) for name, _, number in rows(base / "my_train.txt", ",", columns)]
        classes: Sequence[str] = [str(k) for k in range(1 + max((_number(base, n) for _, n in numbers), default=0))]
        pairs = [(name, number) for name, _, number in rows(base / f"my_{own}.txt", ",", columns)]
        pairs = [(name, str(_number(base, number))) for name, number in pairs]
        heard = Places(base, [f"{own}/{{}}/{{}}.wav", *audio_places(own)], audio)
        seen = Places(base, [f"{own}/{{}}", *video_places(base, own)])
        find = lambda name: (heard.find(name), seen.find(name))  # noqa: E731
    else:
        classes = sorted({video.parent.name for video in _videos(base / "train").values()})
        videos = _videos(base / own if own == "train" or (base / own).is_dir() else base / "val")
        pairs = [(name, name.split("/")[0]) for name in videos]
        find = lambda name: (_heard(videos[name]), videos[name])  # noqa: E731
    return collect("kinetics-sounds", classes, share_of(pairs, split, validation, seed), find, readers, missing)


def _number(base: Path, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{base}: the lists my_train.txt and my_test.txt end in class numbers, got {text!r}")
    return int(text)


def _videos(base: Path) -> dict[str, Path]:
    """``CLASS/NAME`` to the video, in the order of names."""
    if not base.is_dir():
        raise FileNotFoundError(f"{base} is missing: expected folders train and test (or val) with CLASS/NAME.mp4")
    found = [v for v in sorted(base.glob("*/*")) if visible(v.parent.name) and visible(v.name)]
    return {f"{v.parent.name}/{v.stem}": v for v in found if v.suffix.lower() in VIDEOS}


def _heard(video: Path) -> Path:
    beside = video.with_suffix(".wav")
    return beside if beside.is_file() else video


def ave(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    audio: Reader | None = None,
    video: Reader | None = None,
    missing: str = "error",
) -> Clips:
    """AVE: 4,143 clips of ten seconds, 28 events that can be seen and heard, as ``audio`` and ``video``.

    ``root`` has ``trainSet.txt``, ``valSet.txt`` and ``testSet.txt`` (lines ``CLASS&ID&QUALITY&START&END``) and videos
    ``AVE/ID.mp4``; if there are ``audio/ID.wav`` (or ``wave_files/ID.wav``) or frames in ``visual/ID`` (or
    ``Image-01-FPS/ID``), these are read instead; other places: :func:`audio_places`, :func:`video_places`. The label is
    that of the clip; start and end are not used. A video that a list names more than once counts once, with its first
    class (our reading).

    Options and errors as for :func:`crema_d`; sound is ten seconds by default.
    Source: Tian et al., arXiv 1803.08842.
    """
    base = existing(root)
    check(split, 0.0, missing)
    lists = {"train": "trainSet.txt", "validation": "valSet.txt", "test": "testSet.txt"}
    columns = {"class": LABEL, "name": NAME, "quality": QUALITY, "start": START, "end": END}
    found = {name: rows(base / own, "&", columns) for name, own in lists.items()}
    classes = sorted({row[0] for own in found.values() for row in own})
    chosen: dict[str, str] = {}
    for label, name, *_ in found[split]:
        chosen.setdefault(name, label)
    frames = ["visual/{}", *(f"{folder}/{{}}" for folder in folders(base, r"Image-\d+-FPS"))]
    own = {"train": "train", "validation": "val", "test": "test"}[split]
    heard = Places(base, ["audio/{}.wav", "wave_files/{}.wav", *audio_places(own), "AVE/{}.mp4"], audio)
    seen = Places(base, [*frames, *video_places(base, own), "AVE/{}.mp4"])
    readers = {"audio": audio or Either(LogSpectrogram(seconds=10.0)), "video": video or Frames()}
    find = lambda name: (heard.find(name), seen.find(name))  # noqa: E731
    return collect("ave", classes, list(chosen.items()), find, readers, missing)


def vggsound(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    audio: Reader | None = None,
    video: Reader | None = None,
    validation: float = 0.1,
    seed: int = 0,
    missing: str = "error",
) -> Clips:
    """VGGSound: some 200,000 clips of ten seconds, 309 events, as ``audio`` and ``video``.

    ``root`` has ``vggsound.csv`` (lines ``ID,START,"CLASS",SPLIT``), or ``train.csv`` and ``test.csv`` (lines
    ``ID_START.mp4,"CLASS"``). A clip is ``ID_START`` with START in six digits or as it is listed: videos
    ``video/ID_000030.mp4`` (or ``videos``, ``train``, ``test``, ``train-videos/train-set``, ``test-videos/test-set``),
    sound ``train-audios/train-set/NAME.wav``, frames ``train-videos/train-set-img/Image-01-FPS/NAME.mp4/*.jpg``; other
    places: :func:`audio_places`, :func:`video_places`. Classes are those of both lists, by name. Many clips are no
    longer on YouTube: give ``missing="skip-missing"``.

    Options and errors as for :func:`crema_d`; sound is ten seconds by default.
    Source: Chen et al., arXiv 2004.14368 (CC BY 4.0); lists as published with it, frames and sound as the published
    codes of OGM-GE (343dc1d) and BalanceBenchmark (4c1482f).
    """
    base = existing(root)
    check(split, validation, missing)
    own = listed(split)
    if (base / "vggsound.csv").exists():
        columns = {"name": NAME, "start": START, "class": LABEL, "split": SPLIT}
        table = [(f"{n}_{start}", label, part) for n, start, label, part in rows(base / "vggsound.csv", ",", columns)]
        strange = [part for *_, part in table if part not in ("train", "test")]
        if strange:
            raise ValueError(f"{base / 'vggsound.csv'}: the fourth field is train or test, got {strange[0]!r}")
    else:
        pair = {"name": NAME, "class": LABEL}
        parts = {part: rows(base / f"{part}.csv", ",", pair) for part in ("train", "test")}
        table = [(Path(name).stem, label, part) for part, lines in parts.items() for name, label in lines]
    classes = sorted({label for _, label, _ in table})
    pairs = [(name, label) for name, label, part in table if part == own]
    tree = f"{own}-videos/{own}-set"
    images = [f"{tree}-img/{folder}" for folder in folders(base / f"{tree}-img", r"Image-\d+-FPS")]
    frames = [f"{folder}/{{}}{end}" for folder in images for end in (".mp4", "")]
    where = ("video", "videos", own, tree)
    videos = [f"{folder}/{{}}{end}" for folder in where for end in VIDEOS]
    sounds = [f"{own}-audios/{own}-set/{{}}.wav", *audio_places(own)]
    heard = Places(base, [*sounds, *videos], audio)
    seen = Places(base, [*frames, *(f"{folder}/{{}}" for folder in where), *videos, *video_places(base, own)])
    readers = {"audio": audio or Either(LogSpectrogram(seconds=10.0)), "video": video or Frames()}
    find = lambda name: (heard.find(*_padded(name)), seen.find(*_padded(name)))  # noqa: E731
    return collect("vggsound", classes, share_of(pairs, split, validation, seed), find, readers, missing)


def _padded(name: str) -> tuple[str, ...]:
    """``ID_30`` also as ``ID_000030``, and the other way round."""
    own, _, start = name.rpartition("_")
    if not start.isdecimal():
        return (name,)
    return tuple(dict.fromkeys((name, f"{own}_{int(start):06d}", f"{own}_{int(start)}")))


def ucf101(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    modalities: Sequence[str] = ("rgb", "flow"),
    fold: int = 1,
    readers: Mapping[str, Reader] | None = None,
    validation: float = 0.1,
    seed: int = 0,
    missing: str = "error",
) -> Clips:
    """UCF-101: 13,320 videos of 101 actions, as any of ``rgb``, ``flow`` and ``audio``.

    ``root`` has ``ucfTrainTestlist/`` (``classInd.txt``, ``trainlist01.txt``, ``testlist01.txt``; ``fold`` 1 to 3),
    and: for ``rgb`` frames in ``jpegs_256/NAME`` or videos ``UCF-101/CLASS/NAME.avi``; for ``flow`` frames in
    ``tvl1_flow/u/NAME`` and ``tvl1_flow/v/NAME``; for ``audio`` ``audio/NAME.wav`` or the video's sound (half of the
    classes have none: list those that have, or give ``missing="skip"``). Lists and files may disagree over
    ``HandstandPushups`` and ``HandStandPushups``, as the published ones do. ``validation`` holds out *groups* of clips
    of one recording (the ``gXX`` of their names), as the test lists do.

    ``readers``: in the place of the default ``Frames()``, ``Flow()``, ``LogSpectrogram()``. Other options and errors as
    for :func:`crema_d`; ValueError for unknown modalities, fewer than two, or another fold.
    Source: Soomro et al., arXiv 1212.0402; frames and flow in the layout of Feichtenhofer et al., arXiv 1604.06573.
    """
    base = existing(root)
    known: dict[str, Reader] = {"rgb": Frames(), "flow": Flow(), "audio": Either(LogSpectrogram())}
    check(split, validation, missing)
    subset_of("modalities", modalities, known)
    if fold not in (1, 2, 3):
        raise ValueError(f"fold must be 1, 2 or 3, got {fold}")
    given = {**known, **(readers or {})}
    lists = base / "ucfTrainTestlist"
    classes = [name for _, name in rows(lists / "classInd.txt", " ", {"number": (), "class": ()})]
    spelt = {name.casefold(): name for name in classes}
    files = [row[0].split()[0] for row in rows(lists / f"{listed(split)}list{fold:02d}.txt", " ", {"file": ()})]
    pairs = [(file.rsplit(".", 1)[0], file.split("/")[0]) for file in files]
    pairs = [(name, spelt.get(label.casefold(), label)) for name, label in pairs]
    chosen = share_of(pairs, split, validation, seed, key=lambda name: name.rsplit("_c", 1)[0])
    seen, videos = Places(base, ["jpegs_256/{}"]), Places(base, ["UCF-101/{}.avi"])
    heard = Places(base, ["audio/{}.wav", *feature_files("audio")], given["audio"])

    def find(name: str) -> tuple[Path | None, ...]:
        folder, own = name.rsplit("/", 1) if "/" in name else ("", name)
        names = _handstands(own)
        video = videos.find(*(f"{f}/{n}" for f in _handstands(folder) for n in names))
        flow = (n for n in names if all((base / "tvl1_flow" / axis / n).is_dir() for axis in ("u", "v")))
        flowing = next(flow, None)
        places = {
            "rgb": seen.find(*names) or video,
            "flow": base / "tvl1_flow" / "{}" / flowing if flowing else None,
            "audio": heard.find(*names) or video,
        }
        return tuple(places[modality] for modality in modalities)

    return collect("ucf-101", classes, chosen, find, {m: given[m] for m in modalities}, missing)


def _handstands(name: str) -> tuple[str, ...]:
    """A name, and the same with the other spelling of handstand."""
    both = (name, name.replace("HandStand", "Handstand"), name.replace("Handstand", "HandStand"))
    return tuple(dict.fromkeys(both))


# -- what published codes share ----------------------------------------------------------------------------------------


def audio_places(own: str) -> list[str]:
    """Further places of sound and of its precomputed features, ``own`` being train, dev, val or test.

    ``audio/NAME.wav``, ``audio/own/NAME.wav``, MLA's ``audio/own_fbank/NAME.npy``, OGM-GE's ``audio_spec/NAME.pkl``,
    and files of features in ``audio`` and ``audio/own`` as MMPareto and BalanceBenchmark have them.
    """
    sounds = ["audio/{}.wav", f"audio/{own}/{{}}.wav"]
    return sounds + feature_files(f"audio/{own}_fbank", f"audio/{own}", "audio", f"audio_spec/{own}", "audio_spec")


def video_places(base: Path, own: str) -> list[str]:
    """Further places of frames and videos: ``visual/NAME``, ``visual/own/NAME``, MLA's ``visual/own_imgs/NAME`` and
    ``visual/own_imgs/Image-01-FPS/NAME``, each a folder of frames, or a video in the first two."""
    inner = folders(base / "visual" / f"{own}_imgs", r"Image-\d+-FPS")
    frames = [f"visual/{own}_imgs/{folder}/{{}}" for folder in inner]
    frames += [f"visual/{own}_imgs/{{}}", f"visual/{own}/{{}}", "visual/{}"]
    return frames + [f"{folder}/{{}}{end}" for folder in (f"visual/{own}", "visual") for end in VIDEOS]
