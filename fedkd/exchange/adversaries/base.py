"""What an adversary is: whom it controls, what it knows, and where it sits."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from fedkd.bounds import Count, ShareBelowOne, Whole
from fedkd.exchange.adversaries.scores import SCORES
from fedkd.exchange.kinds import Stage
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Bundle
from fedkd.randomness import Purpose, generator_for

ALMOST = 1e-9
"""Is added to a count before it is rounded down: 0.29 of 100 is 29, and 28.999... in floats."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What an adversary knows in a round.

    Attributes:
        round: 1-based.
        own: what its clients would send if they were honest, by client: of one client where each
            acts alone, of all that answered where they act together.
        others: what honest clients have sent, decoded, by client; empty where each acts alone.
        received: what its clients received in this call, decoded, by client; nothing of those that
            received nothing, and nothing at all where they act together.
    """

    round: int
    own: Mapping[int, Payload]
    others: Mapping[int, Payload] = field(default_factory=dict)
    received: Mapping[int, Payload] = field(default_factory=dict)


class Adversary(Stage, ABC):
    """Whoever controls some of the clients.

    Where its clients act each alone, its seat is at the client, before everything else that happens
    to what is sent: what it sends is released, encoded and checked like an honest answer. Where
    they act `together`, its seat is at the server, after decoding and before all that looks at
    answers: it sees those of all honest clients, and what it sends is checked like theirs. So a
    run's numbers never depend on how clients are grouped.
    """

    @property
    def together(self) -> bool:
        """Whether its clients know what the honest ones have sent. If not, each acts alone."""
        return False

    @property
    def lies(self) -> bool:
        """Whether it replaces what its clients send, in any round."""
        return True

    @abstractmethod
    def controlled(self, clients: int, *, seed: int) -> frozenset[int]:
        """Return whom it controls.

        Args:
            clients: of the federation.
            seed: of the run.
        """

    def lies_in(self, round: int) -> bool:
        """Tell whether it replaces what its clients send in a round, 1-based."""
        return self.lies

    def refuses(self, kind: type[Payload]) -> str | None:
        """Return, in a few words, why this kind of payload gives it nothing to lie about."""
        return None

    def refuses_asked(self, asked: Asked) -> str | None:
        """The same of what is asked for, whose parts are known."""
        return self.refuses(asked.kind)

    def replaces(self, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
        """Say what is sent instead.

        Args:
            seen: what it knows.
            rng: of this round, and where each acts alone of this client and attempt.

        Returns:
            What is sent instead, by client; of clients that it controls, also of none.
        """
        return {}


class NoAdversary(Adversary):
    """Everybody is honest."""

    kind: Literal["none"] = "none"

    @property
    def lies(self) -> bool:
        """Never."""
        return False

    def controlled(self, clients: int, *, seed: int) -> frozenset[int]:
        """Nobody."""
        return frozenset()


class Controlling(Adversary):
    """An adversary that controls a share of the clients, or those that are named.

    Which they are is drawn from the run's seed alone: runs of one seed share them, and those of a
    smaller share are among those of a larger one.
    """

    fraction: ShareBelowOne | None = Field(
        default=None,
        description="share of all clients that it controls, rounded down to whole clients; which "
        "they are, the run's seed says",
    )
    clients: tuple[Annotated[Whole, Field(ge=0, le=99_999)], ...] | None = Field(
        default=None, max_length=100_000, description="whom it controls, instead of a share"
    )

    @model_validator(mode="after")
    def _says_whom(self) -> "Controlling":
        if (self.fraction is None) == (self.clients is None):
            raise ValueError(
                f"needs either fraction (such as fraction: 0.2) or clients (such as clients: "
                f"[0, 3]), got {'neither' if self.fraction is None else 'both'}"
            )
        if self.clients is not None and len(set(self.clients)) < len(self.clients):
            raise ValueError(f"clients names a client twice: {list(self.clients)}")
        return self

    def check_clients(self, clients: int) -> None:
        """Refuse clients that there are not, and a federation without an honest one.

        Args:
            clients: of the federation.

        Raises:
            ValueError: names the setting, what it got and what would work.
        """
        named = self.clients or ()
        strangers = [client for client in named if client >= clients]
        if strangers:
            raise ValueError(
                f"adversary.clients must name clients below clients.count ({clients}), got "
                f"{strangers[0]}"
            )
        if len(named) >= clients:
            raise ValueError(
                f"adversary.clients must leave an honest client, got all {clients} of them"
            )

    def controlled(self, clients: int, *, seed: int) -> frozenset[int]:
        """Return those that are named, or so many of a permutation that the seed draws."""
        if self.clients is not None:
            return frozenset(self.clients)
        count = int((self.fraction or 0.0) * clients + ALMOST)
        if not count:
            return frozenset()
        drawn = generator_for(seed, Purpose.ADVERSARY).permutation(clients)[:count]
        return frozenset(int(client) for client in drawn)


class Lying(Controlling):
    """An adversary that replaces what its clients send; they learn as honest clients do."""

    from_round: Count = Field(default=1, description="the first round in which it lies")

    @property
    def lies_about(self) -> tuple[type[Payload], ...]:
        """The kinds of payloads that it lies about, alone or as parts of a bundle."""
        return SCORES

    def refuses(self, kind: type[Payload]) -> str | None:
        """It needs one of these kinds, or a bundle, which may hold one."""
        return None if kind is Bundle else self._refused(kind)

    def refuses_asked(self, asked: Asked) -> str | None:
        """It needs one of these kinds among the parts."""
        if not asked.parts:
            return self._refused(asked.kind)
        reasons = [self.refuses_asked(part) for part in asked.parts.values()]
        return reasons[0] if all(reasons) else None

    def _refused(self, kind: type[Payload]) -> str | None:
        if kind in self.lies_about:
            return None
        *others, last = (each.kind for each in self.lies_about)
        known = f"{', '.join(others)} or {last}" if others else last
        return f"it has nothing to lie about in {kind.kind}; use an algorithm that sends {known}"

    def lies_in(self, round: int) -> bool:
        """From a round on."""
        return round >= self.from_round
