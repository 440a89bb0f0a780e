"""Who hears whom: a few of those that sent something, never oneself."""

import numpy as np
import pytest

from fedkd.metrics.agreement import agreement_matrix
from fedkd.mutual.graphs import (
    before,
    best_peers,
    exponential_distance,
    exponentially_before,
    random_peers,
)

SENDERS = (1, 4, 6, 9)


def test_on_a_ring_everybody_hears_the_sender_before_it():
    assert [before(client, SENDERS) for client in SENDERS] == [(9,), (1,), (4,), (6,)]


def test_who_has_sent_nothing_hears_whoever_is_before_its_place():
    assert [before(client, SENDERS) for client in (0, 2, 7, 12)] == [(9,), (1,), (6,), (9,)]


@pytest.mark.parametrize(
    ("peers", "distances"), [(2, [1, 1]), (4, [1, 2, 1]), (5, [1, 2, 4, 1]), (8, [1, 2, 4, 1])]
)
def test_distances_are_those_of_the_published_graph(peers, distances):
    found = [exponential_distance(round, peers) for round in range(1, len(distances) + 1)]
    assert found == distances


def test_on_the_exponential_graph_everybody_hears_whose_turn_it_is():
    # The published graph of 4 sends to [1, 2, 3, 0] and then to [2, 3, 0, 1].
    heard = [[exponentially_before(c, range(4), round)[0] for c in range(4)] for round in (1, 2)]
    assert heard == [[3, 0, 1, 2], [2, 3, 0, 1]]


def test_on_the_exponential_graph_news_reaches_everybody_in_the_logarithm_of_their_number():
    for senders in (tuple(range(5)), SENDERS, tuple(range(16))):
        knows = {client: {client} for client in senders}
        for round in range(1, (len(senders) - 1).bit_length() + 1):
            knows = {
                c: knows[c].union(*(knows[p] for p in exponentially_before(c, senders, round)))
                for c in senders
            }
        assert all(len(known) == len(senders) for known in knows.values())


def test_drawn_peers_are_k_others_in_order_and_another_stream_draws_others():
    drawn = {random_peers(4, SENDERS, 2, np.random.default_rng(seed)) for seed in range(30)}
    assert drawn == {(1, 6), (1, 9), (6, 9)}
    assert random_peers(4, SENDERS, 9, np.random.default_rng(0)) == (1, 6, 9)
    assert random_peers(2, SENDERS, 9, np.random.default_rng(0)) == SENDERS


def test_the_best_peers_are_those_that_give_the_same_classes():
    classes = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 0, 1]])
    found = best_peers(agreement_matrix(np.eye(2)[classes]), SENDERS, 1)
    assert found == {1: (4,), 4: (1,), 6: (9,), 9: (6,)}


def test_among_equals_the_first_is_heard_and_nobody_hears_itself():
    assert best_peers(np.ones((4, 4)), SENDERS, 2) == {
        1: (4, 6),
        4: (1, 6),
        6: (1, 4),
        9: (1, 4),
    }
    assert best_peers(np.eye(4), SENDERS, 9)[4] == (1, 6, 9)


def test_who_is_alone_hears_nobody_and_a_newcomer_hears_the_one_there_is():
    rng = np.random.default_rng(0)
    assert before(3, (3,)) == exponentially_before(3, (3,), 1) == random_peers(3, (3,), 2, rng)
    assert before(3, (3,)) == before(3, ()) == exponentially_before(3, (), 2) == ()
    assert best_peers(np.ones((1, 1)), (3,), 2) == {3: ()}
    assert before(5, (3,)) == exponentially_before(5, (3,), 4) == (3,)
