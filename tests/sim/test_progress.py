import io
from collections.abc import Callable

from rich.console import Console

from sim.progress import ProgressObserver, progress_bars
from sim.running import run
from sim.settings import Settings


def shown(small: Callable[..., Settings], *, terminal: bool, quiet: bool = False) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120)
    bars = progress_bars(console, quiet=quiet)
    with bars:
        run(small("strategy.name=local"), observers=[ProgressObserver(bars, "local")])
    return screen.getvalue()


def test_a_person_sees_rounds_and_accuracy(small: Callable[..., Settings]) -> None:
    text = shown(small, terminal=True)
    assert "local" in text
    assert "2/2 rounds" in text
    assert "accuracy" in text


def test_a_file_and_a_person_who_asked_for_quiet_see_nothing(
    small: Callable[..., Settings],
) -> None:
    assert shown(small, terminal=False).strip() == ""
    assert shown(small, terminal=True, quiet=True).strip() == ""


def test_a_rejected_reply_is_named_above_the_bar() -> None:
    screen = io.StringIO()
    bars = progress_bars(Console(file=screen, force_terminal=True, width=120), quiet=False)
    with bars:
        observer = ProgressObserver(bars, "dml")
        observer.event({"round": 2, "client": 5, "event": "rejected", "reason": "a\nb [c]"})
    assert "dml: round 2, client 5: rejected: b [c]" in screen.getvalue()
