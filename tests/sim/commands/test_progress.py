import io
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from sim.commands.progress import (
    Bars,
    FitProgress,
    Lines,
    ProgressObserver,
    Signs,
    StudyProgress,
    signs_of_life,
)
from sim.commands.running import run
from sim.settings import Settings


def screen(*, terminal: bool, width: int = 120) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(
        file=file, force_terminal=terminal, force_interactive=terminal, width=width
    ), file


def plain(text: str) -> str:
    """Without the codes that move the cursor and colour what is written."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def shown(small: Callable[..., Settings], *, terminal: bool, **how: Any) -> str:
    console, file = screen(terminal=terminal)
    with signs_of_life(console, **{"quiet": False, "json": False, **how}) as signs:
        run(small("strategy.name=local"), observers=[ProgressObserver(signs, "local")])
    return plain(file.getvalue())


def test_a_person_sees_rounds_and_accuracy(small: Callable[..., Settings]) -> None:
    text = shown(small, terminal=True)
    assert "starting" in text
    assert "None" not in text
    lines = [line for line in text.splitlines() if "2/2 rounds" in line]
    assert re.fullmatch(r"local: 2/2 rounds, accuracy \d+\.\d %, 0:00:\d\d", lines[-1].strip())


def test_a_log_gets_the_first_and_the_last_round_once(small: Callable[..., Settings]) -> None:
    first, last = shown(small, terminal=False).splitlines()
    assert re.fullmatch(r"local: 1/2 rounds, accuracy \d+\.\d %, 0:00:\d\d", first)
    assert re.fullmatch(r"local: 2/2 rounds, accuracy \d+\.\d %, 0:00:\d\d", last)


def test_who_asked_for_quiet_and_a_program_that_waits_seconds_see_nothing(
    small: Callable[..., Settings],
) -> None:
    assert shown(small, terminal=True, quiet=True) == ""
    assert shown(small, terminal=False, quiet=True) == ""
    assert shown(small, terminal=False, json=True) == ""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_is_never_silent_for_longer_than_half_a_minute() -> None:
    console, file = screen(terminal=False)
    clock = Clock()
    lines = Lines(console, "rounds", clock=clock)
    task = lines.begin("dml")
    clock.now = 31.0
    lines.beat()
    assert file.getvalue() == "dml: starting, 0:00:31 so far\n"
    clock.now = 40.0
    lines.reached(task, 1, 9, "accuracy 50.0 %")
    lines.beat()
    assert len(file.getvalue().splitlines()) == 1
    clock.now = 62.0
    lines.reached(task, 2, 9, "accuracy 60.0 %")
    clock.now = 93.0
    lines.beat()
    clock.now = 100.0
    lines.reached(task, 9, 9, "accuracy 70.0 %")
    lines.ended(task)
    assert file.getvalue().splitlines()[1:] == [
        "dml: 2/9 rounds, accuracy 60.0 %, 0:01:02",
        "dml: 2/9 rounds, accuracy 60.0 %, 0:01:33 so far",
        "dml: 9/9 rounds, accuracy 70.0 %, 0:01:40",
    ]


def test_a_program_is_told_of_what_takes_long() -> None:
    console, file = screen(terminal=False)
    clock = Clock()
    lines = Lines(console, "rounds", patient=True, clock=clock)
    task = lines.begin("dml")
    lines.reached(task, 1, 9, "")
    assert file.getvalue() == ""
    clock.now = 30.0
    lines.reached(task, 2, 9, "")
    assert file.getvalue() == "dml: 2/9 rounds, 0:00:30\n"


def test_a_log_gets_a_line_where_a_model_stopped_early() -> None:
    console, file = screen(terminal=False)
    with Lines(console, "epochs") as lines:
        progress = FitProgress(lines, "seed 3")
        progress("teacher", {"epoch": 1, "epochs": 9, "validation_accuracy": 0.25})
        progress("teacher", {"epoch": 2, "epochs": 9, "validation_accuracy": 0.5})
        progress("generator", {"epoch": 1, "epochs": 1})
    assert [line.rsplit(",", 1)[0] for line in file.getvalue().splitlines()] == [
        "seed 3 teacher: 1/9 epochs, validation 25.0 %",
        "seed 3 generator: 1/1 epochs",
        "seed 3 teacher: 2/9 epochs, validation 50.0 %",
    ]


def test_the_thread_that_shows_life_ends_with_what_it_watches() -> None:
    def watching() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name == "signs of life"]

    with Lines(screen(terminal=False)[0], "rounds"):
        assert watching()
    assert not watching()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_bars_cut_no_number(width: int) -> None:
    console, file = screen(terminal=True, width=width)
    with Bars(console, "epochs") as bars:
        progress = FitProgress(bars, "seed 12, T=4, w=0.5")
        progress("student", {"epoch": 7, "epochs": 300, "validation_accuracy": 0.5763})
        bars._progress.refresh()
        text = plain(file.getvalue())
    assert "7/300 epochs" in text
    assert "validation 57.6 %" in text
    assert "…" not in text
    assert all(len(line) <= width for line in re.split(r"[\r\n]+", text))


def test_what_is_over_makes_room_on_the_terminal_and_stays_as_a_line() -> None:
    console, file = screen(terminal=True, width=80)
    with Bars(console, "rounds") as bars:
        for seed in range(60):
            task = bars.begin(f"dml seed {seed}")
            bars.reached(task, 12, 12, "accuracy 91.8 %")
            assert not bars._progress.tasks
    text = plain(file.getvalue())
    for seed in range(60):
        assert text.count(f"dml seed {seed}: 12/12 rounds, accuracy 91.8 %") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_rejected_reply_is_named_and_moves_no_cursor(terminal: bool) -> None:
    console, file = screen(terminal=terminal)
    with signs_of_life(console, quiet=False, json=False) as signs:
        observer = ProgressObserver(signs, "[bold]dml[/]")
        observer.event({"round": 2, "client": 5, "event": "rejected", "reason": "a\nb [c]\x1b[2J"})
    text = file.getvalue()
    assert r"[bold]dml[/]: round 2, client 5: rejected: b [c]\x1b[2J" in text
    assert "\x1b[2J" not in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_that_goes_back_after_its_last_round_is_shown_again(terminal: bool) -> None:
    console, file = screen(terminal=terminal)
    with signs_of_life(console, quiet=False, json=False) as signs:
        observer = ProgressObserver(signs, "dml")
        observer.metrics([{"accuracy": 0.5}])
        observer.returned(0)
        observer.metrics([{"accuracy": None}])
    assert plain(file.getvalue()).count("dml: 1/1 rounds, accuracy 50.0 %") == 2


def test_silence_takes_everything() -> None:
    with Signs() as signs:
        observer = ProgressObserver(signs, "dml")
        observer.metrics([{"accuracy": 0.5}])
        observer.event({"round": 1, "event": "rejected"})


def test_what_several_runs_promise_alike_is_said_once(small: Callable[..., Settings]) -> None:
    console, file = screen(terminal=False)
    settings = small("strategy.name=fedmd", "privacy.mechanism=gaussian", "privacy.noise=1")
    with Lines(console, "rounds") as signs:
        for arm in ("one", "other"):
            run(settings, observers=[ProgressObserver(signs, arm)])
    assert "one: privacy of each client, delta 1e-05: gaussian noise: each" in file.getvalue()
    assert file.getvalue().count("privacy of each") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_attacks_are_shown_while_they_go_on_and_are_over_when_they_are(terminal: bool) -> None:
    console, file = screen(terminal=terminal)
    clock = Clock()
    signs = Bars(console, "rounds") if terminal else Lines(console, "rounds", clock=clock)
    with signs:
        for arm in ("none", "dp"):
            observer = ProgressObserver(signs, arm)
            observer.attacking("shadow federation 3 of 16")
            clock.now += 40.0
            observer.attacking("shadow federation 9 of 16")
            observer.attacked()
            ProgressObserver(signs, "not attacked").attacked()
            clock.now += 1.0
    text = plain(file.getvalue())
    assert "0/1" not in text
    if not terminal:
        assert text.splitlines() == [
            "none: attacks: shadow federation 3 of 16, 0:00:00",
            "none: attacks: shadow federation 9 of 16, 0:00:40",
            "none: attacks: over, 0:00:40",
            "dp: attacks: shadow federation 9 of 16, 0:00:40",
            "dp: attacks: over, 0:00:40",
        ]


class Overall(Signs):
    """Keeps what is said of a whole study."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int, str]] = []

    def overall(self, completed: int, total: int, note: str) -> None:
        self.told.append((completed, total, note))


