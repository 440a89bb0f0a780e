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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.schedules import ConstantSchedule, PositiveSchedule
from fedkd.targets import Scale
from fedkd.training import Cohort, ComposedObjective, supervised
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    Fault,
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
from strategies.shared.as_published import published_filter
from strategies.shared.lessons import Lesson, SharedLesson
from strategies.shared.robust import Consensus, Rule, TrustingSettings
from strategies.shared.taught import (
    TaughtSettings,
    apart_steps,
    check_public_labels,
    composed_of,
    learn,
    never_taught,
    rows_of_step,
)


class CronusSettings(TaughtSettings, TrustingSettings):
    """Settings under ``strategy:`` when ``name: cronus``; the robust mean is the teacher.

    The filter is the default; ``dishonest`` is alpha in the paper.
    """

    name: Literal["cronus"] = "cronus"
    temperature: PositiveSchedule = ConstantSchedule(value=1.0)
    aggregation: Rule = "filter"

    def by_row(self, scale: Scale) -> Callable[[Tensor], Tensor]:
        """Return the rule of one row; by faults of a later implementation its filter."""
        if not self.as_published:
            return super().by_row(scale)
        return partial(
            published_filter,
            dishonest=self.dishonest,
            from_ones="zero_start" in self.as_published,
            quantile_of_rest="quantile_of_rest" in self.as_published,
        )


LIARS = (
    "clients.count=10",
    "adversary={kind: sign_flip, mode: fixed, fraction: 0.2}",
    "strategy.dishonest=0.4",
)
"""Settings in which a filter has something to leave out."""

FAULTS = {
    "zero_start": Fault(
        does="begins to look for the direction of most variance at a vector of ones, which every "
        "covariance of probabilities maps to 0",
        read_in="ZIB-IOL/FedDistill, utilities.py: top_ev",
        right="the eigenvalue problem is solved",
        shows_with=LIARS,
    ),
    "quantile_of_rest": Fault(
        does="leaves out by a quantile of the clients that the first pass left, fewer than stated",
        read_in="ZIB-IOL/FedDistill, byzantine/defences.py: Cronus",
        right="both passes leave out half of the stated share of all clients",
        shows_with=LIARS,
    ),
}


class Cronus(SharedLesson[CronusSettings, Lesson]):
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
    directions: ClassVar[Mapping[str, str]] = {CLIENTS: "from the robust mean of all clients"}
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    def __init__(self, settings: CronusSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        if self.learns(CLIENTS):
            check_public_labels(settings, federation)
        if settings.as_published and settings.aggregation != "filter":
            raise ValueError(
                "strategy.as_published of cronus is about strategy.aggregation: filter, got "
                f"{settings.aggregation}"
            )

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

    def asks(self, state: Lesson, client: int, round: Round, server: ServerTools) -> Asked:
        """Probabilities of the round's rows."""
        classes = self.federation.num_classes
        return Predictions.asked(round.public_rows, classes, scale="probabilities")

    def aggregate(
        self, state: Lesson, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Lesson:
        """Take the robust mean of the clients' soft labels, at the temperature of the lesson."""
        temperature = self.settings.softening(round.next().progress)
        clients = self.federation.num_clients
        with Consensus(
            self.settings, scale="probabilities", trust=state.trust, clients=clients
        ) as consensus:
            for upload, sent in payloads_of(uploads, Predictions):
                consensus.add(upload.client, sent.targets.probabilities(temperature))
            if not consensus.clients:
                return state
            target = Predictions(
                rows=round.public_rows,
                values=consensus.pop_of_all().numpy(),
                scale="probabilities",
                temperature=temperature,
                averaged=True,
            )
            return Lesson(target, trust=consensus.trust)
