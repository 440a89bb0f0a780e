"""The server's half of a run, gone through again: what it told, and what it made of the answers.

All that is sent passes the exchange as in the run itself: codecs, release rules, the view.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message

from fedkd.exchange.payload import Payload
from fedkd.exchange.pipeline import ExchangeState, ServerTurn
from fedkd.exchange.values import Value
from fedkd.exchange.views import Upload
from sim.server.outbox import Outbox
from sim.settings import Settings
from sim.wire.messages import Told, read_reply
from strategies.contract import Round, ServerTools, Strategy


class ReplayedServer:
    """Stands between two rounds, as a `RoundLoop` does.

    Args:
        strategy: whose server half it is.
        server: what that may use.
        settings: of the run.

    Attributes:
        state: of the algorithm.
    """

    def __init__(
        self, strategy: Strategy[Any, Any], server: ServerTools, settings: Settings
    ) -> None:
        self.strategy = strategy
        self.server = server
        self.state: Value = strategy.begin(server)
        self._settings = settings
        self._exchange = ExchangeState()
        self._round = 1

    @property
    def round(self) -> Round:
        """The round that is next."""
        return self.strategy.federation.round(self._round)

    def open(self) -> "ReplayedRound":
        """Begin the next round."""
        turn = ServerTurn(
            self._settings.stages,
            self._exchange,
            seed=self._settings.seed,
            round=self._round,
        )
        return ReplayedRound(self.strategy, self.server, self.state, self.round, turn)

    def close(self, opened: "ReplayedRound", state: Value) -> None:
        """End a round with what was made of it."""
        self.state, self._exchange = state, opened.turn.committed()
        self._round += 1


class ReplayedRound:
    """One round: tell the clients, then take in what they answered."""

    def __init__(
        self,
        strategy: Strategy[Any, Any],
        server: ServerTools,
        state: Value,
        round: Round,
        turn: ServerTurn,
    ) -> None:
        self.turn = turn
        self._strategy = strategy
        self._num_examples = strategy.federation.num_examples
        self._outbox = Outbox(strategy, state, round, turn, server=server)

    def tell(self, client: int) -> Told:
        """Return what a client is told, as it travels."""
        return self._outbox.tell(client, 1)

    def received(
        self, replies: Mapping[int, Message], *, without: int | None = None
    ) -> list[Upload]:
        """Return what the server receives, decoded; of all that answered but one."""
        answers = {
            client: read_reply(reply.content).payload
            for client, reply in sorted(replies.items())
            if client != without
        }
        return self.decoded(answers)

    def decoded(self, answers: Mapping[int, Payload | None]) -> list[Upload]:
        """Return answers that travelled as the server receives them; silent ones are left out."""
        uploads = []
        for client, sent in answers.items():
            payload = self.turn.receive(client, sent, self._outbox.asked(client))
            if payload is not None:
                uploads.append(Upload(client, payload, self._num_examples[client]))
        return uploads

    def shown(self, uploads: Iterable[Upload]) -> list[Upload]:
        """Return what the aggregator sees of what was received."""
        group = self._strategy.federation.architectures.__getitem__
        return list(self.turn.view(uploads, sums=self._strategy.sums, group=group))
