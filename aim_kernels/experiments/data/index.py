"""What the loaders of published data sets share: samples that are read lazily, and the search for their files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from aim_kernels.experiments.data.features import FEATURES, Features
from aim_kernels.experiments.data.lists import visible
from aim_kernels.experiments.data.media import IMAGES, BrokenFileError, LogSpectrogram, Reader, Source

SPLITS = ("train", "validation", "test")
MISSING = ("error", "skip", "skip-missing")


class Clip(NamedTuple):
    """One sample: its name, what each modality is read from, and its class number."""

    name: str
    sources: tuple[Source, ...]
    label: int


class Clips(Dataset[tuple[Tensor | int, ...]]):
    """Clips that are read lazily: ``clips[i]`` is ``(input of each modality, ..., class number)``.

    A DataLoader's batches so unpack as ``*inputs, labels``. ``classes``: names by class number; ``labels``: ``[N]``,
    int64, without reading a file; ``left_out``: names from the lists whose files are not there or cannot be read.
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
        inputs = []
        for modality, source in zip(self.modalities, clip.sources, strict=True):
            try:
                inputs.append(self.readers[modality](source))
            except Exception as error:
                error.add_note(f"while {modality} of the clip {clip.name!r} of {self.name} was read")
                raise
        return (*inputs, clip.label)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Modality to the shape of a sample, from the first clip: what ``networks.network_of`` takes."""
        *inputs, _ = self[0]
        return {name: tuple(x.shape) for name, x in zip(self.modalities, inputs, strict=True) if isinstance(x, Tensor)}

    def sources(self, modality: str) -> list[Source]:
        """What the samples of ``modality`` are read from, in order; raises ValueError for an unknown one."""
        if modality not in self.modalities:
            raise ValueError(f"unknown modality {modality!r}; it is one of {', '.join(self.modalities)}")
        return [clip.sources[self.modalities.index(modality)] for clip in self.clips]


def existing(root: str | os.PathLike[str]) -> Path:
    if not Path(root).is_dir():
        raise FileNotFoundError(f"root {os.fspath(root)!r} is not a folder")
    return Path(root)


def check(split: str, validation: float, missing: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; it is one of {', '.join(SPLITS)}")
    if not 0.0 <= validation < 1.0:
        raise ValueError(f"validation is a share of the training list, at least 0 and below 1, got {validation}")
    if missing not in MISSING:
        raise ValueError(f"unknown missing {missing!r}; it is one of {', '.join(MISSING)}")


def subset_of(name: str, wanted: Sequence[str], known: Iterable[str], least: int = 2) -> None:
    """Raises ValueError unless ``wanted`` are at least ``least`` different ones of ``known``."""
    known = list(known)
    if len(wanted) < least or len(set(wanted)) != len(wanted) or not set(wanted) <= set(known):
        number = {1: "one", 2: "two"}.get(least, str(least))
        raise ValueError(f"{name} must be at least {number} different ones of {known}, got {list(wanted)}")


def listed(split: str) -> str:
    """The published list or folder that a split comes from: validation is held out of the training list."""
    return "test" if split == "test" else "train"


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
    if not base.is_dir():
        return []
    return sorted((f.name for f in base.iterdir() if f.is_dir() and re.fullmatch(pattern, f.name)), reverse=True)


class Places:
    """Where a modality's files may be: ``patterns`` below ``base`` in which ``{}`` stands for a clip's name.

    Folders are listed once, so that clips that are not in one cost nothing there. If ``reader`` takes only features, or
    only sound, patterns of the other kind are left out.
    """

    def __init__(self, base: Path, patterns: Iterable[str], reader: Reader | None = None) -> None:
        listings: dict[Path, frozenset[str]] = {}
        #: Folders, what is in them, and the rest of the pattern.
        self.patterns: list[tuple[Path, frozenset[str], str]] = []
        for pattern in dict.fromkeys(patterns):
            inner = pattern.split("{}")[0].rpartition("/")[0]
            folder, rest = base / inner, pattern[len(inner) :].lstrip("/")
            feature = Path(pattern).suffix.lower() in FEATURES
            wrong = (isinstance(reader, Features) and not feature) or (isinstance(reader, LogSpectrogram) and feature)
            if not wrong and folder not in listings:
                listings[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
            if not wrong and listings[folder]:
                self.patterns.append((folder, listings[folder], rest))

    def find(self, *names: str) -> Path | None:
        """The first file, or folder with frames, that is there under the first of ``names`` that has one."""
        for name in names:
            for folder, listing, pattern in self.patterns:
                inner = pattern.replace("{}", name)
                if inner.split("/", 1)[0] in listing and ((folder / inner).is_file() or has_frames(folder / inner)):
                    return folder / inner
        return None


def has_frames(path: Path) -> bool:
    return path.is_dir() and any(f.suffix.lower() in IMAGES and visible(f.name) for f in path.iterdir())


def feature_files(*folders_: str, ends: Sequence[str] = FEATURES) -> list[str]:
    """Patterns for :class:`Places`: files of features in any of the folders."""
    return [f"{folder}/{{}}{end}" for folder in folders_ for end in ends]


def collect(
    name: str,
    classes: Sequence[str],
    rows: Sequence[tuple[str, str]],
    find: Callable[[str], tuple[Source | None, ...]],
    readers: Mapping[str, Reader],
    missing: str,
    level: int = 3,
) -> Clips:
    """The clips of ``rows`` (name, class), each with what ``find(name)`` gives for every reader.

    ``missing``: "error" raises FileNotFoundError for the first clip that lacks a file; "skip-missing" leaves such clips
    out; "skip" also reads every file once and leaves out clips whose files are broken. What is left out is counted in a
    warning that names the first, given to the caller at stack ``level``. Raises ValueError for an unknown class, and if
    nothing is left.
    """
    known = {label: number for number, label in enumerate(classes)}
    clips, lacking, broken = [], [], []
    for own, label in rows:
        if label not in known:
            raise ValueError(f"{name}: {own} is of the unknown class {label!r}; classes are {', '.join(classes)}")
        sources = tuple(source for source in find(own) if source is not None)
        if len(sources) == len(readers):
            clips.append(Clip(own, sources, known[label]))
        else:
            lacking.append(own)
    files = f"a file for {' or '.join(readers)}"
    if lacking and missing == "error":
        raise FileNotFoundError(
            f"{name}: {len(lacking)} of {len(rows)} clips lack {files}, {lacking[0]!r} the first; give missing='skip' "
            "to leave them out"
        )
    if missing == "skip":
        reasons = [_broken(clip, readers) for clip in clips]
        broken = [(clip.name, reason) for clip, reason in zip(clips, reasons, strict=True) if reason]
        clips = [clip for clip, reason in zip(clips, reasons, strict=True) if not reason]
    if lacking or broken:
        parts = [f"{len(lacking)} lack {files}, {lacking[0]!r} the first"] if lacking else []
        parts += [f"{len(broken)} have one that cannot be read, the first: {broken[0][1]}"] if broken else []
        left_out = f"{len(lacking) + len(broken)} of {len(rows)} clips are left out"
        warnings.warn(f"{name}: {left_out}: {'; '.join(parts)}", stacklevel=level)
    return Clips(name, classes, clips, readers, [*lacking, *(own for own, _ in broken)])


def _broken(clip: Clip, readers: Mapping[str, Reader]) -> str:
    """Why a clip cannot be read, or nothing. Does not move torch's default generator, which augmentation draws from."""
    with torch.random.fork_rng(devices=[]):
        for read, source in zip(readers.values(), clip.sources, strict=True):
            try:
                read(source)
            except BrokenFileError as error:
                return str(error)
    return ""
