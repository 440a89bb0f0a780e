"""Figures inside a page: what their alternatives say, and that they are whole."""

from urllib.parse import unquote
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from sim.reports.figures import NARROW, STYLE, accuracy_by_round, new_figure, title_axes
from sim.reports.html.alternatives import alternative, number_tables
from sim.reports.html.pictures import picture, themed, to_svg, write_figures


@pytest.fixture
def lines():
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(1, height=2)
        axes.plot([1, 2], [40.0, 83.25], label="dml", color="#0072B2")
        axes.axhline(50.0, label="local")
        axes.plot([1, 2], [1.0, 2.0])
        axes.set_xlabel("round")
        axes.set_ylabel("accuracy (%)")
        title_axes(axes, "Accuracy by round", "line: mean")
    return figure


def test_the_alternative_is_made_of_the_numbers(lines):
    assert alternative(lines, "Accuracy by round") == (
        "Accuracy by round. Accuracy by round: dml 40 at 1 to 83.2 at 2; local 50 throughout."
    )
    (table,) = number_tables(lines)
    assert table.header == ["round", "dml"]
    assert table.rows == [["1", "40"], ["2", "83.2"]]


def test_many_lines_are_told_by_their_extremes():
    figure, (axes,) = new_figure(1, height=2)
    for place in range(20):
        axes.plot([0, 1], [0, place], label=f"arm-{place}")
    told = alternative(figure, "Many")
    assert "20 lines; lowest at the end: arm-0 0 at 0 to 0 at 1" in told
    assert "highest at the end: arm-19 0 at 0 to 19 at 1" in told


def test_cells_of_a_heat_map_are_told_by_their_extremes():
    figure, (axes,) = new_figure(1, height=2)
    axes.pcolormesh(np.array([[1.0, 2.0], [3.0, 4.0]]))
    for row in range(2):
        for column in range(2):
            axes.text(column + 0.5, row + 0.5, f"{1 + 2 * row + column}.0")
    axes.set_xticks([0.5, 1.5], ["a", "b"])
    axes.set_yticks([0.5, 1.5], ["mean", "median"])
    assert "4 cells, lowest 1 (mean, a), highest 4 (median, b)" in alternative(figure, "Grid")


def test_a_figure_of_other_things_says_itself_what_it_shows(lines):
    lines.set_label("dml: median 83")
    assert alternative(lines, "Clients") == "Clients. dml: median 83."


def test_title_and_note_become_text_of_the_page(lines):
    shown, file = picture("accuracy", "fallback", lines)
    assert (shown.title, shown.note) == ("Accuracy by round", "line: mean")
    assert "Accuracy by round" not in file
    assert shown.width == 820
    assert shown.narrow is None


def test_an_embedded_figure_is_whole_follows_the_scheme_and_is_cut_at_no_space(lines):
    shown, _ = picture("accuracy", "t", lines)
    assert not set(shown.wide) & set(' "<>&#')
    text = unquote(shown.wide.removeprefix("data:image/svg+xml,"))
    root = ElementTree.fromstring(text)  # noqa: S314
    assert root.tag.endswith("svg")
    assert "var(--blue)" in text
    assert "prefers-color-scheme:dark" in text
    assert "DejaVu Sans" in text  # the letters of the file, once
    assert "<metadata" not in text


def test_the_same_figure_gives_the_same_text(make_run):
    runs = {"a": [make_run()]}
    with matplotlib.rc_context(STYLE):
        first, second = (to_svg(accuracy_by_round(runs, NARROW)) for _ in range(2))
    assert first == second
    assert themed(first) == themed(second)


def test_older_figures_go(tmp_path):
    write_figures(tmp_path, {"a": "<svg/>", "b": "<svg/>"})
    (tmp_path / "figures" / "c.png").write_bytes(b"")
    write_figures(tmp_path, {"a": "<svg/>"})
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["a.svg"]
