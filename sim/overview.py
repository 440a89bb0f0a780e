"""`data`: how the rows of a run are split, as a table and a figure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd.data.overview import plot_split, split_table
from sim.observers import Row
from sim.records import make_folder
from sim.reports.terminal import Column, FittedTable
from sim.running import load_data
from sim.settings import Settings, SettingsError


@dataclass(frozen=True, slots=True)
class DataOverview:
    """The split of a run.

    Attributes:
        rows: a row for each client: rows, classes held, label entropy in nats, rows per class.
        sizes: rows of the private, public, validation and test sets.
        figure: where the figure was written.
    """

    source: str
    rows: list[dict[str, Any]]
    sizes: dict[str, int]
    figure: Path

    def to_row(self) -> Row:
        """Return the overview as plain values."""
        return {
            "source": self.source,
            "sizes": self.sizes,
            "clients": self.rows,
            "figure": str(self.figure),
        }

    def table(self) -> FittedTable:
        """Return the table for a terminal: classes that find no room are named below it."""
        sizes = ", ".join(f"{count} {name}" for name, count in self.sizes.items())
        label, *names = self.rows[0]
        return FittedTable(
            label=label,
            labels=[str(row[label]) for row in self.rows],
            columns=[
                Column(
                    title=_short(name.removeprefix("class ").replace("_", " ")),
                    cells=[_text(row[name]) for row in self.rows],
                    rank=rank,
                )
                for rank, name in enumerate(names)
            ],
            title=f"{self.source}: {sizes}",
        )


MOST_LETTERS = 30
"""Of the name of a class in a terminal; a longer one would make the head of the table the table."""


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def _text(cell: int | float) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def data(settings: Settings | None = None, *, figure: Path | None = None) -> DataOverview:
    """Load a run's data and show who holds what.

    Args:
        settings: the run; the digits default if None.
        figure: where to draw the split; ``<output>/<name>/split.png`` if None.

    Raises:
        SettingsError: names the setting that cannot work.
    """
    settings = settings or Settings()
    loaded = load_data(settings)
    if figure is None:
        figure = make_folder(settings.output, settings.output / settings.name) / "split.png"
    try:
        plot_split(loaded).savefig(figure, dpi=150)
    except (OSError, ValueError) as error:
        raise SettingsError(f"figure: cannot write {str(figure)!r}: {error}") from None
    return DataOverview(
        source=loaded.name,
        rows=split_table(loaded),
        sizes={
            "private": len(loaded.train_labels),
            "public": len(loaded.public_inputs),
            "validation": len(loaded.validation_labels),
            "test": len(loaded.test_labels),
        },
        figure=figure,
    )
