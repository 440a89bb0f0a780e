"""Rounds that make arms equal in steps or bytes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.commands.arms import Study, study_of
from sim.commands.budgets import Counts, MatchedArm, Matching
from sim.commands.matching import matched
from sim.commands.planning import foresee
from sim.commands.running import run
from sim.commands.study import compare
from sim.commands.trials import Trial, Work, try_out
from sim.settings import Settings, SettingsError

Small = Callable[..., Settings]

NOTHING = Work()
TRIALS = {
    # A teacher's 90 steps and 10 a round; 30 a round, and no bytes down in the first.
    "one_way": Trial(NOTHING, NOTHING, NOTHING, NOTHING, (0, 50), (0, 50), 100, 10),
    "dml": Trial(NOTHING, NOTHING, NOTHING, NOTHING, (100, 0), (100, 200), 30, 30),
    "local": Trial(NOTHING, NOTHING, NOTHING, NOTHING, (0, 0), (0, 0), 8, 8),
}


def trial_of(settings: Settings) -> Trial:
    return TRIALS[settings.strategy.name]


def of(small: Small, *words: str, arms: tuple[str, ...] = ("one_way", "dml")) -> Study:
    return study_of(small(*words), arms)


# -- arithmetic ----------------------------------------------------------------------------------


def test_a_teacher_counts_once() -> None:
    assert Counts(first=100, further=10).total(1) == 100
    assert Counts(first=100, further=10).total(20) == 290


@pytest.mark.parametrize(
    ("target", "rounds"),
    [(0, 1), (100, 1), (104, 1), (105, 1), (106, 2), (190, 10), (194, 10), (196, 11)],
)
def test_rounds_are_those_whose_total_is_nearest(target: int, rounds: int) -> None:
    # 100, 110, 120, ...: 105 is as near to one round as to two, and the fewer count.
    assert Counts(first=100, further=10).nearest_rounds(target) == rounds


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(0, 10**8))
def test_no_other_rounds_are_nearer(first: int, further: int, target: int) -> None:
    counts = Counts(first, further)
    found = counts.nearest_rounds(target)
    apart = abs(counts.total(found) - target)
    assert found >= 1
    for other in (found - 1, found + 1, 1):
        assert other < 1 or apart <= abs(counts.total(other) - target)


# -- on a study ----------------------------------------------------------------------------------


def test_rounds_are_set_to_the_steps_of_the_baseline(small: Small) -> None:
    study, trials = matched(
        of(small, "rounds=20", "study.match=steps"), "one_way", trial_of=trial_of
    )
    # 100 + 19 x 10 = 290 steps; dml: 9 x 30 = 270 and 10 x 30 = 300.
    assert {arm: settings.rounds for arm, settings in study.arms.items()} == {
        "one_way": 20,
        "dml": 10,
    }
    assert study.matching is not None
    assert study.matching.arms[1] == MatchedArm("dml", 20, 10, 600, 300, 300 / 290 - 1)
    assert study.notes == [
        "matched by steps to one_way (290 steps in 20 rounds): dml: 10 rounds instead of 20, "
        "300 steps instead of 600 steps, +3.4 %"
    ]
    assert trials.keys() == {"one_way", "dml"}
    # The same again, and from the other side: one_way cannot have fewer than its teacher's steps.
    again, _ = matched(
        of(small, "rounds=3", "study={match: steps, match_to: dml}"), "one_way", trial_of=trial_of
    )
    assert {arm: settings.rounds for arm, settings in again.arms.items()} == {
        "one_way": 1,
        "dml": 3,
    }


def test_bytes_are_those_up_and_down(small: Small) -> None:
    study, _ = matched(of(small, "rounds=4", "study.match=bytes"), "dml", trial_of=trial_of)
    # dml: 100 + 3 x 300 = 1000; one_way: 50 a round.
    assert study.arms["one_way"].rounds == 20
    assert study.matching is not None
    assert study.matching.to_row()["arms"][0]["after"] == 1000


def test_what_cannot_be_matched_is_refused_by_name(small: Small) -> None:
    arms = ("dml", "local")
    with pytest.raises(SettingsError, match=r"bytes cannot match arm local: its rounds take no by"):
        matched(of(small, "study.match=bytes", arms=arms), "dml", trial_of=trial_of)
    once = replace(TRIALS["dml"], first_steps=7, further_steps=0)
    with pytest.raises(SettingsError, match=r"arm local: its steps do not depend on rounds \(7 in"):
        matched(
            of(small, "study.match=steps", arms=arms),
            "dml",
            trial_of=lambda s: once if s.strategy.name == "local" else TRIALS["dml"],
        )
    with pytest.raises(SettingsError, match=r"match_to must be one of the arms .* got 'fedmd'"):
        matched(of(small, "study={match: steps, match_to: fedmd}"), "dml", trial_of=trial_of)
    with pytest.raises(SettingsError, match=r"sets rounds, which study\.sweep sets as well"):
        matched(
            of(small, "study={match: steps, sweep: {rounds: [1, 2]}}"), "dml-1", trial_of=trial_of
        )
    many = replace(TRIALS["dml"], first_steps=10**9)
    with pytest.raises(SettingsError, match=r"arm local would need 125,000,\d+ rounds"):
        matched(
            of(small, "study.match=steps", arms=arms),
            "dml",
            trial_of=lambda s: many if s.strategy.name == "dml" else TRIALS["local"],
        )


def test_equal_arms_are_tried_once_and_refused_ones_left_as_they_are(small: Small) -> None:
    tried: list[str] = []

    def trial(settings: Settings) -> Trial:
        tried.append(settings.strategy.name)
        if settings.strategy.name == "fedmd":
            raise SettingsError("cannot")
        return trial_of(settings)

    words = "study={match: steps, arms: {a: {}, b: {}, c: {strategy: fedmd}}, refused: %s}"
    study, _ = matched(study_of(small(words % "show")), "a", trial_of=trial)
    assert tried == ["dml", "fedmd"]
    assert study.arms["c"].rounds == 2
    with pytest.raises(SettingsError, match="arm c: cannot"):
        matched(study_of(small(words % "stop")), "a", trial_of=trial)


def test_many_arms_of_which_the_same_is_true_are_told_together() -> None:
    arms = [MatchedArm(f"t{n}", 20, 10, 600, 300, 0.0) for n in range(9)]
    told = Matching("steps", "t0", tuple(arms)).sentences()
    assert told == [
        "matched by steps to t0 (300 steps in 10 rounds): t1, t2, t3, t4, t5, t6 and 2 more: 10 "
        "rounds instead of 20, 300 steps instead of 600 steps, +0.0 %"
    ]


# -- against runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one_way", "dml", "fedmd", "local"])
def test_steps_are_those_of_the_run(small: Small, name: str) -> None:
    settings = small(f"strategy.name={name}", "rounds=4")
    trial = try_out(settings)
    rows = run(settings).history.federation
    steps = sum(row.get("client_steps", 0) + row.get("server_steps", 0) for row in rows)
    assert Counts(trial.first_steps, trial.further_steps).total(4) == steps > 0


def test_a_matched_study_says_so_and_finds_its_runs_again(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.commands.study.write_report", lambda _, place, **__: place)
    settings = small("rounds=3", "study={match: bytes, seeds: 1}", "clients.models=[mlp]")
    arms = ["dml", "fedmd"]
    outlook = foresee(study_of(settings, arms))
    study = compare(settings, arms=arms)
    assert study.matching is not None
    assert outlook.to_row()["match"] == study.matching.to_row() == study.to_row()["match"]
    assert outlook.to_row()["tried"] == 2
    for arm in study.matching.arms:
        (record,) = study.runs[arm.arm]
        moved = sum(record.result["bytes_up"]) + sum(record.result["bytes_down"])
        assert (record.result["rounds"], moved) == (arm.rounds, arm.after)
    assert study.matching.sentences()[0] in study.notes
    again = foresee(study_of(settings, arms), seeds=2)
    assert again.plan.finished == 2
