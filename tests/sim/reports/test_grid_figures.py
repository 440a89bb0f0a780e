from itertools import pairwise

import numpy as np
import pytest

from sim.reports.figures import NARROW, WIDE
from sim.reports.grid_figures import (
    accuracy_by_value,
    accuracy_in_grid,
    draw_grid,
)
from sim.reports.grids import Axis, Grid

SHARES = Axis("adversary.fraction", (0.4, 0, 0.2))
RULES = Axis("strategy.aggregation", ("mean", "median"))
ATTACKS = Axis("adversary.kind", ("lma", "cpa", "fdla"))


def swept(make_run, axes, accuracy, seeds=1):
    """Runs of a sweep; ``accuracy`` tells that of a combination by the places of its values."""
    places = np.ndindex(*(len(axis.values) for axis in axes))
    runs = {
        "-".join(map(str, place)): [
            make_run(seed=seed, accuracies=(accuracy(*place) + seed / 100,))
            for seed in range(seeds)
        ]
        for place in places
    }
    return runs, Grid(tuple(axes), tuple(runs))


def written(axes):
    """Numbers in the cells, by row and column."""
    return {
        tuple(int(place) for place in text.get_position()[::-1]): text.get_text()
        for text in axes.texts
    }


def test_a_heat_map_says_accuracy_in_each_cell(make_run):
    runs, grid = swept(make_run, (RULES, SHARES), lambda rule, share: 0.5 + rule / 10 + share / 100)
    figure = accuracy_in_grid(runs, grid)
    (panel,) = figure.axes
    assert written(panel) == {
        (0, 0): "50.0",
        (0, 1): "51.0",
        (0, 2): "52.0",
        (1, 0): "60.0",
        (1, 1): "61.0",
        (1, 2): "62.0",
    }
    assert [label.get_text() for label in panel.get_yticklabels()] == ["mean", "median"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0.4", "0", "0.2"]
    assert panel.collections[0].get_clim() == pytest.approx((50, 62))
    assert "Mean client accuracy" in figure.get_suptitle()


def test_all_panels_have_one_scale_and_arms_without_a_number_are_grey(make_run):
    runs, grid = swept(make_run, (ATTACKS, RULES, SHARES), lambda a, r, s: 0.3 + a / 5 + r / 20)
    del runs["0-1-1"]
    figure = accuracy_in_grid(runs, grid)
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == [
        "adversary: lma",
        "adversary: cpa",
        "adversary: fdla",
    ]
    assert {panel.collections[0].get_clim() for panel in panels} == {(30.0, 75.0)}
    assert written(panels[0])[1, 1] == "–"  # noqa: RUF001
    assert written(panels[1])[1, 1] == "55.0"


def test_honest_clients_count_where_some_are_not(make_run):
    runs = {
        "0": [make_run(accuracies=(0.6,))],
        "1": [make_run(accuracies=(0.5,), federation={"honest_accuracy": 0.7})],
        "2": [make_run(accuracies=(0.4,))],
        "3": [make_run(accuracies=(0.4,))],
    }
    figure = accuracy_in_grid(runs, Grid((RULES, Axis("a", ("x", "y"))), tuple("0123")))
    assert written(figure.axes[0])[0, 1] == "70.0"
    assert written(figure.axes[0])[0, 0] == "60.0"
    assert "honest clients" in figure.get_suptitle()


def lines(panel):
    """Each line's points, in percent."""
    return [
        [(x, round(y, 6)) for x, y in zip(*container.lines[0].get_data(), strict=True)]
        for container in panel.containers
    ]


def test_curves_run_over_the_number_a_line_for_each_row(make_run):
    runs, grid = swept(make_run, (ATTACKS, RULES, SHARES), lambda a, r, s: 0.4 + r / 10 + s / 100)
    del runs["0-0-2"]
    first, second, _ = accuracy_by_value(runs, grid).axes
    # From the smallest share to the largest, whatever their order in the sweep.
    assert lines(first) == [[(0, 41), (0.4, 40)], [(0, 51), (0.2, 52), (0.4, 50)]]
    assert lines(second)[0] == [(0, 41), (0.2, 42), (0.4, 40)]
    assert first.get_ylim() == second.get_ylim()


@pytest.mark.parametrize(
    ("seeds", "note", "half"),
    # 4.30265 * 0.01 / sqrt(3) in points
    [(1, "one seed each", 0), (2, "mean over two seeds", 0), (3, "bars: 95 %", 2.4841)],
)
def test_bars_are_intervals_from_three_seeds_on(make_run, seeds, note, half):
    runs, grid = swept(make_run, (SHARES,), lambda share: 0.5, seeds)
    figure = accuracy_by_value(runs, grid)
    assert note in figure.get_suptitle()
    (container,) = figure.axes[0].containers
    segments = container.lines[2][0].get_segments()
    assert [(top - bottom) / 2 for (_, bottom), (_, top) in segments] == pytest.approx(
        [half] * 3, abs=1e-3
    )
    assert not figure.legends


def test_learning_rates_have_a_logarithmic_axis(make_run):
    rates, few = (Axis("clients.optimizer.lr", values) for values in ((1e-4, 0.1), (0.01, 0.1)))
    scales = [
        accuracy_by_value(*swept(make_run, (axis,), lambda place: 0.5)).axes[0].get_xscale()
        for axis in (rates, few)
    ]
    assert scales == ["log", "linear"]


def test_what_a_sweep_has_no_place_for_is_not_drawn(make_run):
    runs, grid = swept(make_run, (RULES, Axis("a", ("x", "y"))), lambda rule, other: 0.5)
    assert list(draw_grid(runs, grid)) == ["accuracy_in_grid"]
    runs, grid = swept(make_run, (SHARES,), lambda share: 0.5)
    assert list(draw_grid(runs, grid)) == ["accuracy_by_value"]
    assert draw_grid({}, grid) == {}
    assert draw_grid(runs, Grid((Axis("a", (1,)),), ("0",))) == {}


def test_a_phone_has_panels_below_each_other(make_run):
    runs, grid = swept(make_run, (ATTACKS, RULES, SHARES), lambda *place: 0.5)
    for name, wide in draw_grid(runs, grid, WIDE).items():
        narrow = draw_grid(runs, grid, NARROW)[name]
        assert wide.get_figwidth() == 2 * narrow.get_figwidth()
        narrow.draw_without_rendering()
        places = [axes.get_position() for axes in narrow.axes[:3]]
        assert all(below.y1 < above.y0 for above, below in pairwise(places))