def test_a_study_counts_rounds_of_all_its_runs_and_what_time_they_leave(
    small: Callable[..., Settings],
) -> None:
    now = 0.0
    signs = Overall()
    progress = StudyProgress(signs, lambda: now)
    progress.planned([2, 2, 2])
    settings = small("rounds=2")
    (first, _), (second, _) = progress.observers("local", 0), progress.observers("dml", 0)
    first.started(settings, None)  # type: ignore[arg-type]
    second.started(settings, None)  # type: ignore[arg-type]
    # Its first round was made by another command: it took no time here.
    second.returned(1)
    assert signs.told[-1] == (1, 6, "0/3 runs, 2 running")
    now = 10.0
    second.metrics([])
    assert signs.told[-1] == (2, 6, "1/3 runs, 1 running, 0:00:40 left")
    # It goes back after its last round, and is no more over.
    second.returned(1)
    assert signs.told[-1] == (1, 6, "0/3 runs, 2 running, 0:00:50 left")


def test_a_study_of_one_run_needs_no_count_of_runs(small: Callable[..., Settings]) -> None:
    signs = Overall()
    progress = StudyProgress(signs)
    progress.planned([2])
    (part, _) = progress.observers("local", 0)
    part.started(small("rounds=2"), None)  # type: ignore[arg-type]
    part.metrics([])
    assert signs.told == []
