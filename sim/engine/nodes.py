"""Which node each client is on, in Flower's own runtimes, where nodes come and go.

A client is a node that says so (``partition-id``). One that is not there, or does not answer, is
a lost client like any other: named, and left to the quorum. It changes nobody else's data.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedkd.data import FederatedData
from sim.adversity.faults import FaultPlan
from sim.keeping.identity import data_digest
from sim.keeping.provenance import Provenance, changes, code_of
from sim.keeping.records import package_versions
from sim.server.observers import Row
from sim.server.validation import LONGEST_TRACEBACK, without_codes
from sim.settings import Settings
from sim.wire.flower import SERVER_NODE_ID
from sim.wire.messages import (
    MISTAKE,
    Assignment,
    Introduction,
    Phase,
    Told,
    node_instruction,
    payload_records,
    read_introduction,
    take_word_of_lost_state,
)

_LOG = logging.getLogger("flwr")

_LONGEST_PAUSE_S = 2.0
"""Between two looks for replies; Flower's runtimes do not call back."""

_WORD_OF_WAITING_S = 10.0
"""How long nobody needs to be told that the run waits for nodes."""

_GONE = {
    ErrorCode.NODE_UNAVAILABLE: "its node is gone: no sign of life within two heartbeats",
    ErrorCode.MESSAGE_UNAVAILABLE: "no answer within engine.deadline_s = {deadline_s:g}",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "no answer within engine.deadline_s = {deadline_s:g}",
}
"""Errors that come from the SuperLink because a node said nothing, and what they mean."""


class NodesError(RuntimeError):
    """The runtime has no node that can be any of the run's clients."""


