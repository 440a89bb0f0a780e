"""The exchange: what happens to a payload between the client that makes it and the server.

Client: ``adversary`` -> ``release`` -> ``encode``. Server: ``decode`` -> ``check`` -> ``adversary``
(one whose clients know the others' answers; ``check`` of what it sends) -> ``view``, or
``release`` of the mean where the server is trusted -> aggregate -> ``encode``, and the client
decodes what comes down. `Stages` says which.

At a client, once a call::

    turn = ClientTurn(stages, seed=seed, rounds=rounds, round=round, attempt=attempt,
                      clients={client: Standing(arrays, since), ...})
    received = turn.open({client: payload or None, ...})    # by client; equal objects stay equal
    ...                                                     # the algorithm's client half
    sent = turn.send({client: honest answer, ...})          # what leaves
    arrays = turn.kept()                                    # by client, for its state; often {}

At the server, once a round, `ExchangeState` being part of the run's boundary::

    turn = ServerTurn(stages, before, seed=seed, rounds=rounds, round=round)
    outgoing = turn.send(client, key, make, asked=asked, attempt=attempt)   # .payload, .since
    payload = turn.receive(client, sent, asked)             # raises BadPayloadError
    lies = turn.lies({client: payload, ...})                # where turn.gathers(clients)
    turn.check_lie(lie, asked)                              # raises BadPayloadError
    uploads = turn.view(uploads, sums=sums, group=group)    # for the aggregator
    after = turn.committed()                                # or turn.skipped()

To judge clients a new `ServerTurn` of ``turn.committed()`` sends without asking (``asked=None``);
its ``skipped()`` is the state after that. A `ClientTurn` that judges opens and keeps nothing.

What a codec remembers stays in step because the server's word is final. The server's memory of a
client moves when an answer of that client was decoded, checked and its round is complete; with it
goes the number of the round, ``since``. The client keeps what it had before its last call beside
what it has after it, and goes on from the one whose round the server names. So an answer that got
lost, a second attempt, a round that is left out and a client that was away leave both at the same
memory, also where a client's state cannot be taken back. A client that lost its state encodes from
nothing, and says so; one that cannot decode raises `MemoryLostError`: then `ServerTurn.forget` it.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fedkd.exchange.adversaries import Adversary, NoAdversary, Seen
from fedkd.exchange.budget import EXACT, LADDER, NO_BUDGET, BudgetError, Levels, Share, best_within
from fedkd.exchange.codecs import Codec, Float32
from fedkd.exchange.ledger import Cost, Ledger, OpenLedger
from fedkd.exchange.mechanisms import WantedNoise
from fedkd.exchange.mechanisms.sensitivity import acceptable, form_of, form_of_payload
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.release import (
    Form,
    NoRelease,
    Occasion,
    PrivateSteps,
    ReleaseRule,
    Where,
)
from fedkd.exchange.spending import PrivacyBudget
from fedkd.exchange.values import Arrays, Value, digest, flatten
from fedkd.exchange.views import All, Sum, Upload, View, Weighting
from fedkd.randomness import Purpose, generator_for

PREFIX = "exchange/"
"""What the names of all arrays begin with that a client keeps for its codecs."""

_ROUNDS = f"{PREFIX}rounds"
_UP, _DOWN = 0, 1


class BadPayloadError(ValueError):
    """What came cannot be used; the text says why, in a few words."""


class MemoryLostError(RuntimeError):
    """A client does not remember what it needs to decode what came."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What a payload passes.

    Attributes:
        up: codec of what clients send.
        down: codec of what the server sends.
        view: what the server sees of the answers.
        release: how what is released is protected.
        where: who protects it: each client its answer, or a trusted server the mean of all.
        delta: of the guarantee.
        budget: that no client's releases may exceed; None: there is none.
        adversary: who sends something else, or learns from something else.
        controlled: its clients.
    """

    up: Codec = field(default_factory=Float32)
    down: Codec = field(default_factory=Float32)
    view: View = field(default_factory=All)
    release: ReleaseRule = field(default_factory=NoRelease)
    where: Where = "client"
    delta: int | float = 1e-5
    budget: PrivacyBudget | None = None
    adversary: Adversary = field(default_factory=NoAdversary)
    controlled: frozenset[int] = frozenset()

    @property
    def remember(self) -> bool:
        """Whether a codec has a memory, so that clients' states hold arrays of it."""
        return self.up.remembers or self.down.remembers

    def check(
        self,
        *,
        up: Iterable[type[Payload]],
        down: Iterable[type[Payload]],
        sums: Weighting | None,
    ) -> None:
        """Refuse, before any worker starts, what cannot work with an algorithm.

        Args:
            up: kinds that clients may send.
            down: kinds that the server may send.
            sums: how the algorithm weights clients in a mean, where it needs no more than that.

        Raises:
            ValueError: names the setting and what would work.
        """
        up, down = list(up), list(down)
        reasons = [
            *(("exchange.up", self.up.refuses(kind)) for kind in up),
            *(("exchange.down", self._refused_down(kind)) for kind in down),
            *(("exchange.view", self.view.refuses(kind, sums)) for kind in up),
            *(("privacy.mechanism", self.release.refuses(kind, self.where)) for kind in up),
            ("exchange.up", self._unwritable()),
            ("adversary", self._nothing_to_lie_about(up)),
        ]
        for setting, reason in reasons:
            if reason is not None:
                raise ValueError(f"{setting} {self._kind_of(setting)}: {reason}")

    def check_asked(self, asked: Asked) -> None:
        """The same for what is asked for, whose parts are known.

        Raises:
            ValueError: names the setting and what would work.
        """
        try:
            self.up.asked(asked)
        except ValueError as error:
            raise ValueError(f"exchange.up {self.up.kind}: {error}") from error
        reason = self.view.refuses_asked(asked)
        if reason is not None:
            raise ValueError(f"exchange.view {self.view.kind}: {reason}")
        reason = self.release.refuses_asked(asked)
        if reason is not None:
            raise ValueError(f"privacy.mechanism {self.release.kind}: {reason}")
        reason = self.adversary.refuses_asked(asked)
        if reason is not None:
            raise ValueError(f"adversary {self.adversary.kind}: {reason}")

    def _nothing_to_lie_about(self, up: Sequence[type[Payload]]) -> str | None:
        """Return why an adversary's lies cannot reach anybody."""
        if not up and self.adversary.lies:
            return "clients send nothing that it could replace; use an algorithm whose clients do"
        reasons = [self.adversary.refuses(kind) for kind in up]
        return reasons[0] if reasons and all(reasons) else None

    def _unwritable(self) -> str | None:
        """Return why a codec cannot write what is released at a client."""
        known = self.release.codecs
        if self.where != "client" or not known or self.up.kind in known:
            return None
        return (
            f"it cannot write what privacy.mechanism {self.release.kind} releases, which are no "
            f"distributions; use one of {', '.join(sorted(known))}"
        )

    def _refused_down(self, kind: type[Payload]) -> str | None:
        if kind.is_added and not self.down.exact:
            return (
                f"clients add every {kind.kind} to what they have, so what is rounded on its way "
                "would part them from the server more and more; use float32, or another codec for "
                "exchange.up alone"
            )
        if self.down.follows:
            return (
                "it codes what changed since what came down, and nothing came before that; use "
                "float32, float16 or int8, and this codec for exchange.up"
            )
        return self.down.refuses(kind)

    def _kind_of(self, setting: str) -> str:
        stages = {
            "exchange.up": self.up,
            "exchange.down": self.down,
            "exchange.view": self.view,
            "privacy.mechanism": self.release,
            "adversary": self.adversary,
        }
        return stages[setting].kind


