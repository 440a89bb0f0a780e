import re

import pytest

from sim.publishing.figures import draw_study, figures, load_style
from sim.settings import SettingsError


def test_all_figures_of_the_report_are_files_that_are_the_same_again(finished, tmp_path):
    paths = figures(finished, "svg", output=tmp_path / "a")
    assert {path.stem for path in paths} >= {"accuracy_by_round", "accuracy_by_client"}
    assert {path.name for path in paths} == {p.name for p in (finished / "figures").iterdir()}
    again = figures(finished, "svg", output=tmp_path / "b")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    text = paths[0].read_text()
    assert ">dml</text>" in text
    assert "dc:date" not in text


def test_a_width_and_a_style_are_heard(study, tmp_path):
    own = tmp_path / "own.mplstyle"
    own.write_text("font.size: 7\naxes.prop_cycle: cycler('color', ['123456', '654321'])\n")
    drawn = draw_study(study, load_style(str(own)), format="svg", width=5)["accuracy_by_round"]
    assert re.search(rb'width="360pt"', drawn)
    assert b"#123456" in drawn
    assert b"#0072b2" not in drawn
    assert b"#0072b2" in draw_study(study, load_style(None), format="svg")["accuracy_by_round"]
    assert load_style("grayscale")["axes.prop_cycle"] != load_style(None)["axes.prop_cycle"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "jpeg"}, "--format must be one of svg, pdf, png, got 'jpeg'"),
        ({"width": 0.1}, "--width must be 2 to 20 inches, got 0.1"),
        ({"style": "greyscale"}, "style must be a file or .*'greyscale'.*grayscale"),
    ],
)
def test_slips_are_named(finished, options, said):
    with pytest.raises(SettingsError, match=said):
        figures(finished, **options)


def test_a_damaged_style_is_named(finished, tmp_path):
    style = tmp_path / "own.mplstyle"
    style.write_text("font.sizze: 7\n")
    with pytest.raises(SettingsError, match=r"own.mplstyle.*cannot be read"):
        figures(finished, style=str(style))
