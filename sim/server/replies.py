"""A round's replies as the aggregator sees them: validated uploads, one after the other."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.common.constant import ErrorCode

from fedkd.exchange.budget import BITS, NO_BUDGET, Purse
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Orders
from fedkd.exchange.pipeline import BadPayloadError, ServerTurn
from fedkd.exchange.views import Upload
from fedkd.metrics.diversity import PeerAnswers, VoteCounter
from sim.devices.clock import deadline_for, late_seconds
from sim.devices.effort import Effort
from sim.server.observers import Row
from sim.server.outbox import Outbox
from sim.server.validation import Expected, RejectedReplyError, valid_answer
from sim.settings import EngineSettings
from sim.wire.messages import ClientReply
from strategies.contract import Round

Ask = Callable[[Sequence[int], int], Iterator[tuple[int, Message]]]
"""Asks clients, the so many-th time in this round, and yields (client, reply) in client order."""


class QuorumError(RuntimeError):
    """Too few clients gave a usable answer to a round, or too few could be judged."""


class TooLateError(QuorumError):
    """Too few clients kept ``clock.deadline_s``, and would not if they were asked again."""


@dataclass(frozen=True, slots=True)
class Quorum:
    """How many of those who are asked have to answer, and what is done where fewer do.

    Attributes:
        round: 1-based.
        asked: how many clients.
        what: what a client is counted for, such as ``gave a usable answer``.
        engine: says how many, and what to do below.
    """

    round: int
    asked: int
    what: str
    engine: EngineSettings

    def attempts(self) -> range:
        """Return the numbers of the attempts: who fails is asked so often."""
        retried = self.engine.below_quorum == "retry"
        return range(1, 2 + (self.engine.round_retries if retried else 0))

    def is_reached(self, count: int) -> bool:
        """Tell whether so many are enough."""
        return count >= self.engine.quorum * self.asked

    def retry(self, count: int, attempt: int) -> Row:
        """Return the event of asking the others again."""
        return {
            "round": self.round,
            "event": "round retried",
            "attempt": attempt,
            "reason": f"{count} of {self.asked} clients {self.what}; "
            f"asking {self.asked - count} again",
        }

    def error(self, count: int, reasons: Mapping[int, str]) -> QuorumError:
        """Return the error of a count below the quorum, with the first clients' reasons."""
        late = sorted(filter(None, map(late_seconds, reasons.values())))
        if late and len(late) == len(reasons) and self.asked == count + len(late):
            return self._too_late(count, late)
        told = "; ".join(
            f"client {client}: {_last_line(reason)}" for client, reason in list(reasons.items())[:3]
        )
        return QuorumError(
            f"round {self.round}: {count} of {self.asked} clients {self.what}, "
            f"engine.quorum = {self.engine.quorum:g} asks for more ({told or 'no answer'})"
        )

    def _too_late(self, count: int, late: Sequence[float]) -> TooLateError:
        """Say which deadline would do.

        Args:
            count: how many kept it.
            late: after how many simulated seconds each of the others would have been done, sorted.
        """
        missing = math.ceil(self.engine.quorum * self.asked) - count
        enough, all_of_them = deadline_for(late[max(missing, 1) - 1]), deadline_for(late[-1])
        who = "the others" if count else "they"
        return TooLateError(
            f"round {self.round}: {count} of {self.asked} clients were done by clock.deadline_s, "
            f"engine.quorum = {self.engine.quorum:g} asks for more: {who} take {late[0]:.4g} to "
            f"{late[-1]:.4g} simulated seconds; clock.deadline_s={enough:g} is enough for the "
            f"quorum of this round, {all_of_them:g} for all; later rounds may take longer"
        )


