import pytest

from sim.reports.html.drawings import Scale, interval_bar, interval_text, spark_line
from sim.reports.statistics import paired_difference


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([2.3, 19.2], 0, 20),
        ([-22.2, 19.2], -30, 20),
        ([0.4], 0, 0.4),
        ([-1.2, -0.1], -1.5, 0),
        ([0.0], 0, 5e-7),
    ],
)
def test_a_scale_has_round_ends_and_holds_zero(values, low, high):
    scale = Scale.over(values)
    assert scale.low == pytest.approx(low)
    assert scale.low <= min(values)
    assert scale.high >= max(values)
    if high > 1e-5:
        assert scale.high == pytest.approx(high)


def test_places_are_shares_of_the_width():
    scale = Scale(-10, 30)
    assert [scale.place(value) for value in (-10, 0, 30)] == ["0.00%", "25.00%", "100.00%"]
    assert scale.text == "-10 to +30 points"


def test_an_interval_is_drawn_and_told():
    # Differences of 1, 2 and 3 points: 2 +- 4.30265 / sqrt(3).
    value = paired_difference([0.5, 0.5, 0.5], [0.51, 0.52, 0.53])
    drawn = interval_bar(value, Scale.of([value]))
    assert 'aria-hidden="true"' in drawn
    assert drawn.count("<line") == 3
    assert interval_text(value) == "-0.5 to +4.5*"
    alone = paired_difference([0.5], [0.6])
    assert interval_bar(alone, Scale.of([alone])).count("<line") == 2
    assert interval_text(alone) == "–"  # noqa: RUF001


def test_a_line_of_values_tells_its_ends():
    line = spark_line([0.2, 0.3, 0.6], 0.2, 0.6)
    assert 'points="0.0,18.0 50.0,14.0 100.0,2.0"' in line
    assert line.endswith("20.0 → 60.0")
    assert spark_line([0.2], 0.2, 0.2).endswith(" 20.0")
