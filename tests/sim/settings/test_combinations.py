"""Settings that change together, and conditions on combinations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.settings.combinations import (
    check_condition,
    check_together,
    holds,
    is_among,
    values_meant,
)

SWEEP = {"rounds": (20, 10, 5), "epochs": (1, 2, 4), "up": ("float32", {"kind": "top_k", "k": 2})}


def test_true_is_not_one_and_numbers_are_equal_by_value() -> None:
    assert is_among(1.0, (1, 2))
    assert not is_among(True, (1, 2))
    assert not is_among(0, (False,))
    assert is_among({"k": 2, "kind": "top_k"}, SWEEP["up"])


def test_a_list_is_several_values_unless_it_is_one_of_the_sweep() -> None:
    assert values_meant([1, 2], (1, 2, 4)) == [1, 2]
    assert values_meant(["mlp", "cnn"], (["mlp", "cnn"], ["mlp"])) == (["mlp", "cnn"],)
    assert values_meant(4, (1, 2, 4)) == (4,)


def test_a_condition_holds_where_every_setting_has_one_of_its_values() -> None:
    values = {"rounds": 10, "epochs": 2, "up": {"kind": "top_k", "k": 2}}
    assert holds({"rounds": 10}, "dml", values)
    assert holds({"rounds": [20, 10], "arm": ["dml", "local"]}, "dml", values)
    assert holds({"up": {"kind": "top_k", "k": 2}}, "dml", values)
    assert not holds({"rounds": 10, "epochs": 1}, "dml", values)
    assert not holds({"rounds": 10, "arm": "local"}, "dml", values)


@given(st.lists(st.integers(0, 5), min_size=1), st.integers(0, 5))
def test_a_list_holds_where_one_of_its_values_does(said: list[int], value: int) -> None:
    one = any(holds({"a": each}, "", {"a": value}) for each in said)
    assert holds({"a": said}, "", {"a": value}) == one == (value in said)


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([["rounds", "epoch"]], "'epoch' is not swept over; known: .*did you mean 'epochs'"),
        ([["rounds"]], "change together in twos or more, got"),
        ([["rounds", "up"]], "as many values each, got 3 of rounds, 2 of up"),
        ([["rounds", "epochs"], ["up", "epochs"]], "names epochs twice"),
    ],
)
def test_what_cannot_change_together_is_named(groups: list[list[str]], told: str) -> None:
    with pytest.raises(ValueError, match=f"study.together.*{told}"):
        check_together(groups, SWEEP)


def test_a_value_may_stand_there_twice_only_where_another_setting_changes_with_it() -> None:
    sweep = {"rounds": (10, 10, 5), "epochs": (1, 2, 2)}
    check_together([["rounds", "epochs"]], sweep)
    with pytest.raises(ValueError, match=r"study\.sweep\.rounds has the value 10 twice"):
        check_together([], {"rounds": (10, 10, 5)})
    with pytest.raises(ValueError, match=r"rounds, epochs have the values .* twice"):
        check_together([["rounds", "epochs"]], {"rounds": (1, 1), "epochs": (2, 2)})


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ({}, "names at least one setting"),
        ({"round": 10}, "'round' is not swept over; .* did you mean 'rounds'"),
        ({"rounds": [10, 7]}, "rounds is swept over 20, 10, 5, got 7; .*study.without=null"),
    ],
)
def test_a_condition_on_what_is_not_there_is_named(condition: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_condition("study.without", condition, SWEEP)
    check_condition("study.without", {"rounds": [10, 20], "arm": "whoever"}, SWEEP)
