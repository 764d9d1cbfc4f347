"""Small HTML tables, which notebooks show in place of a result's repr."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_MOST_ROWS = 24  # A table of more rows than a screen shows is cut.


def html_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return one HTML table. The texts are escaped.

    Args:
        caption: The line above the table.
        columns: The names of the columns.
        rows: The cells of each row [rows, columns]. Rows after the first 24 become one row that tells their number.
    """
    shown: list[Sequence[object]] = list(rows[:_MOST_ROWS])
    if len(rows) > _MOST_ROWS:
        shown.append([f"... {len(rows) - _MOST_ROWS} more", *[""] * (len(columns) - 1)])
    head = _row("th", columns)
    body = "".join(_row("td", row) for row in shown)
    return f"<table><caption>{escape(caption)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Sequence[object]) -> str:
    """Return one row of a table."""
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