# -- what is remembered --------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembered(Value):
    """What codecs remember of one client at the server.

    Attributes:
        round: that its last good answer belongs to.
        up: memory of the codec of what it sends.
        down: memory of the codec of what it is sent.
    """

    round: int
    up: Mapping[str, np.ndarray]
    down: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ExchangeState(Value):
    """What the exchange remembers between two rounds; part of a run's boundary.

    Attributes:
        changed: the last round that was complete; what the server sends is of that round.
        clients: what codecs remember, of those of whom they do.
        ledger: what was released so far.
        spent: bytes that were exchanged so far, both ways.
    """

    changed: int = 0
    clients: Mapping[int, Remembered] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    spent: int = 0


class Standing(NamedTuple):
    """Where the exchange with a client stands when it is called.

    Attributes:
        arrays: that it keeps, by name; others than ours are passed over.
        since: the round that the server names.
        levels: that the server has chosen under a budget.
        releases: planned of it in the whole run.
    """

    arrays: Mapping[str, np.ndarray] = MappingProxyType({})
    since: int = 0
    levels: Levels = NO_BUDGET
    releases: int = 1


@dataclass(frozen=True)
class _Snapshot:
    """A client's memories after one round."""

    up: Arrays = field(default_factory=dict)
    down: Arrays = field(default_factory=dict)


