import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sim.commands.arms import study_of
from sim.commands.running import run
from sim.commands.study import StudyResult, baseline_arm, compare, plan_study
from sim.keeping.identity import fingerprint
from sim.keeping.records import is_finished, only_one, turn
from sim.reports import load_study, report
from sim.reports.grids import Axis, Grid
from sim.server.observers import Observer, Row
from sim.settings import Settings, SettingsError

Small = Callable[..., Settings]

ARMS = (
    "study={seeds: 2, arms: {alone: {strategy: local}, "
    "hot: {strategy: {name: dml, temperature: 3}}, cold: {strategy: {temperature: 1}}}}"
)


class Counting(Observer):
    def __init__(self, started: list[tuple[str, int]], arm: str, seed: int) -> None:
        started.append((arm, seed))


def test_arms_differ_from_the_common_settings_only_where_they_say_so(small: Small) -> None:
    arms = study_of(small(ARMS, "strategy.kd_weight=0.5")).arms
    assert list(arms) == ["alone", "hot", "cold"]
    assert arms["alone"].strategy.name == "local"
    # The same strategy: its other settings stay.
    assert arms["hot"].strategy.kd_weight.value == 0.5  # type: ignore[attr-defined]
    assert arms["hot"].strategy.temperature.value == 3.0  # type: ignore[attr-defined]
    assert arms["cold"].clients == small().clients


def test_a_strategy_s_name_is_an_arm_with_its_defaults(small: Small) -> None:
    arms = study_of(small(ARMS), ["fedavg", "hot"]).arms
    assert list(arms) == ["fedavg", "hot"]
    assert arms["fedavg"].strategy.name == "fedavg"


def test_a_mistake_in_an_arm_is_named(small: Small) -> None:
    with pytest.raises(SettingsError, match=r"study\.arms\.a: unknown setting 'rouns'"):
        study_of(small("study={arms: {a: {rouns: 3}}}"))
    with pytest.raises(SettingsError, match=r"unknown arm 'hott'; .* did you mean 'hot'"):
        study_of(small(ARMS), ["hott"])


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
    assert study.baseline == table["baseline"] == "alone"
    assert [(pair["first"], pair["other"]) for pair in study.to_row()["pairs"]] == [
        ("alone", "hot"),
        ("alone", "cold"),
        ("hot", "cold"),
    ]
    assert all((study.folder / run).is_dir() for runs in table["arms"].values() for run in runs)
    assert study.to_row()["differs"] == table["differs"]
    assert list(table["differs"]["strategy.temperature"]) == ["hot", "cold"]


def test_the_baseline_is_the_arm_asked_for_the_study_s_or_the_first(small: Small) -> None:
    arms = study_of(small(ARMS)).arms
    asks = small(ARMS, "study.baseline=hot")
    assert baseline_arm(small(ARMS), arms) == "alone"
    assert baseline_arm(asks, arms) == "hot"
    assert baseline_arm(asks, arms, "cold") == "cold"
    # A file's question is about arms that are not all asked for.
    # Of an arm that was swept over it is the first combination.
    grid = Grid((Axis("arm", ("hot", "cold")), Axis("rounds", (1, 2))), ("h1", "", "c1", "c2"))
    swept = dict.fromkeys(("h1", "c1", "c2"))
    assert baseline_arm(asks, swept, "cold", grid) == "c1"
    assert baseline_arm(asks, swept, None, grid) == "h1"
    assert baseline_arm(asks, {"alone": None, "cold": None}) == "alone"
    for settings, baseline in ((asks, "hott"), (small(ARMS, "study.baseline=hott"), None)):
        with pytest.raises(SettingsError, match=r"baseline must be one of .* did you mean 'hot'"):
            baseline_arm(settings, arms, baseline)
    assert fingerprint(asks) == fingerprint(small(ARMS))


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
    # What was to come is written down, also of runs that were not begun.
    (path,) = folder.glob("plan-*.json")
    plan = json.loads(path.read_text())
    assert list(plan["arms"]) == ["alone", "hot", "cold"]
    (run_of_cold,) = plan["arms"]["cold"]
    assert (run_of_cold["seed"], run_of_cold["rounds"]) == (0, 2)
    assert not (folder / run_of_cold["folder"]).exists()
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
    from sim.commands.running import load_data

    arms = study_of(small(ARMS)).arms
    splits = [load_data(settings).client_rows for settings in arms.values()]
    assert all(
        (rows == others).all()
        for split in splits
        for rows, others in zip(split, splits[0], strict=True)
    )


