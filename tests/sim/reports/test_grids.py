import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.reports.grids import Axis, Grid, value_label

ATTACKS = Axis("adversary.kind", ("lma", "cpa"))
RULES = Axis("strategy.aggregation", ("mean", "median", "filter"))
SHARES = Axis("adversary.fraction", (0, 0.2))


def grid_of(*axes):
    arms = [""]
    for axis in axes:
        arms = [f"{arm}/{label}" for arm in arms for label in axis.labels]
    return Grid(axes, tuple(arms))


def test_numbers_run_along_columns_wherever_they_stand():
    for axes in ((ATTACKS, RULES, SHARES), (SHARES, ATTACKS, RULES), (ATTACKS, SHARES, RULES)):
        first, second = grid_of(*axes).planes
        assert (first.title, second.title) == ("adversary: lma", "adversary: cpa")
        assert (first.rows, first.columns) == (RULES, SHARES)
        for plane, attack in ((first, "lma"), (second, "cpa")):
            for rule, line in zip(RULES.labels, plane.arms, strict=True):
                for share, arm in zip(SHARES.labels, line, strict=True):
                    assert set(arm.split("/")) == {"", attack, rule, share}


def test_arms_that_were_swept_over_are_the_rows():
    arms = Axis("arm", ("a", "b"))
    first, second = grid_of(arms, ATTACKS, SHARES).planes
    assert (first.rows, first.columns, second.title) == (arms, SHARES, "adversary: cpa")
    assert second.arms[0] == ("/a/cpa/0", "/a/cpa/0.2")
    (plane,) = grid_of(arms, ATTACKS).planes
    assert (plane.rows, plane.columns) == (arms, ATTACKS)


def test_without_numbers_the_last_setting_runs_along_columns():
    (plane,) = grid_of(ATTACKS, RULES).planes
    assert (plane.title, plane.rows, plane.columns) == ("", ATTACKS, RULES)
    assert plane.arms[1] == ("/cpa/mean", "/cpa/median", "/cpa/filter")


def test_one_setting_is_one_line_and_single_values_are_left_out():
    (plane,) = grid_of(Axis("rounds", (5,)), SHARES).planes
    assert plane.rows.labels == ("",)
    assert plane.arms == (("/5/0", "/5/0.2"),)
    assert grid_of(Axis("rounds", (5,))).planes == ()
    assert grid_of(ATTACKS, RULES, SHARES, Axis("rounds", (1, 2))).planes == ()


def test_a_grid_is_read_back_as_it_was_written():
    grid = grid_of(Axis("exchange.up", ("float32", {"kind": "top_k", "k": 2})), SHARES)
    assert Grid.of_row(json.loads(json.dumps(grid.to_row()))) == grid


@pytest.mark.parametrize("row", [[], {}, {"axes": [{"name": "a"}], "arms": []}, {"axes": 3}])
def test_what_is_no_grid_is_refused(row):
    with pytest.raises(ValueError, match="grid"):
        Grid.of_row(row)
    with pytest.raises(ValueError, match="of 2 combinations needs an arm for each, got 1"):
        Grid((SHARES,), ("a",))


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("median", "median"),
        (0.2, "0.2"),
        (True, "true"),
        (None, "none"),
        ({"kind": "top_k", "k": 2}, "top_k 2"),
        ({"fraction": 0.2, "kind": "lma"}, "lma 0.2"),
        ([{"name": "mlp"}, "cnn"], "mlp+cnn"),
    ],
)
def test_values_have_short_labels(value, label):
    assert value_label(value) == label


def test_true_is_no_number_and_a_short_title_says_what_is_chosen():
    assert SHARES.numeric
    assert not Axis("a", (True, 1)).numeric
    assert not Axis("a", (float("nan"), 1)).numeric
    assert [axis.title for axis in (ATTACKS, SHARES, Axis("strategy.name", ()))] == [
        "adversary",
        "fraction",
        "strategy",
    ]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_every_arm_stands_in_the_planes_once(sizes):
    axes = [Axis(f"s{place}", tuple("abc"[:size])) for place, size in enumerate(sizes)]
    grid = grid_of(*axes)
    shown = [arm for plane in grid.planes for line in plane.arms for arm in line]
    assert sorted(shown) == (sorted(grid.arms) if len(grid.arms) > 1 else [])
