"""Who hears whom: graphs of peers, of which each learns from a few of the others only.

A graph is drawn over those who have sent something, in the order of their ids. Who has sent nothing
takes a place among them by its id, and hears whoever it would hear there.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

PeerGraph = Literal["all", "ring", "exponential", "random-k", "best-k"]
"""Whom a peer hears. ``all``: every other one; ``ring``: the one before it; ``exponential``: the
one 1, 2, 4, ... before it, in turn; ``random-k``: so many, drawn anew in every round; ``best-k``:
those it agrees with most."""


def exponential_distance(round: int, peers: int) -> int:
    """Return how far apart two peers are that hear each other in a round: 1, 2, 4, ... in turn.

    In ``floor(log2(peers - 1)) + 1`` rounds everybody hears, directly or through others, everybody
    else.

    Args:
        round: from 1 on.
        peers: how many stand in the circle, >= 2.

    Source:
        Kalra et al., 2023 (ProxyFL), section 3.3. https://arxiv.org/abs/2111.11343
    """
    return int(2 ** ((round - 1) % (peers - 1).bit_length()))


def before(client: int, senders: Sequence[int], distance: int = 1) -> tuple[int, ...]:
    """Return the sender so many places before a client on a circle; nobody where it is alone.

    Args:
        client: who hears; it takes its place by its id where it has sent nothing.
        senders: who has sent something, in order.
        distance: >= 1, and below the number of those on the circle.

    Examples:
        >>> from fedkd.mutual.graphs import before
        >>> before(2, [0, 2, 5]), before(0, [0, 2, 5])
        ((0,), (5,))
    """
    place = bisect_left(senders, client)
    circle = list(senders)
    if client not in circle[place : place + 1]:
        circle.insert(place, client)
    return (circle[(place - distance) % len(circle)],) if len(circle) > 1 else ()


def exponentially_before(client: int, senders: Sequence[int], round: int) -> tuple[int, ...]:
    """Return the sender 1, 2, 4, ... places before a client, in turn by the round (from 1 on).

    Examples:
        >>> from fedkd.mutual.graphs import exponentially_before
        >>> [exponentially_before(0, [0, 1, 2, 3, 4], round) for round in (1, 2, 3)]
        [(4,), (3,), (1,)]
    """
    others = len(senders) - (client in senders)
    return before(client, senders, exponential_distance(round, others + 1)) if others else ()


def random_peers(
    client: int, senders: Sequence[int], k: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """Draw k of the other senders, all of them where there are no more; in order.

    Examples:
        >>> import numpy as np
        >>> from fedkd.mutual.graphs import random_peers
        >>> random_peers(1, [0, 1, 2], 5, np.random.default_rng(0))  # no more than there are
        (0, 2)
    """
    others = [sender for sender in senders if sender != client]
    drawn = rng.choice(len(others), min(k, len(others)), replace=False) if others else ()
    return tuple(others[place] for place in sorted(drawn))


def best_peers(
    agreement: Float[np.ndarray, "senders senders"], senders: Sequence[int], k: int
) -> dict[int, tuple[int, ...]]:
    """Return for each sender the k others that it agrees with most, in order.

    Args:
        agreement: of every two senders, such as `fedkd.metrics.agreement.agreement_matrix` of their
            predictions on the same rows; nobody's labels have a part in it.
        senders: in the order of the matrix.
        k: how many, >= 1; all of them where there are no more. Among equals the first is taken.
    """
    found = {}
    for place, sender in enumerate(senders):
        order = [other for other in np.argsort(-agreement[place], kind="stable") if other != place]
        found[sender] = tuple(senders[other] for other in sorted(order[:k]))
    return found
