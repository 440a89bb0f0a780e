"""ProxyFL: a private model and a proxy learn from each other; proxies go from peer to peer.

Source: Kalra, Wen, Cresswell, Volkovs, Tizhoosh, 2023, Algorithm 1. https://arxiv.org/abs/2111.11343
Each client has a private model of its own architecture, which never leaves it, and a proxy of an
architecture that all share. In every step both learn from the same batch of private rows: from the
labels, and from the other's predictions. After training the proxy goes to the peer that is next on
a directed exponential graph, where it takes the place of the peer's own. Nothing is averaged; the
server passes on what it gets.

Differs from the paper: proxies are trained without noise. They replace the receiver's own, as in
the authors' code. A client whose peer was away keeps its own proxy; one that was away itself finds,
when it is back, the last proxy that was sent to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import Field

from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import Weights
from fedkd.exchange.values import Value
from fedkd.models import ModelSettings
from fedkd.mutual.graphs import exponential_distance
from fedkd.objectives import Objective
from fedkd.training import Cohort
from strategies.contract import (
    Call,
    Card,
    Received,
    Round,
    ServerTools,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.two_models.pairs import HALF_AND_HALF, PRIVATE, Pair

PROXY = "proxy"
"""The model that travels."""


class ProxyFLSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: proxyfl``.

    Attributes:
        proxy: the model that goes from peer to peer; private ones are ``clients.models``.
        objective: what a private model minimises on private rows; the client's proxy is its
            teacher.
        proxy_objective: what a proxy minimises on the same rows; the client's private model is its
            teacher.
    """

    name: Literal["proxyfl"] = "proxyfl"
    proxy: ModelSettings = ModelSettings(name="mlp")
    objective: Objective = Field(HALF_AND_HALF)
    proxy_objective: Objective = Field(HALF_AND_HALF)


@dataclass(frozen=True)
class Mail(Value):
    """What the server is about to pass on.

    Attributes:
        proxies: by the client that receives it.
    """

    proxies: Mapping[int, Weights] = field(default_factory=dict)


def next_peer(client: int, round: int, clients: int) -> int:
    """Return where a client's proxy goes: to a peer 1, 2, 4, ... further on, in turn.

    In ``floor(log2(clients - 1)) + 1`` rounds every client hears, directly or through others, from
    as many as it can.

    Args:
        client: partition id.
        round: from 1 on.
        clients: how many there are, >= 2.
    """
    return (client + exponential_distance(round, clients)) % clients


class ProxyFL(Pair[ProxyFLSettings, Mail]):
    """A peer's proxy comes, both models learn from each other, the proxy goes on."""

    card = Card(
        learns="a client's private model and its proxy from each other; proxies go to a peer",
        up="P of the proxy",
        down="P of a peer's proxy",
        equation=(
            "private: a CE + (1-a) KL(proxy || private); proxy: b CE + (1-b) KL(private || proxy)"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = ProxyFLSettings
    State: ClassVar[type[Value]] = Mail
    up = (Weights,)
    down = (Weights,)
    travels = PROXY
    directions: ClassVar[Mapping[str, str]] = {
        PRIVATE: "from the proxy",
        PROXY: "from the private model",
    }

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Take the peer's proxy for one's own, learn with it and from it, and send it on."""
        if received:
            proxies = [
                own if piece is None else expect(piece, Weights).arrays
                for own, piece in zip(cohort.weights(model=PROXY), received, strict=True)
            ]
            cohort.load_weights(proxies, model=PROXY)
        # What an optimizer remembers is of another proxy.
        cohort.reset_optimizers(model=PROXY)
        cohort.fit(self.mutual(call.progress), private=call.local)
        return [Weights(arrays=arrays) for arrays in cohort.weights(model=PROXY)]

    def receives(self, state: Mail, client: int, round: Round) -> int | None:
        """The proxy that a peer sent to it, if one did."""
        return client if client in state.proxies else None

    def payload(self, state: Mail, key: int) -> Weights:
        """The proxy for one client."""
        return state.proxies[key]

    def asks(self, state: Mail, client: int, round: Round, server: ServerTools) -> Asked:
        """A proxy, whatever the client's own model is."""
        return server.asked_weights(self.settings.proxy)

    def aggregate(
        self, state: Mail, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Mail:
        """Address each proxy to the next peer; what nobody has fetched yet stays where it is."""
        proxies = dict(state.proxies)
        clients = self.federation.num_clients
        sent = {upload.client: proxy for upload, proxy in payloads_of(uploads, Weights)}
        for client in sent:
            # Who answered has fetched what there was for it.
            proxies.pop(client, None)
        if clients > 1:
            for client, proxy in sent.items():
                proxies[next_peer(client, round.number, clients)] = proxy
        return Mail({client: proxies[client] for client in sorted(proxies)})
