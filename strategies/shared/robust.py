"""Rules by which a server makes one answer of what many clients say of public rows.

The rules themselves are in `fedkd.targets`. Settings choose one; `Consensus` gathers what clients
say and applies it, over all clients or, for each of them, over the others. Which algorithm takes
which rule, how many liars each withstands and what it costs is in docs/defences.md.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from fedkd.bounds import Real, ShareBelowOne
from fedkd.exchange.payload import expect
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.views import Weighting
from fedkd.mutual.peers import PeerTable, constants
from fedkd.targets import (
    PredictionSpool,
    Scale,
    StreamingMean,
    coordinate_median,
    filtered_mean,
    geometric_median,
    kept_within,
    less_trusted,
    mean_by_row,
    squared_deviations,
    squared_distances,
    trimmed_mean,
)
from strategies.contract import StrategySettings, Upload

CHECKS = {"norm_check": squared_deviations, "outlier_check": squared_distances}
"""What a check compares clients by, row by row; the rest is one rule, `kept_within`."""


Rule: TypeAlias = Literal[
    "mean",
    "median",
    "trimmed_mean",
    "geometric_median",
    "filter",
    "norm_check",
    "outlier_check",
]


class CheckedSettings(StrategySettings):
    """For algorithms that weigh clients by a rule of their own: who is weighed at all.

    Attributes:
        aggregation: ``mean``: all clients, by the algorithm's own weights; ``norm_check`` and
            ``outlier_check``: without clients whose tables, as a whole, are much larger than the
            median client's, or much farther from the clients' median.
        factor: how many times the median client's size or distance the checks allow.
    """

    aggregation: Literal["mean", "norm_check", "outlier_check"] = "mean"
    factor: Real = Field(2.0, ge=1, le=1000)


class RobustSettings(StrategySettings):
    """For algorithms that average what clients say: what stands in the place of the mean.

    Attributes:
        aggregation: ``mean``; or what withstands clients that lie: ``median`` and ``trimmed_mean``,
            score by score; ``geometric_median``, and ``filter``, which leaves out the clients that
            stand out along the direction of most variance, row by row; ``norm_check`` and
            ``outlier_check``, means without clients whose tables, as a whole, are much larger than
            the median client's, or much farther from the clients' median.
        dishonest: share of the clients that may lie: ``filter`` leaves out half of them, rounded
            down, in each of two passes.
        trim: share of the clients that ``trimmed_mean`` leaves out at each end.
        factor: how many times the median client's size or distance the checks allow.
    """

    aggregation: Rule = "mean"
    dishonest: ShareBelowOne = 0.2
    trim: Real = Field(0.1, ge=0, lt=0.5)
    factor: Real = Field(2.0, ge=1, le=1000)

    @property
    def defence(self) -> str | None:
        """The setting that makes more than a mean of the answers, as it is written; None: none."""
        return None if self.aggregation == "mean" else f"strategy.aggregation: {self.aggregation}"

    def sums(self, weighting: Weighting = "equal") -> Weighting | None:
        """How clients are weighted where a mean of their answers is all that is needed."""
        return weighting if self.defence is None else None

    def check_no_defence(self, setting: str, reason: str) -> None:
        """Refuse a rule beside a setting with which it makes no sense.

        Args:
            setting: the other one, such as ``strategy.peers: ring``.
            reason: why not, and what would work.

        Raises:
            ValueError: naming both.
        """
        if self.defence is not None:
            raise ValueError(f"{setting} does not go with {self.defence}: {reason}")

    def by_row(self, scale: Scale) -> Callable[[Tensor], Tensor]:
        """Return the rule of one row: the plain mean where whole clients are checked."""
        match self.aggregation:
            case "median":
                return partial(coordinate_median, scale=scale)
            case "trimmed_mean":
                return partial(trimmed_mean, trim=self.trim, scale=scale)
            case "geometric_median":
                return geometric_median
            case "filter":
                return partial(filtered_mean, dishonest=self.dishonest)
            case _:
                return partial(filtered_mean, dishonest=0.0)


class TrustingSettings(RobustSettings):
    """Rules, and a trust in clients that is remembered.

    Attributes:
        trust_rate: how fast trust in a client falls, over the rounds, with the distance of what it
            says from what the rule makes of all; what is learnt is then the mean weighted by trust.
            0: it is what the rule makes of all, and nothing is remembered.
    """

    trust_rate: Real = Field(0.0, ge=0, le=100)

    @property
    def defence(self) -> str | None:
        """The setting that makes more than a mean of the answers, as it is written; None: none."""
        if super().defence is None and self.trust_rate:
            return f"strategy.trust_rate: {self.trust_rate:g}"
        return super().defence


class Consensus:
    """What clients say of the same public rows, one after the other, and what is made of it.

    A plain mean holds one table, however many clients there are. Other rules need all of them: in a
    file without a name, read back some rows at a time; to be closed, or used in a ``with``.
    """

    def __init__(
        self,
        settings: RobustSettings,
        *,
        scale: Scale,
        trust: Float[np.ndarray, " clients"] | None = None,
        clients: int = 0,
    ) -> None:
        """Begin without any client.

        Args:
            settings: the rule.
            scale: what clients' numbers are; of probabilities rules make probabilities.
            trust: in each client of the run, before the round; None: equal.
            clients: how many there are, where trust is remembered.
        """
        self._settings, self._scale = settings, scale
        self._trust, self._registered = trust, clients
        self._mean = StreamingMean()
        self._spool = None if settings.defence is None else PredictionSpool()
        self._own: dict[int, PeerTable] = {}
        self._sent: list[Bool[np.ndarray, " rows"]] = []
        self._clients: list[int] = []
        self._of_all: Tensor | None = None

    @property
    def clients(self) -> tuple[int, ...]:
        """Who has said something, in order."""
        return tuple(self._clients)

    def add(
        self,
        client: int,
        values: PeerTable,
        weight: int | float = 1,
        *,
        among_others: bool = False,
        sent: Bool[np.ndarray, " rows"] | None = None,
    ) -> None:
        """Take in what a client says.

        Args:
            client: its number.
            values: probabilities or logits, finite, of the rows of all earlier ones.
            weight: how much it counts in a plain mean; other rules count each client once.
            among_others: whether `of_others` will be asked for.
            sent: which rows it spoke of, the same for all or given for all; what stands in the
                others says nothing.
        """
        if self._spool is None:
            self._mean.add(values, weight)
            if among_others:
                self._own[client] = values
        else:
            self._spool.add(values)
        if sent is not None:
            self._sent.append(sent)
        self._clients.append(client)

    def of_all(self) -> Float[Tensor, "rows classes"]:
        """Return what all of them come to, on the CPU; a plain mean in float64.

        Raises:
            ValueError: if there is nobody.
        """
        if self._spool is None:
            return self._mean.mean()
        if self._of_all is None:
            robust = self._reduced(self._places())
            self._of_all = self._weighted(robust)
        return self._of_all

    def pop_of_all(self) -> Float[Tensor, "rows classes"]:
        """Return `of_all` in float32, without a second table; nothing may be asked thereafter.

        Raises:
            ValueError: if there is nobody.
        """
        return self._mean.pop_mean() if self._spool is None else self.of_all().float()

    def of_others(self, client: int) -> Float[Tensor, "rows classes"]:
        """Return what all but one of them come to, on the CPU; a plain mean in float64.

        Raises:
            ValueError: if there is nobody else.
        """
        if self._spool is None:
            return self._mean.without(self._own[client])
        others = [place for place, other in enumerate(self._clients) if other != client]
        if not self._remembers:
            return self._reduced(others)
        self.of_all()
        return self._spool.reduce(partial(mean_by_share, shares=self._shares(others)), only=others)

    @property
    def trust(self) -> Float[np.ndarray, " clients"] | None:
        """How much each client of the run is trusted now; None: all are trusted alike."""
        if self._remembers and self._clients:
            self.of_all()
        return self._trust

    def speakers(self) -> Float[np.ndarray, " rows"]:
        """Return how many clients what was made of each row is made of."""
        places = self._kept(self._places())
        counted: np.ndarray = np.stack([self._sent[place] for place in places]).sum(0, dtype=float)
        return counted

    # -- rules that need all of them ---------------------------------------------------------

    @property
    def _remembers(self) -> bool:
        return isinstance(self._settings, TrustingSettings) and self._settings.trust_rate > 0

    def _places(self) -> list[int]:
        return list(range(len(self._clients)))

    def _kept(self, places: list[int]) -> list[int]:
        """Return those of them that a check leaves."""
        assert self._spool is not None  # noqa: S101
        sent = np.stack([self._sent[place] for place in places]) if self._sent else None
        return kept_places(self._settings, self._spool, places, sent)

    def _reduced(self, places: list[int]) -> Float[Tensor, "rows classes"]:
        """Return what the rule makes of some of them; zeros in a row that nobody spoke of."""
        assert self._spool is not None  # noqa: S101
        kept, rule = self._kept(places), self._settings.by_row(self._scale)
        if not self._sent:
            return self._spool.reduce(rule, only=kept)
        sent = np.stack([self._sent[place] for place in kept])
        parts = [
            _of_speakers(rule, values, sent[:, rows]) for rows, values in self._spool.chunks(kept)
        ]
        return torch.cat(parts)

    def _weighted(self, robust: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows classes"]:
        """Trust those less that are far from what the rule says; return the mean by trust."""
        assert self._spool is not None  # noqa: S101
        if not (isinstance(self._settings, TrustingSettings) and self._settings.trust_rate):
            return robust
        count = self._registered
        after = np.full(count, 1 / count) if self._trust is None else self._trust.copy()
        said = torch.cat([values.clone() for _, values in self._spool.chunks()], dim=1)
        rate = self._settings.trust_rate
        after[self._clients] = less_trusted(after[self._clients], said, robust, rate=rate)
        self._trust = after
        return mean_by_share(said, shares=self._shares(self._places()))

    def _shares(self, places: Sequence[int]) -> Float[Tensor, " clients"]:
        assert self._trust is not None  # noqa: S101
        return torch.from_numpy(self._trust[[self._clients[place] for place in places]])

    def close(self) -> None:
        """Give the room of what was said back."""
        if self._spool is not None:
            self._spool.close()

    def __enter__(self) -> "Consensus":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def mean_by_share(
    values: Float[Tensor, "clients rows classes"], *, shares: Float[Tensor, " clients"]
) -> Float[Tensor, "rows classes"]:
    """Return the mean in which each client has the same share of every row."""
    return mean_by_row(values, shares[:, None].expand(-1, values.shape[1]))


def kept_places(
    settings: RobustSettings | CheckedSettings,
    spool: PredictionSpool,
    places: Sequence[int],
    sent: Bool[np.ndarray, "clients rows"] | None = None,
) -> list[int]:
    """Return which contributions to a spool a check leaves; all of them without a check.

    Args:
        settings: which check.
        spool: what clients say.
        places: the contributions among which it checks.
        sent: which rows each of them spoke of; None: all.
    """
    rule = CHECKS.get(settings.aggregation)
    if rule is None:
        return list(places)
    squares = [
        _among_speakers(rule, values, None if sent is None else sent[:, rows])
        for rows, values in spool.chunks(places)
    ]
    kept = kept_within(np.concatenate(squares, axis=1), sent, factor=settings.factor)
    return [place for place, keep in zip(places, kept, strict=True) if keep]


def values_of(upload: Upload) -> np.ndarray:
    """Return what an upload of predictions says of public rows, as it was sent."""
    return expect(upload.payload, Predictions).values


def checked(
    settings: CheckedSettings,
    uploads: Iterable[Upload],
    said: Callable[[Upload], Float[np.ndarray, "rows classes"]],
) -> Iterator[Upload]:
    """Pass on the uploads of clients that the check leaves; without one all, as they come.

    Args:
        settings: which check.
        uploads: of the round.
        said: what an upload says of public rows, on the scale that is averaged.
    """
    rule = CHECKS.get(settings.aggregation)
    if rule is None:
        yield from uploads
        return
    held = list(uploads)
    if not held:
        return
    values = torch.stack([constants(said(upload)) for upload in held])
    kept = kept_within(rule(values), factor=settings.factor)
    yield from (upload for upload, keep in zip(held, kept, strict=True) if keep)


def _of_speakers(
    rule: Callable[[Tensor], Tensor],
    values: Float[Tensor, "clients rows classes"],
    sent: Bool[np.ndarray, "clients rows"],
) -> Float[Tensor, "rows classes"]:
    """Return what a rule makes of each row by those who spoke of it."""
    told = torch.zeros(values.shape[1:], dtype=values.dtype)
    for speakers, rows in _alike(sent):
        told[rows] = rule(values[speakers][:, rows])
    return told


def _among_speakers(
    rule: Callable[[Tensor], Float[np.ndarray, "clients rows"]],
    values: Float[Tensor, "clients rows classes"],
    sent: Bool[np.ndarray, "clients rows"] | None,
) -> Float[np.ndarray, "clients rows"]:
    """Return what a check compares, of each row among those who spoke of it; else 0."""
    if sent is None:
        return rule(values)
    squares = np.zeros(sent.shape)
    for speakers, rows in _alike(sent):
        squares[np.ix_(speakers, rows)] = rule(values[speakers][:, rows])
    return squares


def _alike(sent: Bool[np.ndarray, "clients rows"]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield clients, and the rows that just these spoke of."""
    patterns, which = np.unique(sent, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        if pattern.any():
            yield np.flatnonzero(pattern).tolist(), np.flatnonzero(which == number).tolist()
