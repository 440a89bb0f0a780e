"""What algorithms have in common whose clients teach each other by predictions of public rows."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor

from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.targets import Scale
from fedkd.training import Cohort, ComposedObjective, supervised
from strategies.contract import (
    CLIENTS,
    Call,
    Federation,
    Received,
    Round,
    ServerTools,
    Step,
    Strategy,
    upload_logits,
)
from strategies.shared.taught import (
    TaughtSettings,
    apart_steps,
    check_public_labels,
    composed_of,
    learn,
    never_taught,
    rows_of_step,
)

SettingsT = TypeVar("SettingsT", bound=TaughtSettings)


@dataclass(frozen=True)
class Peers(Value):
    """What the peers teach.

    Attributes:
        shared: the mean of all that sent something; None before anybody did.
        others: for each of them what the others teach it; None where there was no other.
        trust: float64 ``[clients]`` that sums to 1, how much each client is trusted; None while all
            are trusted alike.
    """

    shared: Predictions | None = None
    others: Mapping[int, Predictions | None] = field(default_factory=dict)
    trust: np.ndarray | None = field(default=None, kw_only=True)


PeersT = TypeVar("PeersT", bound=Peers)


class TaughtByPeers(Strategy[SettingsT, PeersT]):
    """Learn from own labels and from the peers at once; then show the peers what was learnt.

    A subclass says what the server makes of what the peers have shown.
    """

    State: ClassVar[type[Value]] = Peers
    up: tuple[type[Payload], ...] = (Predictions,)
    down: tuple[type[Payload], ...] = (Predictions,)
    needs_public = True
    has_ensemble = True
    directions: ClassVar[Mapping[str, str]] = {CLIENTS: "from each other"}
    taught: ClassVar[str] = CLIENTS
    """The direction in which clients learn."""

    def __init__(self, settings: SettingsT, federation: Federation) -> None:
        super().__init__(settings, federation)
        if self.learns(self.taught):
            check_public_labels(settings, federation)

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        return not self.learns(self.taught) or never_taught(self.settings, self.federation)

    def composed(self) -> ComposedObjective | None:
        """The settings' terms; none where clients learn as in `local`."""
        if not self.learns(self.taught):
            return None
        return composed_of(self.settings, self.federation)

    def rows_of_step(self, private_rows: int) -> int:
        """Private and public rows go through the model together."""
        return rows_of_step(self.federation, self.settings, private_rows)

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows may have a forward pass of their own."""
        yield from super().smallest_steps()
        yield from apart_steps(self, self.settings)

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Minimise both terms in every step; then predict the round's public rows."""
        self.study(cohort, received, call)
        return upload_logits(cohort, call)

    def study(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Learn from own labels and from what the peers sent, or as in `local`."""
        if self.learns(self.taught):
            learn(cohort, received, call, self.settings)
        else:
            cohort.fit(supervised, private=call.local)

    def receives(self, state: PeersT, client: int, round: Round) -> Hashable | None:
        """What the others taught, or what all did where the client is none of them."""
        if self.learns_alone:
            return None
        if client in state.others:
            return None if state.others[client] is None else client
        return None if state.shared is None else "shared"

    def payload(self, state: PeersT, key: Any) -> Payload:
        """What all taught, or the others of one client."""
        taught = state.shared if isinstance(key, str) else state.others[key]
        assert taught is not None  # noqa: S101
        return taught

    def asks(self, state: PeersT, client: int, round: Round, server: ServerTools) -> Asked | None:
        """Logits of the round's rows."""
        return round.asked_logits


def lesson(rows: np.ndarray, values: Tensor, scale: Scale, temperature: float) -> Predictions:
    """Return what is taught about public rows: an average of several clients' predictions.

    Args:
        rows: positions in the public set.
        values: ``[rows, classes]``, of any precision.
        scale: what the values are.
        temperature: what they were, or are to be, softened with.
    """
    return Predictions(
        rows=rows,
        values=values.float().numpy(),
        scale=scale,
        temperature=temperature,
        averaged=True,
    )
