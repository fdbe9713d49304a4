"""Common parts of all commands: arguments that are judged before any work, an output folder, and ends without a
traceback.

A wrong argument is one line of usage, one sentence that names option, value and what is allowed, and exit status 2. A
file that cannot be written is a sentence and exit status 1, an interruption a sentence and 130.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

import torch

from aim_kernels._locks import held

#: Bounds of what can be meant: beyond them lies a slip of the finger, and a run that ends in no lifetime.
MOST_ROUNDS, MOST_THREADS, MOST_EPOCHS = 10_000, 1024, 10_000
MOST_SEEDS, LAST_SEED = 1000, 2**32 - 1
MOST_GAP = 60_000.0  # milliseconds


class Parser(argparse.ArgumentParser):
    """Options are written out: an abbreviation that one mode takes is another option, or none, in the next."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"usage: {self.prog} [options] (--help lists them)\n{self.prog}: error: {message}\n")

    def refuse(self, option: str, why: str) -> NoReturn:
        """The error of one option, as argparse words its own."""
        self.error(f"argument {option}: {why}")

    def refuse_unused(self, options: argparse.Namespace, mode: str, used: Collection[str]) -> None:
        """The error of the first option that was given (its value is neither None nor False) but is not ``used``."""
        for action in self._actions:
            value = getattr(options, action.dest, None)
            if value is not None and value is not False and action.dest not in used:
                self.refuse(action.option_strings[0], f"is not used {mode}; leave it out")

    def refuse_beyond_memory(self, option: str, needed: float) -> None:
        """The error of an option that asks for more bytes than this machine has."""
        if needed > memory():
            self.refuse(option, f"takes {needed / 2**30:.3g} GiB of memory, this machine has {memory() / 2**30:.3g}")


def memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def shown(text: str) -> str:
    """What was typed, in quotes, cut off where it goes on and on."""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


# -- types: text in, value out, or argparse.ArgumentTypeError ----------------------------------------------------------


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number within bounds, both included."""

    def parse(text: str) -> int:
        # int() also takes "1_0" and " 1 ", and refuses more than some thousand digits with an error of its own.
        if not re.fullmatch(r"[+-]?[0-9]{1,30}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """A number within bounds, both included; no NaN."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a number from {low:g} to {high:g}")
        return value

    return parse


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """One of the names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{shown(text)} is none of: {', '.join(names)}")
        return text

    return parse


def seeds(text: str) -> range:
    """One seed ("7") or a range that includes both ends ("100-109")."""
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{shown(text)} is neither a seed like 7 nor a range like 100-109")
    # The length first: what is compared as a number must not be too long to become one.
    first, last = (int(end) if len(end) <= 20 else LAST_SEED + 1 for end in (match[1], match[2] or match[1]))
    if max(first, last) > LAST_SEED:
        raise argparse.ArgumentTypeError(f"{shown(text)}: seeds are whole numbers from 0 to {LAST_SEED}")
    if first > last:
        raise argparse.ArgumentTypeError(f"{shown(text)} is neither a seed nor a range like 100-109: it goes backwards")
    if last - first >= MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"{shown(text)} is {last - first + 1} seeds; at most {MOST_SEEDS} are allowed")
    return range(first, last + 1)


def device(text: str) -> str:
    """A device that is here: cpu, cuda, cuda:1."""
    try:
        asked = torch.device(text)
    except (RuntimeError, ValueError, OverflowError):
        asked = None
    if text == "cpu":
        return text
    module: Any = getattr(torch, asked.type, None) if asked and asked.type != "cpu" else None
    if asked is None or not hasattr(module, "is_available") or not hasattr(module, "device_count"):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no device; use cpu, cuda or cuda:1")
    there = module.device_count() if module.is_available() else 0
    if (asked.index or 0) >= there:
        found = f"sees {there} of that kind" if there else "sees no GPU"
        raise argparse.ArgumentTypeError(f"{shown(text)} is not available here: torch {torch.__version__} {found}")
    return text


def folder(text: str) -> Path:
    """A folder that can be made and written to. It is tried, and nothing of that stays."""
    path = Path(text)
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder")
    made: list[Path] = []
    try:
        for part in reversed([part for part in (path, *path.parents) if not part.exists()]):
            if not part.is_dir():  # "a/.." is there once "a" is
                part.mkdir()
                made.append(part)
        with tempfile.TemporaryFile(dir=path, buffering=0) as probe:
            probe.write(b"x")  # an empty file has room on a full disk
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if os.path.isfile(text):
            why = "it is a file"
        raise argparse.ArgumentTypeError(f"{shown(text)} is no folder that can be written to: {why}") from None
    finally:
        for part in reversed(made):
            with contextlib.suppress(OSError):
                part.rmdir()
    return path


class Distinct(argparse.Action):
    """One or more values, each once; ranges (of seeds) count by their members."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not self.default:
            raise argparse.ArgumentError(self, f"is given twice; put all values behind one {option}")
        if sum(len(value) for value in values if isinstance(value, range)) > MOST_SEEDS:
            raise argparse.ArgumentError(self, f"more than {MOST_SEEDS} seeds")
        found: set[Any] = set()
        for value in values:
            for member in value if isinstance(value, range) else (value,):
                if member in found:
                    raise argparse.ArgumentError(self, f"{shown(str(member))} is named twice")
                found.add(member)
        setattr(namespace, self.dest, values)


