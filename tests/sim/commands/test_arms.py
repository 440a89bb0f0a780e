"""What is said for all arms of a study, and what an arm says itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sim.commands.arms import Study, difference_notes, load_study, study_of
from sim.settings import Settings, SettingsError, load_settings

Read = Callable[..., Study]

FILE = """
rounds: 4
strategy: {name: dml, temperature: 2, kd_weight: 0.5}
study:
  arms:
    alone: {strategy: local}
    plain: {strategy: one_way}
    hot: {strategy: {name: one_way, temperature: 6}}
    long: {rounds: 9}
"""


@pytest.fixture
def study(tmp_path: Path) -> Read:
    def read(*words: str, file: str = FILE, arms: Sequence[str] | None = None) -> Study:
        path = tmp_path / "study.yaml"
        path.write_text(file)
        return load_study(str(path), words, arms=arms)

    return read


def temperatures(study: Study) -> dict[str, float]:
    return {
        name: arm.strategy.temperature.value
        for name, arm in study.arms.items()
        if hasattr(arm.strategy, "temperature")
    }


def test_a_word_reaches_strategies_that_no_file_named() -> None:
    found = load_study(None, ["strategy.temperature=8"], arms=["one_way", "dml", "local"])
    assert temperatures(found) == {"one_way": 8.0, "dml": 8.0}
    assert found.remarks == ["strategy.temperature: not for local, without such a setting"]
    assert found.notes == []


def test_what_a_file_says_for_all_holds_unless_an_arm_says_otherwise(study: Read) -> None:
    found = study()
    assert temperatures(found) == {"plain": 2.0, "hot": 6.0, "long": 2.0}
    assert [arm.rounds for arm in found.arms.values()] == [4, 4, 4, 9]
    assert found.arms["plain"].strategy.kd_weight.value == 0.5  # type: ignore[attr-defined]
    assert found.remarks == [
        "strategy.temperature, strategy.kd_weight: not for alone, without such a setting"
    ]


def test_what_the_command_line_says_holds_over_an_arm_s_own_and_equal_arms_are_named(
    study: Read,
) -> None:
    found = study("strategy.temperature=8", "rounds=3")
    assert temperatures(found) == {"plain": 8.0, "hot": 8.0, "long": 8.0}
    assert {arm.rounds for arm in found.arms.values()} == {3}
    assert found.notes == [
        "arms plain, hot have become equal: strategy.temperature=8, rounds=3 holds for every arm"
    ]
    # What is said for a single arm is said more closely.
    closer = study("study.arms.hot.strategy.temperature=5", "strategy.temperature=8")
    assert temperatures(closer) == {"plain": 8.0, "hot": 5.0, "long": 8.0}
    assert closer.notes == []


@pytest.mark.parametrize("word", ["strategy.name=fedmd", "strategy=fedmd"])
def test_the_strategy_is_the_arm_s_own_to_say(study: Read, word: str) -> None:
    names = {name: arm.strategy.name for name, arm in study(word).arms.items()}
    assert names == {"alone": "local", "plain": "one_way", "hot": "one_way", "long": "fedmd"}


def test_a_strategy_s_settings_may_be_said_together(study: Read) -> None:
    found = study("strategy={name: dml, temperature: {kind: constant, value: 7}}")
    assert temperatures(found) == {"plain": 7.0, "hot": 7.0, "long": 7.0}


def test_a_word_may_be_of_a_strategy_that_is_not_the_default() -> None:
    found = load_study(None, ["strategy.digest_epochs=3"], arms=["fedmd", "dml"])
    assert found.arms["fedmd"].strategy.digest_epochs == 3  # type: ignore[attr-defined]
    assert found.remarks == ["strategy.digest_epochs: not for dml, without such a setting"]
    objective = load_study(None, ["strategy.objective.kd.weight=0.2"], arms=["fml", "local"])
    terms = objective.arms["fml"].strategy.objective.terms  # type: ignore[attr-defined]
    assert (list(terms), terms["kd"].weight.value) == (["ce", "kd"], 0.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["strategy.temprature=8"], "unknown setting 'strategy.temprature' in all arms .* did you"),
        (["rouns=8"], "^unknown setting 'rouns'; did you mean 'rounds'"),
        (["strategy.temperature=0"], r"study\.arms\.plain: strategy\.temperature: must be"),
        (["strategy.name=fedmdd"], "unknown strategy 'fedmdd'"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(
    study: Read, words: Sequence[str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        study(*words)


def test_what_arms_differ_in_is_told(study: Read) -> None:
    found = study()
    assert set(found.differs) == {"rounds", "strategy.temperature"}
    assert difference_notes(found.differs) == [
        "arms differ in rounds (4 in alone, plain, hot; 9 in long), "
        "strategy.temperature (2 in plain, long; 6 in hot)"
    ]
    assert difference_notes(study("strategy.temperature=1", "rounds=2").differs) == []
    schedules = load_study(
        None, ["study={arms: {a: {strategy: dml}, b: {strategy: {name: dml, temperature: 3}}}}"]
    )
    assert difference_notes(schedules.differs) == [
        "arms differ in strategy.temperature (cosine 4 to 1 in a; 3 in b)"
    ]


def test_settings_made_in_python_hold_for_every_arm_as_a_file_s_do() -> None:
    settings = load_settings(None, ["strategy.temperature=8"])
    found = study_of(settings, ["one_way", "dml", "local"])
    assert temperatures(found) == {"one_way": 8.0, "dml": 8.0}
    # What nobody set is every strategy's own default.
    defaults = study_of(Settings(), ["fedmd", "fedavg"]).arms
    assert [arm.strategy.weighting for arm in defaults.values()] == ["equal", "examples"]  # type: ignore[attr-defined]
