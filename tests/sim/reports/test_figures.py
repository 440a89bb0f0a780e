import io
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from scipy import stats

from fedkd.figures.saving import figure_bytes
from fedkd.figures.style import COLORS
from sim.reports.figures import (
    FIGURES,
    STYLE,
    accuracy_by_client,
    accuracy_by_epsilon,
    accuracy_by_exchange,
    accuracy_by_round,
    accuracy_by_time,
    band_note,
    curve_of,
    draw_figures,
    targets_by_round,
)


@pytest.fixture(autouse=True)
def in_style():
    with matplotlib.rc_context(STYLE):
        yield


EXCHANGED = {"target_entropy": 1.5, "peer_disagreement": 0.25}


def seeds(make_run, count, **options):
    return [
        make_run(seed=seed, accuracies=(0.5 + seed / 10, 0.6 + seed / 10), **options)
        for seed in range(count)
    ]


def texts(figure):
    return " ".join(axes.get_title(loc="left") for axes in figure.axes)


def legend(figure):
    return [text.get_text().strip("\u200b") for text in figure.legends[0].get_texts()]


def is_png(content):
    image = imread(io.BytesIO(content), format="png")
    # Something other than the white background is drawn.
    return image.shape[1] > 300 and image.min() < 0.9


def test_three_seeds_have_a_t_interval(make_run):
    curve = curve_of(seeds(make_run, 3), "accuracy")
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert curve.rounds.tolist() == [1, 2]
    assert curve.mean == pytest.approx([0.6, 0.7])
    assert curve.high - curve.mean == pytest.approx([half, half])
    assert "95 %" in band_note([curve])


def test_two_seeds_have_their_values_as_band_and_one_seed_has_none(make_run):
    two, one = (curve_of(seeds(make_run, count), "accuracy") for count in (2, 1))
    assert two.low == pytest.approx([0.5, 0.6])
    assert two.high == pytest.approx([0.6, 0.7])
    assert "95 %" not in band_note([two])
    assert one.low.tolist() == one.mean.tolist() == one.high.tolist()
    assert band_note([one]) == "one seed each"


def test_a_curve_has_the_rounds_that_all_seeds_judged(make_run):
    runs = [make_run(seed=0, accuracies=(0.1, 0.2, 0.3)), make_run(seed=1, accuracies=(0.1, 0.3))]
    assert curve_of(runs, "accuracy").rounds.tolist() == [1, 2]
    assert curve_of(runs, "server_accuracy") is None


def test_arms_keep_their_colour_where_others_are_absent(make_run):
    runs = {
        "local": seeds(make_run, 1, silent=True, strategy="local"),
        "dml": seeds(make_run, 1, federation=EXCHANGED),
    }
    by_round = accuracy_by_round(runs)
    targets = targets_by_round(runs)
    assert [line.get_color() for line in by_round.axes[0].lines] == list(COLORS[:2])
    assert [line.get_color() for line in targets.axes[0].lines] == [COLORS[1]]
    assert legend(by_round) == ["local", "dml"]
    assert legend(targets) == ["dml"]


def test_bytes_add_up_over_rounds_and_are_per_client(make_run):
    (line,) = accuracy_by_exchange({"dml": seeds(make_run, 1)}).axes[0].lines
    assert line.get_xdata().tolist() == [4.0, 8.0]  # kB: 1 up and 3 down a round
    assert line.get_ydata() == pytest.approx([50.0, 60.0])


def test_an_arm_without_exchange_is_a_dashed_line_at_its_last_round(make_run):
    runs = {"local": seeds(make_run, 1, silent=True), "dml": seeds(make_run, 1)}
    dashed, _ = accuracy_by_exchange(runs).axes[0].lines
    assert dashed.get_ydata() == pytest.approx([60.0, 60.0])
    assert dashed.get_linestyle() == "--"
    assert accuracy_by_exchange({"local": runs["local"]}) is None


def test_bytes_are_logarithmic_only_where_arms_are_far_apart(make_run):
    heavy = {"bytes_up": 200_000}
    near = {"a": seeds(make_run, 1), "b": seeds(make_run, 1)}
    far = {"a": seeds(make_run, 1), "b": seeds(make_run, 1, federation=heavy)}
    assert accuracy_by_exchange(near).axes[0].get_xscale() == "linear"
    assert accuracy_by_exchange(far).axes[0].get_xscale() == "log"


def test_every_client_of_every_seed_has_a_mark_with_its_model(make_run):
    figure = accuracy_by_client({"dml": seeds(make_run, 3)})
    marks = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert legend(figure) == ["mlp", "gru"]
    assert marks[0].get_xdata() == pytest.approx([50.0, 60.0, 70.0])
    assert marks[1].get_xdata() == pytest.approx([70.0, 80.0, 90.0])


def test_panels_without_data_are_absent(make_run):
    one_panel = {"dml": seeds(make_run, 1, federation={"peer_disagreement": 0.5})}
    assert len(targets_by_round(one_panel).axes) == 1
    assert targets_by_round({"local": seeds(make_run, 1)}) is None


def test_titles_name_the_units(make_run):
    for figure in draw_figures({"dml": seeds(make_run, 3, federation=EXCHANGED)}).values():
        for axes in figure.axes:
            assert "(%)" in axes.get_title(loc="left") or "(nats)" in axes.get_title(loc="left")


