import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from sim.commands.running import run
from sim.reports import load_run, load_study
from sim.reports.runs import model_label, number
from sim.server.history import summary
from sim.settings import SettingsError, settings_from_table


def test_reads_what_a_real_run_measured(tmp_path):
    settings = settings_from_table(
        {
            "rounds": 3,
            "seed": 5,
            "output": str(tmp_path),
            "data": {"public": {"size": 64}, "private_rows": 200, "test_rows": 100},
            "clients": {"count": 2, "models": ["mlp"], "local": {"epochs": 1}},
            "engine": {"backend": "inline"},
            "evaluation": {"every": 2},
        }
    )
    result = run(settings)
    record = load_run(result.folder)

    measured = summary(result.history, 2)
    assert (record.arm, record.seed, record.status) == ("dml", 5, "finished")
    assert record.settings == settings.to_table()
    assert record.last == measured["last"]
    assert record.selected == measured["selected"]
    assert list(record.last_clients) == measured["clients"]
    assert list(record.bytes_up.values()) == measured["bytes_up"]
    assert list(record.bytes_down.values()) == measured["bytes_down"]
    assert record.seconds == result.seconds
    assert record.model_labels == ("mlp", "mlp")
    # Recomputing from the rows finds the same rounds as the result says.
    (result.folder / "result.json").unlink()
    cut_off = load_run(result.folder)
    assert (cut_off.last, cut_off.selected) == (record.last, record.selected)


def test_a_killed_run_loads_from_its_rows(tmp_path, run_folder):
    folder = run_folder(tmp_path / "run", accuracies=(0.5, 0.8, 0.7), status=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "scope": "feder')
    record = load_run(folder)
    assert record.status == "interrupted"
    assert record.last["round"] == 3
    assert record.selected["round"] == 2
    assert record.seconds == pytest.approx(6.0)
    assert record.bytes_up == {0: 3000, 1: 3000}


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_did_not_finish_is_interrupted(tmp_path, run_folder, status):
    record = load_run(run_folder(tmp_path / "run", status=status))
    assert record.status == "interrupted"
    assert record.result["status"] == status


def test_a_run_cut_off_before_its_first_round_has_nothing_to_show(tmp_path, run_folder):
    record = load_run(run_folder(tmp_path / "run", accuracies=(), status=None))
    assert (record.last, record.selected, record.last_clients) == ({}, {}, ())
    assert record.seconds is None
    assert record.bytes_down == {0: 0, 1: 0}


def test_the_earliest_of_equally_good_rounds_is_selected(tmp_path, run_folder):
    folder = run_folder(
        tmp_path / "run", accuracies=(0.1, 0.2, 0.3), validation=(0.4, 0.6, 0.6), status=None
    )
    assert load_run(folder).selected["round"] == 2


def test_a_round_without_validation_accuracy_is_not_selected(tmp_path, run_folder):
    nan = float("nan")
    folder = run_folder(tmp_path / "run", accuracies=(0.1, 0.2), validation=(nan, 0.1), status=None)
    assert load_run(folder).selected["round"] == 2


def test_a_client_whose_evaluation_failed_is_not_in_the_last_round(tmp_path, run_folder):
    folder = run_folder(tmp_path / "run", accuracies=(0.5,), status=None)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    del rows[1]["accuracy"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["client"] for row in load_run(folder).last_clients] == [1]


def test_a_record_cannot_be_changed(make_run):
    with pytest.raises(FrozenInstanceError):
        make_run().seed = 3


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"not a run folder: it has no settings\.yaml$"):
        load_run(tmp_path)
    with pytest.raises(SettingsError, match=r"nowhere' is not a run folder.*no such folder"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.yaml", "a: [1"),
        ("settings.yaml", "just text"),
        ("settings.yaml", "seed: 1\n"),
        ("settings.yaml", "seed: x\nstrategy: {name: dml}\nclients: {count: 2, models: [mlp]}\n"),
        ("settings.yaml", "seed: 1\nstrategy: {name: dml}\nclients: {count: 2, models: []}\n"),
        ("metrics.jsonl", "{broken\n{}\n"),
        ("metrics.jsonl", '{"scope": "federation"}\n'),
        ("metrics.jsonl", '{"round": 1, "scope": "client"}\n'),
        ("exchange.jsonl", '{"round": 1, "client": 0, "direction": "up"}\n'),
        ("exchange.jsonl", '{"round": 1, "client": 0, "direction": "left", "bytes": 3}\n'),
        ("result.json", "{"),
        ("result.json", "[]"),
        ("result.json", '{"status": "finished", "last": 3}'),
        ("environment.json", "\xff"),
    ],
)
def test_a_damaged_file_is_named_with_its_folder(tmp_path, run_folder, name, content):
    folder = run_folder(tmp_path / "damaged-run")
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(SettingsError, match=rf"^{name} in .*damaged-run' is damaged: .") as error:
        load_run(folder)
    assert "\n" not in str(error.value)


