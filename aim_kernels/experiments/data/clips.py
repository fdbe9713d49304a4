"""The data sets that the field reports on, in the layouts in which they are published: nothing is downloaded or copied.

Each function indexes what is on disk and returns :class:`Clips`, which reads a clip when it is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from aim_kernels.experiments.data.media import IMAGES, VIDEOS, Flow, Frames, LogSpectrogram, Reader

SPLITS = ("train", "validation", "test")
#: CREMA-D's emotions in the order of the published lists' class numbers.
EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")


class Clip(NamedTuple):
    """One sample: its name, a file or folder a modality, and its class number."""

    name: str
    paths: tuple[Path, ...]
    label: int


class Clips(Dataset[tuple[Tensor | int, ...]]):
    """Clips that are read lazily: ``clips[i]`` is ``(input of each modality, ..., class number)``.

    A DataLoader's batches so unpack as ``*inputs, labels``. ``classes``: names by class number; ``labels``: ``[N]``,
    int64, without reading a file; ``left_out``: names from the lists whose files are not there.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        clips: Sequence[Clip],
        readers: Mapping[str, Reader],
        left_out: Sequence[str] = (),
    ) -> None:
        if not clips:
            raise ValueError(f"{name}: no clip has files for {', '.join(readers)}; check root and the lists")
        self.name, self.classes, self.clips = name, tuple(classes), tuple(clips)
        self.readers, self.left_out = dict(readers), tuple(left_out)
        self.modalities, self.num_classes = tuple(self.readers), len(self.classes)
        self.labels = torch.tensor([clip.label for clip in clips])

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor | int, ...]:
        clip = self.clips[index]
        inputs = [read(path) for read, path in zip(self.readers.values(), clip.paths, strict=True)]
        return (*inputs, clip.label)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Modality to the shape of a sample, from the first clip: what ``networks.network_of`` takes."""
        *inputs, _ = self[0]
        return {name: tuple(x.shape) for name, x in zip(self.modalities, inputs, strict=True) if isinstance(x, Tensor)}


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
    ``VideoFlash/NAME.flv``. With ``train.csv`` and ``test.csv`` in ``root`` (lines ``NAME,EMOTION``: the field's random
    split of clips), these are the splits, and ``validation`` is the share of the training list, a class at a time, that
    is held out. Without, *actors* are split by ``seed``, 70 / 10 / 20 % (``validation`` is not used): people never seen
    before, a harder test (our reading).

    ``audio`` and ``video``: readers, by default ``LogSpectrogram()`` and ``Frames()``. ``missing``: "error", or "skip"
    to leave out clips whose files are not there.

    Raises ValueError for an unknown ``split`` or ``missing``, a share outside [0, 1), no clips; FileNotFoundError for
    missing files.
    Source: Cao et al., IEEE Transactions on Affective Computing 5, 2014 (Open Database License); lists and frames as
    the published code of OGM-GE (343dc1d).
    """
    base = existing(root)
    check(split, validation, missing)
    if (base / "train.csv").exists():
        rows = [(name, label) for name, label in lines(base / f"{listed(split)}.csv", ",", 2)]
        chosen = share_of(rows, split, validation, seed)
    else:
        names = sorted(file.stem for file in (base / "AudioWAV").glob("*.wav"))
        actors = sorted({name.split("_")[0] for name in names})
        order = torch.randperm(len(actors), generator=torch.Generator().manual_seed(seed)).tolist()
        first, second = round(0.7 * len(actors)), round(0.8 * len(actors))
        bounds = {"train": (0, first), "validation": (first, second), "test": (second, len(actors))}[split]
        drawn = {actors[i] for i in order[slice(*bounds)]}
        chosen = [(name, name.split("_")[2]) for name in names if name.split("_")[0] in drawn]
    frames = folders(base, r"Image-\d+-FPS")
    find = lambda name: (  # noqa: E731
        place(base, [f"AudioWAV/{name}.wav"]),
        place(base, [*(f"{folder}/{name}" for folder in frames), *(f"VideoFlash/{name}{end}" for end in VIDEOS)]),
    )
    readers = {"audio": audio or LogSpectrogram(), "video": video or Frames()}
    return collect("crema-d", EMOTIONS, chosen, find, readers, missing)


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
    ``train/NAME`` (``test/NAME``) with frames and ``NAME.wav``. Without: Kinetics' own ``train/CLASS/NAME.mp4``, with
    sound in the video, or ``NAME.wav`` beside it; the test split is in ``test``, or ``val`` where that is missing. In
    both, ``validation`` is the share of the training clips, a class at a time, that is held out.

    Options and errors as for :func:`crema_d`; sound is ten seconds by default.
    Source: Arandjelovic and Zisserman, arXiv 1705.08168, of Kinetics, arXiv 1705.06950 (annotations CC BY 4.0); the
    first layout as the published code of OGM-GE (343dc1d).
    """
    base = existing(root)
    check(split, validation, missing)
    readers = {"audio": audio or LogSpectrogram(seconds=10.0), "video": video or Frames()}
    if (base / "my_train.txt").exists():
        everything = [(name, number) for name, _, number in lines(base / "my_train.txt", ",", 3)]
        rows = [(name, number) for name, _, number in lines(base / f"my_{listed(split)}.txt", ",", 3)]
        classes: Sequence[str] = [str(k) for k in range(1 + max(int(number) for _, number in everything))]
        within = base / listed(split)
        find = lambda name: (place(within, [f"{name}/{name}.wav"]), place(within, [name]))  # noqa: E731
    else:
        within = base / listed(split)
        if split == "test" and not within.exists():
            within = base / "val"
        classes = sorted(folder.name for folder in (base / "train").iterdir() if folder.is_dir())
        videos = {f"{v.parent.name}/{v.stem}": v for v in sorted(within.glob("*/*")) if v.suffix.lower() in VIDEOS}
        rows = [(name, name.split("/")[0]) for name in videos]
        find = lambda name: (place(within, [f"{name}.wav", f"{name}{videos[name].suffix}"]), videos[name])  # noqa: E731
    return collect("kinetics-sounds", classes, share_of(rows, split, validation, seed), find, readers, missing)


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
    ``AVE/ID.mp4``; where there are ``audio/ID.wav`` (or ``wave_files/ID.wav``) or frames in ``visual/ID`` (or
    ``Image-01-FPS/ID``), these are read instead. The label is that of the clip; start and end are not used. A video
    that a list names more than once counts once, with its first class (our reading).

    Options and errors as for :func:`crema_d`; sound is ten seconds by default.
    Source: Tian et al., arXiv 1803.08842.
    """
    base = existing(root)
    check(split, 0.0, missing)
    lists = {"train": "trainSet.txt", "validation": "valSet.txt", "test": "testSet.txt"}
    rows = {name: [row for row in lines(base / own, "&", 5) if row[0] != "Category"] for name, own in lists.items()}
    classes = sorted({row[0] for own in rows.values() for row in own})
    chosen: dict[str, str] = {}
    for label, name, *_ in rows[split]:
        chosen.setdefault(name, label)
    frames = ["visual", *folders(base, r"Image-\d+-FPS")]
    find = lambda name: (  # noqa: E731
        place(base, [f"audio/{name}.wav", f"wave_files/{name}.wav", f"AVE/{name}.mp4"]),
        place(base, [*(f"{folder}/{name}" for folder in frames), f"AVE/{name}.mp4"]),
    )
    readers = {"audio": audio or LogSpectrogram(seconds=10.0), "video": video or Frames()}
    return collect("ave", classes, list(chosen.items()), find, readers, missing)


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
    classes have none: ``missing`` only looks for files, so list those that have). ``validation`` holds out *groups* of
    clips of one recording (the ``gXX`` of their names), as the test lists do.

    ``readers``: in the place of the default ``Frames()``, ``Flow()``, ``LogSpectrogram()``. Other options and errors as
    for :func:`crema_d`; ValueError for unknown modalities, fewer than two, or another fold.
    Source: Soomro et al., arXiv 1212.0402; frames and flow in the layout of Feichtenhofer et al., arXiv 1604.06573.
    """
    base = existing(root)
    known: dict[str, Reader] = {"rgb": Frames(), "flow": Flow(), "audio": LogSpectrogram()}
    check(split, validation, missing)
    if len(modalities) < 2 or len(set(modalities)) != len(modalities) or not set(modalities) <= set(known):
        raise ValueError(f"modalities must be at least two different ones of {list(known)}, got {list(modalities)}")
    if fold not in (1, 2, 3):
        raise ValueError(f"fold must be 1, 2 or 3, got {fold}")
    lists = base / "ucfTrainTestlist"
    classes = [name for _, name in lines(lists / "classInd.txt", " ", 2)]
    entries = [row[0] for row in lines(lists / f"{listed(split)}list{fold:02d}.txt", " ", 1)]
    rows = [(entry.rsplit(".", 1)[0], entry.split("/")[0]) for entry in entries]
    chosen = share_of(rows, split, validation, seed, key=lambda name: name.rsplit("_c", 1)[0])

    def find(name: str) -> tuple[Path | None, ...]:
        own, video = name.rsplit("/", 1)[-1], f"UCF-101/{name}.avi"
        flow = all((base / "tvl1_flow" / axis / own).is_dir() for axis in ("u", "v"))
        places = {
            "rgb": place(base, [f"jpegs_256/{own}", video]),
            "flow": base / "tvl1_flow" / "{}" / own if flow else None,
            "audio": place(base, [f"audio/{own}.wav", video]),
        }
        return tuple(places[modality] for modality in modalities)

    given = {**known, **(readers or {})}
    return collect("ucf-101", classes, chosen, find, {m: given[m] for m in modalities}, missing)


# -- what they share ---------------------------------------------------------------------------------------------------


def existing(root: str | os.PathLike[str]) -> Path:
    if not Path(root).is_dir():
        raise FileNotFoundError(f"root {os.fspath(root)!r} is not a folder")
    return Path(root)


def check(split: str, validation: float, missing: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"validation is a share of the training list, at least 0 and below 1, got {validation}")
    if missing not in ("error", "skip"):
        raise ValueError(f"unknown missing {missing!r}; it is 'error' or 'skip'")


def listed(split: str) -> str:
    """The published list or folder that a split comes from: validation is held out of the training list."""
    return "test" if split == "test" else "train"


def lines(path: Path, separator: str, fields: int) -> list[list[str]]:
    """The fields of every line that is not empty; at least ``fields`` of them, the others are dropped.

    Raises FileNotFoundError, ValueError with the number of a line that has too few.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; root must be the folder that has it")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            row = [field.strip() for field in line.strip().split(separator)]
            if len(row) < fields:
                raise ValueError(f"{path}, line {number}: {fields} fields separated by {separator!r}, got {line!r}")
            found.append(row[:fields])
    return found


