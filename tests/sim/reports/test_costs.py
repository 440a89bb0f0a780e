"""Runs as staircases: what an accuracy cost, and what a budget buys."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.reports.costs import (
    Budget,
    Spending,
    Step,
    accuracy_at,
    cost,
    cost_to,
    has_budget_left,
    staircase,
)
from sim.settings import SettingsError

STEPS = (Step(10, 0.4), Step(20, 0.6), Step(30, 0.5), Step(40, 0.7))


def test_an_accuracy_costs_what_the_first_judged_round_with_it_had_spent():
    assert [cost_to(STEPS, target) for target in (0.3, 0.4, 0.41, 0.55, 0.7, 0.71)] == [
        10,
        10,
        20,
        20,
        40,
        None,
    ]
    # Nothing is drawn between two rounds, and rounding does not put off what was reached.
    assert cost_to([Step(1, 0.1 + 0.2), Step(2, 0.9)], 0.3) == 1
    assert cost_to((Step(1, 0.7 - 1e-16),), 0.7) == 1
    assert cost_to((), 0.1) is None


def test_a_budget_buys_the_last_judged_round_that_keeps_to_it():
    assert [accuracy_at(STEPS, budget) for budget in (9, 10, 29.9, 30, 1000)] == [
        None,
        0.4,
        0.6,
        0.5,  # the last, not the best: choosing would look at the test split
        0.7,
    ]


def test_budget_is_left_where_another_round_as_dear_as_the_last_would_have_fitted():
    assert [has_budget_left(STEPS, budget) for budget in (40, 49, 50, 60)] == [
        False,
        False,
        True,
        True,
    ]
    assert [has_budget_left(STEPS[:1], budget) for budget in (19, 20)] == [False, True]
    # Whoever sends nothing never spends bytes.
    assert has_budget_left((Step(0, 0.4), Step(0, 0.5)), 1)
    assert not has_budget_left((), 1)


rising = st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 1)), min_size=1, max_size=8).map(
    lambda steps: tuple(
        Step(sum(spent for spent, _ in steps[: place + 1]), accuracy)
        for place, (_, accuracy) in enumerate(steps)
    )
)


@given(rising, st.floats(0, 1), st.floats(0, 1))
def test_more_accuracy_is_never_cheaper_and_its_cost_buys_it(steps, one, other):
    low, high = sorted([one, other])
    cheap, dear = cost_to(steps, low), cost_to(steps, high)
    assert dear is None or (cheap is not None and cheap <= dear)
    if dear is not None:
        assert accuracy_at(steps, dear) >= high - 1e-9


@pytest.fixture
def runs(make_run):
    """Three seeds each; one arm sends nothing, and one seed of it stays below 60 %."""
    learnt = {"client_steps": 10, "server_steps": 4}
    return {
        "local": [
            make_run(seed=s, accuracies=(0.4, 0.5, 0.55 + s / 20), silent=True) for s in range(3)
        ],
        "dml": [
            make_run(seed=s, accuracies=(0.5 + s / 100, 0.62, 0.8), federation=learnt)
            for s in range(3)
        ],
    }


def test_costs_add_up_over_rounds_clients_and_server(runs):
    (dml, *_) = runs["dml"]
    # A client sends 1000 and receives 3000 bytes a round.
    assert [step.cost for step in staircase(dml, "bytes")] == [4000, 8000, 12000]
    assert [step.cost for step in staircase(dml, "steps")] == [14, 28, 42]
    assert [step.cost for step in staircase(dml, "rounds")] == [1, 2, 3]
    assert [step.accuracy for step in staircase(dml, "rounds", "worst_accuracy")] == pytest.approx(
        [0.4, 0.52, 0.7]
    )
    # Neither a clock nor networks that are known.
    assert staircase(dml, "time") == staircase(dml, "gflop") == ()
    assert staircase(runs["local"][0], "steps") == ()


def test_rows_say_who_reached_it_and_who_had_something_left(runs):
    found = Spending(runs, "local", [0.6], [Budget.of_text("bytes=8kB")]).to_row()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    local, dml = found["to"]
    assert (local["runs"], local["reached"], local["rounds"], local["bytes"]) == (3, 2, 3, 0)
    assert (dml["reached"], dml["rounds"], dml["bytes"], dml["steps"]) == (3, 2, 8000, 28)
    assert (dml["bytes_low"], dml["bytes_high"]) == (8000, 8000)
    assert (dml["time"], local["steps"]) == (None, None)
    local, dml = found["at"]
    assert local["accuracy"] == pytest.approx(0.6)
    assert (local["budget_left"], dml["budget_left"], dml["judged"]) == (3, 0, 3)
    # 62 minus 55, 60 and 65: by seed, as differences of arms are.
    assert dml["difference"] == pytest.approx(0.02)
    assert (dml["difference_ahead"], dml["difference_pairs"]) == (2, 3)
    (too_dear,) = [
        row
        for row in Spending(runs, "local", [], [Budget.of_text("bytes=3000")]).to_row()["at"]
        if row["arm"] == "dml"
    ]
    assert (too_dear["judged"], too_dear["accuracy"], too_dear["difference"]) == (0, None, None)


def test_tables_name_what_was_never_reached(runs):
    spending = Spending(runs, "local", [0.6, 0.9], [Budget.of_text("bytes=8kB")])
    some, none, at = spending.tables()
    cells = {column.title: column.cells for column in some.columns}
    assert cells["reached"] == ["2 of 3", "3 of 3"]
    assert cells["kB"] == ["0.0 ±0.0*", "8.0 ±0.0*"]
    assert "of the runs that reached it alone" in some.caption
    assert none.columns[0].cells == ["never", "never"]
    by_title = {column.title: column.cells for column in at.columns}
    assert by_title["budget left"][0] == "3 of 3"
    assert by_title["minus local"][0] == ""
    assert by_title["minus local"][1].startswith("+2.0 ±")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("bytes=500kB", 5e5),
        ("bytes=500", 500),
        ("bytes = 1.5 MB", 1.5e6),
        ("steps=2k", 2000),
        ("rounds=10", 10),
        ("time=2min", 120),
        ("gflop=1_000", 1000),
    ],
)
def test_budgets_are_read_with_their_units(text, amount):
    assert Budget.of_text(text).amount == amount


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "byte=3",
            "one of rounds, steps, bytes, time, gflop .* got 'byte=3'; did you mean 'bytes'",
        ),
        ("bytes", "bytes must be a number above 0, alone or with kB, B, MB, GB, got ''"),
        ("steps=3kB", "steps must be a number above 0, alone or with k, M, got '3kB'"),
        ("rounds=0", "rounds must be a number above 0, got '0'"),
        ("time=-3s", "got '-3s'"),
        ("gflop=1e999", "got '1e999'"),
    ],
)
def test_what_is_no_budget_is_refused_with_what_would_work(text, said):
    with pytest.raises(SettingsError, match=said):
        Budget.of_text(text)


def test_a_run_alone_is_asked_for_the_highest_whole_percent_that_it_reached(make_run):
    run = make_run(accuracies=(0.4, 0.678, 0.5))
    found = cost(run.folder)
    assert found.targets == [0.67]
    assert found.to_row()["to"][0]["rounds"] == 2
    with pytest.raises(SettingsError, match="at most 100 %, got 120"):
        cost(run.folder, to=[120])
    with pytest.raises(SettingsError, match="did you mean 'worst_accuracy'"):
        cost(run.folder, measure="worst_acuracy")
    with pytest.raises(SettingsError, match="has a judged round with server_accuracy"):
        cost(run.folder, measure="server_accuracy")