# -- sweeps, and arms that cannot run ----------------------------------------------------------

SWEPT = (
    "study={seeds: 1, refused: show, sweep: {strategy.name: [fedmd, fedavg], "
    "exchange.up: [float32, {kind: top_k, k: 2}]}}"
)


def test_a_sweep_runs_and_its_grid_is_in_the_files(small: Small) -> None:
    study = compare(small(SWEPT))
    table = json.loads((study.folder / "study.json").read_text())
    names = ["fedmd-float32", "fedmd-top_k-2", "fedavg-float32", "fedavg-top_k-2"]
    assert table["grid"]["arms"] == study.to_row()["grid"]["arms"] == list(study.runs) == names
    assert (study.folder / "figures" / "accuracy_in_grid.svg").is_file()
    assert (
        study.notes[0] == "swept over strategy.name (fedmd, fedavg), exchange.up (float32, top_k 2)"
    )
    assert study.differs["exchange.up.kind"]["fedmd-top_k-2"] == "top_k"
    assert not any("exchange.up.kind" in note for note in study.notes)
    # What is finished is found by its settings, however it is named by the sweep.
    started: list[tuple[str, int]] = []
    compare(small(SWEPT), observer_of=lambda a, s: [Counting(started, a, s)])
    assert started == []


def test_an_arm_that_cannot_run_is_listed_with_the_reason_or_stops_the_study(small: Small) -> None:
    told: list[str] = []
    started: list[tuple[str, int]] = []
    study = compare(
        small(SWEPT), tell=told.append, observer_of=lambda a, s: [Counting(started, a, s)]
    )
    assert [arm for arm, _ in started] == ["fedmd-float32", "fedmd-top_k-2", "fedavg-float32"]
    assert list(study.refused) == ["fedavg-top_k-2"]
    reason = study.refused["fedavg-top_k-2"]
    assert "exchange.up top_k" in reason
    assert f"refused: fedavg-top_k-2: {reason}" in told
    assert f"refused: fedavg-top_k-2: {reason}" in study.notes
    assert study.to_row()["refused"] == study.refused
    assert json.loads((study.folder / "study.json").read_text())["refused"] == study.refused
    assert load_study(study.folder)["fedavg-top_k-2"] == []
    page = study.report.read_text()
    assert "fedavg-top_k-2 (refused)" in page
    assert reason in page
    # The report that is written again says the same.
    assert report([study.folder]).read_text() == page
    with pytest.raises(SettingsError, match=r"exchange\.up top_k"):
        compare(small(SWEPT.replace("show", "stop"), "name=stops"))
    assert not list((small().output / "stops").glob("*/seed-*"))


def test_a_mistake_in_a_key_is_no_refusal(small: Small) -> None:
    with pytest.raises(SettingsError, match="unknown setting 'rouns'"):
        compare(small("study={refused: show, arms: {a: {}, b: {rouns: 3}}}"))


def test_the_baseline_is_an_arm_that_runs(small: Small) -> None:
    arms = (
        "study={seeds: 1, refused: show, arms: {bad: {strategy: fedavg, "
        "exchange: {up: {kind: top_k, k: 2}}}, good: {strategy: local}}}"
    )
    assert compare(small(arms)).baseline == "good"
    with pytest.raises(
        SettingsError, match=r"the baseline bad is refused, .*; choose another of good"
    ):
        compare(small(arms), baseline="bad")
    with pytest.raises(SettingsError, match=r"every arm is refused: bad: exchange\.up top_k"):
        compare(small(arms), arms=["bad"])


# -- what a study may take again ---------------------------------------------------------------


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of one's own with a linear model, whose weights are drawn with a gain."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    path = folder / "own_linear.py"
    path.write_text(OWN_LINEAR)
    yield path
    sys.modules.pop("own_linear", None)


OWN_LINEAR = """
import math
from torch import nn

def make(*, input_shape, num_classes):
    linear = nn.Linear(math.prod(input_shape), num_classes)
    nn.init.xavier_uniform_(linear.weight, gain=1.0)
    return nn.Sequential(nn.Flatten(), linear)
"""
OWN = ("clients.models=['own_linear:make']", "study={seeds: 1, arms: {a: {strategy: local}}}")


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))
    sys.modules.pop(path.stem, None)
    importlib.invalidate_caches()


