"""Tables for a terminal: where room is short a column is left out and named, no number is cut."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedkd.names import printable

NOTHING = "–"  # noqa: RUF001
"""Stands where there is no such number."""

MOST_TITLE = 12
"""A longer word of a column's title is folded."""

MOST_NAMES = 12
"""So many columns that found no room are named."""

READABLE_WIDTH = 100
"""Lines of words are not longer than this, however wide a table is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of numbers.

    Attributes:
        title: its words may stand on lines of their own; only they may be folded.
        cells: one a row, written whole or not at all.
        rank: columns of lower rank find room first.
        needs: title of a column without which this one says nothing.
        emphasized: positions of cells that stand out.
    """

    title: str
    cells: Sequence[str]
    rank: int
    needs: str = ""
    emphasized: Sequence[int] = ()

    @property
    def width(self) -> int:
        """The width that its cells need, and its title on two lines as far as that is bearable."""
        words = printable(self.title).split()
        title = min(
            (
                max(cell_len(" ".join(words[:split])), cell_len(" ".join(words[split:])))
                for split in range(len(words))
            ),
            default=0,
        )
        widest = max((cell_len(printable(cell)) for cell in self.cells), default=0)
        return max(min(title, MOST_TITLE), widest, 1)

    @property
    def empty(self) -> bool:
        """Whether no row has such a number."""
        return all(cell in (NOTHING, "") for cell in self.cells)


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedTable:
    """A table that chooses its columns by the width of the terminal it is printed on.

    Columns in which no row has a number are left out everywhere. All texts are data: no markup, and
    control characters are shown as escapes.

    Attributes:
        label: title of the first column, whose words may be folded over several lines.
        labels: one a row.
        columns: in their order from left to right.
        title: stands above.
        caption: stands below.
    """

    label: str
    labels: Sequence[str]
    columns: Sequence[Column]
    title: str = ""
    caption: str = ""

    @property
    def natural_width(self) -> int:
        """The width on which nothing is left out and no label is folded."""
        filled = [column for column in self.columns if not column.empty]
        return self._label_width + sum(1 + column.width for column in filled)

    def fitting(self, width: int) -> tuple[list[Column], list[Column]]:
        """Return the columns that find room on a width, and those that do not, in their order."""
        filled = [column for column in self.columns if not column.empty]
        room = width - self._narrowest_label(width)
        # By their place: two columns may have one title, such as classes with long names.
        chosen: set[int] = set()
        titles: set[str] = set()
        for place, column in sorted(enumerate(filled), key=lambda each: each[1].rank):
            alone = column.needs and column.needs not in titles
            if not alone and 1 + column.width <= room:
                chosen.add(place)
                titles.add(column.title)
                room -= 1 + column.width
        return (
            [column for place, column in enumerate(filled) if place in chosen],
            [column for place, column in enumerate(filled) if place not in chosen],
        )

    @property
    def _label_width(self) -> int:
        return max(cell_len(printable(text)) for text in (self.label, *self.labels))

    def _narrowest_label(self, width: int) -> int:
        return min(self._label_width, max(8, width // 4), width)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Tell rich how wide this can be."""
        return Measurement(min(20, options.max_width), options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        """Print what fits."""
        width = options.max_width
        shown, left_out = self.fitting(width)
        lines = min(width, READABLE_WIDTH)
        if self.title:
            yield _words(self.title, lines, console)
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        numbers = sum(1 + column.width for column in shown)
        table.add_column(
            Text(printable(self.label)),
            overflow="fold",
            width=min(self._label_width, width - numbers),
        )
        for column in shown:
            title = Text(printable(column.title))
            table.add_column(title, justify="right", overflow="fold", width=column.width)
        for row, label in enumerate(self.labels):
            cells = [
                Text(
                    printable(column.cells[row]),
                    style="bold" if row in column.emphasized else "",
                )
                for column in shown
            ]
            table.add_row(Text(printable(label)), *cells)
        yield table
        if self.caption:
            yield _words(self.caption, lines, console)
        if left_out:
            names = ", ".join(column.title for column in left_out[:MOST_NAMES])
            if len(left_out) > MOST_NAMES:
                names += f" and {len(left_out) - MOST_NAMES} more"
            yield _words(f"left out for want of room: {names}; --wide shows all", lines, console)


def _words(text: str, width: int, console: Console) -> Text:
    """Break a text between words."""
    lines = Text(printable(text)).wrap(console, width, overflow="fold")
    return Text("\n").join(lines)
