"""What a dry run says of a study, and that it leaves no trace."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedkd.names import printable
from sim.commands import planning, trials
from sim.commands.arms import study_of
from sim.commands.planning import foresee, kind_of, sample
from sim.commands.running import run
from sim.commands.study import compare, plan_study
from sim.commands.trials import RunCost, Trial, Work, try_out
from sim.keeping import provenance
from sim.settings import Settings, SettingsError

Small = Callable[..., Settings]
Fedkd = Callable[..., tuple[int, str, str]]

TWO = "study={seeds: 2, arms: {alone: {strategy: local}, mutual: {strategy: dml}}}"


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.commands.study.write_report", lambda _, place, **__: place)


def everything_in(folder: Path) -> dict[str, str]:
    """Return a digest of every file, and the names of folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


# -- arithmetic --------------------------------------------------------------------------------


def test_calls_go_to_the_worker_that_is_free_next() -> None:
    work = Work(1.0, (3.0, 2.0, 2.0, 1.0))
    assert work.seconds(1) == 9.0
    # One worker: 3, then 1 at 3; the other: 2 and 2. Both end at 4.
    assert work.seconds(2) == 5.0
    assert work.seconds(9) == 4.0  # no call is cut in two
    assert Work(2.0).seconds(4) == 2.0


def test_a_run_is_its_first_round_and_so_many_more_like_the_second() -> None:
    trial = Trial(
        load=Work(0.5),
        first=Work(1.0, (4.0,)),
        further=Work(0.25, (1.0, 1.0)),
        judging=Work(0.0, (0.5,)),
        first_bytes=(100, 0),
        further_bytes=(100, 80),
    )
    # 0.5 + 5 + 9 x 2.25 + judged in rounds 4, 8 and 10: 3 x 0.5
    cost = trial.cost(rounds=10, every=4)
    assert cost == RunCost(seconds=27.25, bytes_up=1000, bytes_down=720)
    # Two workers: a further round takes 1.25.
    assert trial.cost(rounds=10, every=4, workers=2).seconds == 18.25
    assert trial.cost(rounds=1, every=1) == RunCost(6.0, 100, 0)
    assert trial.cost(rounds=8, every=4).seconds == 0.5 + 5 + 7 * 2.25 + 2 * 0.5
    # A fifth of 100 rounds of 2.25 s is judging for 0.5 s more often than there are rounds; of
    # judging for 50 s it is once, and the first, the second and the last round come beside it.
    assert trial.cost(rounds=100, every="auto") == trial.cost(rounds=100, every=1)
    dear = replace(trial, judging=Work(50.0))
    assert dear.cost(rounds=100, every="auto").seconds == 0.5 + 5 + 99 * 2.25 + 5 * 50


def test_a_sample_has_each_kind_first_and_is_spread_out() -> None:
    assert sorted(sample("aab", most=12)) == [0, 1, 2]
    assert sample("aaabbb", most=2) == [0, 3]
    # More kinds than places: still one of each.
    assert sample("abcdef", most=3) == [0, 1, 2, 3, 4, 5]
    found = sample(["a"] * 101, most=11)
    assert found == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert sample([], most=3) == []


def test_arms_are_of_one_kind_where_their_cost_is_alike(small: Small) -> None:
    base = small("strategy.name=dsfl")
    alike = small("strategy.name=dsfl", "seed=4", "data.partition.alpha=0.1")
    assert kind_of(base) == kind_of(alike)
    for word in ("rounds=9", "exchange.up=float16", "clients.count=5", "data.public.size=33"):
        assert kind_of(small("strategy.name=dsfl", word)) != kind_of(base), word
    assert kind_of(small("strategy.name=fedmd")) != kind_of(base)


# -- against runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dml", "fedavg", "fedmd", "fd", "one_way", "local"])
@pytest.mark.parametrize("more", [(), ("exchange.up=float16", "evaluation.every=3")])
def test_bytes_are_those_of_the_run(small: Small, name: str, more: tuple[str, ...]) -> None:
    settings = small(f"strategy.name={name}", "rounds=4", "study={seeds: 1, arms: {it: {}}}", *more)
    (arm,) = foresee(study_of(settings)).arms
    assert arm.source == "trial"
    assert arm.cost is not None
    result = run(settings).to_row()
    assert arm.cost.bytes_up == sum(result["bytes_up"])
    assert arm.cost.bytes_down == sum(result["bytes_down"])
    assert (arm.cost.bytes_up > 0) is (name not in ("local", "one_way"))


