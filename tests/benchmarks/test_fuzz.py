"""Invalid input of every kind is refused in one line; a quick round of the fuzzer."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz"


def fuzz(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FUZZ), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def nothing_passes(*options: str, kinds: int) -> None:
    done = fuzz("--quick", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    # So many kinds of input were thrown, and each was refused, or is nothing to be refused for.
    rows = [line.split("|")[3:8] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= kinds
    for refused, harmless, *bad in rows:
        assert int(refused) + int(harmless) > 0
        assert not any(map(int, bad))


def test_no_malformed_reply_passes() -> None:
    nothing_passes("--only", "replies", kinds=21)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "kinds"), [("settings", 7), ("files", 10)])
def test_nothing_invalid_passes_and_nothing_ends_in_a_traceback(part: str, kinds: int) -> None:
    nothing_passes("--only", part, kinds=kinds)


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
        "    yield harness.Case('good', 'a', lambda: harness.HARMLESS)\n"
        "    yield harness.Case('bad', 'b', lambda: 'accepted')\n"
        "    yield harness.Case('bad', 'c', lambda: 1 / 0)\n"
        "    yield harness.Case('bad', 'd', loop)\n"
        "rows, failures = harness.throw(harness.Part(cases, 5), 5, 0, Path('.'))\n"
        "print({kind: dict(found) for kind, found in rows.items()}, len(failures))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    good, bad = "{'refused': 1, 'harmless': 1}", "{'wrong': 1, 'traceback': 1, 'hang': 1}"
    expected = f"{{'good': {good}, 'bad': {bad}}} 3\n"
    assert done.stdout == expected, done.stderr
