"""Judging by count: by hand, and that it changes nothing but which rounds are judged."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.commands.running import run
from sim.keeping.records import read_rows
from sim.server.judging import MOST_OF_TIME, rounds_between
from sim.settings import Settings, SettingsError

Small = Callable[..., Settings]


def row_of(
    round: int, trained: Sequence[int] = (), predicted: Sequence[int] = ()
) -> dict[str, Any]:
    return {
        "round": round,
        **{f"trained_{place}": rows for place, rows in enumerate(trained)},
        **{f"predicted_{place}": rows for place, rows in enumerate(predicted)},
    }


def test_rounds_between_by_hand() -> None:
    rows = [row_of(1, [10**6]), row_of(2, [100, 50], [50]), row_of(3, [1])]
    # 500 ways forth: judging 125 rows is a fifth of a round that has one, and 1000 of each eighth.
    assert rounds_between(rows, 125) == 1
    assert rounds_between(rows, 126) == 2
    assert rounds_between(rows, 1000) == 8
    assert rounds_between(rows[:1], 1000) == 1
    assert rounds_between([row_of(2), row_of(3, [100, 50], [50])], 1000) == 8
    assert rounds_between([row_of(2)], 1000) == 1


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.integers(0, 10**6))
def test_judging_is_at_most_its_share_and_no_rarer_than_that(
    judged: int, trained: int, predicted: int
) -> None:
    every = rounds_between([row_of(2, [trained], [predicted])], judged)
    passes = 3 * trained + predicted
    if passes:
        assert judged <= (MOST_OF_TIME + 1e-9) * (judged + every * passes)
        if every > 1:
            assert judged > (MOST_OF_TIME - 1e-9) * (judged + (every - 1) * passes)
    else:
        assert every == 1


def test_rounds_are_judged_rarely_and_weights_are_those_of_every_other_run(small: Small) -> None:
    words = ("rounds=9", "clients.count=2", "data.private_rows=60", "data.test_rows=300")
    auto = run(small(*words, "evaluation.every=auto"))
    always = run(small(*words))
    assert auto.weights_sha256 == always.weights_sha256
    federation = [
        row for row in read_rows(auto.folder / "metrics.jsonl") if row["scope"] == "federation"
    ]
    judged = [row["round"] for row in federation if "accuracy" in row]
    held = 2 * (300 + len_of_validation(auto.settings))
    every = rounds_between(federation, held)
    assert every > 2
    assert judged == [1, 2, *(each for each in range(3, 9) if each % every == 0), 9]
    [told] = [row for row in read_rows(auto.folder / "events.jsonl") if row["event"] == "judging"]
    assert (told["round"], f"every {every} rounds" in told["reason"]) == (3, True)
    by_round = {row["round"]: row["accuracy"] for row in federation if "accuracy" in row}
    of_all = {
        row["round"]: row["accuracy"]
        for row in read_rows(always.folder / "metrics.jsonl")
        if row["scope"] == "federation"
    }
    assert by_round == {each: of_all[each] for each in judged}


def len_of_validation(settings: Settings) -> int:
    from sim.commands.running import load_data

    return len(load_data(settings).validation_labels)


def test_another_word_is_refused(small: Small) -> None:
    with pytest.raises(SettingsError, match=r"evaluation\.every.*auto"):
        small("evaluation.every=often")
