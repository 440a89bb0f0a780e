"""`data`: how the rows of a run are split, as a table and a figure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd.data.overview import plot_split, shortened, split_sizes, split_table
from fedkd.figures.saving import save_figure
from sim.engine.data import data_of
from sim.keeping.records import make_folder
from sim.reports.terminal import Column, FittedTable
from sim.server.observers import Row
from sim.settings import Settings, SettingsError

FIGURE_ENDINGS = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")


@dataclass(frozen=True, slots=True)
class DataOverview:
    """The split of a run.

    Attributes:
        rows: a row for each client: its natural id where it has one, rows, classes held, label
            entropy in nats, rows per class.
        inputs: what one input is, in words.
        sizes: rows of the private, public, validation and test sets.
        figure: where the figure was written.
        notes: what was left aside, and which rows repeat.
    """

    source: str
    inputs: str
    rows: list[dict[str, Any]]
    sizes: dict[str, int]
    figure: Path
    notes: tuple[str, ...] = ()

    def to_row(self) -> Row:
        """Return the overview as plain values."""
        return {
            "source": self.source,
            "inputs": self.inputs,
            "sizes": self.sizes,
            "clients": self.rows,
            "figure": str(self.figure),
            "notes": list(self.notes),
        }

    def table(self) -> FittedTable:
        """Return the table for a terminal: classes that find no room are named below it."""
        sizes = ", ".join(f"{count} {name}" for name, count in self.sizes.items())
        label, *names = (name for name in self.rows[0] if name != "id")
        return FittedTable(
            label=label,
            labels=[
                " ".join(str(row[key]) for key in (label, "id") if key in row) for row in self.rows
            ],
            columns=[
                Column(
                    title=shortened(name.removeprefix("class ").replace("_", " "), MOST_LETTERS),
                    cells=[_text(row[name]) for row in self.rows],
                    rank=rank,
                )
                for rank, name in enumerate(names)
            ],
            title=f"{self.source} ({self.inputs}): {sizes}",
        )


MOST_LETTERS = 30
"""Of the name of a class in a terminal; a longer one would make the head of the table the table."""


def _text(cell: int | float | str) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def data(settings: Settings | None = None, *, figure: Path | None = None) -> DataOverview:
    """Load a run's data and show who holds what.

    Args:
        settings: the run; the digits default if None.
        figure: where to draw the split; ``<output>/<name>/split.png`` if None.

    Raises:
        SettingsError: names the setting that cannot work.

    Examples:
        >>> import fedkd
        >>> settings = fedkd.load_settings(None, ["clients.count=4"])
        >>> fedkd.data_overview(settings).sizes
        {'private': 844, 'public': 500, 'validation': 94, 'test': 359}
    """
    settings = settings or Settings()
    if figure is not None:
        _check_figure(figure)
    # Rows are counted: no model is built and no algorithm made, so no code of these runs.
    try:
        loaded = data_of(settings)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if figure is None:
        figure = make_folder(settings.output, settings.output / settings.name) / "split.png"
    try:
        save_figure(plot_split(loaded), figure)
    except (OSError, ValueError) as error:
        raise SettingsError(f"figure: cannot write {str(figure)!r}: {error}") from None
    return DataOverview(
        source=loaded.name,
        inputs=str(loaded.input_shape),
        rows=split_table(loaded),
        sizes=split_sizes(loaded),
        figure=figure,
        notes=loaded.notes,
    )


def _check_figure(figure: Path) -> None:
    """Refuse what is no picture file, before the data are loaded.

    Without a known ending the figure would silently go to another file than the one named.
    """
    if figure.is_dir() or figure.suffix.lower() not in FIGURE_ENDINGS:
        what = "the folder " if figure.is_dir() else ""
        raise SettingsError(
            f"figure: must be a file such as split.png, got {what}{str(figure)!r}; known endings: "
            f"{', '.join(FIGURE_ENDINGS)}"
        )
    if figure.exists() and not figure.is_file():
        raise SettingsError(f"figure: {str(figure)!r} is not a regular file")
