"""The data sets with text that the field reports on: pictures with a caption, and spoken utterances.

As in :mod:`~aim_kernels.experiments.data.clips` nothing is downloaded; text becomes numbers of words by
:class:`~aim_kernels.experiments.data.text.Tokens` unless another reader is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from aim_kernels.experiments.data.clips import audio_places, video_places
from aim_kernels.experiments.data.features import Either
from aim_kernels.experiments.data.index import (
    Clips,
    Places,
    check,
    collect,
    existing,
    listed,
    share_of,
    subset_of,
)
from aim_kernels.experiments.data.lists import IMAGE, LABEL, TEXT, entries, json_rows, rows, text_of
from aim_kernels.experiments.data.media import VIDEOS, Frames, LogSpectrogram, Picture, Reader, Source
from aim_kernels.experiments.data.text import StoredTokens, Tokens

SENTIMENTS = ("negative", "neutral", "positive")
#: IEMOCAP's four usual classes, in the order of MLA's list of classes, and how its annotations call them.
FOUR = ("Neutral", "Angry", "Sad", "Happy")
_EMOTIONS = {"neu": "Neutral", "ang": "Angry", "sad": "Sad", "hap": "Happy", "exc": "Happy"}


class Caption(NamedTuple):
    """A line of a list: the picture, its text (None if the list has none), its class, and the list's own name of the
    split."""

    image: str
    text: str | None
    label: str
    own: str


def mvsa_single(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    image: Reader | None = None,
    text: Reader | None = None,
    validation: float = 0.1,
    seed: int = 0,
    missing: str = "error",
) -> Clips:
    """MVSA-Single: 4,869 tweets with a picture, three sentiments, as ``image`` and ``text``.

    Three layouts of ``root``, the first that is there. ``train.jsonl``, ``dev.jsonl``, ``test.jsonl`` (a JSON object a
    line with ``img``, ``text``, ``label``). MLA's ``my_train_mvsa.txt`` and ``my_test_mvsa.txt`` (``477.jpg positive``)
    with ``visual/train_imgs/477.jpg`` and ``text_token/train_token/477_token.npy``. The release's
    ``labelResultAll.txt`` (``ID``, a tab, ``text sentiment,image sentiment``): equal ones are the class, neutral gives
    way to the other, positive beside negative is left out (as is usual, 4,511 pairs remain); clips are split by
    ``seed``, a class at a time, 80 / 10 / 10 %. Pictures are ``data/ID.jpg``, texts ``data/ID.txt``, or in ``image``
    and ``text``.

    ``image`` and ``text``: readers, by default ``Picture()`` and ``Tokens()``, or ``StoredTokens()`` of MLA's files.
    ``validation``: the share of MLA's training list that is held out if there is no ``my_dev_mvsa.txt``. Other options
    and errors as for :func:`~aim_kernels.experiments.data.clips.crema_d`.
    Source: Niu et al., MultiMedia Modeling 2016; lists as the published code of MLA (ab6c184); the rule for two
    sentiments by Xu and Mao, CIKM 2017.
    """
    base = existing(root)
    check(split, validation, missing)
    found = _captions(base, "mvsa", split, validation, seed)
    if found is None:
        found = _annotated(base / "labelResultAll.txt", split, seed)
    return _captioned("mvsa-single", base, SENTIMENTS, found, image, text, missing)


def food101(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    image: Reader | None = None,
    text: Reader | None = None,
    validation: float = 0.1,
    seed: int = 0,
    missing: str = "error",
) -> Clips:
    """UPMC Food-101: some 90,000 pictures of 101 dishes with the title of their page, as ``image`` and ``text``.

    Three layouts of ``root``, the first that is there. ``train.jsonl``, ``dev.jsonl``, ``test.jsonl`` (a JSON object a
    line with ``img``, ``text``, ``label``). MLA's ``my_train_food.txt`` and ``my_test_food.txt`` (``NAME.jpg CLASS``)
    with ``visual/train_imgs/NAME.jpg`` and ``text_token/train_token/NAME_token.npy``. The release's
    ``texts/train_titles.csv`` and ``texts/test_titles.csv`` (``NAME.jpg,"title",CLASS``, or any order under a header)
    with ``images/train/CLASS/NAME.jpg``. Without a list of its own (``dev``), ``validation`` is the share of the
    training list, a class at a time, that is held out. Classes are those of the training list, by name.

    Options and errors as for :func:`mvsa_single`.
    Source: Wang et al., ICME Workshops 2015; lists as the published codes of MLA (ab6c184) and BalanceBenchmark
    (4c1482f).
    """
    base = existing(root)
    check(split, validation, missing)
    found = _captions(base, "food", split, validation, seed)
    every = _captions(base, "food", "train", 0.0, seed)
    if found is None or every is None:
        every = _titles(base, "train")
        found = _of_split(_titles(base, listed(split)), split, validation, seed)
    classes = sorted({caption.label for caption in every})
    return _captioned("food-101", base, classes, found, image, text, missing)


def _captions(base: Path, name: str, split: str, validation: float, seed: int) -> list[Caption] | None:
    """What JSON lists or MLA's lists say of a split; None if there are none."""
    own = {"train": "train", "validation": "dev", "test": "test"}[split]
    if (base / "train.jsonl").exists():
        table = json_rows(base / f"{own}.jsonl", ("img", "text", "label"))
        return [Caption(image, text, label, own) for image, text, label in table]
    if not (base / f"my_train_{name}.txt").exists():
        return None
    held = (base / f"my_dev_{name}.txt").exists()
    own = own if held else listed(split)
    pairs = rows(base / f"my_{own}_{name}.txt", " ", {"image": IMAGE, "class": LABEL})
    found = [Caption(image, None, label, own) for image, label in pairs]
    return found if held else _of_split(found, split, validation, seed)


