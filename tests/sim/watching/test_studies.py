import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.keeping.plans import announced
from sim.settings import SettingsError
from sim.watching.runs import Measured, RunSight, Status
from sim.watching.studies import Follower, duration, mean_curve, seconds_left, thinned


def plan_of(**arms: Sequence[int]) -> dict[str, Any]:
    return {
        "arms": {
            arm: [
                {"seed": seed, "folder": f"{arm}/seed-{seed}-0", "rounds": rounds}
                for seed, rounds in enumerate(of_arm)
            ]
            for arm, of_arm in arms.items()
        },
        "refused": {"bad": "cannot work"},
    }


def seen(arm: str, status: Status, *, rounds: int, took: Sequence[float] = ()) -> RunSight:
    measured = [Measured(place, place / 10, took_s) for place, took_s in enumerate(took, start=1)]
    around_s = 1.5 if status == "finished" else 0.0
    return RunSight(
        arm=arm,
        seed=0,
        folder=Path(arm),
        status=status,
        rounds=rounds,
        measured=measured,
        around_s=around_s,
    )


def test_a_study_is_followed_with_the_runs_that_it_has_not_begun(
    run_at: Callable[..., Any], tmp_path: Path
) -> None:
    with announced(tmp_path, plan_of(dml=(4, 4), fedmd=(4,))):
        follower = Follower(tmp_path)
        sight = follower.look()
        assert sight.condition == "running"
        assert [(run.label, run.status) for run in sight.runs] == [
            ("dml seed 0", "planned"),
            ("dml seed 1", "planned"),
            ("fedmd seed 0", "planned"),
        ]
        assert (sight.finished, sight.done, sight.rounds) == (0, 0, 12)
        assert sight.told() == "running, 0 of 3 runs finished, time left not known yet"
        assert sight.refused == {"bad": "cannot work"}
        run = run_at("dml/seed-0-0")
        with run.running():
            run.round(1, accuracy=0.25)
            sight = follower.look()
            # Two seconds a round, for eleven rounds that are left.
            assert sight.told() == "running, 0 of 3 runs finished, about 22 s left"
        run.ended("finished")
        assert follower.look().finished == 1
    sight = follower.look()
    assert sight.condition == "stopped"
    assert sight.ended() == (
        f"{tmp_path}: 2 of 3 runs are not finished (2 planned), and no process here works on them; "
        "the same fedkd compare goes on"
    )


def test_events_stand_in_the_order_in_which_they_were_seen(
    run_at: Callable[..., Any], tmp_path: Path
) -> None:
    first, second = run_at("dml/seed-0-0"), run_at("dml/seed-1-0", seed=1)
    with announced(tmp_path, plan_of(dml=(4, 4))):
        follower = Follower(tmp_path)
        second.event(round=1, event="worker lost", reason="")
        follower.look()
        first.event(round=1, client=2, event="reply rejected", reason="not finite")
        assert follower.look().events == (
            "dml seed 1, round 1: worker lost: ",
            "dml seed 0, round 1, client 2: reply rejected: not finite",
        )
        # A run that goes on from before its events has them no more.
        (second.folder / "events.jsonl").write_text("")
        assert len(follower.look().events) == 1


def test_of_a_study_that_is_over_its_last_file_tells(
    run_at: Callable[..., Any], tmp_path: Path
) -> None:
    for seed in (0, 1):
        run_at(f"dml/seed-{seed}-0", seed=seed).ended("finished")
    with announced(tmp_path, plan_of(dml=(4, 4, 4, 4))):
        pass
    (tmp_path / "study-0").mkdir()
    table = {"arms": {"dml": ["../dml/seed-0-0", "../dml/seed-1-0"]}}
    (tmp_path / "study-0" / "study.json").write_text(json.dumps(table))
    sight = Follower(tmp_path).look()
    assert sight.condition == "finished"
    assert [(run.seed, run.rounds) for run in sight.runs] == [(0, 4), (1, 4)]


def test_two_commands_on_one_study_are_one_sight(tmp_path: Path) -> None:
    with announced(tmp_path, plan_of(dml=(4,))), announced(tmp_path, plan_of(dml=(4, 4), fd=(4,))):
        runs = Follower(tmp_path).look().runs
    assert [run.label for run in runs] == ["dml seed 0", "dml seed 1", "fd seed 0"]


