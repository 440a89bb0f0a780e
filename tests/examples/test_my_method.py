"""The example of a package of one's own: its tests pass, and it runs beside an installed fedkd."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import fedkd

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "my_method"
NAME = "my_method.variance_weighted:VarianceWeighted"
RUN = (
    "rounds=2 clients.count=3 clients.models=[mlp] data.private_rows=60 data.public.size=20 "
    "data.partition.kind=iid engine.backend=inline --json"
)


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


def test_it_learns_and_its_power_counts(tmp_path: Path) -> None:
    words = [*RUN.split()[:-1], f"output={tmp_path}", f"strategy.name={NAME}"]
    one, other = (
        fedkd.run(fedkd.load_settings(None, [*words, f"strategy.power={power}"]))
        for power in (0, 2)
    )
    assert one.status == other.status == "finished"
    assert one.weights_sha256 != other.weights_sha256


@pytest.mark.slow
def test_its_own_tests_pass_from_its_folder() -> None:
    pytest_here = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert " passed" in called(*pytest_here, folder=EXAMPLE, path=str(ROOT))


@pytest.mark.slow
def test_it_runs_and_keeps_to_the_contract_where_fedkd_is_an_installed_wheel(
    tmp_path: Path,
) -> None:
    # Copies: building leaves folders behind.
    for name, source in (("fedkd", ROOT), ("my_method", EXAMPLE)):
        called("cp", "-r", *_parts(source), tmp_path / name, folder=_made(tmp_path / name))
        build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index")
        wheels = ("--no-build-isolation", "--wheel-dir", tmp_path / "wheels")
        called(*build, *wheels, tmp_path / name, folder=tmp_path)
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # What they need is there; that fedkd itself is installed there to be edited is not seen.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    wheels = sorted((tmp_path / "wheels").glob("*.whl"))
    called(*install, "--no-index", "--force-reinstall", *wheels, folder=tmp_path)

    where = "import fedkd, my_method; print(fedkd.__file__); print(my_method.__file__)"
    for place in called(python, "-c", where, folder=tmp_path).split():
        assert place.startswith(str(site))
    check = f"import fedkd; fedkd.check_strategy({NAME!r})"
    called(python, "-c", check, folder=tmp_path)
    command = tmp_path / "venv" / "bin" / "fedkd"
    made = called(command, "run", f"strategy.name={NAME}", *RUN.split(), folder=tmp_path)
    result = json.loads(made)
    made_of = json.loads((tmp_path / result["folder"] / "identity.json").read_text())
    assert made_of["versions"]["my_method"] == "0.1.0"
    assert "my_method/variance_weighted.py" in made_of["code"]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _parts(source: Path) -> list[Path]:
    names = (
        "fedkd",
        "strategies",
        "sim",
        "src",
        "fedkd_start.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    )
    return [source / name for name in names if (source / name).exists()]
