"""The command works in any folder, whatever the names of what lies there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[1]
START = "from fedkd_start import main; main()"
HIDING = ("strategies/__init__", "sim", "datasets/__init__", "fedkd/__init__", "typing", "random")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as projects have them: with names of ours, of Python's and of libraries."""
    folder = tmp_path / "project"
    for name in HIDING:
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('this is another project')\n")
    (folder / "my_own_nets.py").write_text(
        "from torch import nn\n"
        "def net(*, input_shape, num_classes):\n"
        "    c, h, w = input_shape\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, num_classes))\n"
    )
    return folder


def started(
    project: Path, *words: str, path: str = "", module: bool = False
) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, *(["-m", "fedkd"] if module else ["-P", "-c", START])]
    words = (*words, "clients.count=2", "rounds=1", "clients.local.steps=1", "output=../runs")
    return subprocess.run(
        [*program, *words],
        cwd=project,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(HOME)]))},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("path", ["", "."])
def test_the_users_folder_hides_nothing_and_its_models_are_found(project: Path, path: str) -> None:
    words = ("clients.models=['my_own_nets:net']", "engine.backend=inline", "--quiet")
    done = started(project, "run", *words, path=path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("path", ["", "."])
def test_nor_does_it_on_workers(project: Path, path: str) -> None:
    done = started(project, "run", "clients.models=['my_own_nets:net']", "--quiet", path=path)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_m_looks_in_the_folder_last_too(project: Path) -> None:
    # Which package -m runs is Python's to say; with a fedkd there it would be that one.
    (project / "fedkd" / "__init__.py").unlink()
    (project / "fedkd").rmdir()
    done = started(project, "data", module=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_hidden_by_another_folder_is_named(tmp_path: Path, project: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "yaml").mkdir(parents=True)
    (elsewhere / "yaml" / "__init__.py").write_text("version = 0\n")
    done = started(project, "data", path=str(elsewhere))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"{str(elsewhere / 'yaml')!r} on PYTHONPATH hides" in done.stderr
