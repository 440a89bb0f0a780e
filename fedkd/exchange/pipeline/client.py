"""The client's side of a round: from what it receives to what it sends."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedkd.exchange.adversaries import Seen
from fedkd.exchange.budget import LADDER, NO_BUDGET
from fedkd.exchange.codecs import Float32
from fedkd.exchange.mechanisms import WantedNoise
from fedkd.exchange.mechanisms.sensitivity import acceptable, form_of_payload
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.pipeline.memory import (
    Snapshot,
    Standing,
    arrays_in,
    arrays_of,
    snapshots_in,
)
from fedkd.exchange.pipeline.stages import Stages
from fedkd.exchange.pipeline.turns import (
    UP,
    MemoryLostError,
    lies_of,
    told_apart,
)
from fedkd.exchange.release import (
    NoRelease,
    Occasion,
)
from fedkd.exchange.values import Arrays
from fedkd.randomness import Purpose, generator_for


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
        self._before: dict[int, dict[int, Snapshot]] = {}
        if stages.remember:
            self._before = {c: snapshots_in(standing.arrays) for c, standing in clients.items()}
        self._after = {client: self._snapshot(client) or Snapshot() for client in self._before}
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
            client: arrays_of(
                {r: s for r, s in before.items() if r == self._since[client]}
                | {self._round: self._after[client]}
            )
            for client, before in self._before.items()
        }

    def _snapshot(self, client: int) -> Snapshot | None:
        """Return the memories that the server goes on from; None: they are lost."""
        since = self._since[client]
        return Snapshot() if since == 0 else self._before[client].get(since)

    def _decoded(self, client: int, sent: Payload) -> Payload:
        snapshot = Snapshot()
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
            replaced |= lies_of(stages.adversary, seen, rng)
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
            return codec.encode(payload, arrays_in(self._received.get(client)), rng)[0]
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
        return generator_for(self._seed, purpose, self._round, UP, client, self._attempt, *more)
