"""Lists as people save them, and what lies about in folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aim_kernels.experiments.data.lists import LABEL, NAME, TEXT, entries, json_rows, natural, rows, text_of, visible

PAIR = {"name": NAME, "class": LABEL}


@pytest.mark.parametrize(
    "content",
    [
        b"a,x\nb,y\n",
        b"a,x\r\n\r\nb,y\r\n",
        b"a,x\rb,y",
        b"\xef\xbb\xbfa,x\nb,y",
        "a,x\nb,y\n".encode("utf-16"),
        b'"a","x"\n"b","y"\n',
        b' a , x ,more\n  \n,\nb, "y",\n',
        b"Name,Label\na,x\nb,y\n",
        b"\xef\xbb\xbfid,title,class\r\na,t,x\r\nb,t,y\r\n",
        b",label,file_name\n0,x,a\n1,y,b\n",
        b"# YTID,category\na,x\nb,y\n",
    ],
    ids=["plain", "crlf", "cr", "mark", "utf-16", "quotes", "blanks", "header", "named", "pandas", "comment"],
)
def test_one_list_in_the_ways_it_is_saved(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    assert rows(tmp_path / "list.csv", ",", PAIR) == [["a", "x"], ["b", "y"]]


def test_a_header_is_one_only_if_it_names_every_column(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("video,singing\nlabel,video\n")  # a clip and a class of these names
    assert rows(tmp_path / "list.csv", ",", PAIR) == [["video", "singing"], ["label", "video"]]
    assert rows(tmp_path / "list.csv", ",", {"a": (), "b": ()})[0] == ["video", "singing"]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    written = "crème_brûlée.jpg,Crème brûlée, façon grand-mère" + ("" if encoding == "latin-1" else " œuvre 5 €")
    (tmp_path / "list.csv").write_bytes(written.encode(encoding))
    assert text_of(tmp_path / "list.csv") == written
    assert rows(tmp_path / "list.csv", ",", PAIR) == [["crème_brûlée.jpg", "Crème brûlée"]]


def test_bytes_of_no_encoding_are_still_read(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"a\x81,x\n")  # 0x81 is nothing in Windows-1252 and in UTF-8
    assert rows(tmp_path / "list.csv", ",", PAIR) == [["a\x81", "x"]]


def test_quotes_hold_separators_and_breaks(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('a.jpg,"Pie, ""the"" best\nof all",pie\nb.jpg,5" cake,cake\n')
    columns = {"name": NAME, "text": TEXT, "class": LABEL}
    assert rows(tmp_path / "list.csv", ",", columns) == [
        ["a.jpg", 'Pie, "the" best\nof all', "pie"],
        ["b.jpg", '5" cake', "cake"],
    ]
    (tmp_path / "list.txt").write_text('"a" 1 bird  singing\nb\t2\tdog\n')
    assert rows(tmp_path / "list.txt", " ", {"name": (), "number": (), "class": ()}) == [
        ["a", "1", "bird  singing"],
        ["b", "2", "dog"],
    ]
    (tmp_path / "list.txt").write_text('a.mp4 [split|sign] Oh, "yes" [split|sign] Sad\n')
    assert rows(tmp_path / "list.txt", "[split|sign]", {"a": (), "b": (), "c": ()}) == [["a.mp4", 'Oh, "yes"', "Sad"]]


def test_lines_that_do_not_fit_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a,b\n\nc\n")
    with pytest.raises(ValueError, match=r"list\.csv, line 3: 2 fields \(name, class\) separated by ',', got 'c'"):
        rows(tmp_path / "list.csv", ",", PAIR)
    (tmp_path / "list.csv").write_text('a,x\nb,"y\nc,z\n')
    with pytest.raises(ValueError, match=r"list\.csv, line \d: .*is a double quote left open"):
        rows(tmp_path / "list.csv", ",", PAIR)
    with pytest.raises(FileNotFoundError, match=r"none\.csv is missing"):
        rows(tmp_path / "none.csv", ",", PAIR)
    (tmp_path / "list.csv").write_text("")
    assert rows(tmp_path / "list.csv", ",", PAIR) == []


def test_json_lists(tmp_path: Path) -> None:
    objects = [{"img": "data/1.jpg", "label": "neutral", "text": "a, \u00e9"}, {"img": "2", "label": 7, "text": None}]
    expected = [["data/1.jpg", "neutral"], ["2", "7"]]
    file = tmp_path / "x.jsonl"
    file.write_text("\ufeff" + "\r\n".join(map(json.dumps, objects)) + "\r\n\r\n", encoding="utf-8", newline="")
    assert json_rows(file, ("img", "label")) == expected
    file.write_text(json.dumps(objects, indent=1))
    assert json_rows(file, ("img", "label")) == expected
    assert json_rows(file, ("text",)) == [["a, \u00e9"], [""]]
    file.write_text('{"img": "1", "label": "x"}\n\n{"img": "2"}\n')
    with pytest.raises(
        ValueError, match=r"x\.jsonl, line 3: expected a JSON object with img, label; it lacks \['label'\]"
    ):
        json_rows(file, ("img", "label"))
    file.write_text('{"img": "1", "label": "x"}\n{"img": "2"\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: not JSON"):
        json_rows(file, ("img", "label"))
    file.write_text('"img label"\n')
    with pytest.raises(ValueError, match="expected a JSON object"):
        json_rows(file, ("img", "label"))


def test_natural_order_and_what_is_hidden(tmp_path: Path) -> None:
    order = ["1.jpg", "2.jpg", "10.jpg", "a2b10.jpg", "a10b2.jpg", "frame_9.jpg", "Frame_10.jpg"]
    for start in range(len(order)):
        turned = order[start:] + order[:start]
        assert sorted(turned[:3], key=natural) == [name for name in order if name in turned[:3]]
    assert sorted(["b", "1", "a", "-1"], key=natural) == sorted(["-1", "a", "1", "b"], key=natural)  # comparable
    for name in (".DS_Store", "._1.jpg", "Thumbs.db", "desktop.ini", "1.jpg", "10.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert [path.name for path in entries(tmp_path)] == ["1.jpg", "2.jpg", "10.jpg"]
    assert visible("-3Mwkq_2") and visible("_x") and not visible("__MACOSX")
