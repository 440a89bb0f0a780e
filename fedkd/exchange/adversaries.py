"""Adversaries: clients that send something else than an honest client would."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import PlainValidator, SerializeAsAny

from fedkd.exchange.kinds import Kinds, Stage
from fedkd.exchange.payload import Payload


class Adversary(Stage, ABC):
    """Whoever controls some of the clients.

    Its seat is before everything else that happens to what is sent: what it sends is released,
    encoded and checked like an honest answer.
    """

    together: ClassVar[bool] = False
    """Whether its clients see what the others of their cohort would send. If not, each acts alone,
    and a run's numbers do not depend on how clients are grouped."""

    @abstractmethod
    def controls(self, client: int) -> bool:
        """Tell whether it controls a client."""

    @abstractmethod
    def replaces(
        self, round: int, honest: Mapping[int, Payload], rng: np.random.Generator
    ) -> Mapping[int, Payload]:
        """Say what is sent instead.

        Args:
            round: 1-based.
            honest: by client what would be sent: of one client that it controls or, `together`, of
                all clients of a cohort.
            rng: of this round and this client or cohort alone.

        Returns:
            What is sent instead, by client; of clients that it controls, also of none.
        """


class NoAdversary(Adversary):
    """Everybody is honest."""

    kind: Literal["none"] = "none"

    def controls(self, client: int) -> bool:
        """Nobody."""
        return False

    def replaces(
        self, round: int, honest: Mapping[int, Payload], rng: np.random.Generator
    ) -> Mapping[int, Payload]:
        """Nothing."""
        return {}


ADVERSARIES: Kinds[Adversary] = Kinds("adversary", Adversary, {"none": NoAdversary})
"""Adversaries by the name that a settings file uses."""

AdversaryField: TypeAlias = Annotated[SerializeAsAny[Adversary], PlainValidator(ADVERSARIES.read)]
"""An adversary in settings: its kind, or a table with its kind and settings."""