def test_an_edited_model_is_run_anew_and_the_old_run_is_kept(small: Small, own_model: Path) -> None:
    first = compare(small(*OWN))
    old = {path: path.read_bytes() for path in first.runs["a"][0].folder.rglob("*.json*")}
    edit(own_model, "gain=1.0", "gain=2.00")
    told: list[str] = []
    second = compare(small(*OWN), tell=told.append)
    (note,) = told
    assert note.startswith("a seed 0: code: own_linear.py changed; the earlier run is kept")
    assert second.notes[0] == note
    assert second.to_row()["weights_sha256"] != first.to_row()["weights_sha256"]
    assert all(path.read_bytes() == content for path, content in old.items())
    # Either is found again, by what it is made of.
    edit(own_model, "gain=2.00", "gain=1.0")
    started: list[tuple[str, int]] = []
    third = compare(small(*OWN), observer_of=lambda a, s: [Counting(started, a, s)])
    assert started == []
    assert third.to_row()["weights_sha256"] == first.to_row()["weights_sha256"]


def test_edited_code_can_be_accepted(small: Small, own_model: Path) -> None:
    first = compare(small(*OWN))
    edit(own_model, "gain=1.0", "gain=2.00")
    started: list[tuple[str, int]] = []
    second = compare(
        small(*OWN), accept_code=True, observer_of=lambda a, s: [Counting(started, a, s)]
    )
    assert started == []
    assert second.to_row()["weights_sha256"] == first.to_row()["weights_sha256"]
    assert "taken as it is, made with other code (code: own_linear.py changed)" in second.notes[0]


def test_other_rows_in_the_same_folder_are_run_anew(small: Small, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()

    def study(*, mirrored: bool, accept_code: bool = False) -> StudyResult:
        rng = np.random.default_rng(0)
        pictures = rng.integers(0, 255, (400, 8, 8), dtype=np.uint8)
        labels = np.where(pictures.mean((1, 2)) > np.median(pictures.mean((1, 2))), 1, 0)
        cells = []
        for picture in pictures[:, ::-1] if mirrored else pictures:
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "png")
            cells.append({"bytes": buffer.getvalue()})
        pq.write_table(pa.table({"image": cells, "label": labels}), source / "train-0.parquet")
        one_arm = "study={seeds: 1, arms: {a: {strategy: local}}}"
        return compare(small(one_arm, f"data.source={source}"), accept_code=accept_code)

    first = study(mirrored=False).to_row()
    assert study(mirrored=False).to_row()["weights_sha256"] == first["weights_sha256"]
    # Labels, sizes and counts are what they were; other code may be accepted, other rows never.
    for accept_code in (True, False):
        other = study(mirrored=True, accept_code=accept_code).to_row()
        assert other["weights_sha256"] != first["weights_sha256"]


def test_an_interrupted_run_goes_on_with_other_code_only_if_told_to(
    small: Small, own_model: Path
) -> None:
    class Interrupt(Observer):
        def completed(self, round: int) -> None:
            raise KeyboardInterrupt

    settings = small(*OWN)
    with pytest.raises(KeyboardInterrupt):
        run(settings, observers=[Interrupt()])
    (folder,) = (settings.output / settings.name).iterdir()
    edit(own_model, "gain=1.0", "gain=2.00")
    with pytest.raises(SettingsError, match=r"own_linear\.py changed.*--accept-code"):
        run(settings, resume=folder)
    assert run(settings, resume=folder, accept_code=True).status == "finished"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["reason"] for event in events if event["event"] == "code changed"] == [
        "code: own_linear.py changed"
    ]


# -- reports -----------------------------------------------------------------------------------


def test_a_report_replaces_none_on_other_runs(small: Small) -> None:
    arms = "study={seeds: 1, arms: {a: {strategy: local}, b: {strategy: fedavg}}}"
    first = compare(small(arms), arms=["a"])
    text = first.report.read_bytes()
    # Other settings, and another baseline: reports of their own, each of which stays.
    others = [compare(small(arms, "clients.optimizer.lr=0.02"), arms=["a"])]
    others += [compare(small(arms), arms=["b", "a"])]
    assert len({first.report, *(other.report for other in others)}) == 3
    assert first.report.read_bytes() == text
    # More seeds and more arms of the same study are the same report.
    again = [compare(small(arms), arms=["a"], seeds=2), compare(small(arms), seeds=2)]
    assert [study.report for study in again] == [first.report] * 2
    # Fewer would lose some of it.
    assert compare(small(arms), seeds=1).report != first.report
    for other in (first, *others):
        (shown, *_) = load_study(other.folder)["a"]
        assert shown.folder.resolve() in {run.folder.resolve() for run in other.runs["a"]}


