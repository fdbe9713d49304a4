"""From text to tensors, without a model or a download: numbers of words, or bags of words."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from aim_kernels.experiments.data.features import stored
from aim_kernels.experiments.data.lists import text_of
from aim_kernels.experiments.data.media import BrokenFileError, naming

PADDING, UNKNOWN = 0, 1


def words(source: Path | str) -> list[str]:
    """Words, numbers and single punctuation marks, in lower case, of a text or of a text file."""
    text = text_of(source) if isinstance(source, Path) else source
    return re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]", text.casefold())


def vocabulary(sources: Iterable[Path | str], most: int) -> tuple[str, ...]:
    """The ``most`` frequent words of texts, the most frequent first, equals in the order of the alphabet.

    Take it from training texts: ``vocabulary(clips.sources("text"), 10_000)``.
    """
    counts = Counter(word for source in sources for word in words(source))
    return tuple(word for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most])


@dataclass(frozen=True)
class Tokens:
    """The numbers of a text's words: int64 ``[length]``, what an embedding takes.

    A longer text is cut, a shorter one padded at its end with 0, so that ``(ids > 0).sum(-1)`` are the lengths. With
    ``vocabulary`` its words are 2, 3, ... and all others 1; ``size`` is not used. Without, a word is ``1 + crc32(word)
    mod (size - 1)``: the same on every machine, with collisions.

    ``num_embeddings``: rows of the embedding. Raises ValueError for a ``length`` below 1 or a ``size`` below 2.
    """

    length: int = 64
    size: int = 2**15
    vocabulary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.length < 1 or self.size < 2:
            raise ValueError(f"length must be at least 1 and size at least 2, got {self.length} and {self.size}")

    @property
    def num_embeddings(self) -> int:
        return len(self.vocabulary) + 2 if self.vocabulary else self.size

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: 2 + k for k, word in enumerate(self.vocabulary)}

    def __call__(self, source: Path | str) -> Tensor:
        found = words(source)[: self.length]
        if self.vocabulary:
            ids = [self._numbers.get(word, UNKNOWN) for word in found]
        else:
            ids = [1 + zlib.crc32(word.encode()) % (self.size - 1) for word in found]
        return torch.tensor(ids + [PADDING] * (self.length - len(ids)), dtype=torch.int64)


@dataclass(frozen=True)
class BagOfWords:
    """``log(1 + n)`` of how often each word occurs: float32 ``[size]``, what every network here takes.

    Words are hashed, ``crc32(word) mod size``, or looked up in ``vocabulary`` (then ``[len(vocabulary)]``, other words
    do not count). Raises ValueError for a ``size`` below 1.
    """

    size: int = 2048
    vocabulary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: k for k, word in enumerate(self.vocabulary)}

    def __call__(self, source: Path | str) -> Tensor:
        found = words(source)
        if self.vocabulary:
            ids = [self._numbers[word] for word in found if word in self._numbers]
        else:
            ids = [zlib.crc32(word.encode()) % self.size for word in found]
        size = len(self.vocabulary) or self.size
        return torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=size).float().log1p()


@dataclass(frozen=True)
class StoredTokens:
    """Token numbers that somebody computed before, ``NAME_token.npy``: int64 ``[n]``, of the file's own length.

    If ``NAME_pm.npy`` is beside it, numbers are set to ``padding`` where that mask is 1, as the published code of MLA
    (ab6c184) saves BERT's tokens. Raises BrokenFileError for other numbers than integers of at least 0 and a mask of
    another length.
    """

    padding: int = PADDING

    def __call__(self, path: Path) -> Tensor:
        ids = stored(path).flatten()
        mask_file = path.with_name(path.name.replace("_token.", "_pm."))
        with naming(path):
            if not torch.equal(ids, ids.round()) or bool((ids < 0).any()):
                raise ValueError("expected token numbers, integers of at least 0")
            if mask_file == path or not mask_file.is_file():
                return ids.long()
            mask = stored(mask_file).flatten()
            if len(mask) != len(ids):
                raise BrokenFileError(f"{mask_file} masks {len(mask)} tokens, {path.name} has {len(ids)}")
            return torch.where(mask > 0.5, torch.full_like(ids, self.padding), ids).long()
