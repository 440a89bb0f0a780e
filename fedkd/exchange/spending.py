"""What the charges of a ledger come to: epsilon of each client, and whether a budget is kept."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from fedkd.exchange.ledger import Cost, Ledger, OpenLedger
from fedkd.privacy import (
    COARSE,
    Event,
    Gaussian,
    Laplace,
    RandomizedResponse,
    SampledGaussian,
    Spent,
    bound,
    spent,
)


class PrivacyBudgetError(RuntimeError):
    """A release would spend more than ``privacy.budget``; it did not leave."""


def events_of(cost: Cost) -> tuple[Event, ...]:
    """Return the events that a release is to an accountant.

    Raises:
        ValueError: nobody knows what a mechanism of one's own costs.
    """
    figures = cost.figures
    match cost.mechanism:
        case "gaussian":
            return (Gaussian(1, figures["noise_multiplier"]),)
        case "laplace":
            return (Laplace(1, figures["scale"]),)
        case "dp_sgd":
            return (
                SampledGaussian(
                    int(figures["count"]), figures["noise_multiplier"], figures["sample_rate"]
                ),
            )
        case "randomized_response":
            return (
                RandomizedResponse(
                    int(figures["count"]), figures["epsilon"], int(figures["classes"])
                ),
            )
        case "votes":
            counted = (
                (figures["answered"], figures["noise_multiplier"]),
                (figures.get("checked", 0), figures.get("check_multiplier", 0.0)),
            )
            return tuple(Gaussian(int(count), noise) for count, noise in counted if count)
    raise ValueError(
        f"nobody knows what mechanism {cost.mechanism!r} costs; those of fedkd are known"
    )


def spent_of(costs: Iterable[tuple[Cost, int]], *, delta: int | float) -> Spent:
    """Return what releases come to, each cost with how many there are of it."""
    return _spent(tuple(event for each in costs for event in _times(*each)), delta)


def spent_by_client(ledger: Ledger, *, delta: int | float) -> dict[int, Spent]:
    """Return what each client that released anything has spent, by client in order.

    By privacy loss distributions: a tenth of a second for each client that learns by DP-SGD and has
    rows as no other.
    """
    return {client: _spent(events, delta) for client, events in sorted(_events_by_client(ledger))}


def bounds_by_client(ledger: Ledger, *, delta: int | float) -> dict[int, float]:
    """Return a bound on what each client has spent, without loss distributions: in milliseconds.

    Exact where a client's releases are all Gaussian, or all randomised response.
    """
    return {client: _bound(events, delta) for client, events in sorted(_events_by_client(ledger))}


def _events_by_client(ledger: Ledger) -> list[tuple[int, tuple[Event, ...]]]:
    # Clients with the same releases have the same events, and are added up once.
    costs: dict[int, dict[tuple[object, ...], tuple[Cost, int]]] = {}
    for charge in ledger.charges:
        key = charge.cost.mechanism, *sorted(charge.cost.figures.items())
        for client in charge.clients.tolist():
            own = costs.setdefault(client, {})
            own[key] = charge.cost, own.get(key, (charge.cost, 0))[1] + 1
    return [
        (client, tuple(event for cost, count in own.values() for event in _times(cost, count)))
        for client, own in costs.items()
    ]


def _times(cost: Cost, count: int) -> Iterable[Event]:
    return (replace(event, count=count * event.count) for event in events_of(cost))


@lru_cache(maxsize=4096)
def _spent(events: tuple[Event, ...], delta: float) -> Spent:
    return spent(events, delta=delta, grid=COARSE)


@lru_cache(maxsize=4096)
def _bound(events: tuple[Event, ...], delta: float) -> float:
    return bound(events, delta=delta)


@dataclass(frozen=True, slots=True)
class PrivacyBudget:
    """The epsilon that no client's releases may exceed, but for rounding (1e-9 of it).

    Attributes:
        epsilon: of the whole run.
        delta: of the guarantee.
    """

    epsilon: int | float
    delta: int | float

    def exceeded(self, ledger: Ledger) -> tuple[int, float] | None:
        """Return the first client that has spent more, and how much; None where nobody has."""
        most = self.epsilon * (1 + 1e-9)
        for client, events in sorted(_events_by_client(ledger)):
            # What is computed in no time first: it is larger, and so it is enough where it fits.
            if _bound(events, self.delta) <= most:
                continue
            exact = _spent(events, self.delta).epsilon
            if exact > most:
                return client, exact
        return None

    def check(self, ledger: Ledger, what: str) -> None:
        """Refuse releases that are entered and have not left yet.

        Raises:
            PrivacyBudgetError: naming the client and what it would have spent.
        """
        found = self.exceeded(ledger)
        if found is not None:
            client, epsilon = found
            raise PrivacyBudgetError(
                f"{what} would bring client {client} to epsilon {epsilon:.4g}, and privacy.budget "
                f"is {self.epsilon:g} (delta {self.delta:g}): it does not leave"
            )

    def room_for(self, ledger: Ledger, round: int, costs: Mapping[int, Cost | None]) -> str | None:
        """Return why a round must not begin, or None.

        Args:
            ledger: before the round.
            round: its number.
            costs: what each client's release in it would cost.
        """
        opened = OpenLedger(ledger)
        for client, cost in costs.items():
            if cost is not None:
                opened.charge_client(round, client, 1, cost)
        found = self.exceeded(opened.closed())
        if found is None:
            return None
        client, epsilon = found
        return (
            f"round {round} would bring client {client} to epsilon {epsilon:.4g}, and "
            f"privacy.budget is {self.epsilon:g} (delta {self.delta:g}): the run ends before it"
        )