class Nodes:
    """The clients of a run as nodes of a Flower `Grid`.

    Nodes introduce themselves (`Introduction`) without anybody waiting for them, except before
    the first round and where too few are there for a quorum. Who came while a round went on takes
    part from the next one.

    Args:
        grid: of the runtime.
        settings: of the run; they travel to the nodes.
        data: what the server has loaded, and every node should have.
        event: is told of nodes that come, go, or are refused.
    """

    def __init__(
        self, grid: Grid, settings: Settings, data: FederatedData, event: Callable[[Row], None]
    ) -> None:
        self._grid = grid
        self._settings = settings
        self._event = event
        self._faults = FaultPlan(settings.faults, settings.seed)
        self._text = json.dumps(settings.to_table())
        self._ours = introduction(settings, data, 0)
        self._online: set[int] = set()
        self._node_of: dict[int, int] = {}
        self._came: dict[int, list[int]] = {}
        self._refused: dict[int, str] = {}
        self._introducing: dict[str, int] = {}
        self._partitions_said: set[int] = set()
        self._trained: dict[int, int] = {}
        self._mistaken: dict[Phase, set[int]] = {}
        self._lost: set[int] = set()
        self._round = 0

    def begin(self, round: int, clients: Sequence[int]) -> None:
        """Take in who came since the last round, and wait a while if too few clients are there.

        Args:
            round: about to be asked; 1-based.
            clients: who takes part in it.

        Raises:
            NodesError: before the first round, if no node can be any client.
        """
        first = not self._round
        self._round = round
        if first:
            clients = range(self._settings.clients.count)
        needed = len(clients) if first else self._settings.engine.quorum * len(clients)
        started = time.monotonic()
        pause = 0.1
        said = False
        while True:
            self._look()
            self._admit(late=not first)
            missing = [client for client in clients if client not in self._node_of]
            waited = time.monotonic() - started
            if len(clients) - len(missing) >= needed or self._hopeless():
                break
            if waited >= self._settings.nodes.wait_s:
                break
            if not said and waited >= _WORD_OF_WAITING_S:
                said = True
                _LOG.info(
                    "waiting for the nodes of clients %s, at most nodes.wait_s = %g seconds",
                    _listed(missing),
                    self._settings.nodes.wait_s,
                )
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        if first:
            if not self._node_of:
                raise NodesError(self._nobody())
            for client in missing:
                reason = f"no node said within nodes.wait_s = {self._settings.nodes.wait_s:g} "
                self._tell("absent", f"{reason}that its partition-id is {client}", client)

    def ask(
        self,
        phase: Phase,
        round: int,
        attempt: int,
        told: Iterable[tuple[int, Told]],
    ) -> Iterator[tuple[int, Message]]:
        """Send clients what they receive, and yield (client, reply) in client order.

        Args:
            phase: what they shall do.
            round: 1-based.
            attempt: how often this was asked in this round, this time included.
            told: (client, what it is told), in client order.
        """
        told = list(told)
        if attempt > 1:
            self.begin(round, [client for client, _ in told])
        else:
            self._look()
        answers: dict[int, Message] = {}
        waiting = self._send(phase, round, attempt, told, answers)
        allowed = self._settings.engine.deadline_s
        # The SuperLink keeps the deadline; this is for one that does not.
        until = time.monotonic() + allowed + 2 * _LONGEST_PAUSE_S
        pause = 0.1
        for client, _ in told:
            while client not in answers:
                for reply in self._grid.pull_messages(list(waiting)):
                    # Errors come from the SuperLink's own node: only this says whom they are about.
                    whose = waiting.pop(reply.metadata.reply_to_message_id, None)
                    if whose is not None:
                        answers[whose] = self._understood(whose, phase, round, reply)
                if client in answers:
                    break
                if time.monotonic() > until:
                    self._node_of.pop(client, None)
                    reason = f"no answer within engine.deadline_s = {allowed:g}"
                    answers[client] = _error(ErrorCode.MESSAGE_UNAVAILABLE, reason)
                    break
                time.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_PAUSE_S)
            yield client, answers.pop(client)

    def take_lost(self) -> tuple[int, ...]:
        """Return who has said since the last call that it no longer had its state, in order."""
        lost, self._lost = tuple(sorted(self._lost)), set()
        return lost

    def _send(
        self,
        phase: Phase,
        round: int,
        attempt: int,
        told: Sequence[tuple[int, Told]],
        answers: dict[int, Message],
    ) -> dict[str, int]:
        """Send the messages; return whose answer to which is waited for."""
        # Clients that receive one object share its records: it is encoded once.
        records = {id(each.payload): payload_records(each.payload) for _, each in told}
        sent: dict[int, Message] = {}
        for client, each in told:
            node = self._node_of.get(client)
            if self._faults.drops_out(phase, round, client, attempt):
                answers[client] = _error(ErrorCode.NODE_UNAVAILABLE, "dropped out (faults)")
            elif node is None:
                answers[client] = _error(ErrorCode.NODE_UNAVAILABLE, "it has no node now")
            else:
                assignment = Assignment(self._text, self._trained.get(client, 0))
                content = node_instruction(
                    round, attempt, dict(records[id(each.payload)]), each, assignment
                )
                sent[client] = Message(
                    content,
                    node,
                    phase,
                    ttl=self._settings.engine.deadline_s,
                    group_id=str(round),
                )
        taken = set(self._grid.push_messages(list(sent.values()))) if sent else set()
        waiting = {}
        for client, message in sent.items():
            if message.metadata.message_id in taken:
                waiting[message.metadata.message_id] = client
            else:
                self._node_of.pop(client)
                answers[client] = _error(ErrorCode.NODE_UNAVAILABLE, "its node has left")
        return waiting

    def _understood(self, client: int, phase: Phase, round: int, reply: Message) -> Message:
        """Note what a reply says about its node."""
        if reply.has_error():
            if reply.error.code == MISTAKE:
                return self._mistake(client, phase, round, reply)
            if reply.error.code not in _GONE:
                return reply
            self._node_of.pop(client, None)
            reason = self._reason_gone(reply.error)
            # Not NODE_UNAVAILABLE: it was asked, and what it received was sent.
            return _error(ErrorCode.MESSAGE_UNAVAILABLE, reason)
        self._mistaken.setdefault(phase, set()).discard(client)
        if take_word_of_lost_state(reply.content):
            self._lost.add(client)
            before = self._trained.get(client, 0)
            self._tell(
                "state lost",
                f"its node was restarted and no longer had the state of round {before}: the "
                "client starts anew from the weights that the seed gives "
                "(nodes.restarted: accept)",
                client,
            )
        if phase == "train":
            self._trained[client] = round
        return reply

    def _mistake(self, client: int, phase: Phase, round: int, reply: Message) -> Message:
        """Take the word of a node that an author's code failed for no more than it is.

        All nodes run the same code, so a mistake in it shows on most of them. One node that says so
        may be broken, or lie to end the run: it is left out like any other that failed.
        """
        # By phase: what fails in training may judge a client well.
        mistaken = self._mistaken.setdefault(phase, set())
        mistaken.add(client)
        there = {*self._node_of, *mistaken}
        if 2 * len(mistaken) > len(there):
            return reply
        told = reply.error.reason or "it does not say how"
        _LOG.error(
            "round %d, client %d: its node reports a mistake of an algorithm's or a model's own "
            "code. %d of %d nodes do; the run ends when more than half do:\n%s",
            round,
            client,
            len(mistaken),
            len(there),
            without_codes(told[-LONGEST_TRACEBACK:]),
        )
        return _error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, told)

    # -- who is there ----------------------------------------------------------------------

    def _look(self) -> None:
        """Ask new nodes who they are, and take in who has said so."""
        self._online = {int(node) for node in self._grid.get_node_ids()}
        self._refused = {node: why for node, why in self._refused.items() if node in self._online}
        for client, nodes in self._came.items():
            self._came[client] = [node for node in nodes if node in self._online]
        if self._introducing:
            for reply in self._grid.pull_messages(list(self._introducing)):
                node = self._introducing.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    self._introduce(node, reply)
        known = {
            *self._node_of.values(),
            *self._introducing.values(),
            *self._refused,
            *(node for nodes in self._came.values() for node in nodes),
        }
        messages = {
            node: Message(
                node_instruction(0, 1, {}, Told(), Assignment(self._text)),
                node,
                "query",
                ttl=self._settings.engine.deadline_s,
            )
            for node in sorted(self._online - known)
        }
        if messages:
            taken = set(self._grid.push_messages(list(messages.values())))
            for node, message in messages.items():
                if message.metadata.message_id in taken:
                    self._introducing[message.metadata.message_id] = node

    def _introduce(self, node: int, reply: Message) -> None:
        """Take a node in, or say why not."""
        if reply.has_error():
            reason = reply.error.reason or "unknown error"
            if reply.error.code == ErrorCode.CLIENT_APP_CRASHED:
                # Flower calls it so, too, where a process takes half a minute to start.
                self._tell("node asked again", f"node {node}: {reason}")
            elif reply.error.code not in _GONE:
                self._refuse(node, reason)
            # One that is gone again is asked again when it is back.
            return
        try:
            said = read_introduction(reply.content)
        except ValueError as error:
            self._refuse(node, str(error))
            return
        self._partitions_said.add(said.partitions)
        problem = self._problem(said)
        if problem:
            self._refuse(node, problem)
            return
        client = said.partition
        if said.versions != self._ours.versions:
            self._tell(
                "other versions",
                f"its node {node} has {said.versions}, the server has "
                f"{self._ours.versions}: the same run elsewhere may give other bits",
                client,
            )
        there = [self._node_of.get(client), *self._came.get(client, [])]
        others = [str(other) for other in there if other in self._online]
        if others:
            self._tell(
                "second node",
                f"node {node} says that its partition-id is {client}, which node {others[0]} "
                "says too; it is asked only when the other is gone",
                client,
            )
        self._came.setdefault(client, []).append(node)

    def _problem(self, said: Introduction) -> str:
        """Return what keeps a node from being one of the run's clients."""
        count = self._settings.clients.count
        if said.partitions != count:
            return (
                f"it has num-partitions={said.partitions}, but clients.count is {count}: "
                f"they must be the same (clients.count={said.partitions} in overrides; or "
                f"{count} in each node's --node-config; or, in the simulation runtime, flwr "
                f"federation simulation-config --num-supernodes {count})"
            )
        if not 0 <= said.partition < count:
            return (
                f"its partition-id must be 0 to {count - 1} (clients.count is {count}), "
                f"got {said.partition}"
            )
        if said.data != self._ours.data:
            return (
                "its data is not what the server has (data.source "
                f"{self._settings.data.source!r} is read on each machine)"
            )
        if said.code != self._ours.code:
            try:
                other = str(changes(_code(self._ours), _code(said)))
            except (ValueError, AttributeError):
                other = "it does not say which code it has"
            return f"its code is not the server's: {other}"
        return ""

    def _refuse(self, node: int, reason: str) -> None:
        self._refused[node] = reason
        self._tell("node refused", f"node {node}: {reason}")

    def _admit(self, *, late: bool) -> None:
        """Give the clients that have no node one that came for them."""
        for client, nodes in sorted(self._came.items()):
            if not nodes or self._node_of.get(client) in self._online:
                continue
            self._node_of[client] = nodes.pop(0)
            if late:
                self._tell("joined", f"its node {self._node_of[client]} is there", client)

    def _hopeless(self) -> bool:
        """Tell whether all nodes that they say there are have come, and none can take part."""
        return (
            bool(self._refused)
            and not self._node_of
            and not self._introducing
            and len(self._refused)
            >= min(self._partitions_said, default=self._settings.clients.count)
        )

    def _nobody(self) -> str:
        if self._refused:
            node, reason = next(iter(self._refused.items()))
            return f"no node can take part: node {node}: {reason}"
        waiting = f"within nodes.wait_s = {self._settings.nodes.wait_s:g} seconds"
        if self._introducing:
            nodes = _listed(sorted(self._introducing.values()))
            return f"no node has said which client it is {waiting} (nodes {nodes} were asked)"
        return f"no node came {waiting}"

    def _reason_gone(self, error: Error) -> str:
        return _GONE[error.code].format(deadline_s=self._settings.engine.deadline_s)

    def _tell(self, event: str, reason: str, client: int | None = None) -> None:
        about = {} if client is None else {"client": client}
        self._event({"round": self._round, **about, "event": event, "reason": reason})


def introduction(settings: Settings, data: FederatedData, partition: int) -> Introduction:
    """Return what a process says of itself that has loaded these data."""
    return Introduction(
        partition=partition,
        partitions=settings.clients.count,
        data=data_digest(data),
        code=json.dumps(code_of(settings), sort_keys=True),
        versions=versions(),
    )


def versions() -> str:
    """Return the versions of the packages that decide bits, in words."""
    return ", ".join(
        f"{package} {version}"
        for package, version in package_versions().items()
        if package not in ("flwr", "ray")
    )


def _code(said: Introduction) -> Provenance:
    return Provenance({}, dict(json.loads(said.code).items()), {})


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _error(code: int, reason: str) -> Message:
    """Return an answer that nobody gave."""
    return Message(Error(code, reason), reply_to=Message(RecordDict(), SERVER_NODE_ID, "train"))