def _of_split(found: Sequence[Caption], split: str, validation: float, seed: int) -> list[Caption]:
    """The captions that :func:`share_of` takes, by their place in the list: names may repeat."""
    numbered = [(f"{k:09d}", caption.label) for k, caption in enumerate(found)]
    return [found[int(k)] for k, _ in share_of(numbered, split, validation, seed)]


def _titles(base: Path, own: str) -> list[Caption]:
    columns = {"image": IMAGE, "text": TEXT, "class": LABEL}
    table = rows(base / "texts" / f"{own}_titles.csv", ",", columns)
    return [Caption(image, text, label, own) for image, text, label in table]


def _annotated(path: Path, split: str, seed: int) -> list[Caption]:
    """MVSA's own annotations, one annotator a line."""
    found = []
    for name, both in rows(path, "\t", {"ID": ("id",), "text,image": ("textimage",)}):
        pair = [sentiment.strip().casefold() for sentiment in both.split(",")]
        if len(pair) != 2 or not set(pair) <= set(SENTIMENTS):
            raise ValueError(f"{path}, ID {name}: expected two sentiments like positive,neutral, got {both!r}")
        polar = sorted(set(pair) - {"neutral"})
        if len(polar) < 2:
            found.append(Caption(f"{name}.jpg", None, polar[0] if polar else "neutral", "data"))
    parts: dict[str, list[Caption]] = {"train": [], "validation": [], "test": []}
    generator = torch.Generator().manual_seed(seed)
    for label in SENTIMENTS:
        own = [caption for caption in found if caption.label == label]
        order = torch.randperm(len(own), generator=generator).tolist()
        first, second = round(0.8 * len(own)), round(0.9 * len(own))
        bounds = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
        for part, places in bounds.items():
            parts[part] += [own[k] for k in sorted(places)]
    return parts[split]


def _captioned(
    name: str,
    base: Path,
    classes: Sequence[str],
    found: Sequence[Caption],
    image: Reader | None,
    text: Reader | None,
    missing: str,
) -> Clips:
    """Clips of an image and a text each; a list without texts has them in files, MLA's tokens before others."""
    captions: dict[str, Caption] = {}
    for caption in found:
        unique, repeats = caption.image, 1
        while unique in captions:
            repeats += 1
            unique = f"{caption.image}#{repeats}"
        captions[unique] = caption
    own = found[0].own if found else "train"
    shown = Places(base, ["{}", f"visual/{own}_imgs/{{}}", f"images/{own}/{{}}", "images/{}", "image/{}", "data/{}"])
    tokens = Places(base, [f"text_token/{own}_token/{{}}_token.npy"])
    plain = Places(base, ["data/{}.txt", "text/{}.txt", "texts/{}.txt"])
    listed_text = bool(found) and found[0].text is not None
    use_tokens = isinstance(text, StoredTokens) or (text is None and not listed_text and bool(tokens.patterns))

    def find(unique: str) -> tuple[Source | None, ...]:
        caption = captions[unique]
        file = caption.image.rsplit("/", 1)[-1]
        stem = file.rsplit(".", 1)[0]
        written: Source | None = caption.text
        if use_tokens or written is None:
            written = (tokens if use_tokens else plain).find(stem)
        return shown.find(caption.image, f"{caption.label}/{file}", file), written

    readers = {"image": image or Picture(), "text": text or (StoredTokens() if use_tokens else Tokens())}
    rows_ = [(unique, caption.label) for unique, caption in captions.items()]
    return collect(name, classes, rows_, find, readers, missing, level=4)


