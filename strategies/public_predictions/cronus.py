"""Cronus: a robust mean of soft labels of public rows, learnt in the same steps as private rows.

Source: Chang, Shejwalkar, Shokri, Houmansadr, 2019. https://arxiv.org/abs/1912.11279
The server leaves out, row by row, the clients that stand out, and averages the rest. A client
learns from its labels and from these soft labels jointly, in every step; it does not digest first
and revisit its own rows then. No code of the authors' is known, so the filter is the paper's as a
later implementation has it, but for two of its faults (see `fedkd.targets.robust`).

Differs from the paper: the public term is KL(target || client), whose gradient is that of the
cross-entropy. Other robust rules, the plain mean, and a trust in clients that falls over the rounds
(``trust_rate``, as in ExpGuard) are settings.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd.bounds import Real, ShareBelowOne
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value
from fedkd.schedules import ConstantSchedule, PositiveSchedule
from fedkd.targets import (
    PredictionSpool,
    coordinate_median,
    filtered_mean,
    geometric_median,
    less_trusted,
    mean_by_row,
    trimmed_mean,
)
from fedkd.training import Cohort, ComposedObjective, supervised
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    Federation,
    Received,
    Round,
    ServerTools,
    Step,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.public_predictions.dsfl import soft_labels
from strategies.shared.lessons import Lesson, SharedLesson
from strategies.shared.taught import (
    TaughtSettings,
    apart_steps,
    check_public_labels,
    composed_of,
    learn,
    never_taught,
    rows_of_step,
)


class CronusSettings(TaughtSettings):
    """Settings under ``strategy:`` when ``name: cronus``; the robust mean is the teacher.

    Attributes:
        aggregation: ``filter`` leaves out, row by row, the clients that stand out along the
            direction of most variance, as in the paper; ``geometric_median``, ``median`` and
            ``trimmed_mean`` are other robust means; ``mean`` is none.
        dishonest: share of the clients that may lie, alpha in the paper: ``filter`` leaves out
            half of them, rounded down, in each of two passes.
        trim: share of the clients that ``trimmed_mean`` leaves out at each end.
        trust_rate: how fast trust in a client falls, over the rounds, with the distance of what it
            says from the robust mean; the target is then the mean weighted by trust. 0: the target
            is the robust mean, and nothing is remembered.
    """

    name: Literal["cronus"] = "cronus"
    temperature: PositiveSchedule = ConstantSchedule(value=1.0)
    aggregation: Literal["filter", "geometric_median", "median", "trimmed_mean", "mean"] = "filter"
    dishonest: ShareBelowOne = 0.2
    trim: Real = Field(0.1, ge=0, lt=0.5)
    trust_rate: Real = Field(0.0, ge=0, le=100)

    def robust_mean(self, probabilities: Tensor) -> Tensor:
        """Return what the clients' soft labels ``[clients, rows, classes]`` come to."""
        match self.aggregation:
            case "filter":
                return filtered_mean(probabilities, dishonest=self.dishonest)
            case "geometric_median":
                return geometric_median(probabilities)
            case "median":
                return coordinate_median(probabilities, scale="probabilities")
            case "trimmed_mean":
                return trimmed_mean(probabilities, trim=self.trim, scale="probabilities")
            case "mean":
                return filtered_mean(probabilities, dishonest=0.0)


@dataclass(frozen=True)
class Trusting(Lesson):
    """What the server remembers: the lesson, and how much it trusts each client.

    Attributes:
        trust: float64 ``[clients]`` that sums to 1; None while all are trusted alike.
    """

    trust: np.ndarray | None = None


class Cronus(SharedLesson[CronusSettings, Trusting]):
    """Learn from own labels and from the robust mean at once; then predict the public rows."""

    card = Card(
        learns="clients from the robust mean of all clients' soft labels",
        up="n x C probabilities",
        down="n x C probabilities",
        equation=(
            "in every step CE(private) + KL(target || own) on public rows; target = mean of the "
            "clients left when, twice, the alpha K / 2 largest |(p_k - mean p) v| have gone, v the "
            "first eigenvector of their covariance"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = CronusSettings
    takes_views = True
    State: ClassVar[type[Value]] = Trusting
    directions: ClassVar[Mapping[str, str]] = {CLIENTS: "from the robust mean of all clients"}

    def __init__(self, settings: CronusSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        if self.learns(CLIENTS):
            check_public_labels(settings, federation)

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        return not self.learns(CLIENTS) or never_taught(self.settings, self.federation)

    def composed(self) -> ComposedObjective | None:
        """The settings' terms; none where clients learn as in `local`."""
        if not self.learns(CLIENTS):
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
        """Minimise both terms in every step; then send soft labels of the round's public rows."""
        if self.learns(CLIENTS):
            learn(cohort, received, call, self.settings)
        else:
            cohort.fit(supervised, private=call.local)
        return soft_labels(cohort, call.public_rows)

    def asks(self, state: Trusting, client: int, round: Round, server: ServerTools) -> Asked:
        """Probabilities of the round's rows."""
        classes = self.federation.num_classes
        return Predictions.asked(round.public_rows, classes, scale="probabilities")

    def aggregate(
        self, state: Trusting, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Trusting:
        """Take the robust mean of the clients' soft labels, at the temperature of the lesson."""
        temperature = self.settings.softening(round.next().progress)
        said = {}
        with PredictionSpool() as spool:
            for upload, sent in payloads_of(uploads, Predictions):
                soft = sent.targets.probabilities(temperature)
                spool.add(soft)
                if self.settings.trust_rate:
                    said[upload.client] = soft
            if not spool.count:
                return state
            labels = spool.reduce(self.settings.robust_mean)
        trust = state.trust
        if said:
            labels, trust = self._trusted(trust, said, labels)
        target = Predictions(
            rows=round.public_rows,
            values=labels.float().numpy(),
            scale="probabilities",
            temperature=temperature,
            averaged=True,
        )
        return Trusting(target, trust)

    def _trusted(
        self, trust: np.ndarray | None, said: Mapping[int, Tensor], robust: Tensor
    ) -> tuple[Tensor, np.ndarray]:
        """Return the mean weighted by trust, and the trust; who was away keeps what it had."""
        clients, values = list(said), torch.stack(list(said.values()))
        count = self.federation.num_clients
        after = np.full(count, 1 / count) if trust is None else trust.copy()
        after[clients] = less_trusted(after[clients], values, robust, rate=self.settings.trust_rate)
        shares = torch.from_numpy(after[clients])[:, None].expand(-1, values.shape[1])
        return mean_by_row(values, shares), after
