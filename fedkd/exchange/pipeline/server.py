"""The server's side of a round: from what it sends to what it remembers."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from fedkd.exchange.adversaries import Seen
from fedkd.exchange.budget import EXACT, LADDER, NO_BUDGET, BudgetError, Levels, Share, best_within
from fedkd.exchange.codecs import Codec
from fedkd.exchange.ledger import Cost, OpenLedger
from fedkd.exchange.mechanisms import WantedNoise
from fedkd.exchange.mechanisms.sensitivity import form_of, form_of_payload
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.pipeline.memory import (
    ExchangeState,
    Remembered,
    arrays_in,
)
from fedkd.exchange.pipeline.stages import Stages
from fedkd.exchange.pipeline.turns import (
    DOWN,
    BadPayloadError,
    lies_of,
    told_apart,
)
from fedkd.exchange.release import (
    Form,
    NoRelease,
    Occasion,
    PrivateSteps,
)
from fedkd.exchange.values import Arrays, flatten
from fedkd.exchange.views import Sum, Upload, Weighting
from fedkd.randomness import Purpose, generator_for


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
        rng = generator_for(self._seed, Purpose.ADVERSARY, self._round, DOWN)
        seen = Seen(round=self._round, own=own, others=others)
        return dict(lies_of(self._stages.adversary, seen, rng))

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
            self._seed, Purpose.RELEASE, self._round, DOWN, key, told_apart(payload)
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
            return arrays_in(codec.decode(sent, memory)[0])
        # What many receive is decoded once; it is held so that its id stays its own.
        if id(sent) not in self._received:
            self._received[id(sent)] = sent, arrays_in(codec.decode(sent, {})[0])
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
        return generator_for(self._seed, purpose, self._before.changed, DOWN, named)


def _shown(asked: Asked) -> str:
    inner = asked.about.get("inner")
    return asked.kind.kind if inner is None else f"{inner.kind.kind} encoded"


def _everybody(_: int) -> Hashable:
    return None


def _scaled(payload: Payload, factor: int | float) -> Payload:
    arrays = {"values": (factor * flatten(payload).arrays["values"]).astype(np.float32)}
    return payload.with_arrays(arrays)


def _with(payload: Payload, noise: Payload) -> Payload:
    values = flatten(payload).arrays["values"].astype(np.float64)
    values = values + flatten(noise).arrays["values"]
    return payload.with_arrays({"values": values.astype(np.float32)})
