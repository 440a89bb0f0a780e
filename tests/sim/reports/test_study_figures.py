import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.reports.study_figures import (
    accuracy_by_seed,
    clients_by_round,
    draw_study,
    pareto_front,
    pareto_fronts,
)


def test_a_front_is_who_is_beaten_by_nobody():
    points = {"free": (0, 50), "cheap": (1, 60), "worse": (2, 55), "best": (3, 70), "dear": (4, 70)}
    assert pareto_front(points) == ["free", "cheap", "best"]
    assert pareto_front({"a": (1, 1), "b": (1, 1)}) == ["a", "b"]


@given(
    st.dictionaries(
        st.text(max_size=3), st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1
    )
)
def test_a_front_rises_and_beats_everybody_else(points):
    front = pareto_front(points)
    assert front
    ends = [points[name] for name in front]
    assert ends == sorted(ends)
    assert all(
        any(points[name][0] <= cost and points[name][1] >= value for name in front)
        for cost, value in points.values()
    )


def study(make_run):
    return {
        "local": [make_run(seed=s, accuracies=(0.4, 0.5), silent=True) for s in range(2)],
        "dml": [make_run(seed=s, accuracies=(0.4, 0.6 + s / 10)) for s in range(2)],
    }


def labelled(axes):
    return {
        line.get_label(): list(zip(*line.get_data(), strict=True))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_each_cost_in_which_arms_differ_has_a_panel(make_run):
    figure = pareto_fronts(study(make_run))
    # Both took 7.5 seconds.
    assert [axes.get_xlabel() for axes in figure.axes] == ["kB per client"]
    # 2 rounds of 1000 and 3000 bytes.
    assert labelled(figure.axes[0]) == {
        "local": [(0.0, pytest.approx(50))],
        "dml": [(8.0, pytest.approx(65))],
    }
    assert pareto_fronts({"dml": study(make_run)["dml"]}) is None


def test_seeds_are_lines_through_the_arms(make_run):
    figure = accuracy_by_seed(study(make_run))
    seeds = [line.get_xdata() for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    assert [list(line) for line in seeds] == [
        [pytest.approx(50), pytest.approx(60)],
        [pytest.approx(50), pytest.approx(70)],
    ]
    assert figure.get_label() == "local: 50.0, 50.0; dml: 60.0, 70.0"
    assert accuracy_by_seed({"a": [make_run()], "b": [make_run()]}) is None


def test_each_arm_has_a_panel_with_its_clients_and_their_mean(make_run):
    figure = clients_by_round(study(make_run))
    assert [axes.get_title() for axes in figure.axes] == ["local", "dml"]
    dml = figure.axes[1]
    assert len(dml.lines) == 3
    assert labelled(dml) == {"dml": [(1.0, pytest.approx(40)), (2.0, pytest.approx(60))]}
    assert clients_by_round({"a": [make_run(accuracies=(0.5,))]}) is None


def test_a_single_run_has_its_clients_alone(make_run):
    assert list(draw_study({"dml": [make_run()]})) == ["clients_by_round"]