def test_a_report_in_a_study_reaches_no_further_than_the_study(small: Small) -> None:
    place = small().output / "default" / "study-0"
    place.mkdir(parents=True)
    (place / "study.json").write_text(json.dumps({"arms": {"a": ["../../elsewhere"]}}))
    with pytest.raises(SettingsError, match="lies outside the study"):
        load_study(place)


def test_arms_that_are_trained_by_different_backends_are_named(small: Small) -> None:
    arms = (
        "study={seeds: 1, arms: {one: {engine: {vectorize: loop}}, "
        "two: {engine: {vectorize: vmap}}, three: {engine: {vectorize: loop}}}}"
    )
    settings = small(arms, "strategy.name=local", "clients.models=[mlp]")
    study = compare(settings)
    (equal, differ, trained) = study.notes
    assert equal.startswith("arms one, three are equal")
    assert differ == "arms differ in engine.vectorize (loop in one, three; vmap in two)"
    assert trained.startswith("mlp was trained by loop in one, three; by vmap in two")
    assert study.runs["two"][0].result["backends"] == {"mlp": ["vmap"]}
    assert json.loads((study.folder / "study.json").read_text())["notes"] == list(study.notes)
    alike = compare(settings, arms=["one", "three"]).notes
    assert not [note for note in alike if "was trained" in note]


def test_two_commands_on_one_study_wait_for_each_other(small: Small) -> None:
    compare(small("study={seeds: 1, arms: {a: {strategy: local}}}"))
    folder = small().output / "default"
    order = []

    def late() -> None:
        with only_one(folder):
            order.append("late")

    with only_one(folder):
        thread = threading.Thread(target=late)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "late"]


def test_two_commands_on_one_study_make_every_run_once(small: Small) -> None:
    settings = small(
        "rounds=1", "study={seeds: 1, arms: {a: {strategy: local}, b: {strategy: dml}}}"
    )
    started: list[tuple[str, str]] = []
    told: list[str] = []
    found: list[StudyResult] = []
    other_is_busy = threading.Event()

    def second_begins(arm: str, _seed: int) -> Sequence[Observer]:
        # What the first is making is left for later: there is another run to make.
        started.append(("second", arm))
        other_is_busy.set()
        return ()

    second = threading.Thread(
        target=lambda: found.append(compare(settings, observer_of=second_begins, tell=told.append))
    )

    def first_begins(arm: str, _seed: int) -> Sequence[Observer]:
        started.append(("first", arm))
        second.start()
        assert other_is_busy.wait(60)
        return ()

    found.append(compare(settings, observer_of=first_begins, tell=told.append))
    second.join()
    assert started == [("first", "a"), ("second", "b")]
    assert found[0].to_row() == found[1].to_row()
    # Each has taken what the other made, and says so.
    for arm in "ab":
        taken = f"{arm} seed 0: another command has made this run; it is taken as it is"
        assert told.count(taken) == 1


@pytest.mark.slow
def test_two_processes_on_one_study_make_every_run_once(
    small: Small, small_words: tuple[str, ...]
) -> None:
    output = small().output
    command = [sys.executable, "-m", "fedkd", "compare", "--arms", "local,dml", "--seeds", "2"]
    command += [*small_words, f"output={output}", "--json"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    first, second = (json.loads(out) for out, _ in said)
    assert first == second
    runs = [path.parent for path in output.glob("default/*/*/result.json")]
    assert len(runs) == 4
    # Rows of two processes in one folder would be twice as many.
    assert {len((run / "metrics.jsonl").read_bytes().splitlines()) for run in runs} == {10}


def test_a_command_that_is_killed_leaves_its_run_to_the_other(small: Small) -> None:
    settings = small("study={seeds: 1, arms: {a: {strategy: local}}}")
    (planned,) = plan_study(study_of(settings)).left
    planned.folder.mkdir(parents=True)
    ready, hold = os.pipe()
    child = os.fork()
    if child == 0:
        with turn(planned.folder, waiting=None):
            os.write(hold, b"!")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    told: list[str] = []

    def tell(note: str) -> None:
        told.append(note)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    compare(settings, tell=tell)
    assert told == [f"a seed 0: process {child} is making this run; waiting for it"]
    assert planned.finished
    os.close(ready)
    os.close(hold)