def iemocap(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    modalities: Sequence[str] = ("audio", "text"),
    fold: int = 5,
    readers: Mapping[str, Reader] | None = None,
    validation: float = 0.1,
    seed: int = 0,
    missing: str = "error",
) -> Clips:
    """IEMOCAP: acted dialogues, four emotions (excited counts as happy), as any of ``audio``, ``text`` and ``video``.

    Two layouts of ``root``. With MLA's ``my_train_iemo.txt`` and ``my_test_iemo.txt`` (lines ``NAME.mp4 [split|sign]
    text [split|sign] Emotion``) these are the splits, ``fold`` is not used, and ``my_dev_iemo.txt`` or a share of the
    training list, ``validation``, is the validation split. Otherwise the release's ``Session1`` to ``Session5`` with
    ``dialog/EmoEvaluation/*.txt``, ``dialog/transcriptions/*.txt`` and ``sentences/wav/DIALOGUE/NAME.wav``: session
    ``fold`` is the test split, and ``validation`` the share of the other sessions' *dialogues* that is held out.

    ``audio`` is in those places, in ``subaudio/NAME.wav`` or in
    :func:`~aim_kernels.experiments.data.clips.audio_places`; ``text`` in the lists, or, for the reader
    ``StoredTokens()``, in ``text_token/train_token/NAME_token.npy``; ``video`` is frames in ``faces/NAME`` or
    ``visual/train_imgs/NAME``, or ``subvideo/NAME.mp4`` (the release has a video a dialogue only: cut it first).

    ``readers``: in the place of the default ``LogSpectrogram(seconds=6.0)``, ``Tokens()``, ``Frames()``. Other options
    and errors as for :func:`~aim_kernels.experiments.data.clips.crema_d`; ValueError for unknown modalities, fewer than
    two, or another fold.
    Source: Busso et al., Language Resources and Evaluation 42, 2008; lists as the published code of MLA (ab6c184).
    """
    base = existing(root)
    known: dict[str, Reader] = {"audio": Either(LogSpectrogram(seconds=6.0)), "text": Tokens(), "video": Frames()}
    check(split, validation, missing)
    subset_of("modalities", modalities, known)
    if fold not in range(1, 6):
        raise ValueError(f"fold must be 1 to 5, the session for testing, got {fold}")
    given = {**known, **(readers or {})}
    own = listed(split)
    if (base / "my_train_iemo.txt").exists():
        held = split == "validation" and (base / "my_dev_iemo.txt").exists()
        own = "dev" if held else own
        columns: dict[str, Sequence[str]] = {"name": (), "text": (), "emotion": ()}
        table = rows(base / f"my_{own}_iemo.txt", "[split|sign]", columns)
        texts = {Path(name).stem: text for name, text, _ in table}
        pairs = [(Path(name).stem, label) for name, _, label in table]
        share = 0.0 if (base / "my_dev_iemo.txt").exists() else validation
        chosen = pairs if held else share_of(pairs, split, share, seed)
    else:
        texts, chosen = _sessions(base, split, fold, validation, seed)
    sounds = [f"Session{k}/sentences/wav/{{}}.wav" for k in range(1, 6)]
    heard = Places(base, [*sounds, "subaudio/{}.wav", *audio_places(own)], given["audio"])
    seen = Places(base, ["faces/{}", *(f"subvideo/{{}}{end}" for end in VIDEOS), *video_places(base, own)])
    tokens = Places(base, [f"text_token/{own}_token/{{}}_token.npy"])
    stored = isinstance(given["text"], StoredTokens)
    ways: dict[str, Callable[[str], Source | None]] = {
        "audio": lambda name: heard.find(f"{name.rsplit('_', 1)[0]}/{name}", name),
        "text": lambda name: tokens.find(name) if stored else texts.get(name),
        "video": lambda name: seen.find(name),
    }
    find = lambda name: tuple(ways[modality](name) for modality in modalities)  # noqa: E731
    return collect("iemocap", FOUR, chosen, find, {m: given[m] for m in modalities}, missing)


def _sessions(
    base: Path, split: str, fold: int, validation: float, seed: int
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The release's utterances of a split: name to text, and (name, class)."""
    sessions = [fold] if split == "test" else [k for k in range(1, 6) if k != fold]
    texts: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []
    for session in sessions:
        dialog = base / f"Session{session}" / "dialog"
        for folder in (dialog / "EmoEvaluation", dialog / "transcriptions"):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is missing: expected the release's folders or my_train_iemo.txt")
        for file in entries(dialog / "EmoEvaluation"):
            if file.suffix == ".txt":
                marks = re.findall(r"^\[[\d. -]+\]\s+(\S+)\s+(\w+)\s+\[", text_of(file), re.MULTILINE)
                pairs += [(name, _EMOTIONS[mark]) for name, mark in marks if mark in _EMOTIONS]
        for file in entries(dialog / "transcriptions"):
            if file.suffix == ".txt":
                texts.update(re.findall(r"^(Ses\S+)\s+\[[\d. -]+\]:[ \t]*(.*?)\s*$", text_of(file), re.MULTILINE))
    dialogues = [(name, "") for name in dict.fromkeys(name.rsplit("_", 1)[0] for name, _ in pairs)]
    drawn = {name for name, _ in share_of(dialogues, split, validation, seed)}
    return texts, [(name, label) for name, label in pairs if name.rsplit("_", 1)[0] in drawn]
