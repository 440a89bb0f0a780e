"""Curves: lines of reference, and values that hold until the next step."""

import math

import pytest

from fedkd import figures


def test_the_line_of_knowing_nothing_is_at_log_classes():
    axes = figures.entropy_curves([1, 2], [0.5, 0.4], num_classes=7).axes[0]
    assert axes.lines[-1].get_ydata()[0] == pytest.approx(math.log(7))


def test_a_schedule_holds_its_value_until_the_next_step():
    figure = figures.schedules_in_force([1, 2], {"temperature": [4, 1], "kd_weight": [0.0, 1.0]})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["temperature", "kd_weight"]
    assert figure.axes[0].lines[0].get_drawstyle() == "steps-post"
    assert figure.axes[0].lines[0].get_ydata().tolist() == [4, 1]
