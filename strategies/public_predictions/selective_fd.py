"""Selective-FD: clients speak of public rows like their own, and are taught where they agree.

Source: Shao, Wu, Zhang, 2024, Selective knowledge sharing for privacy-preserving federated
distillation without a good teacher. https://arxiv.org/abs/2304.01731
A client estimates once how much denser its private rows are than blind ones at each public row, and
claims those where that is more than it is for a quarter of its own. The server averages each row
over those who claim it, and drops rows that nobody claims or whose mean is ambiguous.

Differs from the authors' code: the estimate's system is solved, where theirs multiplies by its
matrix; known rows are drawn, and are half of a client's at most; the kernel's width follows the
client's rows unless it is given (theirs is 5). The server's selector is the paper's, which their
code lacks, with a threshold that can leave something out. Soft labels travel unless ``labels:
hard`` is set; the codec ``cfd`` with ``bits: 1`` sends hard ones without loss.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fedkd.bounds import Count, Few, PositiveWeight, Real, ShareBelowOne
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.views import Weighting
from fedkd.targets import ambiguity, density_ratio
from fedkd.training import Cohort, as_tensor, supervised, towards_targets
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    Fault,
    Federation,
    PrivateUse,
    Received,
    Round,
    ServerTools,
    Step,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.public_predictions.dsfl import soft_labels
from strategies.shared.as_published import multiplied_density_ratio
from strategies.shared.lessons import Lesson, SharedLesson
from strategies.shared.robust import Consensus, RobustSettings

CLAIMED = "claimed"
"""What a client calls its mask of the public set: bool ``[public]``."""

FEWEST = 2
"""Kept rows that are worth a lesson, where a round has so many."""

NARROWER = 4
"""How many times the kernel is narrower than the median distance of a client's known rows."""


class SelectiveFDSettings(RobustSettings):
    """Settings under ``strategy:`` when ``name: selective_fd``.

    Attributes:
        known: private rows that the estimate is made of, half of the client's at most.
        blind: rows that it compares them with, uniform between the smallest and the largest number
            of the public rows.
        width: of the Gaussian kernel; null: a quarter of the median distance between known rows.
        quantile: share of the client's other rows that would not be claimed.
        ambiguous: what an L1 distance between a mean and its own one-hot label, 2 (1 - largest
            probability), has to stay below; null: no row is too ambiguous.
        distil_epochs: passes over the kept public rows before a client trains at home.
        labels: ``soft``: clients send probabilities; ``hard``: 1 for the most probable class, so
            that a row's mean holds the shares of its claimants' votes.
    """

    name: Literal["selective_fd"] = "selective_fd"
    known: Few = 250
    blind: Few = 250
    width: PositiveWeight | None = None
    quantile: ShareBelowOne = 0.25
    ambiguous: Annotated[Real, Field(ge=1e-6, le=2)] | None = 0.9
    distil_epochs: Count = 1
    labels: Literal["soft", "hard"] = "soft"