def _snapshots_in(arrays: Mapping[str, np.ndarray]) -> dict[int, _Snapshot]:
    if _ROUNDS not in arrays:
        return {}
    found = {int(round): _Snapshot() for round in arrays[_ROUNDS]}
    for name, array in arrays.items():
        if name.startswith(PREFIX) and name != _ROUNDS:
            round, side, inner = name.removeprefix(PREFIX).split("/", 2)
            snapshot = found[int(round)]
            (snapshot.up if side == "up" else snapshot.down)[inner] = array
    return found


def _arrays_of(snapshots: Mapping[int, _Snapshot]) -> Arrays:
    arrays = {_ROUNDS: np.array(sorted(snapshots), np.int64)}
    for round, snapshot in snapshots.items():
        for side, memory in (("up", snapshot.up), ("down", snapshot.down)):
            arrays |= {f"{PREFIX}{round}/{side}/{name}": array for name, array in memory.items()}
    return arrays


def _arrays_in(payload: Payload | None) -> Arrays:
    return {} if payload is None else flatten(payload).arrays


# -- the client's side ---------------------------------------------------------------------------


class ClientTurn:
    """One call of clients, from what they receive to what they send.

    Args:
        stages: of the run.
        seed: of the run.
        round: of the call, 1-based.
        attempt: the so many-th in this round.
        clients: who is called, and where the exchange with each stands.
    """

    def __init__(
        self,
        stages: Stages,
        *,
        seed: int,
        round: int,
        attempt: int,
        clients: Mapping[int, Standing],
    ) -> None:
        self._stages = stages
        self._seed = seed
        self._round = round
        self._attempt = attempt
        self._since = {client: standing.since for client, standing in clients.items()}
        self._levels = {client: standing.levels for client, standing in clients.items()}
        self._releases = {client: standing.releases for client, standing in clients.items()}
        self._before: dict[int, dict[int, _Snapshot]] = {}
        if stages.remember:
            self._before = {c: _snapshots_in(standing.arrays) for c, standing in clients.items()}
        self._after = {client: self._snapshot(client) or _Snapshot() for client in self._before}
        self._received: dict[int, Payload | None] = {}

    def open(self, received: Mapping[int, Payload | None]) -> dict[int, Payload | None]:
        """Decode what came down.

        Clients that received one object get one object, unless the codec has a memory.

        Raises:
            MemoryLostError: a client has lost what it needs for that.
        """
        opened: dict[int, Payload | None] = {}
        shared: dict[int, Payload] = {}
        for client, sent in received.items():
            level = self._levels.get(client, NO_BUDGET).down
            codec = self._stages.down if level is None else LADDER[level]
            if sent is None:
                opened[client] = None
            elif codec.remembers:
                opened[client] = self._decoded(client, sent)
            else:
                if id(sent) not in shared:
                    shared[id(sent)] = codec.decode(sent, {})[0]
                opened[client] = shared[id(sent)]
        self._received |= opened
        return opened

    def send(self, honest: Mapping[int, Payload | None]) -> dict[int, Payload | None]:
        """Return what leaves each client.

        Args:
            honest: what the algorithm's client half returned, by client.
        """
        answers = {client: payload for client, payload in honest.items() if payload is not None}
        answers |= self._instead(answers)
        sent: dict[int, Payload | None] = dict.fromkeys(honest)
        for client, answer in answers.items():
            payload = answer
            if self._stages.where == "client":
                payload = self._released(client, payload)
            elif isinstance(self._stages.release, WantedNoise):
                # No honest answer is refused: who is in the mean must tell of nobody's rows.
                payload = acceptable(payload)
            sent[client] = self._encoded(client, payload)
        return sent

    def kept(self) -> dict[int, Arrays]:
        """Return the arrays that each client keeps from now on, in place of those of before."""
        return {
            client: _arrays_of(
                {r: s for r, s in before.items() if r == self._since[client]}
                | {self._round: self._after[client]}
            )
            for client, before in self._before.items()
        }

    def _snapshot(self, client: int) -> _Snapshot | None:
        """Return the memories that the server goes on from; None: they are lost."""
        since = self._since[client]
        return _Snapshot() if since == 0 else self._before[client].get(since)

    def _decoded(self, client: int, sent: Payload) -> Payload:
        snapshot = _Snapshot()
        since = sent.since if isinstance(sent, Encoded) else 0
        if since:
            held = self._snapshot(client) if since == self._since[client] else None
            if held is None:
                raise MemoryLostError(
                    f"client {client} has no memory of round {since}, which "
                    f"exchange.down {self._stages.down.kind} needs to decode what came"
                )
            snapshot = held
        payload, memory = self._stages.down.decode(sent, snapshot.down)
        self._after[client] = replace(self._after[client], down=memory)
        return payload

    def _instead(self, honest: Mapping[int, Payload]) -> dict[int, Payload]:
        stages = self._stages
        if stages.adversary.together or not stages.adversary.lies_in(self._round):
            return {}
        replaced: dict[int, Payload] = {}
        for client in sorted(stages.controlled & honest.keys()):
            received = self._received.get(client)
            seen = Seen(
                round=self._round,
                own={client: honest[client]},
                received={} if received is None else {client: received},
            )
            rng = self._rng(Purpose.ADVERSARY, client)
            replaced |= _replaced(stages.adversary, seen, rng)
        return replaced

    def _released(self, client: int, payload: Payload) -> Payload:
        rule = self._stages.release
        if isinstance(rule, NoRelease):
            return payload
        occasion = Occasion(
            where="client",
            round=self._round,
            releases=self._releases[client],
            delta=self._stages.delta,
            form=form_of_payload(payload),
        )
        bounded = rule.bounded(payload)
        # Of another answer other noise: two answers with one noise would give their difference.
        rng = self._rng(Purpose.RELEASE, client, told_apart(bounded))
        return rule.release(bounded, occasion, rng)

    def _encoded(self, client: int, payload: Payload) -> Payload | None:
        levels = self._levels.get(client, NO_BUDGET)
        if levels.up is not None:
            rng = self._rng(Purpose.CODEC, client)
            written = LADDER[levels.up].encode(payload, {}, rng)[0]
            return written if written.payload_bytes <= levels.most_bytes else None
        codec = self._stages.up
        if isinstance(codec, Float32):
            return payload
        rng = self._rng(Purpose.CODEC, client)
        if codec.follows:
            return codec.encode(payload, _arrays_in(self._received.get(client)), rng)[0]
        if not codec.remembers:
            return codec.encode(payload, {}, rng)[0]
        held = self._snapshot(client)
        sent, memory = codec.encode(payload, {} if held is None else held.up, rng)
        self._after[client] = replace(self._after[client], up=memory)
        if isinstance(sent, Encoded):
            return replace(sent, since=0 if held is None else self._since[client])
        return sent

    def _rng(self, purpose: Purpose, client: int, *more: int) -> np.random.Generator:
        # Of each attempt its own: noise that comes twice under two answers can be taken off.
        return generator_for(self._seed, purpose, self._round, _UP, client, self._attempt, *more)


