from pathlib import Path

import pytest
from rich.console import Console

from sim.server.observers import event_words
from sim.watching.runs import Measured, RunSight, Status
from sim.watching.studies import Sight
from sim.watching.terminal import change_words, changes, sparkline, view


def run(arm: str, seed: int, status: Status, *accuracies: float, quiet_s: float = 0.0) -> RunSight:
    return RunSight(
        arm=arm,
        seed=seed,
        folder=Path(arm) / str(seed),
        status=status,
        rounds=8,
        measured=[Measured(place, value, 1.0) for place, value in enumerate(accuracies, start=1)],
        events=[{"round": 1, "client": 2, "event": "worker lost", "reason": "a\nb \x1b[2J"}]
        if accuracies
        else [],
        quiet_s=quiet_s,
    )


def sight(*runs: RunSight) -> Sight:
    told = [f"{run.label}, {event_words(row)}" for run in runs for row in run.events]
    return Sight(
        name="study", folder=Path("study"), is_study=True, runs=runs, held=True, events=told
    )


def printed(shown: Sight, *, width: int = 80, height: int | None = None) -> list[str]:
    console = Console(width=width, height=25, color_system=None)
    with console.capture() as capture:
        console.print(view(shown, height=height))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_small_curve_has_a_step_for_each_share_and_blanks_for_what_is_to_come() -> None:
    curve = [(1, 0.0), (2, 0.5), (3, 1.0)]
    assert sparkline(curve, rounds=4, low=0.0, high=1.0, width=4) == "▁▅█ "
    # Two characters a round, and two rounds a character.
    assert sparkline(curve, rounds=4, low=0.0, high=1.0, width=8) == "▁▁▁▅▅█  "
    assert sparkline(curve, rounds=4, low=0.0, high=1.0, width=2) == "▅█"
    # Alike is in the middle; nothing is known before the first round that was judged.
    assert sparkline([(1, 0.5)], rounds=1, low=0.5, high=0.5, width=3) == "▅▅▅"
    assert sparkline([], rounds=4, low=0.0, high=1.0, width=3) == "   "


def test_everything_is_there_in_80_columns() -> None:
    shown = sight(
        run("one_way", 0, "finished", *[0.2] * 8),
        run("one_way", 1, "running", 0.2, 0.4, quiet_s=300.0),
        run("dml", 0, "planned"),
    )
    lines = printed(shown)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "study: running, 1 of 3 runs finished, about 14 s left" in text
    assert "10 of 24 rounds" in text
    row = next(line for line in lines if line.startswith("one_way"))
    assert "1 of 2" in row
    assert "30.0 %" in row
    assert "seed 1: 2 of 8, quiet for about 5 min" in row
    assert "waits" in next(line for line in lines if line.startswith("dml"))
    assert "one_way seed 0, round 1, client 2: worker lost: b \\x1b[2J" in text


def test_where_there_is_no_room_arms_that_are_at_work_are_shown() -> None:
    runs = [run(f"arm{place}", 0, "planned") for place in range(30)]
    runs[20] = run("arm20", 0, "running", 0.5)
    lines = printed(sight(*runs), height=20)
    assert len(lines) <= 20
    assert any(line.startswith("arm20") for line in lines)
    assert any("more arms" in line for line in lines)


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_leaves_columns_out(width: int) -> None:
    lines = printed(sight(run("dml", 0, "running", 0.5)), width=width)
    assert max(map(len, lines)) <= width


def test_changes_are_told_once_each() -> None:
    before = sight(run("dml", 0, "planned"), run("dml", 1, "planned"))
    begun = sight(run("dml", 0, "running"), run("dml", 1, "planned"))
    on = sight(run("dml", 0, "running", 0.5), run("dml", 1, "planned"))
    over = sight(run("dml", 0, "finished", 0.5, 0.6), run("dml", 1, "planned"))
    told = [
        [change_words(row) for row in changes(*two)]
        for two in ((None, before), (before, begun), (begun, on), (on, over), (over, over))
    ]
    assert told == [
        [],
        ["dml seed 0: running, 0 of 8 rounds"],
        [
            "dml seed 0: round 1, client 2: worker lost: b \\x1b[2J",
            "dml seed 0: 1 of 8 rounds, accuracy 50.0 %",
        ],
        ["dml seed 0: finished, 2 of 8 rounds, accuracy 60.0 %"],
        [],
    ]
