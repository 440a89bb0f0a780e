"""A small table as HTML for notebooks: no colours of its own, so that it is readable on any."""

from collections.abc import Sequence
from html import escape


def to_html(titles: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[str] = ()) -> str:
    """Write a table; everything is escaped.

    Args:
        titles: of the columns.
        rows: a text for each column.
        below: lines under it.
    """
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    lines = "".join(f"<div>{escape(line)}</div>" for line in below)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{lines}"
