"""Throws invalid input at fedkd and counts what becomes of it.

    python benchmarks/fuzz                      # all parts, their full numbers
    python benchmarks/fuzz --only settings      # one part
    python benchmarks/fuzz --quick              # a tenth of each, to see that it runs
    python benchmarks/fuzz --seed 7             # other input; the same seed gives the same

Every input is invalid by construction. Right is a refusal in one line that names what is wrong; a
traceback, more than 10 s of computing, or silent acceptance is a failure, which is printed with
what is needed to repeat it. Exit status 1 if there is any.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import files
import replies
import settings
from harness import OUTCOMES, Part, throw

PARTS: dict[str, Part] = {
    "settings": Part(settings.cases, 2000),
    "replies": Part(replies.cases, 500),
    "files": Part(files.cases, 500),
}
"""By name: what makes the cases, and how many."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of each part")
    options = parser.parse_args()
    failures: list[str] = []
    print(f"| part | kind of input | {' | '.join(OUTCOMES)} |\n|---|---|{'---:|' * len(OUTCOMES)}")
    with tempfile.TemporaryDirectory(prefix="fedkd-fuzz-") as folder:
        for name in options.only:
            part = PARTS[name]
            count = part.count // 10 if options.quick else part.count
            place = Path(folder, name)
            place.mkdir()
            rows, failed = throw(part, count, options.seed, place)
            for kind, outcomes in rows.items():
                numbers = " | ".join(str(outcomes[outcome]) for outcome in OUTCOMES)
                print(f"| {name} | {kind} | {numbers} |", flush=True)
            failures += [f"{name}: {failure}" for failure in failed]
    for failure in failures:
        print(failure)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