# -- writing, and the end ----------------------------------------------------------------------------------------------


class OtherVersionError(ValueError):
    """A file of results that this version cannot go on with."""


class CannotWriteError(OSError):
    """A file could not be written: ``filename``, and why (``errno``, ``strerror``)."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError within is one of this file, also where the system says only that the disk is full."""
    try:
        yield
    except CannotWriteError:
        raise
    except OSError as error:
        raise CannotWriteError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """As ``path.write_text``, in UTF-8, but whole or not at all: a reader never sees a part of it."""
    with writing(path):
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            path.write_text(text, encoding="utf-8")  # a device, or the error of what is in the way
            return
        target = Path(os.path.realpath(path))
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def append_lines(path: Path, header: str, lines: str) -> None:
    """Appends whole lines to a table, the header before the first: all of them or, if that fails, none.

    Processes that append to one file take turns. A last line that has no end was cut short; it is removed, with a
    warning on stderr, so that no part of it is ever taken for a whole one.
    """
    with writing(path):
        if path.exists() and not path.is_file():
            path.write_text(header + lines, encoding="utf-8")  # a device, or the error of what is in the way
            return
        with open(path, "ab+", buffering=0) as file, held(file.fileno(), str(path)):
            size = _whole(file, path)
            data = memoryview(((header if not size else "") + lines).encode())
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise


def _whole(file: FileIO, path: Path) -> int:
    """Bytes of a file's whole lines; what follows them is removed."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 65536)
        file.seek(begin)
        last = (file.read(end - begin) or b"").rfind(b"\n")
        if last >= 0:
            end = begin + last + 1
            break
        end = begin
    if end < size:
        sys.stderr.write(f"{path}: its last line was cut short ({size - end} bytes); it is removed\n")
        file.truncate(end)
    return end


def make_folder(path: Path) -> Path:
    """The folder, made where it is missing."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def run(prog: str, work: Callable[[], int], kept: str = "") -> int:
    """The exit status of ``work``; where it is interrupted or a file cannot be read or written a sentence, ``kept``
    (what became of the work so far) and 130 or 1."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        sys.stderr.write(f"\nInterrupted. {kept}\n" if kept else "\nInterrupted.\n")
        return 130
    except BrokenPipeError:  # whoever read this has enough
        return 1
    except (OSError, OtherVersionError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"{prog}: error: {_said(error)}\n" + _advice(error) + (f"{kept}\n" if kept else ""))
        return 1


def _advice(error: Exception) -> str:
    """What helps against a file that cannot be written."""
    if not isinstance(error, CannotWriteError):
        return ""
    folder = os.path.dirname(error.filename) or "."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"Make room on the disk of {folder}, or give another folder by --out.\n"
    return f"Let {folder} be written to, or give another folder by --out.\n"


def _said(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        last = (error.stderr or "").strip().splitlines()[-1:]
        return ": ".join([f"a process of its own ended with status {error.returncode}", *last])
    if not isinstance(error, OSError) or isinstance(error, CannotWriteError) or not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else f"cannot write the output: {error.strerror}"


def leave(prog: str, main: Callable[[], int]) -> NoReturn:
    """Ends the process by what ``main`` gives. Output that waits still is written first, so that a full disk shows."""
    status = run(prog, main)
    try:
        sys.stdout.flush()
    except OSError:
        status = status or 1
        # The interpreter would try once more, and print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def filled(options: argparse.Namespace, **defaults: Any) -> argparse.Namespace:
    """The options, with defaults in place of None: what was given had to be told from what was not."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def given(argv: Sequence[str] | None, option: str) -> bool:
    """Whether the option is among the arguments, alone or with its value."""
    return any(argument.partition("=")[0] == option for argument in (sys.argv[1:] if argv is None else argv))
