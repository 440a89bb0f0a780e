"""What clients are told in a round: made from the server's state, each distinct piece once."""

from collections.abc import Hashable, Iterator
from statistics import fmean
from typing import Any

from fedkd.exchange.payload import Payload
from fedkd.exchange.values import Value
from sim.wire.messages import Told
from strategies.contract import Round, Strategy


class Outbox:
    """Answers what each client is told.

    Args:
        strategy: names and makes it.
        state: from which.
        round: in which it is received.
        silent: tell nobody anything.
    """

    def __init__(
        self, strategy: Strategy[Any, Any], state: Value, round: Round, *, silent: bool = False
    ) -> None:
        self._strategy = strategy
        self._state = state
        self._round = round
        self._silent = silent
        self._made: dict[Hashable, Payload] = {}

    def __call__(self, client: int) -> Told:
        """Return what a client is told; clients that receive the same share one object."""
        if self._silent:
            return Told()
        key = self._strategy.receives(self._state, client, self._round)
        orders = self._strategy.orders(self._state, client, self._round)
        if key is None:
            return Told(None, orders)
        if key not in self._made:
            self._made[key] = self._strategy.payload(self._state, key)
        return Told(self._made[key], orders)

    def pieces(self) -> Iterator[Payload]:
        """Yield every distinct piece that somebody was told so far."""
        yield from self._made.values()

    def entropy(self) -> float | None:
        """Return the mean entropy of the soft labels among the pieces; None without any."""
        found = [e for piece in self.pieces() if (e := piece.targets_entropy()) is not None]
        return fmean(found) if found else None
