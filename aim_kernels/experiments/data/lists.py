"""Lists and folders as they are on disk: encodings, quotes, header lines, hidden files, order of numbered files."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Header names of columns, in lower case without blanks, underscores and hyphens.
NAME = ("name", "file", "filename", "clip", "clipname", "video", "videoid", "youtubeid", "ytid", "id", "key", "path")
LABEL = ("label", "labels", "class", "classname", "classnumber", "category", "emotion", "target")
START = ("start", "starttime", "startseconds", "seconds", "time", "duration")
QUALITY, END = ("quality",), ("end", "endtime", "endseconds")
SPLIT = ("split", "set", "subset", "partition", "traintestsplit")
IMAGE = ("image", "imagepath", "imagename", "img", "imgpath", *NAME)
TEXT = ("text", "title", "caption", "sentence", "tweet")

_HIDDEN = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"}


def visible(name: str) -> bool:
    """False for what operating systems and archives leave behind: ``.DS_Store``, ``._x``, ``__MACOSX``, ``Thumbs.db``
    and everything else that begins with a dot."""
    return not name.startswith(".") and name.casefold() not in _HIDDEN


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key by which ``2.jpg`` comes before ``10.jpg``; equal numbers in the order of their digits."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(1, int(part), "") if k % 2 else (0, 0, part) for k, part in enumerate(parts)], name


def entries(folder: Path) -> list[Path]:
    """What is in a folder, in :func:`natural` order, without what is hidden."""
    return sorted((path for path in folder.iterdir() if visible(path.name)), key=lambda path: natural(path.name))


def text_of(path: Path) -> str:
    """A file's text: UTF-16 if a mark says so, else UTF-8 with or without a mark, else Windows-1252, else Latin-1.

    Raises FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; root must be the folder that has it")
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            pass
    return content.decode("latin-1")  # has a character for every byte


def rows(path: Path, separator: str, columns: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The fields of every line that is not blank, one a column, stripped.

    ``columns``: what a column is to the names that a header may give it. If the first line names all of them, fields
    are taken by name, else in the order of ``columns``; further fields are dropped. A field may be in double quotes and
    then hold the separator. ``separator``: a blank stands for any number of blanks and tabs; the last field then takes
    the rest of the line.

    Raises FileNotFoundError, ValueError with the number of a line that has too few fields or an open quote.
    """
    found: list[list[str]] = []
    places: list[int] | None = None
    for number, row in _split(path, separator, len(columns)):
        if not any(row):
            continue
        if places is None:
            named = _header(row, columns)
            places = named if named is not None else list(range(len(columns)))
            if named is not None:
                continue
        if len(row) <= max(places):
            shown = repr(separator.join(row))
            raise ValueError(
                f"{path}, line {number}: {len(columns)} fields ({', '.join(columns)}) separated by {separator!r}, "
                f"got {shown[:200]}"
            )
        found.append([row[place] for place in places])
    return found


def _split(path: Path, separator: str, fields: int) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and stripped fields."""
    text = text_of(path)
    if (len(separator) == 1 and not separator.isspace()) or separator == "\t":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        try:
            for row in reader:
                yield reader.line_num, [field.strip() for field in row]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}; is a double quote left open?") from None
        return
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        row = line.split(None, fields - 1) if separator == " " else line.split(separator)
        yield number, [re.sub(r'^"(.*)"$', r"\1", field.strip()) for field in row]


def _header(row: Sequence[str], columns: Mapping[str, Sequence[str]]) -> list[int] | None:
    """The place of every column if the row names them all, each in another field."""
    cells = [re.sub(r"[\W_]", "", cell.casefold()) for cell in row]
    places = []
    for names in columns.values():
        own = [k for k, cell in enumerate(cells) if cell in names and k not in places]
        if not own:
            return None
        places.append(min(own, key=lambda k: names.index(cells[k])))
    return places


def json_rows(path: Path, keys: Sequence[str]) -> list[list[str]]:
    """The values of ``keys`` of every object of a file with a JSON object a line, or with one JSON list of objects.

    Raises FileNotFoundError, ValueError with the number of a line that is not such an object or lacks a key.
    """
    text = text_of(path)
    lines = [(number, line) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.strip()]
    objects: list[tuple[int, Any]]
    try:
        if text.lstrip().startswith("["):
            objects = list(enumerate(json.loads(text), 1))
        else:
            objects = [(number, json.loads(line)) for number, line in lines]
    except json.JSONDecodeError as error:
        number = next((n for n, line in lines if not _is_json(line)), error.lineno)
        raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
    for number, item in objects:
        lacking = [key for key in keys if not isinstance(item, dict) or key not in item]
        if lacking:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with {', '.join(keys)}; it lacks {lacking}"
            )
    return [["" if item[key] is None else str(item[key]).strip() for key in keys] for _, item in objects]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True
