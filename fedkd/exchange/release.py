"""Release rules: what is done to a payload before it may leave, and what that costs.

A rule works at each client (its answer is protected from everybody, a curious server included) or
at a trusted server (the mean of the answers is protected from those who get to see anything made of
it); ``privacy.where`` says which. What is made of a released payload afterwards is post-processing
and costs nothing. The rules of ours are in `fedkd.exchange.mechanisms`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from fedkd.exchange.kinds import Stage
from fedkd.exchange.ledger import Cost
from fedkd.exchange.payload import Asked, Payload

Where = Literal["client", "server"]

Unit = Literal["example", "client"]
"""Whose presence is protected: a row of a client's, or a client with all of its rows."""


class Form(NamedTuple):
    """What a released table looks like; public, as it is planned.

    Attributes:
        rows: public rows, or classes.
        columns: numbers of a row.
        distributions: whether each row is one; else any numbers.
    """

    rows: int
    columns: int
    distributions: bool


class PrivateSteps(NamedTuple):
    """What a client's learning costs it, where learning itself is protected.

    Attributes:
        rows: private rows of the client, which the guarantee takes for known.
        batch_size: expected rows of a step.
        steps: on private rows in this call, at most.
        steps_of_run: in all calls of the run.
    """

    rows: int
    batch_size: int
    steps: int
    steps_of_run: int

    @property
    def sample_rate(self) -> float:
        """With which each row is drawn for a step."""
        return min(1.0, self.batch_size / max(self.rows, 1))


@dataclass(frozen=True, kw_only=True)
class Occasion:
    """What is released when; nothing in it depends on anybody's data.

    Attributes:
        where: at a client or at the server.
        round: of the run.
        releases: how many of them are planned for one client in the whole run; a wanted epsilon
            is shared out over so many.
        delta: of the guarantee.
        clients: how many clients' answers are in it; 1 at a client.
        form: of what is released; None: it is no table.
        learning: what a client's learning costs, where that is protected.
    """

    where: Where
    round: int
    releases: int = 1
    delta: int | float = 1e-5
    clients: int = 1
    form: Form | None = None
    learning: PrivateSteps | None = None


class ReleaseRule(Stage, ABC):
    """One way to protect what is released."""

    learns: ClassVar[bool] = False
    """Whether it protects how clients learn, so that all that they send is post-processing."""
    codecs: ClassVar[frozenset[str]] = frozenset()
    """Codecs that can write what it releases; empty: all."""

    def refuses(self, kind: type[Payload], where: Where) -> str | None:
        """Return, in a few words, why it cannot protect this kind there; None: it can."""
        return None

    def refuses_asked(self, asked: Asked) -> str | None:
        """Return why it cannot protect what is asked for, looking into it; None: it can."""
        return None

    def bounded(self, payload: Payload) -> Payload:
        """Return an answer whose influence is limited, each client's for itself: clipped, say."""
        return payload

    def travelling(self, asked: Asked) -> Asked:
        """Return what an answer looks like once it is released at a client."""
        return asked

    @abstractmethod
    def cost(self, occasion: Occasion) -> Cost | None:
        """Return what a release costs; it is entered in the ledger before anything leaves."""

    def cost_of(self, released: Payload, occasion: Occasion) -> Cost | None:
        """Return what a trusted server's release has cost, where that shows in what is released."""
        return self.cost(occasion)

    @abstractmethod
    def release(self, payload: Payload, occasion: Occasion, rng: np.random.Generator) -> Payload:
        """Return what may leave.

        Args:
            payload: what would leave without the rule, `bounded`: an answer, or at a server the
                mean of those of ``occasion.clients``.
            occasion: as for `cost`.
            rng: of this release alone.
        """

    def read(self, released: Payload, occasion: Occasion) -> Payload:
        """Return the best guess of what was released: post-processing, which costs nothing.

        Args:
            released: an answer as it was released, or the mean of several.
            occasion: as for `release`, but for ``clients``, which says of how many it is the mean.
        """
        return released

    def told(self, where: Where) -> str:
        """Return in a sentence or two what is promised, to whom."""
        return f"{self.kind}: what it promises is said by its author"


class NoRelease(ReleaseRule):
    """Everything leaves as it is, and is accounted for nowhere."""

    kind: Literal["none"] = "none"

    def cost(self, occasion: Occasion) -> Cost | None:
        """Nothing is promised, so nothing is counted."""
        return None

    def release(self, payload: Payload, occasion: Occasion, rng: np.random.Generator) -> Payload:
        """Hand on the same object."""
        return payload

    def told(self, where: Where) -> str:
        """Nothing is promised."""
        return "no guarantee: whatever is sent leaves as it is"
