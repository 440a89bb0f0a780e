"""Views: what the server gets to see of the answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeAlias, cast

from pydantic import PlainValidator, SerializeAsAny

from fedkd.exchange.kinds import Kinds, Stage
from fedkd.exchange.payload import Asked, Payload, PayloadT

Weighting = Literal["examples", "equal"]
"""How much a client counts in a mean: as much as it has private rows, or like every other."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One answer, or the mean of several, as a server sees it.

    Attributes:
        client: partition id; of a mean, the first of those in it.
        payload: what was sent; of several, their weighted mean.
        num_examples: private rows of the client; of several, of all of them.
        clients: how many are in it.
        of_all: the mean of all answers, where one noise on their sum protects the means of all
            others: what is to be used in the place of a mean of the payloads, whose noise is a
            multiple of that one, so that the two together would give it away.
    """

    client: int
    payload: Payload
    num_examples: int
    clients: int = 1
    of_all: Payload | None = None

    def weight(self, by: Weighting) -> int:
        """Return how much it counts in a mean."""
        return self.num_examples if by == "examples" else self.clients


class RunningMean(Generic[PayloadT]):
    """A running weighted mean of payloads: memory of one, whatever the number of clients."""

    def __init__(self) -> None:
        self._sum: PayloadT | None = None
        self._like: PayloadT | None = None
        self._weight = 0.0

    def add(self, payload: PayloadT, weight: int | float) -> None:
        """Fold one client's payload in.

        Raises:
            ValueError: the weight is not positive, or the payload has another form.
        """
        if not weight > 0:
            raise ValueError(f"weight must be > 0, got {weight}")
        term = payload.weighted(weight)
        self._sum = cast(PayloadT, term if self._sum is None else self._sum.plus(term))
        self._like = self._like or payload
        self._weight += weight

    @property
    def weight(self) -> float:
        """How much was added so far; 0: nothing was."""
        return self._weight

    def mean(self) -> PayloadT:
        """Return the mean, in the types of what was added.

        Raises:
            ValueError: nothing was added.
        """
        if self._sum is None or self._like is None:
            raise ValueError("nothing has no mean")
        return cast(PayloadT, self._sum.over(self._weight, self._like))


class View(Stage, ABC):
    """What of the answers reaches the aggregator."""

    def refuses(self, kind: type[Payload], sums: Weighting | None) -> str | None:
        """Return why it cannot show answers of a kind to an algorithm; None: it can.

        Args:
            kind: of payload.
            sums: how the algorithm weights clients in a mean, where a mean is all that it needs.
        """
        return None

    def refuses_asked(self, asked: Asked) -> str | None:
        """Return why it cannot show what is asked for, looking into its parts; None: it can."""
        return None

    @abstractmethod
    def shown(
        self,
        uploads: Iterable[Upload],
        sums: Weighting | None,
        group: Callable[[int], Hashable],
    ) -> Iterator[Upload]:
        """Yield what the aggregator sees.

        Args:
            uploads: good ones, as they come.
            sums: how clients are weighted in a mean.
            group: which clients' payloads have a mean with each other, such as those of one
                architecture.
        """


class All(View):
    """The server sees every answer."""

    kind: Literal["all"] = "all"

    def shown(
        self,
        uploads: Iterable[Upload],
        sums: Weighting | None,
        group: Callable[[int], Hashable],
    ) -> Iterator[Upload]:
        """Hand answers on, one by one."""
        yield from uploads


class Sum(View):
    """The server sees only sums: of each group of clients one answer, the weighted mean.

    A group of one client hides nothing.
    """

    kind: Literal["sum"] = "sum"

    def refuses(self, kind: type[Payload], sums: Weighting | None) -> str | None:
        """The algorithm has to need no more than a mean, and the kind to have one."""
        if sums is None:
            return "the algorithm needs each client's answer; use all"
        if not kind.adds_up:
            return f"a sum of {kind.kind} says nothing; use all"
        return None

    def refuses_asked(self, asked: Asked) -> str | None:
        """Every part has to have a mean."""
        parts = (self.refuses_asked(part) for part in asked.parts.values())
        return self.refuses(asked.kind, "equal") or next(filter(None, parts), None)

    def shown(
        self,
        uploads: Iterable[Upload],
        sums: Weighting | None,
        group: Callable[[int], Hashable],
    ) -> Iterator[Upload]:
        """Add up all answers, then yield each group's mean, in the order of their first clients."""
        if sums is None:
            raise ValueError("exchange.view: sum needs an algorithm that takes sums")
        groups: dict[Hashable, _Group] = {}
        for upload in uploads:
            groups.setdefault(group(upload.client), _Group()).add(upload, upload.weight(sums))
        for held in sorted(groups.values(), key=lambda group: group.client):
            yield held.upload()


class _Group:
    def __init__(self) -> None:
        self._mean = RunningMean[Payload]()
        self._examples = 0
        self._clients = 0
        self.client = -1

    def add(self, upload: Upload, weight: int) -> None:
        self._mean.add(upload.payload, weight)
        self.client = upload.client if self.client < 0 else min(self.client, upload.client)
        self._examples += upload.num_examples
        self._clients += upload.clients

    def upload(self) -> Upload:
        return Upload(self.client, self._mean.mean(), self._examples, self._clients)


VIEWS: Kinds[View] = Kinds("view", View, {"all": All, "sum": Sum})
"""Views by the name that a settings file uses."""

ViewField: TypeAlias = Annotated[SerializeAsAny[View], PlainValidator(VIEWS.read)]
"""A view in settings: its kind, or a table with its kind and settings."""
