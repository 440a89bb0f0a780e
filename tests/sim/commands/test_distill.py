"""`fedkd distill` as a user sees it: run folder, repetitions, search, listing, mistakes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save

from fedkd.distillation.settings import DistillSettings
from sim.commands.distilling import running, searching, studying
from sim.commands.distilling.running import distill
from sim.commands.distilling.searching import read_trials, search
from sim.commands.distilling.studying import repeat
from sim.commands.interruption import Interruption
from sim.keeping.identity import fingerprint
from sim.keeping.provenance import Provenance
from sim.keeping.records import IDENTITY_FILE, read_rows
from sim.reports.distillation import (
    differences,
    distill_rows,
    is_distillation,
    load_distillation,
    write_distill_report,
)
from sim.settings import SettingsError, load_distill_settings

SMALL = (
    "data.private_rows=60",
    "data.public.size=40",
    "data.test_rows=80",
    "teacher.models=mlp",
    "teacher.training.epochs=2",
    "training.epochs=2",
    "search.temperatures=[1,4]",
    "search.weights=[0.5,1]",
)

Fedkd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., DistillSettings]:
    def settings(*words: str) -> DistillSettings:
        return load_distill_settings(None, [*SMALL, f"output={tmp_path / 'runs'}", *words])

    return settings


def without_watch(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without what a stop-watch and the place decide."""
    models = {
        name: {key: value for key, value in model.items() if key != "latency_s"}
        for name, model in row["models"].items()
    }
    left_out = ("seconds", "folder", "report")
    return {**{k: v for k, v in row.items() if k not in left_out}, "models": models}


def test_a_run_leaves_a_folder_that_tells_everything(fedkd: Fedkd, tmp_path: Path) -> None:
    code, out, err = fedkd("distill", *SMALL, f"output={tmp_path}", "--report")
    assert code == 0
    assert [line.split(",")[0] for line in err.splitlines()] == [
        "teacher: 1/2 epochs",
        "teacher: 2/2 epochs",
        "student: 2/2 epochs",
        "twin: 2/2 epochs",
    ]
    (folder,) = tmp_path.glob("distill/*")
    assert f"run    {folder}" in out
    assert f"report {folder / 'report.html'}" in out
    for words in ("teacher", "student", "twin", "accuracy", "agreement", "bytes", "MFLOPs"):
        assert words in out
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["objective"]["kd"]["temperature"] == {"kind": "constant", "value": 4.0}
    assert json.loads((folder / "environment.json").read_text())["device"] == "cpu"
    rows = read_rows(folder / "metrics.jsonl")
    assert [(row["model"], row["epoch"]) for row in rows] == [
        (model, epoch) for model in ("teacher", "student", "twin") for epoch in (1, 2)
    ]
    assert {"loss/ce", "loss/kd", "temperature/kd", "validation_accuracy"} <= rows[2].keys()
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    for name, model in result["models"].items():
        content = save(load_file_of(folder, name))  # without what the file says of the model
        assert model["weights_sha256"] == hashlib.sha256(content).hexdigest()
        assert model["size_bytes"] == len(content)
        assert model["parameters"] == sum(t.numel() for t in load_file_of(folder, name).values())
        assert model["flops"] > 0
        assert set(model["latency_s"]) == {"1", "64"}
    assert result["weights_sha256"] == result["models"]["student"]["weights_sha256"]
    assert result["models"]["teacher"]["agreement"] == 1.0
    names = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert {
        "validation_by_epoch",
        "losses_by_epoch",
        "schedules_student",
        "agreement",
        "cka",
    } <= names
    assert {"reliability_student", "confusion_student"} <= names
    page = (folder / "report.html").read_text()
    assert page.count("<img") == len(names)
    assert "What distillation changed" in page


def load_file_of(folder: Path, name: str) -> dict[str, Any]:
    return load_file(folder / "models" / f"{name}.safetensors")


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(
    small: Callable[..., DistillSettings],
) -> None:
    first, second, other = (distill(small(f"seed={seed}")).row for seed in (3, 3, 4))
    assert without_watch(first) == without_watch(second)
    assert first["weights_sha256"] != other["weights_sha256"]