def test_a_trial_has_two_rounds_of_the_whole_run_s_schedule(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[tuple[int, int]] = []
    through = trials.RoundLoop._round

    def noting(self: trials.RoundLoop, before: Any) -> bool:
        rounds.append((before.round + 1, self._settings.rounds))
        return through(self, before)

    monkeypatch.setattr(trials.RoundLoop, "_round", noting)
    trial = try_out(small("rounds=9", "evaluation.every=7"))
    assert rounds == [(1, 9), (2, 9)]
    # Judged although the run would do so in its seventh round only.
    assert trial.judging.calls_s
    rounds.clear()
    once = try_out(small("rounds=1"))
    assert rounds == [(1, 1)]
    assert once.first == once.further


def test_what_would_end_this_process_is_left_out_of_a_trial(small: Small) -> None:
    settings = small(
        "faults=[{kind: delay, seconds: 999}, {kind: dropout, probability: 0.5}]", "rounds=3"
    )
    assert try_out(settings).first_bytes[0] > 0
    outlook = foresee(study_of(settings, ["dml"]))
    assert "faults other than dropouts are left out" in outlook.notes


# -- what is left of a study -------------------------------------------------------------------


def test_finished_runs_tell_what_a_run_costs(small: Small) -> None:
    settings = small(TWO, "study.parallel=1")
    made = compare(settings, arms=["mutual"], seeds=1)
    outlook = foresee(study_of(settings), seeds=3)
    alone, mutual = outlook.arms
    result = made.runs["mutual"][0].result
    assert (alone.left, alone.finished, alone.source) == (3, 0, "trial")
    assert (mutual.left, mutual.finished, mutual.source) == (2, 1, "finished")
    assert mutual.cost is not None
    assert mutual.cost.bytes_up == sum(result["bytes_up"])
    assert mutual.cost.seconds == result["seconds"] + planning.AROUND_S
    assert outlook.plan.finished == 1
    assert outlook.plan.told() == (
        "6 runs: 2 arms x 3 seeds; 1 finished already and taken as they are; 5 to run; "
        "one after the other (study.parallel is 1)"
    )
    # In another engine it took another time.
    ray = settings.model_copy(
        update={"engine": settings.engine.model_copy(update={"backend": "ray"})}
    )
    assert [arm.source for arm in foresee(study_of(ray), seeds=3).arms] == ["trial", "trial"]


def test_a_finished_study_has_nothing_left(small: Small) -> None:
    settings = small(TWO)
    compare(settings, seeds=1)
    outlook = foresee(study_of(settings), seeds=1)
    assert outlook.tried == 0
    assert outlook.total == RunCost(0, 0, 0)
    assert [arm.left for arm in outlook.arms] == [0, 0]


def test_equal_arms_are_tried_once_and_refused_ones_not_at_all(small: Small) -> None:
    settings = small(
        "study={seeds: 2, refused: show, arms: {a: {strategy: fedmd}, b: {strategy: fedmd}, "
        "c: {strategy: fedavg, exchange: {up: {kind: top_k, k: 2}}}}}"
    )
    tried: list[str] = []
    outlook = foresee(study_of(settings), trying=lambda arm, *_: tried.append(arm))
    assert tried == ["a"]
    assert outlook.arms[0].cost == outlook.arms[1].cost
    assert "top_k" in outlook.arms[2].refused
    assert outlook.to_row()["left"] == 4
    assert "2 refused" in outlook.plan.told()


def test_combinations_that_are_equal_are_one_arm(small: Small) -> None:
    settings = small(
        "strategy.name=fedmd",
        "study={seeds: 1, sweep: {adversary.kind: [scaled, lma], adversary.fraction: [0, 0.5]}}",
    )
    plan = plan_study(study_of(settings), writes=False)
    assert plan.study.combinations == 4
    assert plan.told().startswith(
        "3 runs: 3 arms x 1 seed; 4 combinations, of which equal ones run once; "
    )


def test_arms_beyond_the_sample_cost_what_others_of_their_kind_do(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "sample", lambda kinds: sample(kinds, most=2))
    settings = small(
        "strategy.name=fedmd", "study={seeds: 1, sweep: {clients.optimizer.lr: [0.1, 0.2, 0.3]}}"
    )
    # The learning rate is a setting of clients: each is a kind of its own.
    assert foresee(study_of(settings)).tried == 3
    settings = small(
        "strategy.name=fedmd", "study={seeds: 1, sweep: {data.partition.alpha: [0.5, 1, 2]}}"
    )
    outlook = foresee(study_of(settings))
    assert (outlook.tried, outlook.distinct) == (2, 3)
    assert [arm.source for arm in outlook.arms] == ["trial", "like", "trial"]
    assert any(note.startswith("2 of 3 distinct arms were tried") for note in outlook.notes)


def test_arms_that_nothing_is_known_of_are_named(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "TRIAL_S", 0.0)
    outlook = foresee(study_of(small(TWO)), seeds=1)
    assert outlook.unknown == ["mutual"]
    assert any("nothing is known of mutual" in note for note in outlook.notes)
    assert "at least" in " ".join(outlook.sentences())


def test_a_dry_run_is_refused_as_the_study_would_be(small: Small) -> None:
    settings = small("study={arms: {a: {strategy: fedavg, exchange: {up: {kind: top_k, k: 2}}}}}")
    with pytest.raises(SettingsError, match="top_k"):
        foresee(study_of(settings))
    with pytest.raises(SettingsError, match="baseline must be one of"):
        foresee(study_of(small(TWO)), baseline="nobody")


# -- no trace ----------------------------------------------------------------------------------


def test_nothing_is_left_on_disk(
    fedkd: Fedkd, small_words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.csv"
    lines = [f"{row % 7},{row % 5},{row % 3},c{row % 2}" for row in range(500)]
    table.write_text("a,b,c,label\n" + "\n".join(lines) + "\n")
    own = ("clients.models=[mlp]", f"data.source={table}", f"output={tmp_path / 'runs'}")
    words = [TWO, *small_words, *own]
    before = everything_in(tmp_path)
    code, out, _ = fedkd("compare", "--dry-run", *words)
    assert code == 0
    assert "4 runs: 2 arms x 2 seeds" in " ".join(out.split())
    assert everything_in(tmp_path) == before
    # Not even the digests of data are kept, which a study keeps.
    monkeypatch.setattr(provenance, "_FRESH_S", -1.0)
    fedkd("compare", "--dry-run", *words)
    assert everything_in(tmp_path) == before
    fedkd("compare", "--seeds", "1", *words)
    after = everything_in(tmp_path)
    assert f"runs/{provenance.CACHE_FILE}" in after
    code, out, _ = fedkd("compare", "--dry-run", *words)
    assert "2 finished already" in " ".join(out.split())
    assert everything_in(tmp_path) == after


def test_the_command_prints_plain_values(
    fedkd: Fedkd, small_words: tuple[str, ...], tmp_path: Path
) -> None:
    words = ["--dry-run", "--json", TWO, *small_words, f"output={tmp_path / 'none'}"]
    code, out, _ = fedkd("compare", *words)
    row = json.loads(out)
    assert code == 0
    assert (row["runs"], row["left"], row["finished"]) == (4, 4, 0)
    assert [arm["arm"] for arm in row["arms"]] == ["alone", "mutual"]
    assert row["bytes_up"] == 2 * row["arms"][1]["bytes_up"] > 0
    assert row["seconds"] > 0
    assert printable(out)


def test_a_study_says_first_how_many_runs_it_has(
    fedkd: Fedkd, small_words: tuple[str, ...], tmp_path: Path
) -> None:
    words = [TWO, *small_words, f"output={tmp_path / 'runs'}"]
    _, _, err = fedkd("compare", "--seeds", "1", *words)
    assert err.splitlines()[0].startswith("fedkd: 2 runs: 2 arms x 1 seed; ")
    _, _, err = fedkd("compare", "--seeds", "1", "--quiet", *words)
    assert not err
