from collections.abc import Callable
from pathlib import Path

import pytest

from sim.overview import data
from sim.settings import Settings, SettingsError


def test_the_overview_counts_every_row_once(small: Callable[..., Settings]) -> None:
    shown = data(small())
    assert shown.sizes["private"] == sum(row["rows"] for row in shown.rows) == 200
    assert (shown.sizes["public"], shown.sizes["test"]) == (60, 100)
    assert shown.figure.name == "split.png"
    assert shown.figure.is_file()
    assert len(shown.table().labels) == 4


def test_a_figure_that_cannot_be_written_is_named(
    small: Callable[..., Settings], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="figure: cannot write"):
        data(small(), figure=tmp_path / "no" / "folder.png")
