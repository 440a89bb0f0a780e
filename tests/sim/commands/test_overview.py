import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedkd.data import FederatedData, plot_split
from sim.commands.overview import DataOverview, data
from sim.settings import Settings, SettingsError


def printed(shown: DataOverview, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(shown.table())
    return capture.get().splitlines()


def overview(class_names: list[str], counts: list[int]) -> DataOverview:
    row = {"client": 0, "rows": sum(counts), "classes": len(counts), "label_entropy": 1.5}
    of_classes = {f"class {name}": n for name, n in zip(class_names, counts, strict=True)}
    rows = [{**row, **of_classes}]
    return DataOverview("somewhere", "4 features", rows, {"private": 1}, Path("split.png"))


def test_the_overview_counts_every_row_once(small: Callable[..., Settings]) -> None:
    shown = data(small())
    assert shown.sizes["private"] == sum(row["rows"] for row in shown.rows) == 200
    assert (shown.sizes["public"], shown.sizes["test"]) == (60, 100)
    assert shown.inputs == "pictures of 1x8x8"
    assert shown.figure.name == "split.png"
    assert shown.figure.is_file()
    assert len(shown.table().labels) == 4


def test_a_figure_that_cannot_be_written_is_named(
    small: Callable[..., Settings], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="figure: cannot write"):
        data(small(), figure=tmp_path / "no" / "folder.png")


@pytest.mark.parametrize("name", ["", "folder", "folder.png", "split", "split.xyz", "split."])
def test_a_figure_that_names_no_picture_file_is_refused_and_nothing_written(
    small: Callable[..., Settings], tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SettingsError, match=r"figure: must be a file such as split\.png, got .*"):
        data(small(), figure=tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_long_names_of_classes_leave_room_and_no_number_is_cut() -> None:
    names = [f"a very long name of class {number}" for number in range(7)]
    shown = printed(overview(names, [12345] * 7))
    assert all(len(line) <= 80 for line in shown)
    assert "12345" in " ".join(shown)
    assert not any("123…" in line or "1234…" in line for line in shown)


def test_names_are_no_markup_in_a_table_and_no_formula_in_a_figure(
    tiny_data: Callable[..., FederatedData],
) -> None:
    shown = "\n".join(printed(overview(["[red]", "[/]", "$x^", ":smile:"], [1, 2, 3, 4])))
    assert all(name in shown for name in ("[red]", "[/]", "$x^", ":smile:"))
    named = replace(tiny_data(rows=(8, 8)), name="$\\frac$")
    names = ("$\\undefined$", "a$b$c", *named.class_names[2:])
    figure = plot_split(replace(named, class_names=names))
    figure.savefig(io.BytesIO(), format="png")
    assert figure.axes[0].get_xticklabels()[0].get_text() == "$\\undefined$"