def test_a_missing_metrics_file_is_named(tmp_path, run_folder):
    folder = run_folder(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(SettingsError, match=r"it has no metrics\.jsonl"):
        load_run(folder)


def write_study(folder: Path, arms: object) -> Path:
    (folder / "study.json").write_text(json.dumps({"name": "s", "arms": arms}))
    return folder


def test_a_run_of_a_study_belongs_to_its_arm(tmp_path, run_folder):
    paths = {"warm": "warm/seed-0-00000000", "cold": "cold/seed-0-11111111"}
    for path in paths.values():
        run_folder(tmp_path / path)
    stray = run_folder(tmp_path / "cold" / "seed-9-22222222", seed=9)
    write_study(tmp_path, {arm: [path] for arm, path in paths.items()})

    assert load_run(tmp_path / paths["cold"]).arm == "cold"
    assert load_run(tmp_path / paths["cold"], "mine").arm == "mine"
    assert load_run(stray).arm == "dml"
    study = load_study(tmp_path)
    assert list(study) == ["warm", "cold"]
    assert [record.arm for of_arm in study.values() for record in of_arm] == ["warm", "cold"]


def test_a_damaged_study_does_not_hide_a_whole_run(tmp_path, run_folder):
    folder = run_folder(tmp_path / "warm" / "seed-0-00000000")
    (tmp_path / "study.json").write_text("{")
    assert load_run(folder).arm == "dml"


@pytest.mark.parametrize(
    ("arms", "text"),
    [
        ({}, "at least one arm"),
        (["a"], "at least one arm"),
        ({"a": "b"}, "arm 'a' must be a list"),
        ({"a": ["../elsewhere"]}, "lies outside the study"),
        ({"a": ["gone"]}, "gone' is not a run folder"),
    ],
)
def test_a_study_that_cannot_be_read_says_why(tmp_path, arms, text):
    with pytest.raises(SettingsError, match=text):
        load_study(write_study(tmp_path, arms))


def test_a_folder_that_is_no_study_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"not a study folder: it has no study\.json"):
        load_study(tmp_path)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "0.5", True, [1]])
def test_what_is_no_finite_number_is_none(value):
    assert number({"x": value}, "x") is None


def test_models_of_another_version_still_have_a_label():
    assert model_label({"name": "mlp", "options": {"hidden": [8]}}) == "mlp(hidden=[8])"
    assert "gone" in model_label({"name": "gone"})
    assert model_label("gone") == "gone"


def test_no_round_of_a_run_that_promises_privacy_is_selected_by_validation_rows(
    tmp_path, run_folder
):
    folder = run_folder(tmp_path / "run", privacy={"mechanism": "dp_sgd", "epsilon": 8})
    record = load_run(folder)
    assert record.federation[0]["validation_accuracy"] == 0.5
    assert record.selected == {}
    assert record.protected
    assert record.epsilon == 8
    # Nor of one that was killed, and says nothing of what it has spent.
    (folder / "result.json").unlink()
    record = load_run(folder)
    assert record.selected == {}
    assert record.protected
    assert record.epsilon is None


def test_a_run_without_a_mechanism_promises_nothing(tmp_path, run_folder):
    record = load_run(run_folder(tmp_path / "run"))
    assert not record.protected
    assert record.epsilon is None
    assert record.privacy == {}
