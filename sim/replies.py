"""A round's replies as the aggregator sees them: validated uploads, one after the other."""

from collections.abc import Callable, Iterator, Sequence

from flwr.app import Message
from flwr.common.constant import ErrorCode

from fedkd.metrics.diversity import VoteCounter
from sim.observers import Row
from sim.settings import EngineSettings
from sim.validation import Expected, RejectedReplyError, read_valid_reply
from strategies.knowledge import Broadcast, ClientUpload, Knowledge, Predictions
from strategies.plan import RoundPlan

Ask = Callable[[Sequence[int], int], Iterator[tuple[int, Message]]]
"""Asks clients, the so many-th time in this round, and yields (client, reply) in client order."""


class QuorumError(RuntimeError):
    """Too few clients gave a usable answer to a round."""


class Replies:
    """Iterating asks the clients of a round and yields their uploads.

    Aggregation so overlaps with training; what else the replies say is noted in passing. Where
    fewer answers are usable than the quorum asks for and ``engine.below_quorum`` is ``retry``,
    those who failed are asked again, and their uploads come last, in client order.

    Args:
        plan: the round.
        clients: who is asked, sorted.
        broadcast: what they receive.
        ask: asks them.
        expected: returns what a client has to answer.
        num_examples: private rows of each client.
        engine: says what to do below the quorum.
        event: is told of each reply that is left out.
    """

    def __init__(
        self,
        *,
        plan: RoundPlan,
        clients: Sequence[int],
        broadcast: Broadcast,
        ask: Ask,
        expected: Callable[[int], Expected],
        num_examples: Sequence[int],
        engine: EngineSettings,
        event: Callable[[Row], None],
    ) -> None:
        self._plan = plan
        self._clients = clients
        self._broadcast = broadcast
        self._expected = expected
        self._num_examples = num_examples
        self._engine = engine
        self._event = event
        self._votes: VoteCounter | None = None
        self._uploads = self._all_uploads(ask)
        self.rejected: dict[int, str] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self.exchanged: list[Row] = []

    def __iter__(self) -> Iterator[ClientUpload]:
        return self._uploads

    def drain(self) -> None:
        """Take in what the aggregator did not ask for.

        Raises:
            QuorumError: too few answers are usable. An aggregator that takes in everything
                meets it there.
        """
        for _ in self._uploads:
            pass

    @property
    def valid(self) -> int:
        """Clients that gave a usable answer so far."""
        return len(self.metrics)

    def disagreement(self) -> float | None:
        """Return how often two peers' top classes differ on public rows, in [0, 1]."""
        return None if self._votes is None else self._votes.disagreement()

    def _all_uploads(self, ask: Ask) -> Iterator[ClientUpload]:
        clients = self._clients
        attempts = 1 + (self._engine.round_retries if self._engine.below_quorum == "retry" else 0)
        for attempt in range(1, attempts + 1):
            if attempt > 1:
                self._tell_of_retry(clients, attempt)
            yield from self._read(ask(clients, attempt))
            if self.valid >= self._engine.quorum * len(self._clients):
                return
            clients = [client for client in clients if client not in self.metrics]
        reasons = "; ".join(
            f"client {client}: {_last_line(reason)}"
            for client, reason in list(self.rejected.items())[:3]
        )
        raise QuorumError(
            f"round {self._plan.round}: {self.valid} of {len(self._clients)} clients gave a usable "
            f"answer, engine.quorum = {self._engine.quorum:g} asks for more "
            f"({reasons or 'no answer'})"
        )

    def _read(self, messages: Iterator[tuple[int, Message]]) -> Iterator[ClientUpload]:
        for client, message in messages:
            received = self._broadcast.to(client)
            unreached = message.has_error() and message.error.code == ErrorCode.NODE_UNAVAILABLE
            if received is not None and not unreached:
                self._count(client, "down", received)
            if message.has_error():
                self._reject(client, message.error.reason or "unknown error")
                continue
            if client in self.metrics:
                self._reject(client, f"a second reply to round {self._plan.round}")
                continue
            try:
                reply = read_valid_reply(message.content, self._expected(client))
            except RejectedReplyError as error:
                if error.knowledge is not None:
                    self._count(client, "up", error.knowledge)
                self._reject(client, str(error))
                continue
            self.metrics[client] = reply.metrics
            self.rejected.pop(client, None)
            if reply.knowledge is not None:
                self._count(client, "up", reply.knowledge)
                self._vote(reply.knowledge)
                yield ClientUpload(client, reply.knowledge, self._num_examples[client])

    def _vote(self, knowledge: Knowledge) -> None:
        if isinstance(knowledge, Predictions):
            values = knowledge.values
            if self._votes is None:
                self._votes = VoteCounter(*values.shape)
            self._votes.add(values.argmax(-1))

    def _reject(self, client: int, reason: str) -> None:
        self.rejected[client] = reason
        self._event(
            {
                "round": self._plan.round,
                "client": client,
                "event": "rejected",
                "reason": reason,
            }
        )

    def _tell_of_retry(self, clients: Sequence[int], attempt: int) -> None:
        self._event(
            {
                "round": self._plan.round,
                "event": "round retried",
                "attempt": attempt,
                "reason": f"{self.valid} of {len(self._clients)} clients gave a usable answer; "
                f"asking {len(clients)} again",
            }
        )

    def _count(self, client: int, direction: str, knowledge: Knowledge) -> None:
        self.exchanged.append(
            {
                "round": self._plan.round,
                "client": client,
                "direction": direction,
                "kind": knowledge.kind,
                "bytes": knowledge.payload_bytes,
            }
        )


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
