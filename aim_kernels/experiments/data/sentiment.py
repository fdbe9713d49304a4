"""CMU-MOSI and CMU-MOSEI: sentiment of spoken opinions, in the files of features that the field passes on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels.experiments.data import unpickle
from aim_kernels.experiments.data.index import Clip, Clips, check, subset_of
from aim_kernels.experiments.data.media import Reader, Source, naming

_KEYS = {"text": "text", "audio": "audio", "video": "vision"}
#: Number of classes to their names.
CLASSES = {
    2: ("negative", "not negative"),
    3: ("negative", "neutral", "positive"),
    7: ("-3", "-2", "-1", "0", "1", "2", "3"),
}


@dataclass(frozen=True)
class Rows:
    """Samples in memory: the reader of row ``k`` of a table; ``[T, D]`` is turned to ``[D, T]``, a signal of D
    channels."""

    table: Tensor

    def __call__(self, k: int) -> Tensor:
        return self.table[k].T.contiguous() if self.table.dim() == 3 else self.table[k]


def cmu_mosi(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    aligned: bool = True,
    modalities: Sequence[str] = ("text", "audio", "video"),
    num_classes: int = 2,
    text: str | Reader = "features",
) -> Clips:
    """CMU-MOSI: 2,199 utterances of reviews, as any of ``text``, ``audio`` and ``video`` features.

    ``root``: a file, or a folder with ``aligned_50.pkl`` or ``unaligned_50.pkl`` (MMSA's; also in ``Processed`` or
    ``MOSI/Processed``), or ``mosi_data.pkl`` or ``mosi_data_noalign.pkl``: by split ``train``, ``valid`` and ``test``
    the keys ``text``, ``audio``, ``vision`` (``[N, T, D]``) and ``regression_labels`` (or ``labels``), from -3 to 3.

    A pickle can run anything as it is loaded. These are read by a reader of our own that calls nothing: NumPy arrays
    and plain containers, else an error (:mod:`~aim_kernels.experiments.data.unpickle`). The whole file is read for each
    split.

    Samples are float32 signals ``[D, T]``, padded with zeros as in the file. Minus infinity becomes 0, as in the
    published codes; other values that are not finite as well, with a warning. ``num_classes``: 2 (below 0, or not), 3
    (below, at, above 0) or 7 (rounded, halves to even). ``text``: "features"; "bert" for ``text_bert``'s token numbers,
    int64 ``[T]``, 0 where its mask is; or a reader of ``raw_text`` such as ``Tokens()``.

    Raises FileNotFoundError; BrokenFileError for a file that cannot be read, or not safely; ValueError for unknown
    options and files with other keys or shapes.
    Source: Zadeh et al., IEEE Intelligent Systems 31, 2016; files as the published codes of MMSA (a94e65d) and
    BalanceBenchmark (4c1482f).
    """
    return _sentiment("cmu-mosi", "MOSI", "mosi", root, split, aligned, modalities, num_classes, text)


def cmu_mosei(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    aligned: bool = True,
    modalities: Sequence[str] = ("text", "audio", "video"),
    num_classes: int = 2,
    text: str | Reader = "features",
) -> Clips:
    """CMU-MOSEI: 22,856 utterances of opinions; files (``MOSEI/Processed``, ``mosei_senti_data.pkl``,
    ``mosei_senti_data_noalign.pkl``), options and errors as for :func:`cmu_mosi`.

    Source: Zadeh et al., ACL 2018; files as for :func:`cmu_mosi`.
    """
    return _sentiment("cmu-mosei", "MOSEI", "mosei_senti", root, split, aligned, modalities, num_classes, text)


def _sentiment(
    name: str,
    folder: str,
    short: str,
    root: str | os.PathLike[str],
    split: str,
    aligned: bool,
    modalities: Sequence[str],
    num_classes: int,
    text: str | Reader,
) -> Clips:
    check(split, 0.0, "error")
    subset_of("modalities", modalities, _KEYS)
    if num_classes not in CLASSES:
        raise ValueError(f"num_classes must be one of {list(CLASSES)}, got {num_classes}")
    if isinstance(text, str) and text not in ("features", "bert"):
        raise ValueError(f"unknown text {text!r}; it is 'features', 'bert' or a reader of text")
    path = _file(Path(root), folder, short, aligned)
    with naming(path), path.open("rb") as file:
        content = unpickle.load(file)
    part = unpickle.item(path, content, {"train": "train", "validation": "valid", "test": "test"}[split])
    values = _labels(path, part)
    sources: dict[str, list[Source]] = {}
    readers: dict[str, Reader] = {}
    for modality in modalities:
        sources[modality] = list(range(len(values)))
        if modality == "text" and not isinstance(text, str):
            sources[modality] = [str(line) for line in _array(path, part, "raw_text", len(values), 1).tolist()]
            readers[modality] = text
        elif modality == "text" and text == "bert":
            readers[modality] = Rows(_tokens(path, part, len(values)))
        else:
            readers[modality] = Rows(_signal(path, part, _KEYS[modality], len(values)))
    rows = zip(_names(path, part, len(values)), _classes(values, num_classes), strict=True)
    clips = [Clip(own, tuple(sources[m][k] for m in modalities), label) for k, (own, label) in enumerate(rows)]
    return Clips(name, CLASSES[num_classes], clips, readers)


def _file(root: Path, folder: str, short: str, aligned: bool) -> Path:
    if root.is_file():
        return root
    names = ["aligned_50.pkl", f"{short}_data.pkl"] if aligned else ["unaligned_50.pkl", f"{short}_data_noalign.pkl"]
    places = [root / inner / own for own in names for inner in (".", "Processed", f"{folder}/Processed", folder)]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"root {os.fspath(root)!r} is neither a file nor a folder with {' or '.join(names)}")


def _array(path: Path, part: Any, key: str, samples: int | None, dims: int) -> Any:
    found = unpickle.array(path, unpickle.item(path, part, key))
    if found.ndim != dims or (samples is not None and len(found) != samples):
        wanted = f"{dims} dimensions" + (f" and {samples} rows, one a label" if samples is not None else "")
        raise ValueError(f"{path}: {key!r} has the shape {found.shape}, expected {wanted}")
    return found


def _numbers(path: Path, key: str, found: Any) -> Any:
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {key!r} has elements of the type {found.dtype}, expected numbers")
    return found.astype(np.float32)


def _labels(path: Path, part: Any) -> Any:
    """``[N]`` from -3 to 3."""
    key = "regression_labels" if isinstance(part, dict) and "regression_labels" in part else "labels"
    found = unpickle.array(path, unpickle.item(path, part, key))
    if found.ndim == 0 or found.size != len(found):
        raise ValueError(f"{path}: {key!r} has the shape {found.shape}, expected one number a sample")
    values = _numbers(path, key, found).reshape(-1)
    if not (np.abs(values) <= 3.0).all():
        raise ValueError(f"{path}: {key!r} has values outside -3 to 3")
    return values


def _classes(values: Any, num_classes: int) -> list[int]:
    if num_classes == 2:
        return [int(value >= 0.0) for value in values]
    numbers = np.sign(values) + 1 if num_classes == 3 else np.round(values) + 3
    return [int(number) for number in numbers]


def _signal(path: Path, part: Any, key: str, samples: int) -> Tensor:
    """``[N, T, D]``, finite."""
    table = _numbers(path, key, _array(path, part, key, samples, 3))
    bad = ~np.isfinite(table)
    other = int((bad & ~np.isneginf(table)).sum())
    if other:
        warnings.warn(f"{path}: {other} values of {key!r} are not finite and become 0", stacklevel=4)
    table[bad] = 0.0
    return torch.from_numpy(table)


def _tokens(path: Path, part: Any, samples: int) -> Tensor:
    """Token numbers ``[N, T]`` of ``text_bert`` ``[N, 3, T]``: numbers, mask, segments."""
    table = _numbers(path, "text_bert", _array(path, part, "text_bert", samples, 3))
    if table.shape[1] != 3:
        raise ValueError(f"{path}: 'text_bert' has the shape {table.shape}, expected [N, 3, T]")
    return torch.from_numpy((table[:, 0] * (table[:, 1] > 0.5)).astype(np.int64))


def _names(path: Path, part: Any, samples: int) -> list[str]:
    """The file's own names, or numbers if it has none."""
    if "id" not in part:
        return [str(k) for k in range(samples)]
    found = unpickle.array(path, part["id"]).tolist()
    if len(found) != samples:
        raise ValueError(f"{path}: {len(found)} names of 'id', {samples} labels")
    return ["$_$".join(map(_plain, own)) if isinstance(own, list) else _plain(own) for own in found]


def _plain(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