def claimed_rows(
    private: torch.Tensor,
    public: torch.Tensor,
    settings: SelectiveFDSettings,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return which public rows ``[rows, features]`` are like a client's private ones: bool."""
    order = rng.permutation(len(private))
    known, others = np.split(order, [max(1, min(settings.known, len(order) // 2))])
    blind = torch.from_numpy(
        rng.uniform(float(public.min()), float(public.max()), (settings.blind, public.shape[1]))
    )
    width = settings.width or _width(private[known], blind)
    # The other rows set the threshold; a client with a single row has no others.
    held = private[others] if len(others) else private[known]
    published = "multiplies_by_matrix" in settings.as_published
    estimate = multiplied_density_ratio if published else density_ratio
    ratios = estimate(torch.cat([held, public]), private[known], blind, width=width)
    threshold = torch.quantile(ratios[: len(held)], settings.quantile)
    claimed: np.ndarray = (ratios[len(held) :] > threshold).numpy()
    return claimed


def _width(known: torch.Tensor, blind: torch.Tensor) -> float:
    distances = torch.pdist(known.double())
    if not len(distances) or not distances.median():
        distances = torch.cdist(known.double(), blind).flatten()
    return max(float(distances.median()) / NARROWER, 1e-6)


def hardened(values: np.ndarray) -> np.ndarray:
    """Return 1 for the largest of each row of ``[rows, classes]``, the first of equals, else 0."""
    hard: np.ndarray = np.eye(values.shape[1], dtype=np.float32)[values.argmax(-1)]
    return hard


def consensus(
    uploads: Iterable[Upload], rows: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the mean over those who sent it, and how many those are."""
    total, claims = np.zeros((len(rows), classes)), np.zeros(len(rows))
    for upload, sent in payloads_of(uploads, Predictions):
        places = np.searchsorted(rows, sent.rows)
        # In the mean of several clients the weights say which share of them sent a row; those of
        # a single client would be its own opinion of itself.
        shares = sent.weights if upload.clients > 1 and sent.weights is not None else 1.0
        weights = upload.weight("equal") * np.broadcast_to(shares, len(places))
        total[places] += weights[:, None] * sent.values
        claims[places] += weights
    return total / np.where(claims > 0, claims, 1.0)[:, None], claims


def robust_consensus(
    uploads: Iterable[Upload], rows: np.ndarray, classes: int, settings: RobustSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row what a rule makes of those who sent it, and how many these are.

    Clients that a check leaves out have sent nothing.
    """
    with Consensus(settings, scale="probabilities") as said:
        for upload, own in payloads_of(uploads, Predictions):
            places = np.searchsorted(rows, own.rows)
            values, sent = np.zeros((len(rows), classes), np.float32), np.zeros(len(rows), bool)
            values[places], sent[places] = own.values, True
            if sent.any():
                said.add(upload.client, values, sent=sent)
        if not said.clients:
            return np.zeros((len(rows), classes)), np.zeros(len(rows))
        return said.of_all().numpy(), said.speakers()


FAULTS = {
    "multiplies_by_matrix": Fault(
        does="multiplies by the matrix of the density ratio's system instead of its inverse",
        read_in="shaojiawei07/Selective-FD, KuLSIF.py: np.dot(LHS_matrix, RHS)",
        right="the system is solved",
        # The authors' width; with a narrow kernel no claim changes.
        shows_with=("strategy.width=5",),
    ),
    "never_filters": Fault(
        does="sets the server's threshold to 2.0, above any distance that there can be",
        read_in="kitsuyaazuma/SCARLET (reproducibility): l1_distance_threshold",
        right="a threshold below 2 (1 - 1/C)",
        stands_for="strategy.ambiguous=null",
    ),
}


class SelectiveFD(SharedLesson[SelectiveFDSettings, Lesson]):
    """Distil what is kept, train at home, send soft labels of the rows that one claims."""

    card = Card(
        learns="clients from the mean of those clients who claim a public row",
        up="at most n x C probabilities, of the rows that the client claims, 1 bit a row",
        down="at most n x C probabilities, of the rows that are kept, 1 bit a row",
        equation=(
            "a row is claimed if KuLSIF(row) > its quantile over own rows, kept if 2 (1 - max p) < "
            "tau of the mean p of its claimants; KL(p || own) on kept rows, then CE on private rows"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = SelectiveFDSettings
    takes_views = True
    directions: ClassVar[Mapping[str, str]] = {CLIENTS: "from the clients that claim a row"}
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    @property
    def sums(self) -> Weighting | None:
        """A mean is all that is needed; other rules look at each client."""
        return self.settings.sums()

    @property
    def private_use(self) -> PrivateUse:
        """Which rows are claimed depends on private rows."""
        return super().private_use._replace(
            sent="which public rows are near to private ones",
        )

    def __init__(self, settings: SelectiveFDSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        most = 2 * (1 - 1 / federation.num_classes)
        if settings.ambiguous is not None and settings.ambiguous >= most:
            raise ValueError(
                f"strategy.ambiguous must be below 2 (1 - 1/classes) = {most:g}, or no row would "
                f"be left out, got {settings.ambiguous:g}; null keeps all"
            )

    @property
    def learns_alone(self) -> bool:
        """Whether nobody learns from what is received."""
        return not self.learns(CLIENTS)

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Distil what is kept, train on private rows, speak of those public rows one claims."""
        if received:
            lesson = call.lesson(received, epochs=self.settings.distil_epochs)
            cohort.fit(towards_targets, public=lesson)
        cohort.fit(supervised, private=call.local)
        rows = call.public_rows
        hard = self.settings.labels == "hard"
        return [
            Predictions(
                rows=rows[claimed[rows]],
                values=(hardened(sent.values) if hard else sent.values)[claimed[rows]],
                scale="probabilities",
                ids="subset",
                planned=len(rows),
            )
            for sent, claimed in zip(
                soft_labels(cohort, rows), self._claims(cohort, call), strict=True
            )
        ]

    def _claims(self, cohort: Cohort, call: Call) -> list[np.ndarray]:
        """Return each member's mask of the public set, which it makes once and keeps."""
        kept = cohort.kept(CLAIMED)
        if any(mask is None for mask in kept):
            everything = np.arange(self.federation.public_size)
            nothing = [everything[:0]] * (len(kept) - 1)
            public = as_tensor(cohort.examples(on=[everything, *nothing])[0].inputs).flatten(1)
            first = self.federation.round(1)
            kept = [
                claimed_rows(
                    as_tensor(own.inputs).flatten(1), public, self.settings, first.random(client)
                )
                if mask is None
                else mask
                for client, mask, own in zip(
                    cohort.clients, kept, cohort.examples(on="private"), strict=True
                )
            ]
            cohort.keep(CLAIMED, kept)
        return [mask for mask in kept if mask is not None]

    def asks(self, state: Lesson, client: int, round: Round, server: ServerTools) -> Asked:
        """Probabilities of some of the round's rows, also of none."""
        classes = self.federation.num_classes
        return Predictions.asked(round.public_rows, classes, ids="subset", scale="probabilities")

    def aggregate(
        self, state: Lesson, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Lesson:
        """Keep the rows that somebody claims and whose mean is not too ambiguous.

        Where nobody claims anything the last ones stay. A lone row is left out, since BatchNorm
        cannot train on it.
        """
        rows = round.public_rows
        classes, settings = self.federation.num_classes, self.settings
        if settings.defence is None:
            means, claims = consensus(uploads, rows, classes)
        else:
            means, claims = robust_consensus(uploads, rows, classes, settings)
        if not claims.any():
            return state
        keep = claims > 0
        if self.settings.ambiguous is not None and not self.commits("never_filters"):
            keep &= ambiguity(torch.from_numpy(means)).numpy() < self.settings.ambiguous
        if keep.sum() < min(FEWEST, len(rows)):
            return Lesson()
        return Lesson(
            Predictions(
                rows=rows[keep],
                values=means[keep].astype(np.float32),
                scale="probabilities",
                averaged=True,
                ids="subset",
                planned=len(rows),
            )
        )

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows have steps of their own, however few are kept."""
        yield from super().smallest_steps()
        rows = min(FEWEST, self.federation.rows_per_round)
        yield from self.clients_public_steps(rows)
