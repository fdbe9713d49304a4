"""Tables of results: cells, Markdown and HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence


def number(value: float, sign: str = "") -> str:
    """With one decimal; nothing for what is not a number. ``sign``: "+" for differences."""
    return "" if math.isnan(value) else f"{value:{sign}.1f}"


def with_error(value: float, error: float, sign: str = "") -> str:
    """A number and, where there is one, its error."""
    return number(value, sign) + ("" if math.isnan(error) else f" ± {error:.1f}")


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Of the header and the lines behind it."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def html_table(lines: Sequence[Sequence[str]]) -> str:
    """Of the header and the lines behind it."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(lines[0], "th") + "".join(row(cells, "td") for cells in lines[1:]) + "</table>"
