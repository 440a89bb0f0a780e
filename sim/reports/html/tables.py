"""Tables of a page: none is wider than a sheet of paper, and none needs a wide screen.

A table of many columns is several tables: each has the first columns again, and as many others as
find room on an A4 page or a screen of 768 pixels. On a phone the rows of a short table are cards,
and a long one is scrolled beside its first column, which stays.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sim.reports.terminal import FittedTable

ROOM = 700
"""Pixels that a table may be wide: an A4 page has 718 between its margins."""

_LETTER, _PADDING = 7.3, 17
"""Pixels of a letter of the tables' size, and what stands beside the text of a cell."""

_LONGEST = 16
"""Letters; longer texts are folded where room is short."""

_JOINTS = re.compile("[-_./=]+")

_MOST_ROWS = 15
"""Longer tables are folded away until somebody asks for them."""

_MOST_KEYS = 2
"""Columns of words that every part of a table has."""

_MOST_CARDS = 12
"""Rows; more than so many cards would be a long way down on a phone."""

Cell = str
"""What stands in a cell: a text, or markup that was made here."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts; the first ``left`` columns are words, the others numbers.

    Attributes:
        header: a title for each column.
        rows: a cell for each column.
        left: how many columns are words.
        title: its heading where there are several.
        caption: what it shows, for those who come to it without what stands around it.
        note: how to read it.
        cards: whether its rows may be cards on a phone; numbers that are compared along a row and
            down a column stay a table.
        heat: columns of numbers that are drawn in shades, from 0 to the largest of them.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1
    title: str = ""
    caption: str = ""
    note: str = ""
    cards: bool = True
    heat: Sequence[Sequence[int | float]] = ()

    @property
    def carded(self) -> bool:
        """Whether its rows are cards on a phone."""
        return self.cards and not self.heat and self.short and len(self.header) > 2

    @property
    def short(self) -> bool:
        """Whether it stays in one piece on paper."""
        return len(self.rows) <= _MOST_CARDS

    @property
    def long(self) -> bool:
        """Whether it is folded away."""
        return len(self.rows) > _MOST_ROWS

    @property
    def drawn(self) -> bool:
        """Whether cells hold drawings, which take what width there is."""
        return any(hasattr(cell, "__html__") for row in self.rows[:1] for cell in row)

    @property
    def parts(self) -> "list[Table]":
        """The table, or several that have the first column in common and find room on a page."""
        groups = list(self._groups())
        if len(groups) == 1:
            return [self]
        keys = [*range(self._keys)]
        return [
            replace(
                self,
                header=[self.header[place] for place in (*keys, *group)],
                rows=[[row[place] for place in (*keys, *group)] for row in self.rows],
                left=len(keys) + sum(place < self.left for place in group),
                caption=f"{self.caption or self.title}, part {number} of {len(groups)}",
                heat=[[row[place - 1] for place in group] for row in self.heat],
            )
            for number, group in enumerate(groups, start=1)
        ]

    def shade(self, row: int, column: int) -> int | None:
        """Return in percent how dark a cell is; None where columns are not drawn in shades."""
        if not self.heat or column == 0:
            return None
        highest = max(map(max, self.heat))
        return round(100 * self.heat[row][column - 1] / highest) if highest > 0 else 0

    @property
    def _keys(self) -> int:
        return min(self.left, _MOST_KEYS, len(self.header) - 1)

    def _groups(self) -> Iterable[list[int]]:
        """Return the columns of each part but for the first ones, which all parts have."""
        widths = [self._width(place) for place in range(len(self.header))]
        first = sum(widths[: self._keys])
        group: list[int] = []
        taken = first
        for place, width in enumerate(widths[self._keys :], start=self._keys):
            if group and taken + width > ROOM:
                yield group
                group, taken = [], first
            group.append(place)
            taken += width
        yield group

    def _width(self, place: int) -> float:
        """Return the pixels that a column needs, long texts folded."""
        words = max(map(len, breakable(self.header[place]).split()), default=0)
        cells = max((_letters(row[place]) for row in self.rows), default=0)
        if place < self.left:
            cells = min(cells, _LONGEST)
        return _PADDING + _LETTER * max(words, cells)


def breakable(title: str) -> str:
    """Return a title with spaces where a word that is too long may go on in the next line."""
    return " ".join(
        word if len(word) <= _LONGEST else _JOINTS.sub(r"\g<0> ", word) for word in title.split()
    )


def _letters(cell: Cell) -> int:
    # Markup is a drawing, which has a width of its own.
    return 20 if hasattr(cell, "__html__") else len(cell)


def table_of(fitted: FittedTable, *, title: str = "", note: str = "") -> Table:
    """Return a terminal's table as one of a page, without the columns that nobody fills."""
    columns = [column for column in fitted.columns if not column.empty]
    rows = [
        [label, *(column.cells[place] for column in columns)]
        for place, label in enumerate(fitted.labels)
    ]
    header = [fitted.label, *(column.title for column in columns)]
    return Table(header, rows, title=title, caption=title or fitted.title, note=note)
