"""What is planned to go wrong: a pure function of the seed."""

import signal
import time
from collections import Counter
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from sim.adversity.faults import FaultKind, FaultPlan, FaultRule, InjectedError
from sim.engine.deadline import DeadlineError, deadline
from sim.settings import SettingsError, load_settings


def plan(seed: int = 0, **rule: Any) -> FaultPlan:
    return FaultPlan([FaultRule(**rule)], seed)


def struck(plan: FaultPlan, *, rounds: int = 40, clients: int = 25) -> set[tuple[int, int]]:
    return {
        (round, client)
        for round in range(1, rounds + 1)
        for client in range(clients)
        if any(plan.striking("train", round, client, 1))
    }


def test_a_rule_strikes_as_often_as_its_probability_says() -> None:
    hits = len(struck(plan(kind="crash", probability=0.3)))
    # 1000 draws: 4 standard deviations are 58.
    assert abs(hits - 300) < 58


def test_a_seed_decides_whom_a_rule_strikes() -> None:
    rule = {"kind": "crash", "probability": 0.3}
    assert struck(plan(1, **rule)) == struck(plan(1, **rule))
    assert struck(plan(1, **rule)) != struck(plan(2, **rule))


def test_two_rules_draw_for_themselves() -> None:
    rule = FaultRule(kind="crash", probability=0.5)
    both = FaultPlan([rule, rule], 0)
    counts = Counter(
        len(list(both.striking("train", round, client, 1)))
        for round in range(20)
        for client in range(20)
    )
    assert set(counts) == {0, 1, 2}


def test_a_rule_keeps_to_its_clients_rounds_phases_and_attempts() -> None:
    rule = plan(kind="crash", clients=[3], rounds=[2, 5], phases=["evaluate"], attempts=2)
    asked = [
        (phase, round, client, attempt)
        for phase in ("train", "evaluate")
        for round in range(1, 7)
        for client in range(5)
        for attempt in (1, 2, 3)
        if any(rule.striking(phase, round, client, attempt))
    ]
    assert asked == [("evaluate", round, 3, attempt) for round in (2, 5) for attempt in (1, 2)]


def test_without_a_bound_every_attempt_is_struck() -> None:
    rule = plan(kind="kill", attempts=None)
    assert all(rule.takes_worker_down("train", 1, 0, attempt) for attempt in range(1, 50))


def test_only_faults_of_the_process_take_the_worker_down() -> None:
    kinds = {
        kind for kind in get_args(FaultKind) if plan(kind=kind).takes_worker_down("train", 1, 0, 1)
    }
    assert kinds == {"kill", "exit", "segfault", "freeze"}


def test_a_crash_raises_and_a_delay_waits() -> None:
    with pytest.raises(InjectedError):
        plan(kind="crash").strike("train", 1, 0, 1)
    started = time.monotonic()
    plan(kind="delay", seconds=0.05).strike("train", 1, 0, 1)
    assert time.monotonic() - started >= 0.05


def test_exhausted_memory_is_an_error_that_leaves_the_process_well() -> None:
    with pytest.raises(MemoryError):
        plan(kind="memory").strike("train", 1, 0, 1)
    assert len(bytearray(200 * 2**20)) == 200 * 2**20


def test_a_hang_ends_at_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"engine\.deadline_s = 0\.1"), deadline(0.1):
        plan(kind="hang").strike("train", 1, 0, 1)
    assert time.monotonic() - started < 1


def test_after_a_deadline_nothing_rings_any_more() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with deadline(0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["faults=[{kind: sneeze}]"], r"faults\.0\.kind"),
        (["faults=[{kind: kill, probability: 2}]"], r"faults\.0\.probability"),
        (["faults=[{kind: bad_reply, reply: polite}]"], "polite"),
        (["faults=[{kind: kill}]", "engine.backend=inline"], r"engine\.backend: ray, got inline"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(words: list[str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load_settings(None, words)


def test_a_rule_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValidationError, match="often"):
        FaultRule(kind="crash", often=True)
