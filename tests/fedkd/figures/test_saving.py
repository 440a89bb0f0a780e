import re

import matplotlib
import matplotlib.style
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fedkd.figures import figure_bytes, save_figure
from fedkd.figures.style import COLORS, DASHES, STYLE, color, dash


def plot():
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3, 2))
        axes = figure.add_subplot()
        axes.plot([1, 2, 3], [1, 4, 9], color=color(0), marker="o", label="a$b")
        axes.fill_between([1, 2, 3], [0, 3, 8], [2, 5, 10], alpha=0.2)
        axes.legend()
    return figure


@pytest.mark.parametrize("format", ["png", "svg", "pdf"])
def test_the_same_figure_gives_the_same_bytes_without_a_time(format, monkeypatch):
    first = figure_bytes(plot(), format)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert figure_bytes(plot(), format) == first
    assert not re.search(rb"CreationDate|Producer|dc:date|Matplotlib v|Software", first)


def test_text_in_svg_is_text_and_a_dollar_sign_is_no_formula():
    written = figure_bytes(plot(), "svg").decode()
    assert re.search(r"<text[^>]*>a\$b</text>", written)


def test_pdf_holds_its_fonts_as_true_type():
    written = figure_bytes(plot(), "pdf")
    assert b"/FontFile2" in written
    assert b"/Type3" not in written


def test_the_ending_names_the_format_and_the_style_the_resolution(tmp_path):
    save_figure(plot(), tmp_path / "a.SVG")
    save_figure(plot(), tmp_path / "a.png", style={**STYLE, "savefig.dpi": 50})
    assert (tmp_path / "a.SVG").read_bytes() == figure_bytes(plot(), "svg")
    assert imread(tmp_path / "a.png").shape[:2] == (100, 150)
    with pytest.raises(ValueError, match="nothing"):
        save_figure(plot(), tmp_path / "a.nothing")


def test_colours_are_those_of_the_style_in_force_and_lines_differ_once_they_come_round():
    with matplotlib.rc_context(STYLE):
        assert [color(0), color(6), color(7)] == [COLORS[0], COLORS[6], COLORS[0]]
        assert [dash(6), dash(7), dash(28)] == [DASHES[0], DASHES[1], DASHES[0]]
    with matplotlib.style.context("grayscale"):
        assert color(0) == "#000000"
        assert dash(4) == DASHES[1]
    with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler("linestyle", ["-", ":"])}):
        assert color(1) == COLORS[1]


def test_the_style_can_be_used_by_name():
    with matplotlib.style.context("fedkd.figures.fedkd"):
        assert color(1) == "#d55e00"
