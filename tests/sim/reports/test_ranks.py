"""Ranks over data sets: against SciPy, by hand, and against the example that the field knows."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from sim.reports.ranks import (
    Ranking,
    cliques,
    critical_difference,
    friedman,
    rank_rows,
    wilcoxon_p,
)

DEMSAR = np.array(
    [
        [4, 3, 2, 1],
        [1, 2, 3, 4],
        [4, 1, 2, 3],
        [4, 1, 3, 2],
        [4, 2, 3, 1],
        [1, 2.5, 4, 2.5],
        [3, 2, 4, 1],
        [2.5, 2.5, 4, 1],
        [4, 3, 2, 1],
        [2.5, 2.5, 2.5, 2.5],
        [4, 2.5, 1, 2.5],
        [3, 2, 4, 1],
        [4, 1, 2, 3],
        [3, 1, 4, 2],
    ]
)
"""Ranks of Demsar, 2006, table 6: four ways to prune C4.5 on 14 data sets."""


def test_the_published_example_comes_out():
    assert DEMSAR.mean(0) == pytest.approx([3.143, 2.0, 2.893, 1.964], abs=5e-4)
    found = friedman(DEMSAR)
    # His formula has no correction for ties, which here leave 1 - (3 * 6 + 60) / (14 * 60).
    uncorrected = found.chi_square * (1 - (3 * 6 + 60) / (14 * 60))
    assert uncorrected == pytest.approx(9.28, abs=5e-3)
    assert 13 * uncorrected / (14 * 3 - uncorrected) == pytest.approx(3.69, abs=5e-3)
    assert found.freedom == (3, 39)
    # His q of 2.569 for four arms: 2.569 * sqrt(4 * 5 / (6 * 14)) = 1.25.
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)


tables = arrays.arrays(
    np.float64,
    st.tuples(st.integers(2, 8), st.integers(3, 6)),
    elements=st.integers(0, 6).map(float),
).filter(lambda table: any(len(set(row)) > 1 for row in table.tolist()))


@given(tables)
def test_friedman_s_statistic_is_scipy_s_with_ties(scores):
    found = friedman(rank_rows(scores))
    assert found.chi_square == pytest.approx(
        stats.friedmanchisquare(*scores.T).statistic, abs=1e-12, rel=1e-12
    )
    sets, arms = scores.shape
    if math.isfinite(found.f):
        f = (sets - 1) * found.chi_square / (sets * (arms - 1) - found.chi_square)
        assert found.p_value == pytest.approx(stats.f.sf(f, *found.freedom), abs=1e-12)


@given(tables)
def test_ranks_of_a_data_set_add_up_and_do_not_depend_on_units(scores):
    ranks = rank_rows(scores)
    arms = scores.shape[1]
    assert ranks.sum(1) == pytest.approx(arms * (arms + 1) / 2)
    assert (rank_rows(scores / 7 + 3) == ranks).all()
    # The best one is the first; upside down the last one is.
    assert rank_rows(-scores) == pytest.approx(arms + 1 - ranks)


def test_data_sets_that_all_rank_alike_leave_no_more_than_chance():
    # Given the first of three orders of three arms, two more agree with it once in 6 * 6.
    found = friedman(np.array([[1.0, 2.0, 3.0]] * 3))
    assert (found.chi_square, found.f, found.p_value) == (6.0, math.inf, pytest.approx(1 / 36))
    tied = friedman(np.array([[1.5, 1.5, 3.0]] * 3))
    assert tied.p_value == pytest.approx(1 / 9)
    equal = friedman(np.array([[2.0, 2.0, 2.0]] * 3))
    assert (equal.chi_square, equal.p_value) == (0.0, 1.0)


@pytest.mark.parametrize("arms", [2, 3, 5, 10])
def test_the_critical_difference_is_that_of_the_studentized_range(arms):
    q = critical_difference(arms, 7) / math.sqrt(arms * (arms + 1) / 42) * math.sqrt(2)
    assert stats.studentized_range.cdf(q, arms, math.inf) == pytest.approx(0.95, abs=1e-12)
    if arms == 2:
        # The range of two normals is that of one with twice the variance.
        assert q / math.sqrt(2) == pytest.approx(stats.norm.ppf(0.975), abs=1e-12)


def test_the_critical_difference_matches_the_table_of_the_field():
    # Demsar, 2006, table 5 (a): q at 5 % for 2 to 10 arms.
    table = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    for arms, q in enumerate(table, start=2):
        found = critical_difference(arms, 1) / math.sqrt(arms * (arms + 1) / 6)
        assert found == pytest.approx(q, abs=1e-3)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=9, unique=True), st.randoms())
def test_pairs_are_tested_as_scipy_does_where_nothing_is_tied(sizes, random):
    signed = [float(size * random.choice([-1, 1])) for size in sizes]
    expected = stats.wilcoxon(signed, method="exact").pvalue
    assert wilcoxon_p(signed) == pytest.approx(expected, abs=1e-12)
    assert wilcoxon_p([*signed, 0.0]) == wilcoxon_p(signed)
    assert wilcoxon_p([-each for each in signed]) == wilcoxon_p(signed)


def test_ties_of_wilcoxon_s_test_are_counted_by_hand():
    # Ranks 1.5, 1.5, 3: of eight signed sums only +6 and -6 are as far from 0 as 6; and 3, where
    # one of the small ones is against: 6, 3, 3, 0, 0, -3, -3, -6 are six of eight as far.
    assert wilcoxon_p([1.0, 1.0, 2.0]) == 2 / 8
    assert wilcoxon_p([1.0, -1.0, 2.0]) == 6 / 8
    assert wilcoxon_p([0.0, 0.0]) == 1.0
    many = [float(each) for each in range(1, 31)]
    assert wilcoxon_p(many) == pytest.approx(stats.wilcoxon(many).pvalue)


def test_groups_that_cannot_be_told_apart_are_as_large_as_they_can_be():
    means = [3.0, 1.0, 1.9, 2.5]
    assert cliques(means, 1.2) == [(1, 2), (2, 3, 0)]
    assert cliques(means, 0.1) == []
    assert cliques(means, 9.0) == [(1, 2, 3, 0)]
    assert cliques([1.0, 2.0], 1.0) == []  # as far as the critical difference is told apart


def test_a_ranking_orders_arms_and_compares_each_pair():
    scores = np.array([[0.5, 0.6, 0.7], [0.1, 0.3, 0.2], [0.8, 0.81, 0.9], [0.4, 0.4, 0.5]])
    found = Ranking(("a", "b", "c"), ("w", "x", "y", "z"), scores, (3, 3, 3, 3))
    assert found.mean_ranks == {"c": 1.25, "b": pytest.approx(7.5 / 4), "a": pytest.approx(2.875)}
    by_pair = {(pair.first, pair.other): pair for pair in found.pairs}
    assert (by_pair["a", "b"].wins, by_pair["a", "b"].ties) == (3, 1)
    assert by_pair["a", "b"].p_value == 2 / 8
    assert by_pair["a", "c"].p_value == 2 / 16 == found.p_smallest
    assert by_pair["a", "c"].p_holm == pytest.approx(3 / 8)
    # 2.3437 * sqrt(3 * 4 / 24) = 1.657; a and c are 1.625 apart.
    assert found.critical_difference == pytest.approx(1.657, abs=1e-3)
    assert found.cliques == [("c", "b", "a")]
    assert not any(pair.told_apart for pair in found.pairs)
