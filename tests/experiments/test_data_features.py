"""Precomputed features of every format, none of which may run code."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aim_kernels.experiments.data import (
    BagOfWords,
    BrokenFileError,
    Features,
    StoredTokens,
    Tokens,
    unpickle,
    vocabulary,
)
from aim_kernels.experiments.data.features import FEATURES, Either, stored
from aim_kernels.experiments.data.text import words

pytestmark = pytest.mark.usefixtures("one_thread")


class Calls:
    """A pickle of this calls ``os.mkdir(path)``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def write(path: Path, values: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, values)
    elif path.suffix in (".pt", ".pth"):
        torch.save(torch.from_numpy(values), path)
    else:
        path.write_bytes(pickle.dumps(values))


@pytest.mark.parametrize("end", FEATURES)
def test_features_of_every_format(tmp_path: Path, end: str) -> None:
    values = np.arange(12, dtype=np.float64).reshape(3, 4)
    write(tmp_path / f"x{end}", values)
    found = Features()(tmp_path / f"x{end}")
    assert found.shape == (1, 3, 4) and found.dtype == torch.float32
    np.testing.assert_array_equal(found[0].numpy(), values)
    assert Features(channel=False)(tmp_path / f"x{end}").shape == (3, 4)
    assert Either(lambda path: torch.zeros(7))(tmp_path / f"x{end}").shape == (1, 3, 4)
    assert Either(lambda path: torch.zeros(7))(tmp_path / "x.wav").shape == (7,)
    found += 1.0  # writable, and not the file's memory
    content = (tmp_path / f"x{end}").read_bytes()
    for cut in (b"", content[: len(content) // 2], b"no features" * 9):
        (tmp_path / f"x{end}").write_bytes(cut)
        with pytest.raises(BrokenFileError, match=rf"x{end} cannot be read"):
            stored(tmp_path / f"x{end}")
    with pytest.raises(FileNotFoundError):
        stored(tmp_path / f"none{end}")


@pytest.mark.parametrize("end", FEATURES)
def test_no_format_runs_code(tmp_path: Path, end: str) -> None:
    held = np.array([Calls(tmp_path / "ran")], dtype=object)
    if end == ".npy":
        np.save(tmp_path / f"x{end}", held, allow_pickle=True)
    elif end == ".npz":
        np.savez(tmp_path / f"x{end}", held)
    elif end in (".pt", ".pth"):
        torch.save({"x": Calls(tmp_path / "ran")}, tmp_path / f"x{end}")
    else:
        (tmp_path / f"x{end}").write_bytes(pickle.dumps(held))
    with pytest.raises(BrokenFileError, match=rf"x{end} cannot be read"):
        stored(tmp_path / f"x{end}")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_single_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    torch.save({"a": torch.zeros(2)}, tmp_path / "named.pt")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    (tmp_path / "named.pkl").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "x.txt").write_text("1 2")
    for name, message in (
        ("two.npz", r"expected one array, got \['a', 'b'\]"),
        ("named.pt", "expected a tensor, got dict"),
        ("words.npy", "expected numbers"),
        ("named.pkl", "expected numbers"),
        ("x.txt", "no file of features"),
    ):
        with pytest.raises(BrokenFileError, match=message):
            stored(tmp_path / name)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("core", ["core", "_core"])
def test_arrays_come_out_of_pickles_as_they_went_in(tmp_path: Path, protocol: int, core: str) -> None:
    held = {
        "f": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "axes": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
        "big": np.arange(3, dtype=">i4"),
        "empty": np.zeros((0, 5)),
        "bool": np.array([True, False]),
        "words": np.array(["video$_$1", "é"]),
        "bytes": np.array([[b"v", b"1.5"]]),
        "objects": np.array([["a", None], ["b", 2]], dtype=object),
        "list": [np.ones(2), np.zeros(2)],
        "scalar": np.float64(2.5),
    }
    content = pickle.dumps(OrderedDict(held), protocol)
    other = b"numpy.core." if core == "core" else b"numpy._core."
    if protocol < 4:  # names have a line of their own there: the other NumPy's can be put in
        content = content.replace(b"numpy._core.", other).replace(b"numpy.core.", other)
    found = unpickle.load(io.BytesIO(content))
    for key, value in held.items():
        opened = unpickle.array(tmp_path, unpickle.item(tmp_path, found, key))
        np.testing.assert_array_equal(opened, np.asarray(value), err_msg=key)
        assert opened.dtype == np.asarray(value).dtype, key
    with pytest.raises(ValueError, match="expected the key 'g' among f, order"):
        unpickle.item(tmp_path, found, "g")
    with pytest.raises(ValueError, match="expected a dictionary with 'g', got list"):
        unpickle.item(tmp_path, found["list"], "g")


def test_arrays_within_objects_and_lists_that_are_no_array(tmp_path: Path) -> None:
    nested = np.empty(2, dtype=object)
    nested[0], nested[1] = np.ones(3), np.zeros(3)
    found = unpickle.load(io.BytesIO(pickle.dumps(nested, 4)))
    np.testing.assert_array_equal(unpickle.array(tmp_path, found), [[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="lists of equal lengths"):
        unpickle.array(tmp_path, [[1, 2], [3]])
    unfilled = b"\x80\x02cnumpy\nndarray\n)\x81."
    with pytest.raises(ValueError, match="without content"):
        unpickle.array(tmp_path, unpickle.load(io.BytesIO(unfilled)))


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"cnumpy\ndtype\n(S'O'\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb.cnumpy",
        b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O'\ntRS'x'\ntR.",
        b"cnumpy\ndtype\n(S'i4,f4'\ntR.",
        b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'<'\nN(S'a'\ntNI-1\nI-1\nI0\ntb.",
        b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'<'\n(S'f8'\n(I2\nttNNI-1\nI-1\nI0\ntb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I9\ntcnumpy\ndtype\n(S'f8'\ntRI00\nS'x'\ntb.",
    ],
)
def test_pickles_that_are_refused(content: bytes) -> None:
    """Functions, other encodings than those for bytes, scalars of objects, fields, and a shape beyond the content."""
    if content.endswith(b".cnumpy"):  # a type alone is harmless: nothing to call on it
        assert not hasattr(unpickle.load(io.BytesIO(content)), "newbyteorder")
        return
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        unpickle.load(io.BytesIO(content))


# -- text --------------------------------------------------------------------------------------------------------------


def test_tokens_are_padded_and_stable(tmp_path: Path) -> None:
    assert words("Don't STOP: 5€!") == ["don't", "stop", ":", "5", "€", "!"]
    read = Tokens(length=6, size=1000)
    found = read("Good pie, good")
    assert found.dtype == torch.int64 and found.shape == (6,)
    assert int((found > 0).sum()) == 4 and found[4:].tolist() == [0, 0]
    # the checksums of good, pie and the comma, which no machine and no version changes
    assert found.tolist()[:4] == [1 + value % 999 for value in (1820610194, 576189563, 3772416878, 1820610194)]
    assert read("one two three four five six seven").shape == (6,)
    assert read("").tolist() == [0] * 6
    (tmp_path / "1.txt").write_bytes("Good crème".encode("latin-1"))
    assert torch.equal(read(tmp_path / "1.txt"), read("good crème"))


def test_tokens_and_bags_of_a_vocabulary() -> None:
    known = vocabulary(["b a b", "b c a"], 2)
    assert known == ("b", "a")
    read = Tokens(4, vocabulary=known)
    assert read("a c b").tolist() == [3, 1, 2, 0] and read.num_embeddings == 4
    assert Tokens(4, 50).num_embeddings == 50
    bag = BagOfWords(vocabulary=known)("a c b b")
    torch.testing.assert_close(bag, torch.tensor([3.0, 2.0]).log())
    hashed = BagOfWords(16)("a c b b")
    assert hashed.shape == (16,) and hashed.dtype == torch.float32
    torch.testing.assert_close(hashed.exp().sum() - 16, torch.tensor(4.0))  # four words, whatever collides
    assert BagOfWords(16)("").tolist() == [0.0] * 16
    for wrong in (lambda: Tokens(0), lambda: Tokens(4, 1), lambda: BagOfWords(0)):
        with pytest.raises(ValueError, match="must be at least"):
            wrong()


def test_stored_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "7_token.npy", np.array([[101, 9, 0, 55]]))
    assert StoredTokens()(tmp_path / "7_token.npy").tolist() == [101, 9, 0, 55]
    np.save(tmp_path / "7_pm.npy", np.array([[0.0, 0.0, 1.0, 1.0]], dtype=np.float32))
    assert StoredTokens()(tmp_path / "7_token.npy").tolist() == [101, 9, 0, 0]
    np.save(tmp_path / "7_pm.npy", np.zeros((1, 3), dtype=np.float32))
    with pytest.raises(BrokenFileError, match=r"7_pm\.npy masks 3 tokens, 7_token\.npy has 4"):
        StoredTokens()(tmp_path / "7_token.npy")
    np.save(tmp_path / "8_token.npy", np.array([0.5]))
    with pytest.raises(BrokenFileError, match=r"8_token\.npy .* integers of at least 0"):
        StoredTokens()(tmp_path / "8_token.npy")
