"""Throwing cases one by one, each within its time, and counting what became of them."""

import signal
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OUTCOMES = ("refused", "harmless", "wrong", "traceback", "hang")
"""Refused as it should be; accepted with the very numbers of the input that is not broken; accepted
otherwise, or refused without naming what is wrong; an exception of another kind; more than
`PATIENCE_S` of computing, or no answer at all."""

HARMLESS = "harmless"
"""What an attempt returns where the numbers are those of the input that is not broken."""

PATIENCE_S = 10
"""Of computing, which a busy machine does not lengthen."""
NO_ANSWER_S = 120
"""Of waiting."""


@dataclass(frozen=True)
class Case:
    """One invalid input.

    Attributes:
        kind: its row in the table.
        text: what is needed to repeat it.
        attempt: hands it over. Returns "" if it is refused as it should be, `HARMLESS`, or what
            is wrong; any exception is one that a user would have seen as a traceback.
    """

    kind: str
    text: str
    attempt: Callable[[], str]


@dataclass(frozen=True)
class Part:
    """One part of the fuzzer.

    Attributes:
        cases: from a stream of random numbers, a number of cases and an empty folder.
        count: how many cases are thrown.
    """

    cases: Callable[[np.random.Generator, int, Path], Iterator[Case]]
    count: int


class _HangError(BaseException):
    """No Exception: what is thrown at may catch those."""


def throw(
    part: Part, count: int, seed: int, folder: Path
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Return for each kind of input how often which outcome came, and the failures in words."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    failures = []
    for case in part.cases(np.random.default_rng(seed), count, folder):
        outcome, words = _outcome(case)
        rows[case.kind][outcome] += 1
        if outcome not in ("refused", HARMLESS):
            failures.append(f"{case.kind}: {outcome}: {case.text[:500]}\n  {words}")
    return dict(rows), failures


def _outcome(case: Case) -> tuple[str, str]:
    def too_long(*_: object) -> None:
        raise _HangError

    before = [signal.signal(number, too_long) for number in (signal.SIGALRM, signal.SIGPROF)]
    signal.setitimer(signal.ITIMER_REAL, NO_ANSWER_S)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE_S)
    try:
        wrong = case.attempt()
    except _HangError:
        return "hang", f"more than {PATIENCE_S} s of computing, or {NO_ANSWER_S} s"
    except Exception:
        return "traceback", traceback.format_exc(limit=-3).replace("\n", "\n  ")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGALRM, signal.SIGPROF), before, strict=True):
            signal.signal(number, handler)
    if wrong == HARMLESS:
        return HARMLESS, ""
    return ("wrong", wrong) if wrong else ("refused", "")
