"""A disk that is full in the midst of a line: none of it stays."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
from result_lines import compare_line

from aim_kernels import command_line
from aim_kernels.command_line import CannotWriteError, append_lines, write_text
from aim_kernels.experiments.compare import cli, main
from aim_kernels.experiments.compare.results import Folder

TINY = ["--data", "digits", "--methods", "joint", "--epochs", "1", "--seeds", "1"]


class Full(io.FileIO):
    """A file on a disk with room for some bytes more."""

    room = 7

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(bytes(data)[: self.room])
        self.room -= written
        return written


def no_sync(_descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["write", "fsync"])
def test_a_line_is_whole_or_not_there(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "table"
    append_lines(file, "head\n", "first\n")
    with monkeypatch.context() as patch:
        if at == "write":
            patch.setattr(command_line, "open", lambda path, mode, buffering: Full(path, mode.replace("b", "")), False)
        else:
            patch.setattr(os, "fsync", no_sync)
        with pytest.raises(CannotWriteError, match=f"cannot write {file}: No space left"):
            append_lines(file, "head\n", "second, a long one\n")
        assert file.read_text() == "head\nfirst\n"
        with pytest.raises(CannotWriteError):
            append_lines(tmp_path / "new", "head\n", "first\n")
        assert (tmp_path / "new").read_text() == ""
    append_lines(tmp_path / "new", "head\n", "first\n")
    assert (tmp_path / "new").read_text() == "head\nfirst\n"


@pytest.mark.parametrize("cut", ["head\nfirst\nsecon", "head\nfirst\n" + 70_000 * "x"])
def test_a_last_line_without_an_end_is_removed_with_a_warning(
    cut: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table"
    file.write_text(cut)
    append_lines(file, "head\n", "third\n")
    assert file.read_text() == "head\nfirst\nthird\n"
    removed = len(cut) - len("head\nfirst\n")
    assert capsys.readouterr().err == f"{file}: its last line was cut short ({removed} bytes); it is removed\n"
    file.write_text("hea")
    append_lines(file, "head\n", "first\n")
    assert file.read_text() == "head\nfirst\n"


def test_a_number_that_lost_its_last_digits_is_not_read(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(2):
        folder.add(compare_line(seed=seed, seconds=123.25), [])
    text = folder.file.read_text()
    assert text.endswith("123.25\n")
    folder.file.write_text(text[:-4])
    assert [line.seed for line in folder.lines()] == [0]
    folder.add(compare_line(seed=2), [])
    assert [(line.seed, line.seconds) for line in folder.lines()] == [(0, 123.25), (2, 1.5)]


def test_a_text_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page"
    write_text(file, "old")

    def cut(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[:2].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(CannotWriteError, match=f"cannot write {file}: No space left"):
        write_text(file, "new and longer")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.usefixtures("one_thread")
def test_a_comparison_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "train", lambda run: (compare_line(run.contestant, run.seed, epochs=run.epochs), []))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_sync)
        assert main([*TINY, "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert f"error: cannot write {tmp_path / 'results.csv'}: No space left on device\n" in err
    assert f"Make room on the disk of {tmp_path}, or give another folder by --out.\n" in err
    assert "the same command continues" in err and not (tmp_path / "claims").exists()
    (tmp_path / "history").rmdir()
    (tmp_path / "history").write_text("")  # in the way
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'history'}: File exists\nLet {tmp_path} be written to, or give another" in err
    (tmp_path / "history").unlink()
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    assert len(Folder(tmp_path).lines()) == 3


def test_a_line_that_the_system_writes_in_part(tmp_path: Path) -> None:
    """The system takes what fits, and refuses the rest: a file's greatest size is reached within a line."""
    resource = pytest.importorskip("resource")
    file = tmp_path / "table"
    append_lines(file, "head\n", "first\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(CannotWriteError, match="File too large"):
            append_lines(file, "head\n", "second, a long one\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text() == "head\nfirst\n"
