"""Sentences say what was measured, and no more."""

import pytest

from sim.reports import verdicts
from sim.reports.statistics import Difference, is_decided, paired_difference
from sim.reports.verdicts import few_seeds, verdict
from sim.settings import SettingsError


def said(first, other, corrected=None, **names):
    difference = paired_difference(first, other, (-1.0, 1.0))
    p = difference.p_value if corrected is None else corrected
    return verdict(difference, p, arm="dml", baseline="one_way")


def test_what_is_decided_is_said_with_interval_and_test():
    # Differences 0.1, 0.2, 0.3: mean 0.2, half width 4.302653 * 0.1 / sqrt(3) = 0.248414,
    # p as worked out for 1, 2, 3: 0.0741799.
    first, other = [0.1, 0.1, 0.1], [0.2, 0.3, 0.4]
    assert said(first, other) == (
        "It is undecided whether dml beats one_way: 20.0 points ahead "
        "(95 % interval -4.8 to +44.8; p 0.074; "
        "ahead in 3 of 3 seeds). 3 such seeds find 32.6 points in 4 of 5 studies; an interval of "
        "±1 takes about 387."
    )
    sure = [0.3 + n / 100 for n in range(6)]
    assert said([0.1] * 6, sure).startswith(
        "dml beats one_way by 22.5 points (95 % interval +20.5 to +24.5; p <0.001; "
        "ahead in 6 of 6 seeds)"
    )
    assert said(sure, [0.1] * 6).startswith("dml falls behind one_way by 22.5 points")


def test_the_corrected_p_decides():
    sure = [0.3 + n / 100 for n in range(6)]
    text = said([0.1] * 6, sure, corrected=0.06)
    assert text.startswith("It is undecided whether dml beats one_way")
    assert "p <0.001, corrected 0.060" in text


def test_what_cannot_be_tested_is_said():
    assert said([0.5], [0.25]) == (
        "dml is 25.0 points behind one_way with one seed: no interval, no test."
    )
    assert said([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], corrected=None).endswith(
        "(95 % interval +10.0 to +10.0; no test: all seeds differ by the same; "
        "ahead in 3 of 3 seeds)."
    )
    assert verdict(None, None, arm="a", baseline="b") == (
        "a and b cannot be compared: no seed is finished in both."
    )
    assert "level" in said([0.5, 0.6], [0.5, 0.6])


def test_an_interval_beyond_what_is_possible_says_so():
    text = said([0.1, 0.1, 0.1], [0.2, 0.3, 0.9])
    assert "95 % interval -57.4 to +100.0, cut off at what is possible" in text
    # 3.26 times their standard deviation of 0.379 is more than a share can differ by.
    assert "3 such seeds find no difference that is possible in 4 of 5 studies" in text


def test_two_seeds_are_called_two_seeds_and_decide_nothing():
    # 30.0 and 30.1 points have p = 0.001, which is one number's worth of spread.
    text = said([0.1, 0.1], [0.4, 0.401])
    assert (
        text == "dml is 30.1 points ahead of one_way with two seeds (+30.0 and +30.1): no verdict."
    )
    difference = paired_difference([0.1, 0.1], [0.4, 0.401])
    assert difference.p_value < 0.01
    assert not is_decided(difference, difference.p_value)
    (remark,) = few_seeds([difference])
    assert remark.startswith("* two seeds are few")
    assert "cannot go below 0.5 with 2 pairs" in remark


def test_the_exact_test_is_told_what_it_cannot_reach_after_correction():
    six = [Difference(0.1, 0.0, 0.2, 0.04, 6)]
    assert few_seeds(six) == ()
    # 3 * 2 / 64 is above 0.05; 3 * 2 / 128 = 0.047 is not.
    (remark,) = few_seeds(six, comparisons=3)
    assert remark == (
        "The exact sign-flip test, which assumes nothing, cannot go below 0.0938 corrected for 3 "
        "comparisons with 6 pairs, nor below 0.05 with fewer than 7 (--seeds 7)."
    )


def test_few_seeds_are_told_what_they_cannot_show():
    (remark,) = few_seeds([Difference(0.1, 0.0, 0.2, 0.04, 3), None])
    assert "3 seeds are few" in remark
    assert "cannot go below 0.25 with 3 pairs" in remark
    assert few_seeds([Difference(0.1, 0.0, 0.2, 0.04, 6)]) == ()
    assert few_seeds([Difference(0.1, None, None, None, 1)]) == ()


def test_every_arm_but_the_baseline_is_judged(make_run):
    runs = {
        arm: [make_run(seed=s, accuracies=(base + s * s * base / 50,)) for s in range(3)]
        for arm, base in {"local": 0.5, "one_way": 0.6, "dml": 0.9}.items()
    }
    heading, local, dml, remark = verdicts(runs, "one_way")
    assert heading.startswith("Against one_way, by mean client accuracy at the last round")
    assert "2 comparisons" in heading
    assert local.startswith("local falls behind one_way by 10.")
    assert dml.startswith("dml beats one_way by 31.0 points")
    assert remark.startswith("* 3 seeds")
    assert verdicts({"dml": runs["dml"]}) == ()
    # One seed each: nothing is tested, and nothing is said of tests.
    assert len(verdicts({arm: of_arm[:1] for arm, of_arm in runs.items()})) == 3
    with pytest.raises(SettingsError, match="did you mean 'dml'"):
        verdicts(runs, "dmll")
