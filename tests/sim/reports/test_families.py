"""Arms of one question are compared with each other, corrected for their pairs and no others."""

import pytest

from sim.reports.families import compare_families, family_rows, family_tables, questions_of
from sim.reports.grids import Axis, Grid
from sim.reports.statistics import compare_pairs, corrected
from sim.reports.verdicts import answers

FAMILIES = questions_of({"first": ["a", "b", "c"], "second": ["c", "d"], "gone": ["a", "refused"]})
RISES = {"a": 0.0, "b": 0.05, "c": 0.02, "d": 0.3}


@pytest.fixture
def runs(make_run):
    return {
        arm: [
            make_run(strategy="dml", arm=arm, seed=seed, accuracies=[0.5 + rise + noise * seed])
            for seed in range(3)
        ]
        for (arm, rise), noise in zip(RISES.items(), (0.01, 0.013, -0.004, 0.02), strict=True)
    }


def test_pairs_are_those_of_a_family_and_p_is_corrected_for_them_alone(runs):
    found = compare_families(runs, FAMILIES)
    assert {name: list(pairs) for name, pairs in found.items()} == {
        "first": [("a", "b"), ("a", "c"), ("b", "c")],
        "second": [("c", "d")],
    }
    every = compare_pairs(runs, "accuracy", "last")
    for pairs in found.values():
        assert all(value == every[pair] for pair, (value, _) in pairs.items())
    # A single pair needs no correction; among all pairs of the study it would.
    value, p = found["second"]["c", "d"]
    assert p == value.p_value < corrected(every)["c", "d"]
    of_three = sorted(value.p_value for value, _ in found["first"].values())
    assert min(p for _, p in found["first"].values()) == pytest.approx(min(1, 3 * of_three[0]))


def test_tables_and_rows_say_what_was_compared(runs):
    rows = family_rows(runs, FAMILIES)
    assert [(row["family"], row["first"], row["other"]) for row in rows] == [
        ("first", "a", "b"),
        ("first", "a", "c"),
        ("first", "b", "c"),
        ("second", "c", "d"),
    ]
    assert rows[-1]["difference_p_sign_flip"] == 0.25
    tables = family_tables(runs, FAMILIES)
    assert [table.labels for table in tables] == [["b - a", "c - a", "c - b"], ["d - c"]]
    # The smallest p that three pairs can reach stands below.
    assert tables[1].caption.startswith("p of 1 pair; sign-flip is at least 0.25; would find")
    assert tables[0].caption.startswith("p corrected for 3 pairs by Holm; sign-flip is at least 0")
    # What the rows say, in points.
    by_title = {column.title: column.cells for column in tables[1].columns}
    assert by_title["would find"] == [f"{100 * rows[-1]['difference_detectable']:.1f}"]
    assert by_title["seeds for ±1"] == [f"{rows[-1]['difference_seeds_needed']:,}"]
    assert (
        "two seeds, no verdict"
        in family_tables({arm: of_arm[:2] for arm, of_arm in runs.items()}, FAMILIES)[0].caption
    )


def test_a_sweep_over_arms_asks_how_they_compare_at_every_combination():
    # local has no temperature: one arm for both; a condition left dml at 4 out.
    arms = Axis("arm", ("local", "one_way", "dml"))
    temperature = Axis("strategy.temperature", (1, 4))
    grid = Grid((arms, temperature), ("local", "local", "one_way-1", "one_way-4", "dml-1", ""))
    assert questions_of({}, grid, "one_way-4") == {
        "against one_way": [
            ("one_way-1", "local"),
            ("one_way-4", "local"),
            ("one_way-1", "dml-1"),
        ]
    }
    assert questions_of({}, grid, "local") == {
        "against local": [("local", "one_way-1"), ("local", "one_way-4"), ("local", "dml-1")]
    }
    # What the study asks itself comes first; a sweep over one arm has a baseline like any other.
    assert questions_of({"mine": ["local", "dml-1"]}, grid) == {"mine": [("local", "dml-1")]}
    assert questions_of({}, Grid((temperature,), ("dml-1", "dml-4")), "dml-1") == {}


def test_each_pair_that_is_asked_about_is_answered_in_a_sentence(runs):
    questions = {"against a": [("a", "b"), ("a", "d")]}
    told = answers(runs, questions)
    assert told[0] == (
        "Against a, by mean client accuracy at the last round; p of the paired t-test, corrected "
        "for 2 comparisons by Holm:"
    )
    assert told[2].startswith("d beats a by 31.0 points (95 % interval ")
    # Of very many the tables say enough.
    assert answers(runs, {str(number): [("a", "b")] for number in range(17)}) == ()
    assert answers(runs, {"gone": [("a", "refused")]}) == ()
