import numpy as np

from fedkd.randomness import Purpose
from fedkd.training import Member, Passes, Streams
from fedkd.training.feeds import Feed, FitKeys

STREAMS = Streams(seed=3, round=2, rounds=3)
MEMBER = Member(1, np.arange(30))


def private_batches(public_fits: int) -> tuple[int, Feed]:
    """The seed and the batches of a private fit that comes after so many on public rows alone."""
    keys = FitKeys(STREAMS)
    for _ in range(public_fits):
        keys.next(private=False)
    passes = Passes(batch_size=8, epochs=2)
    return Feed.drawn(MEMBER, STREAMS, keys.next(private=True), passes, None)


def test_fits_on_public_rows_alone_do_not_move_the_private_batches() -> None:
    seed, feed = private_batches(0)
    for public_fits in (1, 2):
        other_seed, other = private_batches(public_fits)
        assert other_seed == seed
        for batch, same in zip(feed.private, other.private, strict=True):
            np.testing.assert_array_equal(batch, same)


def test_every_fit_has_streams_of_its_own() -> None:
    keys = FitKeys(STREAMS)
    drawn = [keys.next(private=private) for private in (False, True, False, True, True)]
    assert len(set(drawn)) == len(drawn)
    firsts = {Feed.drawn(MEMBER, STREAMS, key, Passes(batch_size=8), None)[0] for key in drawn}
    assert len(firsts) == len(drawn)


def test_a_server_s_fits_are_counted_together() -> None:
    # It has no batches that would have to be a client's in another algorithm.
    keys = FitKeys(Streams(seed=3, purpose=Purpose.SERVER))
    assert [keys.next(private=private) for private in (False, True)] == [
        (Purpose.SERVER, 0, 0),
        (Purpose.SERVER, 1, 0),
    ]
