"""What clients are told in a round: made from the server's state, each distinct piece once."""

from collections.abc import Hashable, Iterator
from statistics import fmean
from typing import Any

from fedkd.exchange.budget import BudgetError
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.pipeline import ServerTurn
from fedkd.exchange.values import Value
from sim.server.validation import authors_code
from sim.settings import SettingsError
from sim.wire.messages import Told
from strategies.contract import Round, ServerTools, Strategy


class Outbox:
    """Answers what each client is told, and what it has to answer.

    Args:
        strategy: names and makes it.
        state: from which.
        round: in which it is received.
        turn: what is sent passes it.
        server: for what clients have to answer; None: nobody has to.
        silent: tell nobody anything.
    """

    def __init__(
        self,
        strategy: Strategy[Any, Any],
        state: Value,
        round: Round,
        turn: ServerTurn,
        *,
        server: ServerTools | None = None,
        silent: bool = False,
    ) -> None:
        self._strategy = strategy
        self._state = state
        self._round = round
        self._turn = turn
        self._server = server
        self._silent = silent
        self._made: dict[Hashable, Payload] = {}
        self._asked: dict[int, Asked | None] = {}
        self.told: dict[int, Told] = {}

    def tell(self, client: int, attempt: int) -> Told:
        """Return what a client is told now; clients that receive the same share one object.

        Raises:
            SettingsError: its share of a budget does not hold it.
        """
        if self._silent:
            return Told()
        strategy, state = self._strategy, self._state
        asked = self.asked(client)
        with authors_code(self._where):
            key = strategy.receives(state, client, self._round)
            if not isinstance(key, Hashable):
                raise TypeError(
                    f"{type(strategy).__name__}: receives gave a {type(key).__name__}, expected a "
                    "key such as a word, a number or a tuple"
                )
            orders = strategy.orders(state, client, self._round)
        try:
            sent = self._turn.send(
                client,
                key,
                self._make,
                asked=asked,
                trains=self._server is not None,
                attempt=attempt,
                beside=0 if orders is None else orders.payload_bytes,
            )
        except BudgetError as error:
            raise SettingsError(f"round {self._round.number}, client {client}: {error}") from error
        told = Told(sent.payload, orders, sent.since, sent.levels)
        self.told[client] = told
        return told

    def asked(self, client: int) -> Asked | None:
        """Return what a client has to answer, decoded; None: nothing."""
        if self._server is None:
            return None
        if client not in self._asked:
            with authors_code(self._where):
                self._asked[client] = self._strategy.asks(
                    self._state, client, self._round, self._server
                )
        return self._asked[client]

    @property
    def _where(self) -> str:
        return f"round {self._round.number}, the server's half"

    def _make(self, key: Hashable) -> Payload:
        if key not in self._made:
            with authors_code(self._where):
                self._made[key] = self._strategy.payload(self._state, key)
        return self._made[key]

    def pieces(self) -> Iterator[Payload]:
        """Yield every distinct piece that somebody was told so far, as it was before it left."""
        yield from self._made.values()

    def entropy(self) -> float | None:
        """Return the mean entropy of the soft labels among the pieces; None without any."""
        kinds: dict[type[Payload], list[Payload]] = {}
        for piece in self.pieces():
            kinds.setdefault(type(piece), []).append(piece)
        found = [
            entropy
            for kind, pieces in kinds.items()
            for entropy in kind.targets_entropies(pieces)
            if entropy is not None
        ]
        return fmean(found) if found else None
