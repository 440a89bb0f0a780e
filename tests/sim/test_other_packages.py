"""An algorithm of another package: named, checked, run, recorded and resumed like one of ours."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sim
from sim.commands.arms import load_study
from sim.commands.running import settings_of_run
from sim.keeping.provenance import changes, provenance_of
from sim.settings import (
    Settings,
    SettingsError,
    load_distill_settings,
    load_settings,
    read_settings,
    settings_from_table,
)
from sim.settings.permission import allow_flags

NAME = "lone_methods.again:Again"
METHOD = '''
from fedkd.bounds import Count
from fedkd.objectives import Objective
from strategies.mutual.dml import DML, DMLSettings


class Settings(DMLSettings):
    name: str
    repeats: Count = 1
    extra: Objective = Objective.model_validate({"ce": 1.0, "kd": 0.5})


class Again(DML):
    """Learn several times a round."""

    Settings = Settings

    def client(self, cohort, received, call):
        for _ in range(self.settings.repeats):
            answer = super().client(cohort, received, call)
        return answer


class Bare(DML):
    pass


class NoSettings(DML):
    Settings = {"repeats": 1}


def function():
    pass
'''

DISTILLING = '''
from typing import ClassVar

from fedkd.bounds import Count
from fedkd.distillation.fit.method import MethodResult, MethodSettings
from fedkd.distillation.methods.offline import Offline
from fedkd.objectives.basic import LogitMSE


class Settings(MethodSettings):
    lessons: Count = 1


class Lessons(Offline):
    """Distil several times over."""

    Settings = Settings

    def run(self, workshop):
        student = workshop.new_student()
        for lesson in range(self.settings.lessons):
            workshop.fit(student, name="student", teacher=workshop.teacher)
        return MethodResult(student)


class Distance(LogitMSE):
    kind: str = ""
    times: float = 1.0

    def value(self, view, parts, pairs):
        return self.times * super().value(view, parts, pairs)
'''
LESSONS, DISTANCE = "lone_methods.distilling:Lessons", "lone_methods.distilling:Distance"
SMALL_DISTILLATION = (
    "data.private_rows=60",
    "data.public.size=40",
    "data.test_rows=80",
    "teacher.models=mlp",
    "teacher.training.epochs=1",
    "training.epochs=1",
)

Small = Callable[..., Settings]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "theirs" / "lone_methods"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "again.py").write_text(METHOD)
    (folder / "distilling.py").write_text(DISTILLING)
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [name for name in sys.modules if name.startswith("lone_methods")]:
        del sys.modules[name]


def test_it_runs_and_its_settings_make_a_difference(small: Small, package: Path) -> None:
    same, ours, other = (
        sim.run(small(f"strategy.name={name}", *words)).weights_sha256
        for name, words in ((NAME, ()), ("dml", ()), (NAME, ("strategy.repeats=2",)))
    )
    assert same == ours
    assert other != ours


@pytest.mark.parametrize(
    ("words", "complaint"),
    {
        f"strategy.name={NAME} strategy.repeat=2": "unknown setting 'strategy.repeat'; did you "
        "mean 'strategy.repeats'?",
        f"strategy={NAME} strategy.repeats=0": "strategy.repeats: must be greater than or equal",
        f"strategy={NAME} strategy.extra={{kdd: 1}}": "strategy.extra: unknown term 'kdd'",
        f"strategy={NAME} strategy.zzz=1": "unknown setting 'strategy.zzz'; known there: name, ",
        f"repeats=2 strategy={NAME}": "unknown setting 'repeats'; did you mean 'strategy.repeats'",
        "strategy=lone_methods.again:Bare": "must have 'name: str', got 'name: Literal['dml']'",
        "strategy=lone_methods.again:NoSettings": "needs Settings, a class derived from strategies",
        "strategy=lone_methods.again:function": "must be a class that is a strategies.",
        "strategy=lone_methods.again:Settings": "must be a subclass of strategies.",
        "strategy=lone_methods.again:Nope": "has no attribute 'Nope'",
        "strategy=lone_methods.nope:Again": "strategy.name 'lone_methods.nope:Again': cannot",
        "strategy=lone_methods.again": "unknown strategy 'lone_methods.again'; known: cfd, ",
    }.items(),
)
def test_what_cannot_work_is_one_line_that_names_the_setting(
    package: Path, words: str, complaint: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, words.split(" ", 1) if "{" in words else words.split())
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_term_of_one_s_own_is_minimised_by_clients(small: Small, package: Path) -> None:
    def digest(kind: str) -> str | None:
        words = (f"strategy.objective={{ce: 1, far: {{kind: '{kind}'}}}}", "rounds=2")
        return sim.run(small("strategy.name=dml", *words)).weights_sha256

    assert digest(DISTANCE) == digest("mse")
    settings = small("strategy.name=dml", f"strategy.objective={{far: {{kind: '{DISTANCE}'}}}}")
    assert allow_flags(settings) == " --allow lone_methods"
    assert "lone_methods/distilling.py" in provenance_of(settings).code


def test_a_method_of_one_s_own_distils(package: Path, tmp_path: Path) -> None:
    def student(*words: str) -> object:
        words = (*SMALL_DISTILLATION, *words, f"output={tmp_path / 'runs'}")
        result = sim.distill(load_distill_settings(None, words))
        made_of = json.loads((result.folder / "identity.json").read_text())
        assert ("lone_methods/distilling.py" in made_of["code"]) == (len(words) > 7)
        measured = result.row["models"]["student"]
        return {key: value for key, value in measured.items() if key != "latency_s"}

    assert student(f"method={LESSONS}") == student()
    other = student(
        f"method={LESSONS}",
        "method.lessons=3",
        f"objective={{ce: 1, far: {{kind: '{DISTANCE}', times: 2.0}}}}",
    )
    assert other != student()


@pytest.mark.parametrize(
    ("words", "complaint"),
    {
        f"method={LESSONS} method.lesson=2": "unknown setting 'method.lesson'; did you mean "
        "'method.lessons'?",
        f"method={LESSONS} method.lessons=0": "method.lessons: must be greater than or equal to 1",
        "method=lone_methods.distilling:Distance": "method.name 'lone_methods.distilling:Distance' "
        "must be a subclass of fedkd.distillation.fit.method.Method",
        "method=lone_methods.distilling:Nope": "has no attribute 'Nope'",
        "method=lone": "unknown method 'lone'; known: offline, dml",
    }.items(),
)
def test_what_cannot_distil_is_one_line(package: Path, words: str, complaint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_distill_settings(None, words.split())
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_alone_makes_neither_a_method_nor_a_term_run(package: Path, tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    for text, setting in (
        (f"method: '{LESSONS}'", "method.name"),
        (f"objective: {{far: {{kind: '{DISTANCE}'}}}}", "objective.far.kind"),
    ):
        config.write_text(text)
        with pytest.raises(SettingsError, match=f"{setting}: .*only a file names"):
            load_distill_settings(config)
        assert "lone_methods" not in sys.modules
        assert load_distill_settings(config, allow=["lone_methods.distilling"])
        del sys.modules["lone_methods"], sys.modules["lone_methods.distilling"]


def test_saved_settings_are_read_again_and_travel_as_a_table(small: Small, package: Path) -> None:
    settings = small(f"strategy.name={NAME}", "strategy.repeats=2", "strategy.extra.kd.weight=3")
    assert settings.to_table()["strategy"]["repeats"] == 2
    # A word changes one term of the default objective, as it does for an algorithm of ours.
    assert list(settings.to_table()["strategy"]["extra"]) == ["ce", "kd"]
    assert settings_from_table(json.loads(json.dumps(settings.to_table()))) == settings
    path = package / "settings.yaml"
    path.write_text(settings.to_yaml())
    assert load_settings(path, allow=["lone_methods"]) == settings
    assert allow_flags(settings) == " --allow lone_methods"


def test_a_file_alone_does_not_make_it_run(package: Path, tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    for text in (
        f"strategy: '{NAME}'",
        f"strategy: {{name: '{NAME}', repeats: 2}}",
        f"study: {{arms: {{a: {{strategy: '{NAME}'}}}}}}",
    ):
        config.write_text(text)
        with pytest.raises(SettingsError, match=r"strategy\.name: .*--allow lone_methods"):
            load_settings(config)
        assert read_settings(config)
        assert "lone_methods" not in sys.modules
    with pytest.raises(SettingsError, match=r"study\.arms\.a: strategy\.name: .*only a file names"):
        load_study(str(config))
    assert "lone_methods" not in sys.modules
    study = load_study(str(config), ["strategy.repeats=2"], allow=["lone_methods"])
    assert study.arms["a"].to_table()["strategy"]["repeats"] == 2


def test_settings_that_were_only_looked_at_are_not_run(package: Path, small: Small) -> None:
    config = package / "a.yaml"
    config.write_text(f"strategy: {{name: '{NAME}', repeats: 2}}")
    settings = read_settings(config)
    assert settings.to_table()["strategy"].items() >= {"name": NAME, "repeats": 2}.items()
    assert sim.data(settings.model_copy(update={"output": small().output})).sizes
    assert "lone_methods" not in sys.modules
    with pytest.raises(SettingsError, match="read for a look only"):
        sim.run(settings.model_copy(update={"output": small().output}))


def test_a_run_is_made_of_its_package_and_not_taken_when_that_changed(
    small: Small, package: Path
) -> None:
    settings = small(f"strategy.name={NAME}")
    result = sim.run(settings)
    made_of = json.loads((result.folder / "identity.json").read_text())
    assert {"lone_methods/__init__.py", "lone_methods/again.py"} <= made_of["code"].keys()
    with pytest.raises(SettingsError, match="--allow lone_methods"):
        sim.run(resume=result.folder)
    assert sim.run(settings, resume=result.folder).weights_sha256 == result.weights_sha256
    again = settings_of_run(result.folder, allow=["lone_methods"])
    assert again == settings
    before = provenance_of(settings)
    with (package / "again.py").open("a") as file:
        file.write("\n\nX = 1\n")
    assert changes(before, provenance_of(settings)).code == ("lone_methods/again.py changed",)


def test_the_commit_and_whether_files_differ_from_it_are_told(small: Small, package: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", *who, *words]
        return subprocess.run(
            command, cwd=package.parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    settings = small(f"strategy.name={NAME}")
    assert provenance_of(settings).commits == {}
    git("init", "-q")
    git("add", "lone_methods")
    git("commit", "-qm", "first")
    (package.parent / "beside.txt").touch()
    assert provenance_of(settings).commits == {"lone_methods": git("rev-parse", "HEAD")}
    (package / "new.py").touch()
    assert provenance_of(settings).commits["lone_methods"].endswith("-dirty")


def test_the_version_of_an_installed_package_counts(small: Small, package: Path) -> None:
    settings = small(f"strategy.name={NAME}")
    before = provenance_of(settings)
    about = package.parent / "their_methods-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.2\n")
    (about / "top_level.txt").write_text("lone_methods\n")
    now = provenance_of(settings)
    assert now.versions["lone_methods"] == "1.2"
    assert changes(before, now).code == ("lone_methods none, now 1.2",)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_workers_find_it_in_the_current_folder_and_give_the_same_bits(
    package: Path, small_words: tuple[str, ...]
) -> None:
    def digest(*words: str) -> str:
        program = [sys.executable, "-P", "-c", "from fedkd_start import main; main()", "run"]
        done = subprocess.run(
            [*program, *small_words, f"strategy.name={NAME}", "output=runs", "--json", *words],
            cwd=package.parent,
            env={**os.environ, "PYTHONPATH": str(Path(sim.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["weights_sha256"])

    assert digest("engine.backend=ray") == digest("engine.backend=inline")


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_workers_find_it_where_the_driver_found_it_or_say_so_in_one_line(
    package: Path, small_words: tuple[str, ...], tmp_path: Path
) -> None:
    words = (*small_words, f"strategy.name={NAME}", "output=runs", "engine.backend=ray")
    program = f"import sys; sys.path.insert(0, {str(package.parent)!r}); sys.at_home = True\n"
    program += f"import fedkd\nprint(fedkd.run(fedkd.load_settings(None, {list(words)})).status)"

    def ran() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(sim.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=300,
        )

    assert (done := ran()).stdout == "finished\n", done.stderr
    with (package / "__init__.py").open("w") as file:
        file.write(
            "import sys\nif not hasattr(sys, 'at_home'):\n    raise ImportError('not here')\n"
        )
    last = ran().stderr.splitlines()[-1]
    assert last.endswith(
        f"SettingsError: on a worker: strategy.name '{NAME}': cannot import "
        "'lone_methods.again': not here"
    )
