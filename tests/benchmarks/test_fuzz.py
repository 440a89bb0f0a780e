"""Invalid input of every kind is refused in one line; a quick round of the fuzzer."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz"


def fuzz(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FUZZ), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_nothing_invalid_passes_and_nothing_ends_in_a_traceback() -> None:
    done = fuzz("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    # Each kind of input was thrown, and each was refused.
    rows = [line.split("|")[3:7] for line in done.stdout.splitlines()[2:]]
    assert len(rows) >= 7
    assert all(int(refused) > 0 and not any(map(int, bad)) for refused, *bad in rows)


def test_what_passes_is_counted_shown_and_fails(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(FUZZ)!r})\n"
        "from pathlib import Path\n"
        "import harness\n"
        "harness.PATIENCE_S = 0.2\n"
        "def loop():\n"
        "    while True: pass\n"
        "def cases(rng, count, folder):\n"
        "    yield harness.Case('good', 'a', lambda: '')\n"
        "    yield harness.Case('bad', 'b', lambda: 'accepted')\n"
        "    yield harness.Case('bad', 'c', lambda: 1 / 0)\n"
        "    yield harness.Case('bad', 'd', loop)\n"
        "rows, failures = harness.throw(harness.Part(cases, 4), 4, 0, Path('.'))\n"
        "print({kind: dict(found) for kind, found in rows.items()}, len(failures))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    expected = "{'good': {'refused': 1}, 'bad': {'wrong': 1, 'traceback': 1, 'hang': 1}} 3\n"
    assert done.stdout == expected, done.stderr
