"""`new` makes a package that runs, passes its tests, and works beside an installed fedkd."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedkd
from sim.commands.cli import app
from sim.scaffold import TEMPLATE, new

ROOT = Path(__file__).resolve().parents[3]
RUN = [
    "rounds=2",
    "clients.count=3",
    "clients.models=[mlp]",
    "data.private_rows=60",
    "data.public.size=20",
    "data.partition.kind=iid",
    "engine.backend=inline",
]


def called(*command: str | Path, folder: Path, path: str = "") -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_template_learns_and_its_power_counts(tmp_path: Path) -> None:
    words = [*RUN, f"output={tmp_path}", "strategy.name=my_method:MyMethod"]
    one, other = (
        fedkd.run(fedkd.load_settings(None, [*words, f"strategy.power={power}"]))
        for power in (0, 2)
    )
    assert one.status == other.status == "finished"
    assert one.weights_sha256 != other.weights_sha256


def test_everything_is_named_after_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = new("surer-counts")
    assert made.strategy == "surer_counts:SurerCounts"
    assert sorted(map(str, made.files)) == [
        ".gitignore",
        "README.md",
        "conf/surer_counts.yaml",
        "pyproject.toml",
        "surer_counts/__init__.py",
        "surer_counts/method.py",
        "tests/test_surer_counts.py",
    ]
    for file in made.files:
        text = (tmp_path / "surer_counts" / file).read_text().lower()
        assert not any(name in text for name in ("my_method", "my-method", "mymethod")), file


def test_what_it_makes_runs_from_its_folder_and_its_study_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = new("surer_counts")
    monkeypatch.syspath_prepend(tmp_path / made.folder)
    study = made.folder / "conf" / "surer_counts.yaml"
    words = [*RUN, "output=runs", "study.seeds=1", "study.baseline=null"]
    ran = CliRunner().invoke(
        app, ["compare", str(study), "--allow", made.package, "--arms", "mine", "--json", *words]
    )
    assert ran.exit_code == 0, ran.output
    (digest,) = json.loads(ran.stdout)["weights_sha256"]["mine"]
    fedkd.check_strategy(made.strategy)
    assert len(digest) == 64


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "NAME must be small letters"),
        ("2fast", "NAME must be small letters"),
        ("MyMethod", "NAME must be small letters"),
        ("a/b", "NAME must be small letters"),
        ("..", "NAME must be small letters"),
        ("class", "a word of Python's"),
        ("_hidden", "begin with '_'"),
        ("torch", "finds another 'torch'"),
        ("json", "finds another 'json'"),
        ("sim", "finds another 'sim'"),
        ("fedmd", "one of fedkd's algorithms"),
    ],
)
def test_names_that_no_package_can_have_are_refused(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fedkd.SettingsError, match=told):
        new(name)
    assert not list(tmp_path.iterdir())


def test_nothing_that_is_there_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(fedkd.SettingsError, match="is there already; nothing was written"):
        new("mine", folder=tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())


def test_the_command_says_what_to_do_next(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["new", "mine_first", "--at", str(tmp_path / "place")])
    assert shown.exit_code == 0
    assert "fedkd compare conf/mine_first.yaml --allow mine_first" in shown.output
    assert (tmp_path / "place" / "mine_first" / "method.py").is_file()


def test_shipped_files_are_found_in_any_folder_and_ones_own_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fedkd.load_settings("conf/quickstart.yaml").name == "quickstart"
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "quickstart.yaml").write_text("name: mine\n")
    assert fedkd.load_settings("conf/quickstart.yaml").name == "mine"
    for missing in ("conf/none.yaml", "conf/../schema.py", "quickstart.yaml"):
        with pytest.raises(fedkd.SettingsError, match="does not exist"):
            fedkd.load_settings(missing)


@pytest.mark.slow
def test_wheels_hold_all_that_is_needed_and_work_where_nothing_else_of_ours_is(
    tmp_path: Path,
) -> None:
    made = new("installed_counts", folder=tmp_path / "method")
    # A copy: building leaves folders behind.
    (tmp_path / "fedkd").mkdir()
    called("cp", "-r", *_parts(ROOT), tmp_path / "fedkd", folder=tmp_path)
    for source in (tmp_path / "fedkd", tmp_path / "method"):
        build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index")
        wheels = ("--no-build-isolation", "--wheel-dir", tmp_path / "wheels")
        called(*build, *wheels, source, folder=tmp_path)
    (ours,) = (tmp_path / "wheels").glob("fedkd-*.whl")
    inside = set(zipfile.ZipFile(ours).namelist())
    for file in TEMPLATE.rglob("*.*"):
        if "__pycache__" not in file.parts:
            assert str(file.relative_to(ROOT)) in inside
    assert {f"sim/{file.relative_to(ROOT)}" for file in (ROOT / "conf").rglob("*.yaml")} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/", "docs/"))]

    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # What they need is there; that fedkd itself is installed there to be edited is not seen.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    wheels_made = sorted((tmp_path / "wheels").glob("*.whl"))
    called(*install, "--no-index", "--force-reinstall", *wheels_made, folder=tmp_path)

    where = "import fedkd, installed_counts; print(fedkd.__file__, installed_counts.__file__)"
    away = tmp_path / "away"
    away.mkdir()
    for place in called(python, "-c", where, folder=away).split():
        assert place.startswith(str(site))
    check = f"import fedkd; fedkd.check_strategy({made.strategy!r})"
    called(python, "-c", check, folder=away)
    pytest_here = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert " passed" in called(*pytest_here, folder=made.folder, path=str(site))
    command = tmp_path / "venv" / "bin" / "fedkd"
    ran = called(command, "run", f"strategy.name={made.strategy}", *RUN, "--json", folder=away)
    made_of = json.loads((away / json.loads(ran)["folder"] / "identity.json").read_text())
    assert made_of["versions"]["installed_counts"] == "0.1.0"
    assert "installed_counts/method.py" in made_of["code"]
    words = (*RUN, "study.baseline=null", "--arms", "local,dml", "--seeds", "1", "--json")
    shipped = called(command, "compare", "conf/quickstart.yaml", *words, folder=away)
    assert len(json.loads(shipped)["arms"]) == 2
    assert "MyMethod" not in called(command, "new", "third_method", folder=away)


def _parts(source: Path) -> list[Path]:
    names = (
        "fedkd",
        "strategies",
        "sim",
        "conf",
        "fedkd_start.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    )
    return [source / name for name in names]