def test_one_run_draws_every_figure_and_twice_the_same(make_run):
    measured = {**EXCHANGED, "simulated_s": 12.5}
    privacy = {"mechanism": "dp_sgd", "epsilon": 8}
    runs = {"dml": [make_run(accuracies=(0.5,), federation=measured, privacy=privacy)]}
    first = {name: figure_bytes(figure) for name, figure in draw_figures(runs).items()}
    assert list(first) == list(FIGURES)
    assert all(is_png(content) for content in first.values())
    assert first == {name: figure_bytes(figure) for name, figure in draw_figures(runs).items()}


def test_nothing_measured_draws_nothing(make_run):
    assert draw_figures({"dml": [make_run(accuracies=(), status=None)]}) == {}


def test_names_are_neither_formulas_nor_hidden(make_run):
    run = make_run()
    runs = {"a$x_1$": [run], "_hidden": [run], "w" * 64: [run]}
    figure = draw_figures(runs)["accuracy_by_round"]
    assert legend(figure)[:2] == ["a$x_1$", "_hidden"]
    assert legend(figure)[2] == "w" * 17 + "…" + "w" * 17
    assert is_png(figure_bytes(figure))


def test_long_names_that_differ_only_in_their_middle_stay_whole(make_run):
    run = make_run()
    names = [f"{'a' * 30}-{middle}-{'b' * 30}" for middle in ("x", "y")]
    assert legend(accuracy_by_round({name: [run] for name in names})) == names


def test_more_arms_than_colours_differ_in_their_lines(make_run):
    run = make_run()
    lines = accuracy_by_round({f"arm-{i}": [run] for i in range(20)}).axes[0].lines
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 20


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    accuracies=st.lists(st.none() | st.just(float("nan")) | st.floats(0, 1), max_size=3),
    count=st.integers(1, 3),
)
def test_any_measured_values_can_be_drawn(make_run, accuracies, count):
    run = make_run(accuracies=(0.5,) * len(accuracies), status=None)
    rows = [{**row, "accuracy": value} for row, value in zip(run.federation, accuracies)]  # noqa: B905
    object.__setattr__(run, "federation", tuple(rows))
    runs = {f"arm-{i}": [run] for i in range(count)}
    for figure in draw_figures(runs).values():
        assert is_png(figure_bytes(figure))


def test_accuracy_over_simulated_time_stands_where_there_is_a_clock(make_run):
    def clocked(run, pace):
        rows = tuple({**row, "simulated_s": pace * row["round"]} for row in run.federation)
        return replace(run, federation=rows)

    plain = seeds(make_run, 2)
    quick, slow = ([clocked(run, pace) for run in seeds(make_run, 2)] for pace in (1.0, 2.0))
    figure = accuracy_by_time({"plain": plain, "quick": quick, "slow": slow})
    assert legend(figure) == ["quick", "slow"]
    lines = [line.get_xdata().tolist() for line in figure.axes[0].lines]
    assert [1.0, 2.0] in lines
    assert [2.0, 4.0] in lines
    assert figure.axes[0].get_xlabel() == "simulated seconds"
    assert accuracy_by_time({"plain": plain}) is None


def test_accuracy_against_epsilon_has_intervals_and_a_line_for_who_promises_nothing(make_run):
    runs = {"none": seeds(make_run, 3)} | {
        f"dp-{epsilon}": seeds(make_run, 3, privacy={"mechanism": "dp_sgd", "epsilon": epsilon})
        for epsilon in (16, 1)
    }
    figure = accuracy_by_epsilon(runs)
    axes, beside = figure.axes
    assert axes.get_xscale() == "log"
    # 0.6, 0.7, 0.8 in the last round: t(0.975, 2) * 0.1 / sqrt(3).
    half = 100 * stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    bars = [container.lines for container in axes.containers]
    assert [marks.get_xydata().tolist() for marks, *_ in bars] == [
        [[16, pytest.approx(70)]],
        [[1, pytest.approx(70)]],
    ]
    for _, _, (span,) in bars:
        (low, high) = span.get_segments()[0][:, 1]
        assert (low, high) == (pytest.approx(70 - half), pytest.approx(70 + half))
        assert axes.get_ylim()[0] < low
        assert axes.get_ylim()[1] > high
    levels = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert [line.get_ydata()[0] for line in levels] == [pytest.approx(70)]
    joined = [line.get_xdata() for line in axes.lines if line.get_color() == "#999999"]
    assert [list(line) for line in joined] == [[1, 16]]
    # 2 rounds of 1000 and 3000 bytes.
    assert [bar.get_width() for bar in beside.patches] == [pytest.approx(8)] * 3
    assert "dashed: no guarantee" in axes.texts[0].get_text()
    assert legend(figure) == ["none", "dp-16", "dp-1"]
    assert is_png(figure_bytes(figure))


def test_without_a_promise_nothing_is_drawn_against_epsilon(make_run):
    assert accuracy_by_epsilon({"none": seeds(make_run, 2)}) is None
    killed = make_run(status=None, privacy={"mechanism": "dp_sgd", "epsilon": 8})
    assert accuracy_by_epsilon({"killed": [killed]}) is None
