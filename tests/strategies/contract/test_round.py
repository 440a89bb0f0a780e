"""Rounds: what both sides derive from the settings, so that they agree without a message."""

from dataclasses import replace

import numpy as np
import pytest

from fedkd.randomness import Purpose, generator_for


@pytest.fixture
def federation(tiny_settings, tiny_data):
    """Make the federation of some settings."""
    from sim.engine.runtime import federation_of

    def build(*, clients=4, rows=None, rounds=5, seed=0, **who):
        settings = tiny_settings(
            clients={"count": clients, **who},
            rounds=rounds,
            seed=seed,
            exchange={} if rows is None else {"rows_per_round": rows},
        )
        return federation_of(settings, tiny_data(rows=(5,) * clients))

    return build


def test_progress_goes_from_the_first_round_to_the_last(federation):
    rounds = [federation().round(number) for number in range(1, 6)]
    assert [round.progress for round in rounds] == [0, 0.25, 0.5, 0.75, 1]
    assert federation(rounds=1).round(1).progress == 0


def test_the_round_after_the_last_is_the_last(federation):
    round = federation().round
    assert round(2).next() == round(3)
    assert round(5).next() == round(5)


def test_participants_are_drawn_anew_each_round_by_the_seed_alone(federation):
    drawn = [federation(clients=20, participants=5).round(n).drawn() for n in range(1, 6)]
    again = [federation(clients=20, participants=5).round(n).drawn() for n in range(1, 6)]
    assert drawn == again
    assert len(set(drawn)) > 1
    assert drawn[0] != federation(clients=20, participants=5, seed=1).round(1).drawn()
    for clients in drawn:
        assert len(set(clients)) == 5
        assert list(clients) == sorted(clients)
        assert all(0 <= client < 20 for client in clients)


def test_as_many_as_ever_are_drawn_among_those_who_are_there(federation):
    round = federation(clients=20, participants=5).round(3)
    there = tuple(range(1, 20, 2))
    drawn = replace(round, present=there).drawn()
    assert len(drawn) == 5
    assert set(drawn) < set(there)
    assert list(drawn) == sorted(drawn)
    assert replace(round, present=(4, 9)).drawn() == (4, 9)
    assert replace(round, present=()).drawn() == ()
    assert replace(round, present=tuple(range(20))).drawn() == round.drawn()


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        ({"participation": 1.0}, 10),
        ({"participation": 0.5}, 5),
        ({"participation": 0.01}, 1),
        ({"participants": 7}, 7),
        ({"participants": 10}, 10),
    ],
)
def test_how_many_take_part(federation, who, expected):
    assert len(federation(clients=10, **who).round(1).drawn()) == expected


@pytest.mark.parametrize("count", range(1, 31))
def test_a_number_of_participants_is_met_exactly(federation, count):
    assert len(federation(clients=30, participants=count).round(1).drawn()) == count


def test_public_rows_are_drawn_anew_each_round_by_the_seed_alone(federation):
    drawn = [federation(rows=6).round(number).public_rows for number in range(1, 6)]
    again = [federation(rows=6).round(number).public_rows for number in range(1, 6)]
    assert all(np.array_equal(one, other) for one, other in zip(drawn, again, strict=True))
    assert len({tuple(rows) for rows in drawn}) > 1
    assert not np.array_equal(drawn[0], federation(rows=6, seed=1).round(1).public_rows)
    for rows in drawn:
        assert len(rows) == 6
        assert (np.diff(rows) > 0).all()
        assert rows[0] >= 0
        assert rows[-1] < 20


@pytest.mark.parametrize("rows", [None, 20])
def test_the_whole_public_set_is_exchanged_in_order(federation, rows):
    assert federation(rows=rows).round(3).public_rows.tolist() == list(range(20))


def test_equal_architectures_can_exchange_weights(federation):
    keys = federation().architectures
    assert keys[0] == keys[2] != keys[1] == keys[3]


def test_an_algorithm_draws_by_seed_round_and_key_alone(federation):
    def drawn(seed=7, round=2, key=(1,)):
        return federation(seed=seed).round(round).random(*key).integers(1 << 40)

    assert drawn() == drawn()
    others = [drawn(seed=8), drawn(round=3), drawn(key=(2,)), drawn(key=()), drawn(key=(1, 0))]
    assert len({drawn(), *others}) == 6
    # Not the stream by which participants are drawn.
    apart = generator_for(7, Purpose.PARTICIPANTS, 2).integers(1 << 40)
    assert drawn(key=()) != apart
