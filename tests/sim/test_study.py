import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sim.identity import fingerprint
from sim.observers import Observer, Row
from sim.records import is_finished
from sim.settings import Settings, SettingsError
from sim.study import arm_settings, compare

Small = Callable[..., Settings]

ARMS = (
    "study={seeds: 2, arms: {alone: {strategy: local}, "
    "hot: {strategy: {name: dml, temperature: 3}}, cold: {strategy: {temperature: 1}}}}"
)


class Counting(Observer):
    def __init__(self, started: list[tuple[str, int]], arm: str, seed: int) -> None:
        started.append((arm, seed))


def test_arms_differ_from_the_common_settings_only_where_they_say_so(small: Small) -> None:
    arms = arm_settings(small(ARMS, "strategy.kd_weight=0.5"))
    assert list(arms) == ["alone", "hot", "cold"]
    assert arms["alone"].strategy.name == "local"
    # The same strategy: its other settings stay.
    assert arms["hot"].strategy.kd_weight.value == 0.5  # type: ignore[attr-defined]
    assert arms["hot"].strategy.temperature.value == 3.0  # type: ignore[attr-defined]
    assert arms["cold"].clients == small().clients


def test_a_strategy_s_name_is_an_arm_with_its_defaults(small: Small) -> None:
    arms = arm_settings(small(ARMS), ["fedavg", "hot"])
    assert list(arms) == ["fedavg", "hot"]
    assert arms["fedavg"].strategy.name == "fedavg"


def test_a_mistake_in_an_arm_is_named(small: Small) -> None:
    with pytest.raises(SettingsError, match=r"study\.arms\.a: unknown setting 'rouns'"):
        arm_settings(small("study={arms: {a: {rouns: 3}}}"))
    with pytest.raises(SettingsError, match=r"unknown arm 'hott'; .* did you mean 'hot'"):
        arm_settings(small(ARMS), ["hott"])


def test_a_study_runs_every_arm_with_every_seed_and_reports(small: Small) -> None:
    started: list[tuple[str, int]] = []
    study = compare(small(ARMS), observer_of=lambda a, s: [Counting(started, a, s)])
    # Seed by seed: a study that is cut short has whole pairs.
    assert started == [(arm, seed) for seed in (0, 1) for arm in ("alone", "hot", "cold")]
    assert study.report.is_file()
    assert {arm: len(runs) for arm, runs in study.runs.items()} == dict.fromkeys(
        ("alone", "hot", "cold"), 2
    )
    table = json.loads((study.folder / "study.json").read_text())
    assert all((study.folder / run).is_dir() for runs in table["arms"].values() for run in runs)


def test_what_is_finished_is_not_run_again(small: Small) -> None:
    first = compare(small(ARMS), seeds=1)
    started: list[tuple[str, int]] = []
    second = compare(small(ARMS), seeds=2, observer_of=lambda a, s: [Counting(started, a, s)])
    assert started == [(arm, 1) for arm in ("alone", "hot", "cold")]
    digests = second.to_row()["weights_sha256"]
    assert {arm: of_arm[:1] for arm, of_arm in digests.items()} == first.to_row()["weights_sha256"]


def test_an_interrupted_study_goes_on_where_it_stopped(small: Small) -> None:
    class Interrupt(Observer):
        def metrics(self, rows: Sequence[Row]) -> None:
            raise KeyboardInterrupt

    def stop_in_hot(arm: str, seed: int) -> Sequence[Observer]:
        return [Interrupt()] if arm == "hot" else []

    settings = small(ARMS)
    with pytest.raises(KeyboardInterrupt):
        compare(settings, seeds=1, observer_of=stop_in_hot)
    folder = settings.output / settings.name
    assert [is_finished(run) for run in sorted(folder.glob("*/seed-*"))] == [True, False]
    started: list[tuple[str, int]] = []
    resumed = compare(settings, seeds=1, observer_of=lambda a, s: [Counting(started, a, s)])
    assert started == [("hot", 0), ("cold", 0)]
    fresh = compare(settings.model_copy(update={"name": "fresh"}), seeds=1)
    assert resumed.to_row()["weights_sha256"] == fresh.to_row()["weights_sha256"]


def test_the_fingerprint_changes_with_what_changes_numbers_and_nothing_else(small: Small) -> None:
    base = fingerprint(small())
    harmless = ["engine.backend=ray", "engine.quorum=1", "checkpoints.every=3"]
    assert fingerprint(small(*harmless, "name=other", "study.seeds=9")) == base
    # Models that are stacked may round differently in other company.
    assert fingerprint(small("engine.cohort_size=3")) != base
    assert fingerprint(small("clients.optimizer.lr=0.01")) != base
    assert fingerprint(small("seed=1")) != base


def test_paired_seeds_share_the_split(small: Small, tmp_path: Path) -> None:
    from sim.running import load_data

    arms = arm_settings(small(ARMS))
    splits = [load_data(settings).client_rows for settings in arms.values()]
    assert all(
        (rows == others).all()
        for split in splits
        for rows, others in zip(split, splits[0], strict=True)
    )
