"""Release rules: what is done to a payload before it may leave, and what that costs.

A rule works at each client (its answer is protected from everybody) or at a trusted server (what it
made of the answers is protected from those who receive it); ``privacy.where`` says which.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import numpy as np
from pydantic import PlainValidator, SerializeAsAny

from fedkd.exchange.kinds import Kinds, Stage
from fedkd.exchange.ledger import Cost
from fedkd.exchange.payload import Asked, Payload

Where = Literal["clients", "server"]


@dataclass(frozen=True, kw_only=True)
class Occasion:
    """What is released when; nothing in it depends on anybody's data.

    Attributes:
        where: at a client or at the server.
        round: of the run. At the server: the round whose result is sent.
        rounds: of the whole run.
        clients: how many clients' answers are in it; 1 at a client.
        asked: at a client: what it has to answer.
    """

    where: Where
    round: int
    rounds: int
    clients: int = 1
    asked: Asked | None = None


class ReleaseRule(Stage, ABC):
    """One way to protect what is released."""

    def refuses(self, kind: type[Payload], where: Where) -> str | None:
        """Return, in a few words, why it cannot protect this kind there; None: it can."""
        return None

    @abstractmethod
    def cost(self, occasion: Occasion) -> Cost | None:
        """Return what a release costs; it is entered in the ledger before anything leaves."""

    @abstractmethod
    def release(self, payload: Payload, occasion: Occasion, rng: np.random.Generator) -> Payload:
        """Return what may leave.

        Args:
            payload: what would leave without the rule.
            occasion: as for `cost`.
            rng: of this release alone.
        """


class NoRelease(ReleaseRule):
    """Everything leaves as it is, and is accounted for nowhere."""

    kind: Literal["none"] = "none"

    def cost(self, occasion: Occasion) -> Cost | None:
        """Nothing is promised, so nothing is counted."""
        return None

    def release(self, payload: Payload, occasion: Occasion, rng: np.random.Generator) -> Payload:
        """Hand on the same object."""
        return payload


RELEASE_RULES: Kinds[ReleaseRule] = Kinds("release rule", ReleaseRule, {"none": NoRelease})
"""Release rules by the name that a settings file uses."""

ReleaseField: TypeAlias = Annotated[SerializeAsAny[ReleaseRule], PlainValidator(RELEASE_RULES.read)]
"""A release rule in settings: its kind, or a table with its kind and settings."""
