import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sim.reports.power import detectable_effect
from sim.reports.statistics import (
    Difference,
    Estimate,
    compare_arms,
    compare_pairs,
    difference_by_seed,
    estimate,
    holm,
    paired_difference,
    sign_flip_p,
    smallest_p,
    summarize,
    values_by_seed,
)
from sim.settings import SettingsError

shares = st.floats(0, 1)


def test_interval_matches_hand_computed_value():
    # Mean 2, sample standard deviation 1, t(0.975, 2) = 4.302653, over sqrt(3): 2.484138.
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert found.high == pytest.approx(2 + 2.484138, abs=1e-6)
    assert found.half_width == pytest.approx(2.484138, abs=1e-6)


def test_one_value_has_no_interval_and_none_no_mean():
    assert estimate([0.25]) == Estimate(0.25, None, None, 1)
    assert estimate([0.25]).half_width is None
    assert estimate([]) is None


def test_equal_values_have_an_interval_of_width_zero():
    assert estimate([0.5, 0.5]) == Estimate(0.5, 0.5, 0.5, 2)


@given(st.lists(shares, min_size=2, max_size=8).filter(lambda values: np.std(values) > 1e-6))
def test_interval_agrees_with_scipy(values):
    found = estimate(values)
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12, abs=1e-12)


def test_paired_difference_matches_hand_computed_value():
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 2 sqrt(3) = 3.4641 with 2
    # degrees of freedom, whose tails hold 1 - t / sqrt(t^2 + 2) = 0.0741799.
    found = paired_difference([1.0, 1.0, 1.0], [2.0, 3.0, 4.0])
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((-0.484138, 4.484138), abs=1e-6)
    assert found.p_value == pytest.approx(0.0741799, abs=1e-6)
    assert found.n == 3


@given(
    st.lists(st.tuples(shares, shares), min_size=2, max_size=8).filter(
        lambda pairs: np.std([a - b for a, b in pairs]) > 1e-6
    )
)
def test_paired_difference_agrees_with_scipy_and_changes_sign(pairs):
    first, other = zip(*pairs, strict=True)
    found = paired_difference(first, other)
    expected = stats.ttest_rel(other, first)
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    back = paired_difference(other, first)
    assert (back.mean, back.p_value) == pytest.approx((-found.mean, found.p_value), abs=1e-12)


@given(
    st.lists(st.tuples(shares, shares), min_size=3, max_size=8).filter(
        lambda pairs: np.std([a - b for a, b in pairs]) > 1e-3
    ),
    st.floats(-1, 1),
    st.floats(0.1, 10),
)
def test_what_both_arms_gain_changes_nothing_and_units_do_not_matter(pairs, shift, scale):
    first, other = (np.array(values) for values in zip(*pairs, strict=True))
    found = paired_difference(first.tolist(), other.tolist())
    moved = paired_difference(
        (scale * (first + shift)).tolist(), (scale * (other + shift)).tolist()
    )
    assert moved.mean == pytest.approx(scale * found.mean, abs=1e-12)
    assert moved.p_value == pytest.approx(found.p_value, abs=1e-9)
    assert moved.detectable == pytest.approx(scale * found.detectable, rel=1e-9)
    assert moved.p_sign_flip == found.p_sign_flip


def test_pairing_sees_what_the_spread_over_seeds_hides():
    first, other = [0.1, 0.5, 0.9], [0.12, 0.521, 0.919]
    assert paired_difference(first, other).p_value < 0.01
    assert stats.ttest_ind(first, other).pvalue > 0.9


def test_one_pair_has_a_difference_but_no_interval():
    assert paired_difference([0.5], [0.75]) == Difference(0.25, None, None, None, 1, pairs=(0.25,))


def test_no_spread_warns_about_nothing_and_claims_no_certainty():
    # 0.3 - 0.1 and 0.4 - 0.2 differ by rounding only.
    found = paired_difference([0.1, 0.2], [0.3, 0.4])
    assert found.p_value is None
    assert found.low == found.high == found.mean == pytest.approx(0.2)
    same = Difference(0.0, 0.0, 0.0, 1.0, 2, pairs=(0.0, 0.0))
    assert paired_difference([0.1, 0.2], [0.1, 0.2]) == same


@pytest.mark.parametrize(
    ("first", "other", "text"),
    [
        ([], [], "got 0 and 0"),
        ([1.0], [1.0, 2.0], "got 1 and 2"),
        ([math.nan], [1.0], "finite"),
        ([1.0], [math.inf], "finite"),
    ],
)
def test_values_that_are_no_pairs_are_refused(first, other, text):
    with pytest.raises(ValueError, match=text):
        paired_difference(first, other)