class Replies:
    """Iterating asks the clients of a round and yields their uploads.

    Aggregation so overlaps with training; what else the replies say is noted in passing. Where
    fewer answers are usable than the quorum asks for and ``engine.below_quorum`` is ``retry``,
    those who failed are asked again, and their uploads come last, in client order.

    Args:
        round: of the clients.
        clients: who is asked, sorted.
        outbox: what each of them is told and has to answer.
        turn: what arrives passes it.
        ask: asks them.
        num_examples: private rows of each client.
        engine: says what to do below the quorum.
        deadline_s: ``clock.deadline_s``.
        event: is told of each reply that is left out, of late ones at the end of an attempt, and
            all together where nobody was in time.
        delays_vary: whether who is late may be in time when it is asked again.
        left_out: clients whose answers count for nothing (``counterfactual.without``). They are
            asked, and what comes of them is opened, as ever, so that codecs' memories, the clock
            and a budget go on as in the run that is repeated; then it is dropped, as a lost reply
            is. They are never asked again, no event tells of them, and none of them fails a quorum.
        purse: what may be spent under a budget; None: there is none.

    Attributes:
        failure: what ended the stream before its time.
        simulated_s: how long clients took by the simulated clock, if there is one. An attempt
            lasts as long as the slowest client that counts; as long as ``clock.deadline_s`` where
            somebody who was asked has not answered by then.
        unseen_bytes: what the clients that are left out sent and received.
        effort: of the clients that gave a usable answer that counts.
    """

    def __init__(
        self,
        *,
        round: Round,
        clients: Sequence[int],
        outbox: Outbox,
        turn: ServerTurn,
        ask: Ask,
        num_examples: Sequence[int],
        engine: EngineSettings,
        deadline_s: float | None,
        event: Callable[[Row], None],
        purse: Purse | None = None,
        delays_vary: bool = False,
        left_out: Collection[int] = (),
    ) -> None:
        self._left_out = frozenset(left_out).intersection(clients)
        self.unseen_bytes = 0
        self._purse = purse
        self._delays_vary = delays_vary
        self._round = round
        self._clients = clients
        self._outbox = outbox
        self._turn = turn
        self._num_examples = num_examples
        self._quorum = Quorum(round.number, len(clients), "gave a usable answer", engine)
        self._deadline_s = deadline_s
        self._event = event
        self._votes: VoteCounter | None = None
        self._answers: PeerAnswers | None = None
        self._uploads = self._watched(self._all_uploads(ask))
        self.rejected: dict[int, str] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self.exchanged: list[Row] = []
        self.failure: BaseException | None = None
        self.simulated_s = 0.0
        self.effort = Effort()

    def __iter__(self) -> Iterator[Upload]:
        return self._uploads

    def _watched(self, uploads: Iterator[Upload]) -> Iterator[Upload]:
        """Note what ends the stream, which is no mistake of whoever reads it."""
        try:
            yield from uploads
        except Exception as error:
            self.failure = error
            raise

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
        """Clients that gave a usable answer so far; who is left out fails nobody."""
        return len(self.metrics.keys() | self._left_out)

    def of_peers(self) -> Row:
        """Return how much peers' answers differ on public rows, and how undecided they are.

        None where nobody sent predictions.
        """
        votes, answers = self._votes, self._answers
        return {
            "peer_disagreement": None if votes is None else votes.disagreement(),
            "peer_entropy": None if answers is None else answers.peer_entropy(),
            "peer_diversity": None if answers is None else answers.diversity(),
        }

    def _all_uploads(self, ask: Ask) -> Iterator[Upload]:
        clients = self._clients
        gathers = self._turn.gathers(clients)
        gathered: dict[int, Upload] = {}
        told: Sequence[Upload] = ()
        for attempt in self._quorum.attempts():
            if attempt > 1:
                self._event(self._quorum.retry(self.valid, attempt))
            read = self._read(ask(clients, attempt))
            if gathers:
                gathered |= {upload.client: upload for upload in read}
                told = self._with_lies(gathered)
            else:
                yield from map(self._voted, read)
            if self._quorum.is_reached(self.valid):
                yield from map(self._voted, told)
                return
            error = self._quorum.error(self.valid, self.rejected)
            if isinstance(error, TooLateError) and not self._delays_vary:
                raise error
            clients = [
                client
                for client in clients
                if client not in self.metrics and client not in self._left_out
            ]
            if self._purse is not None:
                clients = self._purse.again(clients)
        raise self._quorum.error(self.valid, self.rejected)

    def _with_lies(self, gathered: dict[int, Upload]) -> list[Upload]:
        """Return the answers with those that an adversary replaces.

        Args:
            gathered: all good answers so far; those whose lie is refused are taken out.
        """
        lies = self._turn.lies({client: each.payload for client, each in gathered.items()})
        told = dict(gathered)
        for client, lie in lies.items():
            asked = self._outbox.asked(client)
            try:
                if asked is not None:
                    self._turn.check_lie(lie, asked)
            except BadPayloadError as error:
                del gathered[client], told[client], self.metrics[client]
                self.rejected[client] = RejectedReplyError(str(error)).told
                self._tell_of(client)
            else:
                told[client] = replace(told[client], payload=lie)
        return list(told.values())

    def _read(self, messages: Iterator[tuple[int, Message]]) -> Iterator[Upload]:
        slowest, waits = 0.0, False
        late: dict[int, str] = {}
        asked = 0
        for client, message in messages:
            asked += client not in self._left_out
            unreached = message.has_error() and message.error.code == ErrorCode.NODE_UNAVAILABLE
            waits = waits or (message.has_error() and not unreached)
            if not unreached:
                told = self._outbox.told[client]
                for piece in (told.payload, told.orders):
                    if piece is not None:
                        self._count(client, "down", piece)
            try:
                reply, payload = self._opened(client, message)
            except RejectedReplyError as error:
                if error.memory_lost:
                    self._turn.forget(client)
                if error.payload is not None:
                    self._count(client, "up", error.payload)
                if client in self._left_out:
                    continue
                self.rejected[client] = error.told
                if late_seconds(error.told) is None:
                    self._tell_of(client)
                else:
                    late[client] = error.told
                continue
            metrics = dict(reply.metrics)
            taken = Effort.taken(metrics)
            if client not in self._left_out:
                self.effort = self.effort.plus(taken)
            self.metrics[client] = metrics
            slowest = max(slowest, reply.metrics.get("simulated_s", 0.0))
            self.rejected.pop(client, None)
            if reply.payload is not None:
                self._count(client, "up", reply.payload)
            if payload is not None and client not in self._left_out:
                yield Upload(client, payload, self._num_examples[client])
        if 1 < len(late) == asked:
            self._tell_of_all(late)
        else:
            for client in late:
                self._tell_of(client)
        self.simulated_s += self._deadline_s if waits and self._deadline_s else slowest

    def _opened(self, client: int, message: Message) -> tuple[ClientReply, Payload | None]:
        """Return a reply, and what it carries, decoded.

        Raises:
            RejectedReplyError: it cannot be used.
        """
        asked = self._outbox.asked(client)
        expected = Expected(
            round=self._round.number,
            asked=None if asked is None else self._turn.asked(asked, client),
            any_loss=self._turn.protects,
            checks_payload=False,
        )
        reply = valid_answer(message, expected, again=client in self.metrics)
        try:
            return reply, self._turn.receive(client, reply.payload, asked)
        except BadPayloadError as error:
            raise RejectedReplyError(str(error), reply.payload) from error

    def _voted(self, upload: Upload) -> Upload:
        """Count the classes of an upload, add up its soft labels, and return it."""
        federation = self._round.federation
        size = federation.public_size, federation.num_classes
        votes, answers = upload.payload.votes(), upload.payload.answers()
        if votes is not None:
            rows, classes = votes
            self._votes = self._votes or VoteCounter(*size)
            self._votes.add(classes, rows)
        if answers is not None:
            rows, scores, logits = answers
            self._answers = self._answers or PeerAnswers(*size)
            self._answers.add(scores, rows, from_logits=logits)
        return upload

    def _tell_of(self, client: int) -> None:
        self._event(
            {
                "round": self._round.number,
                "client": client,
                "event": "rejected",
                "reason": self.rejected[client],
            }
        )

    def _tell_of_all(self, late: Mapping[int, str]) -> None:
        """Tell in one event that nobody was in time: each reason says nearly the same."""
        seconds = sorted(filter(None, map(late_seconds, late.values())))
        self._event(
            {
                "round": self._round.number,
                "event": "all rejected",
                "clients": sorted(late),
                "reason": f"late: all {len(late)} clients take {seconds[0]:.4g} to "
                f"{seconds[-1]:.4g} simulated seconds, clock.deadline_s = {self._deadline_s:g}",
            }
        )

    def _count(self, client: int, direction: str, payload: Payload) -> None:
        if client in self._left_out:
            self.unseen_bytes += payload.payload_bytes
            return
        self.exchanged.append(
            {
                "round": self._round.number,
                "client": client,
                "direction": direction,
                "kind": payload.label,
                "bytes": payload.payload_bytes,
                **self._bits(client, direction, payload),
            }
        )

    def _bits(self, client: int, direction: str, payload: Payload) -> Row:
        """Return the bits of a number under a budget; orders have none."""
        levels = self._turn.levels.get(client, NO_BUDGET)
        level = levels.up if direction == "up" else levels.down
        return {} if level is None or isinstance(payload, Orders) else {"bits": BITS[level]}


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