def share_of(
    rows: Sequence[tuple[str, str]],
    split: str,
    share: float,
    seed: int,
    key: Callable[[str], str] = lambda name: name,
) -> list[tuple[str, str]]:
    """The rows ``(name, class)`` of a split: of every class's ``key(name)`` the ``share`` that ``seed`` draws is held
    out of training, rounded."""
    if split == "test":
        return list(rows)
    held = set()
    generator = torch.Generator().manual_seed(seed)
    for label in sorted({label for _, label in rows}):
        keys = sorted({key(name) for name, own in rows if own == label})
        order = torch.randperm(len(keys), generator=generator).tolist()
        held |= {(label, keys[i]) for i in order[: round(share * len(keys))]}
    return [(name, label) for name, label in rows if ((label, key(name)) in held) == (split == "validation")]


def folders(base: Path, pattern: str) -> list[str]:
    """Names of the folders in ``base`` that match, the last first: more frames a second go before fewer."""
    return sorted((f.name for f in base.iterdir() if f.is_dir() and re.fullmatch(pattern, f.name)), reverse=True)


def place(base: Path, candidates: Iterable[str]) -> Path | None:
    """The first file, or folder with frames, that is there."""
    for candidate in candidates:
        path = base / candidate
        if path.is_file() or (path.is_dir() and any(f.suffix.lower() in IMAGES for f in path.iterdir())):
            return path
    return None


def collect(
    name: str,
    classes: Sequence[str],
    rows: Sequence[tuple[str, str]],
    find: Callable[[str], tuple[Path | None, ...]],
    readers: Mapping[str, Reader],
    missing: str,
) -> Clips:
    clips, left_out = [], []
    for own, label in rows:
        if label not in classes:
            raise ValueError(f"{name}: {own} is of the unknown class {label!r}; classes are {', '.join(classes)}")
        paths = tuple(path for path in find(own) if path is not None)
        if len(paths) == len(readers):
            clips.append(Clip(own, paths, classes.index(label)))
        else:
            left_out.append(own)
    if left_out and missing == "error":
        raise FileNotFoundError(
            f"{name}: {len(left_out)} of {len(rows)} clips lack a file for {' or '.join(readers)}, {left_out[0]!r} the "
            "first; give missing='skip' to leave them out"
        )
    return Clips(name, classes, clips, readers, left_out)
