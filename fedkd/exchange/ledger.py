"""The ledger: what was released of whose data, and what that cost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fedkd.exchange.values import Value

Releaser = Literal["client", "server"]
"""Who releases: each client what it sends, or a trusted server what it made of that."""


@dataclass(frozen=True)
class Cost(Value):
    """What one release costs.

    Attributes:
        mechanism: how it was protected, such as ``gaussian``.
        figures: what an accountant needs to add costs up, such as ``noise_multiplier``.
    """

    mechanism: str
    figures: Mapping[str, int | float]


@dataclass(frozen=True)
class Charge(Value):
    """Releases of one round at one cost.

    Attributes:
        round: of the run.
        by: who released.
        cost: of each release.
        clients: int64, whose answers: one entry a release of a client's own; of a server's release
            all clients whose answers are in it.
        attempts: int64, the so many-th answer of that client in this round.
        sent: of a server: what was released, such as the mean of one architecture.
    """

    round: int
    by: Releaser
    cost: Cost
    clients: np.ndarray
    attempts: np.ndarray
    sent: str = ""


@dataclass(frozen=True)
class Ledger(Value):
    """All charges of a run, in the order in which they were made."""

    charges: tuple[Charge, ...] = ()

    def of_client(self, client: int) -> list[tuple[int, Cost]]:
        """Return (round, cost) of everything that was released with a client's answer in it."""
        return [
            (charge.round, charge.cost)
            for charge in self.charges
            for other in charge.clients
            if other == client
        ]

    def rows(self, since: int = 0) -> list[dict[str, Any]]:
        """Return charges as plain rows for the records: all that an accountant needs.

        Args:
            since: leave out so many charges; those that were written before.
        """
        return [
            {
                "of_round": charge.round,
                "by": charge.by,
                "mechanism": charge.cost.mechanism,
                "figures": dict(charge.cost.figures),
                "clients": charge.clients.tolist(),
                **(
                    {"attempts": charge.attempts.tolist()}
                    if charge.by == "client"
                    else {"sent": charge.sent}
                ),
            }
            for charge in self.charges[since:]
        ]


@dataclass(slots=True)
class OpenLedger:
    """A ledger that a round writes into.

    Attributes:
        before: the ledger that it goes on from.
    """

    before: Ledger
    _pages: dict[Any, "_Page"] = field(default_factory=dict)

    def charge_client(self, round: int, client: int, attempt: int, cost: Cost) -> None:
        """Enter what a client is about to release."""
        page = self._page(round, "client", cost, "")
        page.clients.append(client)
        page.attempts.append(attempt)

    def charge_server(self, round: int, sent: str, clients: Iterable[int], cost: Cost) -> None:
        """Enter what a trusted server is about to release.

        Args:
            round: of the answers.
            sent: names it among all that the server releases of that round.
            clients: whose answers are in it.
            cost: to each of them.
        """
        page = self._page(round, "server", cost, sent)
        page.clients.extend(clients)
        page.attempts.extend([1] * (len(page.clients) - len(page.attempts)))

    def closed(self) -> Ledger:
        """Return the ledger with all that was entered."""
        if not self._pages:
            return self.before
        return Ledger((*self.before.charges, *(page.charge() for page in self._pages.values())))

    def _page(self, round: int, by: Releaser, cost: Cost, sent: str) -> "_Page":
        key = round, by, sent, cost.mechanism, tuple(sorted(cost.figures.items()))
        return self._pages.setdefault(key, _Page(round, by, cost, sent))


@dataclass(slots=True)
class _Page:
    round: int
    by: Releaser
    cost: Cost
    sent: str
    clients: list[int] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)

    def charge(self) -> Charge:
        return Charge(
            self.round,
            self.by,
            self.cost,
            np.array(self.clients, np.int64),
            np.array(self.attempts, np.int64),
            self.sent,
        )