def test_an_interval_ends_where_values_cannot_be():
    # Two seeds, 0.45 and 0.55: mean 0.5, half width 12.7062 * 0.0707107 / sqrt(2) = 0.63531.
    found = estimate([0.45, 0.55], (0.0, 1.0))
    assert (found.low, found.high, found.clipped, found.half_width) == (0.0, 1.0, True, None)
    assert estimate([0.45, 0.55]).high == pytest.approx(0.5 + 0.63531, abs=1e-5)
    inside = estimate([0.49, 0.51], (0.0, 1.0))
    assert (inside.clipped, inside.half_width) == (False, pytest.approx(0.127062, abs=1e-6))
    assert not estimate([1.0, 1.0], (0.0, 1.0)).clipped
    gap = paired_difference([0.1, 0.1], [0.2, 0.9], (-1.0, 1.0))
    assert (gap.low, gap.high, gap.clipped) == (-1.0, 1.0, True)


def test_few_seeds_are_those_whose_signs_cannot_reach_five_percent():
    assert [estimate([0.1 * n for n in range(count)]).few for count in (2, 5, 6)] == [
        True,
        True,
        False,
    ]
    assert sign_flip_p([1.0] * 5) > 0.05 > sign_flip_p([1.0] * 6)


def test_sign_flips_match_values_counted_by_hand():
    # Of the eight sums of +-1 +-2 +-4 only +7 and -7 are as far from 0 as 7.
    assert sign_flip_p([1.0, 2.0, 4.0]) == 2 / 8
    # 1 + 2 - 4 = -1: all eight are at least as far.
    assert sign_flip_p([1.0, 2.0, -4.0]) == 1.0
    # Two flips of equal size: +-1 +-1 is 2 or -2 in two of four cases.
    assert sign_flip_p([1.0, 1.0]) == 2 / 4
    assert sign_flip_p([0.0, 0.0]) == 1.0
    # 0.1 + 0.2 and 0.3 are the same but for rounding: +-(0.1 + 0.2 + 0.3) and nothing else.
    assert sign_flip_p([0.1, 0.2, 0.3]) == 2 / 8
    with pytest.raises(ValueError, match="need 1 to 20 differences, got 21"):
        sign_flip_p([1.0] * 21)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=7))
def test_sign_flips_agree_with_scipy(differences):
    expected = stats.permutation_test(
        (np.asarray(differences, np.float64),),
        lambda values, axis: np.mean(values, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    found = sign_flip_p([float(value) for value in differences])
    assert found == pytest.approx(expected.pvalue, abs=1e-12)


def test_pairs_that_differ_by_rounding_are_ties_and_cannot_be_flipped():
    # 0.1 + 0.2 is not 0.3 by 5e-17: nobody is ahead there, and of the two other signs two of four
    # sums are as far from 0.
    found = paired_difference([0.3, 0.1, 0.1], [0.1 + 0.2, 0.2, 0.4])
    assert (found.pairs[0], found.ahead) == (0.0, 2)
    assert found.p_sign_flip == found.p_smallest == 2 / 4
    assert paired_difference([0.1, 0.2], [0.1, 0.2]).p_smallest == 1.0
    assert [smallest_p(count) for count in (2, 3, 5, 6)] == [0.5, 0.25, 0.0625, 0.03125]


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=7))
def test_no_sign_flip_p_is_below_the_smallest(differences):
    found = paired_difference([0.0] * len(differences), [float(each) for each in differences])
    assert found.p_smallest <= found.p_sign_flip
    if all(each > 0 for each in differences) or all(each < 0 for each in differences):
        assert found.p_smallest == found.p_sign_flip


def test_what_so_many_pairs_could_have_seen_goes_by_their_own_spread():
    # Differences 1, 2, 3: standard deviation 1.
    found = paired_difference([1.0, 1.0, 1.0], [2.0, 3.0, 4.0])
    assert found.sd == pytest.approx(1.0, abs=1e-12)
    assert found.detectable == pytest.approx(detectable_effect(1.0, 3))
    assert found.seeds_needed(1.05).seeds == 6
    for without in (paired_difference([0.5], [0.75]), paired_difference([0.1, 0.2], [0.3, 0.4])):
        assert (without.sd, without.detectable, without.seeds_needed()) == (None, None, None)


