"""``import fedkd`` is enough, takes no time, and a folder of the user's hides nothing of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedkd
import sim

HOME = Path(fedkd.__file__).parents[1]
SMALL = (
    "clients.count=2 rounds=1 clients.local.steps=1 output=../runs clients.models=[mlp] "
    "data.private_rows=60 data.public.size=20 data.partition.kind=iid"
)


def ran(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a notebook in a folder is: with the folder first on the path."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HOME)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of somebody who has a simulator, too."""
    folder = tmp_path / "project"
    for name in ("sim", "strategies"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            "raise RuntimeError('this is another project')\n"
        )
    return folder


def test_everything_that_is_offered_is_what_the_floor_above_has() -> None:
    for name, theirs in fedkd.OFFERED.items():
        assert getattr(fedkd, name) is getattr(sim, theirs)
        assert name in dir(fedkd)
    assert sorted(fedkd.OFFERED) == sorted(fedkd.__all__)
    # All that `sim` offers, and no name that is one of our own packages.
    assert sorted(fedkd.OFFERED.values()) == sorted(sim.__all__)
    assert not [name for name in fedkd.OFFERED if (HOME / "fedkd" / name).exists()]
    with pytest.raises(AttributeError, match="module 'fedkd' has no attribute 'runn'"):
        _ = fedkd.runn  # type: ignore[attr-defined]


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path: Path) -> None:
    done = ran("import fedkd, sys; dir(fedkd); print(*sys.modules)", tmp_path)
    loaded = set(done.stdout.split())
    assert "fedkd" in loaded
    assert not loaded & {"sim", "strategies", "fedkd_start", "numpy", "torch", "pydantic", "flwr"}


@pytest.mark.parametrize(
    "backend",
    [
        "inline",
        pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.xdist_group("ray")]),
    ],
)
def test_a_run_in_a_folder_with_packages_called_like_ours(project: Path, backend: str) -> None:
    words = f"{SMALL} engine.backend={backend}".split()
    program = (
        "import fedkd\n"
        f"print(fedkd.run(fedkd.load_settings(None, {words})).status)\n"
        "import strategies.mutual.dml"
    )
    done = ran(program, project)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    # That theirs are hidden is said, on one line, with where they are.
    (said,) = [line for line in done.stderr.splitlines() if "Warning" in line]
    for name in ("sim", "strategies"):
        assert f"'{project / name / '__init__.py'}'" in said
    assert said.endswith("fedkd, which has a package of that name: rename yours")
    assert "<string>:2: " in said


def test_a_folder_of_files_that_are_no_package_is_no_business_of_ours(tmp_path: Path) -> None:
    (tmp_path / "sim").mkdir()
    done = ran("import fedkd; fedkd.Settings()", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["package", "module", "folder"])
def test_one_that_is_loaded_already_is_named(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "sim.py"
    if kind != "module":
        (tmp_path / "sim").mkdir()
        place = tmp_path / "sim" / "__init__.py" if kind == "package" else tmp_path / "sim"
    if kind != "folder":
        place.touch()
    # A folder without an __init__ is found only where nothing else has its name.
    program = f"import sys\nsys.path.remove({str(HOME)!r})\n"
    program += f"import sim\nsys.path.append({str(HOME)!r})\nimport fedkd\nfedkd.run"
    last = ran(program, tmp_path).stderr.splitlines()[-1]
    assert last == (
        f"ImportError: 'sim' is loaded from '{place}', and fedkd has a package of that name: "
        "rename yours"
    )
