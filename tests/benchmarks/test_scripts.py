"""The benchmarks run; what they measure is for people to look at, not for a test."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name != "measurement.py")
NO_TARGET = ("coverage.py", "demo.py", "table.py")


def run_script(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in NO_TARGET])
def test_quick_mode_measures_both_sides_and_passes_no_verdict(name):
    done = run_script(name, "--quick", "--check")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert lines
    assert all(line.endswith("| no verdict |") for line in lines)


# Each takes seconds to import what it measures.
@pytest.mark.parametrize(
    "name",
    [SCRIPTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS[1:])],
)
def test_an_unknown_option_is_refused_before_anything_runs(name):
    done = run_script(name, "--fast")
    assert done.returncode == 2
    assert "unrecognized arguments: --fast" in done.stderr


@pytest.mark.slow
def test_a_bare_loop_that_computes_something_else_voids_the_ratio():
    # The bare loop lives in a fresh process and keeps the learning rate that the file states.
    program = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import loop_ratio\n"
        "loop_ratio.LEARNING_RATE = 2e-3\n"
        "sys.argv = ['loop_ratio.py', '--quick', '--backend', 'inline']\n"
        "sys.exit(loop_ratio.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "the ratio is void" in done.stdout