def test_a_single_run_and_a_folder_without_a_plan(
    run_at: Callable[..., Any], tmp_path: Path
) -> None:
    run = run_at("dml/seed-3-0", seed=3)
    with run.running():
        run.round(1, accuracy=0.5)
        (single,) = Follower(run.folder).look().runs
        assert (single.arm, single.seed, single.rounds, single.done) == ("dml", 3, 4, 1)
        (of_study,) = Follower(tmp_path).look().runs
        assert of_study.done == 1
    ended = Follower(run.folder).look().ended()
    assert ended.startswith(f"{run.folder}: stopped after round 1 of 4, and no process here")
    assert f"fedkd run --resume {run.folder}" in ended


def test_what_cannot_be_watched_is_refused_by_name(
    run_at: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"nowhere.*there is no such folder"):
        Follower(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="is neither a study's folder"):
        Follower(tmp_path)
    run_at("20260101-120000-1a2b3c")
    with pytest.raises(SettingsError, match=r"the newest: fedkd watch .*/20260101-120000-1a2b3c"):
        Follower(tmp_path)
    distillation = tmp_path / "distilled"
    distillation.mkdir()
    (distillation / "settings.yaml").write_text("{teacher: {}, student: {}, method: {}}")
    with pytest.raises(SettingsError, match="folder of a distillation"):
        Follower(distillation)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is damaged: Expecting"),
        ("[]", "not the table of a study"),
        ('{"arms": {"a": [3]}}', "is damaged: TypeError"),
        ('{"arms": {"a": ["../../elsewhere"]}}', "lies outside the study"),
        ('{"arms": {"a": ["gone"]}}', "gone cannot be read as the folder of a run"),
    ],
)
def test_a_damaged_plan_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "plan-0.json").write_text(text)
    with pytest.raises(SettingsError, match=problem):
        Follower(tmp_path)


def test_the_time_left_is_that_of_the_rounds_left() -> None:
    assert seconds_left([seen("a", "planned", rounds=3)]) is None
    # a: 2 s a round, one finished, one with a round left; b has not begun: 6/3 s a round, and
    # 1.5 s beside its rounds, as the finished run took.
    runs = [
        seen("a", "finished", rounds=2, took=(2.0, 2.0)),
        seen("a", "running", rounds=2, took=(2.0,)),
        seen("b", "planned", rounds=3),
    ]
    assert seconds_left(runs) == pytest.approx(2.0 + 3 * 2.0 + 1.5)
    # Two runs at once take half of it.
    both = [*runs[:2], seen("b", "running", rounds=3)]
    assert seconds_left(both) == pytest.approx((2.0 + 3 * 2.0) / 2)


def test_a_mean_curve_is_over_the_runs_that_have_come_so_far() -> None:
    runs = [seen("a", "running", rounds=3, took=(1, 1)), seen("a", "running", rounds=3, took=(1,))]
    assert mean_curve(runs) == [(1, 0.1), (2, 0.2)]


@given(st.integers(0, 400), st.integers(2, 50))
def test_a_thinned_curve_keeps_its_ends_and_its_order(points: int, most: int) -> None:
    curve = [(round, 0.0) for round in range(points)]
    thin = thinned(curve, most)
    assert len(thin) == min(points, most)
    assert thin == sorted(set(thin))
    assert thin[:1] == curve[:1]
    assert thin[-1:] == curve[-1:]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "about 1 s"), (59.4, "about 59 s"), (61, "about 1 min"), (12_000, "about 3 h 20 min")],
)
def test_times_are_told_in_words(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_a_run_whose_folder_is_gone_is_still_to_be_made(
    run_at: Callable[..., Any], tmp_path: Path
) -> None:
    run_at("dml/seed-0-ab", rounds=3).ended("finished")
    runs = {"dml": ["dml/seed-0-ab", "dml/seed-1-cd"], "fedmd": ["fedmd/seed-0-ef"]}
    (tmp_path / "study.json").write_text(json.dumps({"arms": runs}))
    sight = Follower(tmp_path).look()
    assert [(run.label, run.status, run.rounds) for run in sight.runs] == [
        ("dml seed 0", "finished", 3),
        ("dml seed 1", "planned", 3),
        ("fedmd seed 0", "planned", 3),
    ]
    assert sight.told() == "stopped, 1 of 3 runs finished"
    assert "the same fedkd compare goes on" in sight.ended()
