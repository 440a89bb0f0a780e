import getpass
import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sim.commands.study import compare
from sim.publishing.bundle import bundle, check_bundle, own_packages, study_table
from sim.publishing.studies import open_study
from sim.reports import report
from sim.reports.tables import summary_rows
from sim.settings import SettingsError, load_settings


@pytest.fixture(scope="module")
def archive(finished, tmp_path_factory):
    return bundle(finished, tmp_path_factory.mktemp("bundle") / "study.zip")


def contents(archive):
    with zipfile.ZipFile(archive) as files:
        return {name: files.read(name) for name in files.namelist()}


def rewritten(archive, path, **changes):
    with zipfile.ZipFile(path, "w") as files:
        for name, content in (contents(archive) | changes).items():
            files.writestr(name, content)
    return path


def test_it_has_what_a_reviewer_needs_and_no_checkpoint(archive):
    names = set(contents(archive))
    run = "study/2-dml/"
    [settings] = [name for name in names if name.startswith(f"{run}seed-0") and "settings" in name]
    folder = settings.rpartition("/")[0]
    for name in ("identity.json", "environment.json", "metrics.jsonl", "result.json"):
        assert f"{folder}/{name}" in names
    for name in ("tables/table.tex", "methods.tex", "references.bib", "README.md", "SHA256SUMS"):
        assert name in names
    assert {"figures/accuracy_by_round.svg", "figures/accuracy_by_round.pdf"} <= names
    assert not any("checkpoint" in name or name.endswith(".safetensors") for name in names)
    text = contents(archive)["requirements.txt"].decode()
    assert "\ntorch==" in text
    assert "+" not in text
    assert f"fedkd run {settings} output=again" in contents(archive)["README.md"].decode()


def test_the_same_study_gives_the_same_bits(archive, finished, tmp_path):
    assert bundle(finished, tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_it_tells_nothing_of_whose_machine_it_was(archive, finished):
    for name, content in contents(archive).items():
        for path in (str(finished), str(finished.parent), f"/home/{getpass.getuser()}"):
            assert path.encode() not in content, name


def test_it_can_be_unpacked_elsewhere_and_reported_on(archive, finished, tmp_path):
    with zipfile.ZipFile(archive) as files:
        files.extractall(tmp_path)
    study = open_study(tmp_path / "study")
    assert summary_rows(study.runs) == summary_rows(open_study(finished).runs)
    assert report([tmp_path / "study"]).is_file()


def test_a_check_holds_digests_and_the_numbers_of_the_table(archive, tmp_path):
    assert check_bundle(archive) == len(contents(archive)) - 1
    old = contents(archive)
    table = old["tables/table.tex"].replace(b"local &", b"local  &")
    with pytest.raises(SettingsError, match=r"not what was bundled: tables/table.tex changed"):
        check_bundle(rewritten(archive, tmp_path / "a.zip", **{"tables/table.tex": table}))
    digests = old["SHA256SUMS"].replace(
        hashlib.sha256(old["tables/table.tex"]).hexdigest().encode(),
        hashlib.sha256(table).hexdigest().encode(),
    )
    forged = {"tables/table.tex": table, "SHA256SUMS": digests}
    with pytest.raises(SettingsError, match=r"does not follow from the metrics: table.tex"):
        check_bundle(rewritten(archive, tmp_path / "b.zip", **forged))
    with pytest.raises(SettingsError, match=r"extra.txt is new"):
        check_bundle(rewritten(archive, tmp_path / "c.zip", **{"extra.txt": b""}))


def test_what_is_no_archive_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(SettingsError, match="cannot be read as an archive"):
        check_bundle(tmp_path / "a.zip")
    with pytest.raises(SettingsError, match="is not there; --check takes an archive"):
        check_bundle(tmp_path / "b.zip")
    with pytest.raises(SettingsError, match="is a folder; --check takes an archive"):
        check_bundle(tmp_path)


def test_only_a_bundle_is_replaced(finished, tmp_path):
    path = bundle(finished, tmp_path / "a.zip")
    assert bundle(finished, path) == path
    path.write_text("my own notes")
    with pytest.raises(SettingsError, match="is there already and no bundle"):
        bundle(finished, path)
    assert path.read_text() == "my own notes"


def test_one_file_makes_the_whole_study_again(archive, study, swept, tmp_path):
    for names, published in ((contents(archive), study), (None, open_study(swept))):
        content = (
            names["study.yaml"]
            if names
            else contents(bundle(swept, tmp_path / "s.zip"))["study.yaml"]
        )
        (tmp_path / "study.yaml").write_bytes(content)
        again = compare(load_settings(tmp_path / "study.yaml", [f"output={tmp_path / 'again'}"]))
        digests = {
            arm: [run.result["weights_sha256"] for run in of_arm]
            for arm, of_arm in published.runs.items()
        }
        assert again.to_row()["weights_sha256"] == digests
        assert again.baseline == published.baseline


def test_seeds_with_gaps_have_no_file_of_their_own(study):
    gap = {
        arm: [replace(run, seed=2 * run.seed) for run in runs] for arm, runs in study.runs.items()
    }
    assert study_table(replace(study, runs=gap)) is None
    assert study_table(replace(study, whole=False)) is None


def test_a_single_run_and_its_models(study, tmp_path):
    folder = study.runs["dml"][0].folder
    names = contents(bundle(folder, tmp_path / "run.zip", models=True))
    assert check_bundle(tmp_path / "run.zip") == len(names) - 1
    assert "study/settings.yaml" in names
    kept = {path.name for path in (folder / "models").glob("*")}
    assert kept == {Path(name).name for name in names if name.startswith("study/models/")}
    assert json.loads(names["study/result.json"])["folder"] == folder.name


def test_a_file_outside_the_archive_is_refused(archive, tmp_path):
    digest = hashlib.sha256(b"x").hexdigest()
    sums = contents(archive)["SHA256SUMS"] + f"{digest}  ../../out.txt\n".encode()
    bad = rewritten(archive, tmp_path / "a.zip", **{"../../out.txt": b"x", "SHA256SUMS": sums})
    with pytest.raises(SettingsError, match="names a file outside itself"):
        check_bundle(bad)


def test_own_code_is_taken_only_if_asked(study, tmp_path, monkeypatch):
    package = tmp_path / "their_method"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    runs = {
        arm: [
            replace(run, settings={**run.settings, "strategy": {"name": "their_method:Method"}})
            for run in of_arm
        ]
        for arm, of_arm in study.runs.items()
    }
    named = replace(study, runs=runs)
    assert own_packages(named.records) == ["their_method"]
    monkeypatch.setattr("sim.publishing.bundle.open_study", lambda folder: named)
    plain = contents(bundle(study.folder, tmp_path / "a.zip"))
    assert not any(name.startswith("code/") for name in plain)
    assert "code of their_method, which is not included" in plain["README.md"].decode()
    with_code = contents(bundle(study.folder, tmp_path / "b.zip", code=True))
    assert with_code["code/their_method/__init__.py"] == b"raise RuntimeError\n"