# -- the server's side ---------------------------------------------------------------------------


class Planned(NamedTuple):
    """What a client releases in a run, as far as it is planned.

    Attributes:
        releases: how many, at most.
        learning: what its learning in this round costs, where that is protected.
    """

    releases: int = 1
    learning: PrivateSteps | None = None


class Outgoing(NamedTuple):
    """What goes to one client.

    Attributes:
        payload: as it travels; None: nothing.
        since: the round that the client is to go on from; travels with the round's number.
        levels: that were chosen under a budget; travel with it.
    """

    payload: Payload | None
    since: int
    levels: Levels = NO_BUDGET


class ServerTurn:
    """One round of a server, from what it sends to what it remembers.

    Args:
        stages: of the run.
        before: what the exchange remembers.
        seed: of the run.
        round: 1-based.
        plan: what each client releases in the run; None: once, and does not learn.
        shares: of each client under a budget; it may change between attempts. None: there is none.

    Attributes:
        levels: under a budget what each client was told last.
    """

    def __init__(
        self,
        stages: Stages,
        before: ExchangeState,
        *,
        seed: int,
        round: int,
        plan: Callable[[int], "Planned"] | None = None,
        shares: Mapping[int, Share] | None = None,
    ) -> None:
        self._stages = stages
        self._before = before
        self._seed = seed
        self._round = round
        self._plan = plan or (lambda _: Planned())
        self._form: Form | None = None
        self._ledger = OpenLedger(before.ledger)
        self._clients = dict(before.clients)
        self._forgotten: set[int] = set()
        self._wanted: dict[tuple[int, int | None], tuple[Asked, Asked]] = {}
        self._shares = shares
        self.levels: dict[int, Levels] = {}
        self._made: dict[Hashable, Payload] = {}
        self._shared: dict[Hashable, Payload] = {}
        self._down: dict[int, Arrays] = {}
        self._told: dict[int, tuple[Payload, Arrays]] = {}
        self._received: dict[int, tuple[Payload, Arrays]] = {}
        self._opened: dict[int, tuple[Payload, Payload]] = {}

    @property
    def protects(self) -> bool:
        """Whether anything is promised of what clients send."""
        return not isinstance(self._stages.release, NoRelease)

    def send(
        self,
        client: int,
        key: Hashable | None,
        make: Callable[[Hashable], Payload],
        *,
        asked: Asked | None,
        trains: bool = True,
        attempt: int = 1,
        beside: int = 0,
    ) -> Outgoing:
        """Return what goes to a client, and charge what its answer will cost.

        Args:
            client: who receives it.
            key: names it; None: nothing is sent. What has one key is made and released once, and
                encoded once where the codec has no memory.
            make: returns what a key names.
            asked: what the client has to answer; None: nothing.
            trains: whether it is to learn; else it is judged.
            attempt: the so many-th in this round.
            beside: bytes of what travels with it.

        Raises:
            BudgetError: a client's share of a budget does not hold it.
        """
        level = None
        if self._shares is None:
            payload = None if key is None else self._encoded(client, key, make)
        else:
            level, payload = self._fitted(self._shares[client].down_bytes - beside, key, make)
        if self._stages.up.follows:
            self._told.pop(client, None)
            if payload is not None:
                held = self._clients.get(client, Remembered(0, {}, {}))
                self._told[client] = payload, dict(held.down)
        cost = self.cost(client, asked) if trains and self._stages.where == "client" else None
        if cost is not None:
            self._ledger.charge_client(self._round, client, attempt, cost)
            if attempt > 1:
                # Whether there is room for everybody's first was asked before the round.
                self._check_budget(f"another answer of client {client} in round {self._round}")
        if self._shares is None or level is None:
            return Outgoing(payload, self._since(client))
        share = self._shares[client]
        self.levels[client] = Levels(level, share.up, share.up_bytes)
        return Outgoing(payload, 0, self.levels[client])

    def opened(self, client: int, sent: Payload) -> Payload:
        """Return what a client makes of what it was sent in this round."""
        level = self.levels.get(client, NO_BUDGET).down
        codec = self._stages.down if level is None else LADDER[level]
        if codec.remembers:
            on = isinstance(sent, Encoded) and sent.since > 0
            return codec.decode(sent, dict(self._before.clients[client].down) if on else {})[0]
        # What many receive is decoded once; it is held so that its id stays its own.
        if id(sent) not in self._opened:
            self._opened[id(sent)] = sent, codec.decode(sent, {})[0]
        return self._opened[id(sent)][1]

    def cost(self, client: int, asked: Asked | None) -> Cost | None:
        """Return what a round costs a client, as far as that is known before; None: nothing.

        Args:
            client: whom it costs.
            asked: what it has to answer; None: nothing.
        """
        rule, where = self._stages.release, self._stages.where
        if isinstance(rule, NoRelease) or (asked is None and not rule.learns):
            return None
        plan = self._plan(client)
        return rule.cost(
            Occasion(
                where=where,
                round=self._round,
                releases=plan.releases,
                delta=self._stages.delta,
                form=None if asked is None else form_of(asked),
                learning=plan.learning,
            )
        )

    def _check_budget(self, what: str) -> None:
        if self._stages.budget is not None:
            self._stages.budget.check(self._ledger.closed(), what)

    def asked(self, asked: Asked, client: int) -> Asked:
        """Return what a client's answer looks like while it travels, before `receive`."""
        # Many clients are asked for one thing; the pair keeps the id from being another's.
        key = id(asked), self.levels.get(client, NO_BUDGET).up
        if key not in self._wanted:
            self._wanted[key] = asked, self._codec_up(client).asked(self._released_form(asked))
        return self._wanted[key][1]

    def _released_form(self, asked: Asked) -> Asked:
        """Return what an answer looks like after it was released, and decoded."""
        if self._stages.where == "server":
            return asked
        return self._stages.release.travelling(asked)

    def _codec_up(self, client: int) -> Codec:
        level = self.levels.get(client, NO_BUDGET).up
        return self._stages.up if level is None else LADDER[level]

    def receive(self, client: int, sent: Payload | None, asked: Asked | None) -> Payload | None:
        """Check and decode a client's answer; what codecs remember of it moves on.

        Args:
            client: whose it is.
            sent: what came; None: an answer without a payload.
            asked: what it has to be; None: nothing.

        Raises:
            BadPayloadError: it cannot be used; nothing is remembered of it.
        """
        up: Mapping[str, np.ndarray] = {}
        payload: Payload | None = None
        if asked is not None:
            if sent is None:
                raise BadPayloadError(f"expected {asked.kind.kind}, got nothing")
            payload, up = self._decoded(client, sent, asked)
            self._form = form_of(asked)
        elif sent is not None:
            raise BadPayloadError(f"expected nothing, got {sent.kind}")
        if self._stages.remember:
            held = self._clients.get(client, Remembered(0, {}, {}))
            self._clients[client] = Remembered(
                self._round,
                up if asked is not None else held.up,
                self._down.get(client, held.down),
            )
        return payload

    def gathers(self, clients: Iterable[int]) -> bool:
        """Tell whether all answers of these clients are needed before any of them is used."""
        adversary = self._stages.adversary
        return (
            adversary.together
            and adversary.lies_in(self._round)
            and not self._stages.controlled.isdisjoint(clients)
        )

    def lies(self, answers: Mapping[int, Payload]) -> dict[int, Payload]:
        """Return what an adversary that knows all answers sends instead of those of its clients.

        Args:
            answers: all good ones, as `receive` returned them, by client.
        """
        controlled = self._stages.controlled
        own = {client: answers[client] for client in sorted(controlled & answers.keys())}
        if not own:
            return {}
        others = {client: answer for client, answer in answers.items() if client not in own}
        rng = generator_for(self._seed, Purpose.ADVERSARY, self._round, _DOWN)
        seen = Seen(round=self._round, own=own, others=others)
        return dict(_replaced(self._stages.adversary, seen, rng))

    def check_lie(self, lie: Payload, asked: Asked) -> None:
        """Look at what an adversary sends as at any other answer that is decoded.

        Raises:
            BadPayloadError: it cannot be used.
        """
        wanted = self._released_form(asked)
        if type(lie) is not wanted.kind:
            raise BadPayloadError(f"expected {_shown(wanted)}, got {lie.kind}")
        reason = lie.problem(wanted)
        if reason is not None:
            raise BadPayloadError(reason)

    def view(
        self,
        uploads: Iterable[Upload],
        *,
        sums: Weighting | None = None,
        group: Callable[[int], Hashable] = lambda _client: None,
        leaves_one_out: bool = False,
    ) -> Iterator[Upload]:
        """Return what the aggregator sees of the answers; see `View.shown`.

        Where answers are released its mean is all that an algorithm sees that needs no more: noise
        averages out before the best guess of what was released is taken. A trusted server protects
        what the aggregator sees, so that all that is made of it is post-processing.

        Args:
            uploads: good ones, as they come.
            sums: how clients are weighted in a mean, where the algorithm needs no more than that.
            group: which clients' payloads have a mean with each other.
            leaves_one_out: whether it needs, for each client, the mean of the others, and makes
                nothing of answers that is not linear in them.

        Raises:
            PrivacyBudgetError: a release would exceed the budget; it is not shown.
        """
        rule, stages = self._stages.release, self._stages
        if rule.learns or isinstance(rule, NoRelease):
            return stages.view.shown(uploads, sums, group)
        if isinstance(rule, WantedNoise):
            # Tables of all architectures have one mean.
            group = _everybody
        if stages.where == "server":
            if sums is None and leaves_one_out:
                return self._others_protected(uploads)
            return self._means_protected(uploads, sums, group)
        shown = stages.view.shown if sums is None else Sum().shown
        return map(self._read, shown(uploads, sums, group))

    def _read(self, upload: Upload) -> Upload:
        """Return an answer, or a mean of some, as it is best guessed."""
        occasion = self._occasion(upload.client, upload.clients)
        return replace(upload, payload=self._stages.release.read(upload.payload, occasion))

    def _occasion(self, client: int, clients: int, releases: int | None = None) -> Occasion:
        return Occasion(
            where=self._stages.where,
            round=self._round,
            releases=self._plan(client).releases if releases is None else releases,
            delta=self._stages.delta,
            clients=clients,
            form=self._form,
        )

    def _means_protected(
        self,
        uploads: Iterable[Upload],
        sums: Weighting | None,
        group: Callable[[int], Hashable],
    ) -> Iterator[Upload]:
        """Yield each group's mean, released."""
        rule = self._stages.release
        members: dict[Hashable, list[int]] = {}

        def bounded() -> Iterator[Upload]:
            for upload in uploads:
                members.setdefault(group(upload.client), []).append(upload.client)
                yield replace(upload, payload=rule.bounded(upload.payload))

        for mean in Sum().shown(bounded(), sums, group):
            of = group(mean.client)
            clients = members[of]
            # Of the clients in it, the one that releases most often has the most noise.
            releases = max(self._plan(client).releases for client in clients)
            occasion = self._occasion(mean.client, len(clients), releases)
            named = "mean" if of is None else f"mean of {of}"
            released = rule.release(mean.payload, occasion, self._noise(named, mean.payload))
            self._charge(named, clients, rule.cost_of(released, occasion))
            yield replace(mean, payload=rule.read(released, occasion))

    def _others_protected(self, uploads: Iterable[Upload]) -> Iterator[Upload]:
        """Yield every answer with one noise in all of them, for means of all others.

        With n answers u and one noise N for a sum, each answer becomes ``u + N / (n - 1)``. The
        mean of all but one is then ``(sum u + N - own u) / (n - 1)``: made of the released sum and
        of what that client itself has sent. For those that sent nothing there is ``Upload.of_all``,
        ``(sum u + N) / n``. A mean of what is yielded would have ``n / (n - 1)`` of the noise, and
        a client that has it and one that has a mean of others could take the noise off together.
        """
        rule = self._stages.release
        held = [replace(each, payload=rule.bounded(each.payload)) for each in uploads]
        if len(held) < 2:
            # A lone answer would be the mean of all, for clients that sent nothing.
            return
        clients = [upload.client for upload in held]
        releases = max(self._plan(client).releases for client in clients)
        occasion = self._occasion(clients[0], len(held) - 1, releases)
        total = held[0].payload.weighted(1.0)
        for upload in held[1:]:
            total = total.plus(upload.payload.weighted(1.0))
        nothing = _scaled(held[0].payload, 0)
        noise = rule.release(nothing, occasion, self._noise("sum", total))
        self._charge("sum", clients, rule.cost_of(noise, occasion))
        count = len(held)
        mean = total.over(count, held[0].payload)
        of_all = _with(mean, _scaled(noise, (count - 1) / count))
        for upload in held:
            yield replace(upload, payload=_with(upload.payload, noise), of_all=of_all)

    def _charge(self, named: str, clients: Sequence[int], cost: Cost | None) -> None:
        if cost is None:
            return
        self._ledger.charge_server(self._round, named, clients, cost)
        self._check_budget(f"the {named} of round {self._round}")

    def _noise(self, named: str, payload: Payload) -> np.random.Generator:
        key = int.from_bytes(sha256(named.encode()).digest()[:4], "big")
        return generator_for(
            self._seed, Purpose.RELEASE, self._round, _DOWN, key, told_apart(payload)
        )

    def forget(self, client: int) -> None:
        """Start anew with a client that lost its memory: from nothing, on both sides."""
        self._clients.pop(client, None)
        self._down.pop(client, None)
        self._forgotten.add(client)

    def committed(self) -> ExchangeState:
        """Return what is remembered once the round is complete."""
        return ExchangeState(
            self._round,
            self._clients,
            self._ledger.closed(),
            self._before.spent,
        )

    def skipped(self) -> ExchangeState:
        """Return what is remembered of a round that is left out: what it cost.

        What left the clients has left, and a memory that is lost stays lost.
        """
        held = {c: m for c, m in self._before.clients.items() if c not in self._forgotten}
        return replace(self._before, clients=held, ledger=self._ledger.closed())

    def _since(self, client: int) -> int:
        return self._clients[client].round if client in self._clients else 0

    def _encoded(self, client: int, key: Hashable, make: Callable[[Hashable], Payload]) -> Payload:
        codec = self._stages.down
        if not codec.remembers:
            if key not in self._shared:
                rng = self._rng(Purpose.CODEC, key)
                self._shared[key] = codec.encode(self._made_of(key, make), {}, rng)[0]
            return self._shared[key]
        held = self._clients.get(client, Remembered(0, {}, {}))
        rng = self._rng(Purpose.CODEC, key)
        sent, memory = codec.encode(self._made_of(key, make), dict(held.down), rng)
        self._down[client] = memory
        return replace(sent, since=held.round) if isinstance(sent, Encoded) else sent

    def _fitted(
        self, most_bytes: int, key: Hashable | None, make: Callable[[Hashable], Payload]
    ) -> tuple[int, Payload | None]:
        """Return the highest level at which a payload fits, and the payload as it travels."""
        if key is None:
            if most_bytes < 0:
                raise BudgetError(
                    f"exchange.budget_kb: orders for a client have {-most_bytes} "
                    "bytes more than are left for them"
                )
            return EXACT, None
        payload = self._made_of(key, make)

        def encoded(level: int) -> Payload:
            place = (key, level)
            if place not in self._shared:
                rng = self._rng(Purpose.CODEC, key)
                self._shared[place] = LADDER[level].encode(payload, {}, rng)[0]
            return self._shared[place]

        return best_within(payload, most_bytes, encoded)

    def _made_of(self, key: Hashable, make: Callable[[Hashable], Payload]) -> Payload:
        if key not in self._made:
            made, rule = make(key), self._stages.release
            if self._stages.where == "server" and isinstance(rule, WantedNoise):
                form = form_of_payload(made)
                # Means of all others are not read before: each is one of its own.
                made = made if form is None else rule.tidied(made, form)
            self._made[key] = made
        return self._made[key]

    def _decoded(
        self, client: int, sent: Payload, asked: Asked
    ) -> tuple[Payload, Mapping[str, np.ndarray]]:
        codec = self._codec_up(client)
        wanted = self.asked(asked, client)
        if type(sent) is not wanted.kind:
            raise BadPayloadError(f"expected {_shown(wanted)}, got {sent.kind}")
        reason = sent.problem(wanted)
        memory: Mapping[str, np.ndarray] = {}
        if reason is None and isinstance(sent, Encoded):
            reason = codec.bad(sent, wanted) or self._bad_memory(client, sent)
            if sent.since:
                memory = self._clients[client].up if reason is None else {}
        if reason is not None:
            raise BadPayloadError(reason)
        if codec.follows:
            memory = self._came_down(client)
        payload, memory = codec.decode(sent, dict(memory))
        if payload is not sent:
            reason = payload.problem(self._released_form(asked))
            if reason is not None:
                raise BadPayloadError(reason)
        return payload, memory

    def _came_down(self, client: int) -> Arrays:
        """Return the arrays of what a client received, as it decoded them."""
        if client not in self._told:
            return {}
        sent, memory = self._told[client]
        codec = self._stages.down
        if codec.remembers:
            return _arrays_in(codec.decode(sent, memory)[0])
        # What many receive is decoded once; it is held so that its id stays its own.
        if id(sent) not in self._received:
            self._received[id(sent)] = sent, _arrays_in(codec.decode(sent, {})[0])
        return self._received[id(sent)][1]

    def _bad_memory(self, client: int, sent: Encoded) -> str | None:
        """A client goes on from what was named to it, or from nothing."""
        expected = self._since(client) if self._stages.up.remembers else 0
        if sent.since in (0, expected):
            return None
        return f"coded on from round {sent.since}, expected {expected} or 0"

    def _rng(self, purpose: Purpose, key: Hashable) -> np.random.Generator:
        # What is sent of one round has one noise, however often it is sent.
        named = int.from_bytes(sha256(repr(key).encode()).digest()[:4], "big")
        return generator_for(self._seed, purpose, self._before.changed, _DOWN, named)


def _replaced(adversary: Adversary, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
    """Return what an adversary sends, by client.

    Raises:
        ValueError: it speaks for a client that it does not control.
    """
    replaced = adversary.replaces(seen, rng)
    others = replaced.keys() - seen.own.keys()
    if others:
        raise ValueError(
            f"adversary {adversary.kind} replaces what client {min(others)} sends, which it does "
            "not control"
        )
    return replaced


def _shown(asked: Asked) -> str:
    inner = asked.about.get("inner")
    return asked.kind.kind if inner is None else f"{inner.kind.kind} encoded"


def _everybody(_: int) -> Hashable:
    return None


def told_apart(payload: Payload) -> int:
    """Return a number that differs for different content, for the stream of a release."""
    return int(digest(payload)[:8], 16)


def _scaled(payload: Payload, factor: int | float) -> Payload:
    arrays = {"values": (factor * flatten(payload).arrays["values"]).astype(np.float32)}
    return payload.with_arrays(arrays)


def _with(payload: Payload, noise: Payload) -> Payload:
    values = flatten(payload).arrays["values"].astype(np.float64)
    values = values + flatten(noise).arrays["values"]
    return payload.with_arrays({"values": values.astype(np.float32)})
