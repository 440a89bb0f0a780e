"""`data`: how the rows of a run are split, as a table and a figure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fedkd.data.overview import plot_split, split_table
from sim.observers import Row
from sim.records import make_folder
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

    def table(self) -> Table:
        """Return the table for a terminal."""
        sizes = ", ".join(f"{count} {name}" for name, count in self.sizes.items())
        table = Table(title=f"{self.source}: {sizes}")
        for name in self.rows[0]:
            table.add_column(name.removeprefix("class "), justify="right")
        for row in self.rows:
            table.add_row(
                *(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values())
            )
        return table


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