def test_json_is_one_object_and_quiet_says_nothing(fedkd: Fedkd, tmp_path: Path) -> None:
    code, out, err = fedkd("distill", *SMALL, f"output={tmp_path}", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    stored = json.loads((Path(printed["folder"]) / "result.json").read_text())
    # On disk it is sealed.
    assert {"files", "sha256"} == stored.keys() - printed.keys()
    assert without_watch(printed) == without_watch({key: stored[key] for key in printed})
    assert fedkd("distill", *SMALL, f"output={tmp_path}", "--quiet") == (0, "", "")


def test_a_saved_teacher_is_loaded_and_gives_the_same_student(
    small: Callable[..., DistillSettings],
) -> None:
    first = distill(small())
    teacher = first.folder / "models" / "teacher.safetensors"
    second = distill(small(f"teacher.weights={teacher}"))
    assert second.row["weights_sha256"] == first.row["weights_sha256"]
    assert not any(row["model"] == "teacher" for row in read_rows(second.folder / "metrics.jsonl"))
    # The saved settings are settings again.
    assert load_distill_settings(second.folder / "settings.yaml") == second.settings


def test_seeds_are_paired_and_what_is_done_is_not_done_again(
    small: Callable[..., DistillSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small("seeds=3", "seed=5")
    done: list[int] = []
    real = studying.distill

    def stopped_at_the_third(of_seed: DistillSettings, **more: Any) -> Any:
        if of_seed.seed == 7 and not done.count(6) > 1:
            done.append(6)
            raise Interruption()
        done.append(of_seed.seed)
        return real(of_seed, **more)

    monkeypatch.setattr(studying, "distill", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        repeat(settings)
    assert done == [5, 6, 6]
    study = repeat(settings)
    assert done == [5, 6, 6, 7]
    assert [run.seed for run in study.runs] == [5, 6, 7]
    row = study.to_row()
    values = {
        model: [run.models[model]["accuracy"] for run in study.runs]
        for model in ("student", "twin")
    }
    assert row["models"]["student"]["accuracy"] == pytest.approx(sum(values["student"]) / 3)
    gaps = [s - t for s, t in zip(values["student"], values["twin"], strict=True)]
    assert row["differences"]["accuracy"]["mean"] == pytest.approx(sum(gaps) / 3)
    assert row["differences"]["accuracy"]["pairs"] == 3
    # A single run with one of the seeds has the same bits.
    alone = distill(small("seed=6"))
    assert alone.row["weights_sha256"] == row["weights_sha256"][6]
    assert is_distillation(study.folder)
    assert "± 95" in study.report.read_text() or "95 %" in study.report.read_text()


def test_an_interrupted_run_is_one_line_exit_130_and_leaves_what_there_is(
    tmp_path: Path,
) -> None:
    words = [*SMALL, "training.epochs=100000", f"output={tmp_path}", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedkd", "distill", *words], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        metrics = [*tmp_path.glob("*/*/metrics.jsonl")]
        if metrics and '"student"' in metrics[0].read_text():
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    (folder,) = tmp_path.glob("*/*")
    assert process.returncode == 130
    line = f"fedkd: interrupted; what was measured until then is in {folder}\n"
    assert err == line
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], "models" in result) == ("interrupted", False)
    # What there is can be reported on.
    record = load_distillation(folder)
    page = write_distill_report([record], folder, title="stopped").read_text()
    assert "interrupted" in page
    assert (folder / "figures" / "validation_by_epoch.svg").exists()


def test_a_search_prints_its_grid_and_the_command_that_uses_the_best_cell(
    fedkd: Fedkd, tmp_path: Path
) -> None:
    words = [*SMALL, f"output={tmp_path}"]
    code, out, err = fedkd("distill", "--search", *words)
    assert code == 0
    assert "T=1, w=0.5 student: 2/2 epochs" in err
    assert "validation accuracy" in out
    assert out.count(" *") >= 1
    # 60 labelled rows and a tenth of both for validation: 7 rows, of which one is 14.3 points.
    assert "chosen by 7 validation rows: one row is 14.3 points of accuracy; " in out
    assert "on 7 rows; one row is 14.3 points" in out
    (folder,) = tmp_path.glob("distill/search-*")
    found = json.loads((folder / "search.json").read_text())
    assert found["status"] == "finished"
    assert len(found["cells"]) == len(found["trials"]) == 4
    assert found["best"] in found["cells"]
    (command,) = [line for line in out.splitlines() if line.startswith("use it: ")]
    for word in found["words"]:
        assert word in command
    best = load_distill_settings(None, [*words, *found["words"]]).objective.terms
    assert best["kd"].weight.at(0.0) == found["best"]["weight"]
    assert best["ce"].weight.at(0.0) == pytest.approx(1 - found["best"]["weight"])
    assert best["kd"].model_dump()["temperature"]["value"] == found["best"]["temperature"]
    code, _, err = fedkd("report", str(folder))
    assert code == 2
    assert "is the folder of a search" in err


def test_an_interrupted_search_keeps_its_cells_and_goes_on(
    small: Callable[..., DistillSettings],
) -> None:
    settings = small()
    told: list[Any] = []

    def stop_in_the_third(trial: Any) -> Any:
        def watch(name: str, row: Mapping[str, Any]) -> None:
            told.append(trial)
            if len({*told}) == 3:
                # Also what is killed now, without a last word, leaves the two that are done.
                (path,) = settings.output.glob("distill/search-*/search.json")
                assert len(read_trials(path)) == 2
                raise Interruption()

        return watch

    with pytest.raises(KeyboardInterrupt):
        search(settings, observer_of=stop_in_the_third)
    folder = settings.output / "distill" / f"search-{fingerprint(settings)[:8]}"
    kept = read_trials(folder / "search.json")
    assert len(kept) == 2
    assert json.loads((folder / "search.json").read_text())["status"] == "interrupted"
    resumed = search(settings)
    whole = search(small(f"output={settings.output.parent / 'other'}"))
    assert resumed.result.cells == whole.result.cells
    assert all(read_trials(folder / "search.json")[trial] == kept[trial] for trial in kept)
    # A larger grid is the same search with more cells.
    larger = small("search.weights=[0.5,1,0.1]")
    assert fingerprint(larger) == fingerprint(settings)


def test_what_other_weights_or_code_gave_is_kept_and_not_taken_again(
    small: Callable[..., DistillSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "teacher.safetensors"

    def teach(seed: int) -> None:
        saved = distill(small(f"seed={seed}", "name=teacher")).folder / "models/teacher.safetensors"
        weights.write_bytes(saved.read_bytes())

    settings = small(f"teacher.weights={weights}", "seeds=2")
    told: list[str] = []
    teach(1)
    first = repeat(settings, tell=told.append)
    grid = search(settings, tell=told.append)
    assert repeat(settings).to_row()["weights_sha256"] == first.to_row()["weights_sha256"]
    assert told == []
    teach(2)
    # Weights are data: nothing accepts others.
    other = repeat(settings, accept_code=True, tell=told.append)
    assert other.to_row()["weights_sha256"] != first.to_row()["weights_sha256"]
    other_grid = search(settings, tell=told.append)
    assert other_grid.folder.name == f"{grid.folder.name}-2"
    assert grid.folder.joinpath("search.json").is_file()
    (of_runs, of_search) = told
    assert of_runs.startswith("seed 0, seed 1: data: ")
    assert "teacher.safetensors changed; the earlier run is kept" in of_runs
    assert of_search.startswith("search: data: ")
    assert (other.notes, other_grid.notes) == ([of_runs], [of_search])
    # Other code: kept as well, or accepted.
    changed = Provenance({}, {"fedkd/losses/response.py": "other"}, {})
    now = Provenance(changed.data, {"fedkd/losses/response.py": "now"}, {})
    for run in other.runs:
        (run.folder / IDENTITY_FILE).write_text(json.dumps(changed.to_row()))
    monkeypatch.setattr(studying, "provenance_of", lambda _: now)
    accepted = repeat(settings, accept_code=True)
    assert accepted.to_row()["weights_sha256"] == other.to_row()["weights_sha256"]
    assert "taken as it is" in accepted.notes[0]


def test_a_search_never_looks_at_test_rows(
    small: Callable[..., DistillSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small()
    clean = search(settings)
    real = searching.search_grid

    def blind(of: DistillSettings, **more: Any) -> Any:
        from dataclasses import replace

        def rows_of(seed: int) -> Any:
            rows = running.load_rows(of.data, seed=seed, device=torch.device("cpu"))
            return replace(
                rows, test_inputs=rows.test_inputs * float("nan"), test_labels=rows.test_labels - 99
            )

        return real(of, rows_of=rows_of, **more)

    monkeypatch.setattr(searching, "search_grid", blind)
    poisoned = search(small(f"output={settings.output.parent / 'blind'}"))
    assert poisoned.result.cells == clean.result.cells
    assert not (poisoned.folder / "models").exists()


def test_the_list_names_every_table_entry(fedkd: Fedkd) -> None:
    from fedkd.distillation.run.listing import list_components

    code, out, err = fedkd("distill", "--list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    _, printed, _ = fedkd("distill", "--list", "--json")
    as_json = json.loads(printed)
    for section, entries in list_components().items():
        assert section in lines
        assert [row["name"] for row in as_json[section]] == [entry.name for entry in entries]
        for entry in entries:
            assert f"  {entry.name}" in lines
    code, _, err = fedkd("distill", "--list", "seed=1")
    assert (code, err) == (2, "fedkd: --list takes no settings, got seed=1\n")


BAD = {
    "unknown term": (["objective.kdd=1"], "unknown term 'kdd' in objective; known: ce, kd"),
    "setting of a term": (["objective.kd.temperatur=1"], "'objective.kd.temperatur'"),
    "temperature 0": (["objective.kd.temperature=0"], "objective.kd.temperature: must be >= 0.001"),
    "unknown method": (["method=offlin"], "unknown method 'offlin'; known: offline"),
    "setting of a method": (["method={name: offline, x: 1}"], "unknown setting 'method.x'"),
    "weights": (["teacher.weights=no.safetensors"], "teacher.weights: 'no.safetensors' does not"),
    "private rows": (["data.private_rows=5000"], "data.private_rows must be at most"),
    "unknown key": (
        ["student.modle=cnn"],
        "'student.modle'; did you mean 'student.model'?",
    ),
    "model": (["student.model=cnnn"], "unknown model 'cnnn'"),
    "source": (["data.source=./no/such/folder"], "data.source './no/such/folder'"),
    "device": (["device=tpu"], "device: must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
    "threads": (["threads=0"], "threads: must be greater than or equal to 1, got 0"),
    "name": (["name=../x"], "name must be 1 to 64 letters"),
    "grid": (
        ["--search", "search.weights=[2]"],
        "search.weights.0: must be less than or equal to 1, got 2\n",
    ),
    "grid twice": (["--search", "search.temperatures=[2,2]"], "search.temperatures must differ"),
    "search what": (["--search", "objective={ce: 1}"], "needs a term with a temperature"),
    "missing config": (["no.yaml"], "config 'no.yaml' does not exist"),
    "federated settings": (["rounds=3"], "unknown setting 'rounds'"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_line_and_exit_code_2(
    fedkd: Fedkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)
    trained: list[object] = []
    monkeypatch.setattr("torch.optim.Adam.step", lambda *_: trained.append(1))
    words, complaint = BAD[mistake]
    code, out, err = fedkd("distill", *words)
    assert code == 2, err
    assert complaint in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err
    assert not trained
    assert not list(tmp_path.iterdir()), "nothing is left where nothing was run"


def test_a_report_is_written_again_from_the_folder(
    fedkd: Fedkd, small: Callable[..., DistillSettings], tmp_path: Path
) -> None:
    first, second = distill(small()), distill(small("seed=1"))
    code, out, err = fedkd("report", str(first.folder))
    assert (code, err) == (0, "")
    assert out == f"report {first.folder / 'report.html'}\n"
    both = tmp_path / "both"
    code, _, _ = fedkd("report", str(first.folder), str(second.folder), "--output", str(both))
    assert code == 0
    assert "seeds 0, 1" in (both / "report.html").read_text()
    code, _, err = fedkd("report", str(first.folder), str(first.folder))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "one run a seed" in err
    code, _, err = fedkd("report", str(first.folder), str(tmp_path))
    assert code == 2
    assert "is a distillation" in err


def test_one_seed_has_no_interval_and_a_twin_without_a_student_no_difference(
    small: Callable[..., DistillSettings],
) -> None:
    record = load_distillation(distill(small()).folder)
    rows = distill_rows([record])
    assert rows["models"]["student"]["accuracy_low"] is None
    assert rows["differences"]["accuracy"]["p_value"] is None
    gap = record.models["student"]["accuracy"] - record.models["twin"]["accuracy"]
    assert differences([record])["accuracy"].mean == pytest.approx(gap)


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("teacher: {}\nstudent: {}\nmethod: {}\n")
    assert is_distillation(tmp_path)
    with pytest.raises(SettingsError, match="cannot be read as the folder of a distillation"):
        load_distillation(tmp_path)