def test_holm_matches_hand_computed_values():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, none below the last.
    found = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.02, "e": None})
    assert found == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.06, "e": None})
    assert list(found) == ["a", "b", "c", "d", "e"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@given(st.dictionaries(st.integers(0, 9), st.floats(0, 1), min_size=1))
def test_holm_is_between_no_correction_and_bonferroni_s(p_values):
    for key, corrected in holm(p_values).items():
        assert p_values[key] <= corrected <= min(1.0, len(p_values) * p_values[key])
        assert len(p_values) > 1 or corrected == p_values[key]


def test_arms_are_compared_with_the_baseline_and_each_with_each(make_run):
    runs = {
        arm: [make_run(seed=seed, accuracies=(base + seed / 100,)) for seed in range(2)]
        for arm, base in {"a": 0.5, "b": 0.6, "c": 0.8}.items()
    }
    assert {
        arm: round(value.mean, 6)
        for arm, value in compare_arms(runs, "accuracy", "last", "b").items()
    } == {"a": -0.1, "c": 0.2}
    pairs = compare_pairs(runs, "accuracy", "last")
    assert {pair: round(value.mean, 6) for pair, value in pairs.items()} == {
        ("a", "b"): 0.1,
        ("a", "c"): 0.3,
        ("b", "c"): 0.2,
    }
    with pytest.raises(SettingsError, match=r"one of the arms \(a, b, c\), got 'bb'.*mean 'b'"):
        compare_arms(runs, "accuracy", "last", "bb")


def test_only_shared_seeds_are_paired():
    first, other = {0: 0.1, 1: 0.2, 2: 0.9}, {2: 1.0, 1: 0.4, 7: 0.0}
    assert difference_by_seed(first, other).mean == pytest.approx(0.15)
    assert difference_by_seed(first, other).n == 2
    assert difference_by_seed(first, {7: 0.0}) is None


def test_an_arm_is_averaged_over_its_seeds_at_both_rounds(make_run):
    runs = [
        make_run(seed=1, accuracies=(0.4, 0.6), validation=(0.9, 0.1)),
        make_run(seed=0, accuracies=(0.5, 0.8), validation=(0.1, 0.9)),
    ]
    found = summarize("dml", runs)
    assert found.seeds == (0, 1)
    assert (found.last_rounds, found.selected_rounds) == ((2, 2), (2, 1))
    assert found.last["accuracy"].mean == pytest.approx(0.7)
    assert found.selected["accuracy"].mean == pytest.approx(0.6)
    assert found.last["worst_accuracy"].mean == pytest.approx(0.6)
    assert found.last["personal_accuracy"].mean == pytest.approx(0.75)
    assert found.bytes_up.mean == 2000
    assert found.bytes_down.mean == 6000
    assert found.seconds == Estimate(7.5, 7.5, 7.5, 2)
    assert "server_accuracy" not in found.last


def test_a_seed_without_a_finite_value_is_left_out_of_that_measure_only(make_run):
    runs = [
        make_run(seed=0, federation={"server_accuracy": 0.5, "macro_recall": float("nan")}),
        make_run(seed=1, federation={"server_accuracy": None, "macro_recall": 0.25}),
    ]
    found = summarize("dml", runs)
    assert found.last["server_accuracy"] == Estimate(0.5, None, None, 1)
    assert found.last["macro_recall"] == Estimate(0.25, None, None, 1)
    assert found.last["accuracy"].n == 2


def test_an_interrupted_run_does_not_pull_the_mean(make_run):
    finished = make_run(seed=0, accuracies=(0.2, 0.8))
    killed = make_run(seed=1, accuracies=(0.2,), status=None)
    found = summarize("dml", [finished, killed])
    assert (found.seeds, found.left_out, found.finished) == ((0,), 1, True)
    assert found.last["accuracy"] == Estimate(0.8, None, None, 1)


def test_an_arm_of_interrupted_runs_shows_how_far_it_got_and_is_not_compared(make_run):
    killed = make_run(seed=0, accuracies=(0.2,), status="interrupted")
    found = summarize("dml", [killed])
    assert (found.finished, found.left_out) == (False, 0)
    assert found.last["accuracy"].mean == 0.2
    runs = {"local": [make_run(seed=0)], "dml": [killed]}
    assert compare_arms(runs, "accuracy", "last") == {"dml": None}


def test_arms_are_compared_with_the_first(make_run):
    runs = {
        "a": [make_run(seed=0, accuracies=(0.5,)), make_run(seed=1, accuracies=(0.6,))],
        "b": [make_run(seed=1, accuracies=(0.9,)), make_run(seed=2, accuracies=(0.1,))],
        "c": [make_run(seed=3)],
    }
    found = compare_arms(runs, "accuracy", "last")
    assert list(found) == ["b", "c"]
    assert found["b"].mean == pytest.approx(0.3)
    assert found["b"].n == 1
    assert found["c"] is None


def test_two_runs_of_one_seed_in_an_arm_are_refused(make_run):
    with pytest.raises(SettingsError, match=r"two runs with seed 4: .*run-1.*run-2"):
        values_by_seed([make_run(seed=4), make_run(seed=4)], "accuracy", "last")


def test_the_epsilon_of_an_arm_is_the_largest_of_its_runs_and_none_where_one_promises_nothing(
    make_run,
):
    kept = [
        make_run(seed=seed, privacy={"mechanism": "dp_sgd", "epsilon": epsilon})
        for seed, epsilon in enumerate([2, 8, 4])
    ]
    assert summarize("kept", kept).epsilon == 8
    assert summarize("mixed", [*kept, make_run(seed=3)]).epsilon is None
    assert summarize("none", [make_run(seed=3)]).epsilon is None
