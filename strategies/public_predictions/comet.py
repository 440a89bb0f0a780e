"""COMET: clients are grouped by what they say of a row, and learn from the group nearest to them.

Source: Cho, Wang, Chirvolu, Joshi, 2021, Personalized Federated Learning for Heterogeneous Clients
with Clustered Knowledge Transfer. https://arxiv.org/abs/2109.08119
Only the paper's abstract was at hand; the rule is that of the code of SCARLET (Azuma et al., 2025),
which compares with it: the server cuts the clients' soft labels of every public row into two groups
and sends both groups' means to everybody; a client takes, row by row, the one nearest to what it
says itself. ``group: clients`` cuts the clients in two by all rows together, and ``distil: beside``
puts the public term into every step of training at home.

Differs from the code: two groups of up to 12 clients are the best there are; others are seeded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedkd.bounds import Few
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Bundle, Predictions
from fedkd.exchange.values import Value
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.targets import centroids_by_row, clusters_by_row, nearest_centroid
from fedkd.tensors import as_tensor
from fedkd.training import Cohort, supervised
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    Step,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.public_predictions.dsfl import (
    SERVER,
    DistilSettings,
    soft_labels,
    steps_on_public_rows,
)
from strategies.shared.lessons import Distilling
from strategies.shared.robust import CheckedSettings, checked, values_of


class COMETSettings(DistilSettings, CheckedSettings):
    """Settings under ``strategy:`` when ``name: comet``.

    Attributes:
        clusters: groups of clients; one makes every client learn the mean of all.
        group: ``rows`` groups the clients anew for each row; ``clients`` once for all rows.
        distil: ``before`` distils public rows before a client trains at home; ``beside`` in the
            same steps.
        kd_weight: weight of distillation; a number or a schedule.
    """

    name: Literal["comet"] = "comet"
    clusters: Few = 2
    group: Literal["rows", "clients"] = "rows"
    distil: Literal["before", "beside"] = "before"
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)


@dataclass(frozen=True)
class Centroids(Value):
    """What the server remembers.

    Attributes:
        means: soft labels of each group, by its number; None before anybody has sent anything.
        model: the server's own, where it has one.
    """

    means: Bundle | None = None
    model: ServerModel | None = None


def centroids(soft: Tensor, settings: COMETSettings, rng: np.random.Generator) -> Tensor:
    """Return the means ``[clusters, rows, classes]`` of groups of clients ``[clients, ...]``."""
    # For `clients` all of a client's rows are one point.
    points = soft if settings.group == "rows" else soft.flatten(1)[:, None]
    groups = clusters_by_row(points, clusters=settings.clusters, rng=rng)
    means = centroids_by_row(points, groups, clusters=settings.clusters)
    return means.reshape(settings.clusters, *soft.shape[1:])


def nearest(own: Tensor, means: Tensor, settings: COMETSettings) -> Tensor:
    """Return of means ``[clusters, rows, classes]`` those nearest to one's own soft labels."""
    if settings.group == "clients":
        chosen = nearest_centroid(own.flatten()[None], means.flatten(1)[:, None])
        return means[int(chosen)]
    return means[nearest_centroid(own, means), torch.arange(len(own))]


class COMET(Strategy[COMETSettings, Centroids]):
    """Predict; the server groups the clients; distil the nearest group's mean, train at home."""

    card = Card(
        learns=(
            "clients from that group of clients that is nearest to them, row by row, and a server "
            "model, if there is one, from the mean of all"
        ),
        up="n x C probabilities",
        down="clusters x n x C probabilities",
        equation=(
            "KL(nearest of the 2-means of {p_k(x)} to own p(x) || own) on public rows, then CE on "
            "private rows"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = COMETSettings
    takes_views = True
    State: ClassVar[type[Value]] = Centroids
    directions: ClassVar[Mapping[str, str]] = {
        CLIENTS: "from the group of clients nearest to them",
        SERVER: "its model, if there is one, from the mean of all clients",
    }
    up = (Predictions,)
    down = (Bundle,)
    needs_public = True
    has_ensemble = True

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        return not self.learns(CLIENTS) or self.federation.never(self.settings.kd_weight)

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Distil the nearest means before or beside private rows; predict the round's rows."""
        weight = self.settings.kd_weight.at(call.progress)
        lesson = None
        if received and weight:
            nearest_means = Received(self._nearest(cohort, received))
            lesson = call.lesson(nearest_means, epochs=self.settings.distil_epochs)
        if lesson is not None and self.settings.distil == "beside":
            cohort.fit(Distilling(weight, labels=True), private=call.local, public=lesson)
        else:
            if lesson is not None:
                cohort.fit(Distilling(weight), public=lesson)
            cohort.fit(supervised, private=call.local)
        return soft_labels(cohort, call.public_rows)

    def _nearest(self, cohort: Cohort, received: Received) -> list[Predictions]:
        """Return what each member learns: the means that are nearest to what it says now."""
        told = [
            [part for part in piece.parts.values() if isinstance(part, Predictions)]
            for piece in received.all(Bundle)
        ]
        rows = told[0][0].rows
        return [
            _soft(
                rows,
                nearest(
                    as_tensor(own.values),
                    torch.stack([as_tensor(part.values) for part in means]),
                    self.settings,
                ),
            )
            for own, means in zip(soft_labels(cohort, rows), told, strict=True)
        ]

    # -- server half ---------------------------------------------------------------------

    def begin(self, server: ServerTools) -> Centroids:
        """There are no groups yet."""
        return Centroids(model=server.new(SERVER) if self.settings.server_model else None)

    def receives(self, state: Centroids, client: int, round: Round) -> str | None:
        """All groups' means, for everybody."""
        return None if state.means is None or self.learns_alone else "means"

    def payload(self, state: Centroids, key: str) -> Bundle:
        """All groups' means."""
        assert state.means is not None  # noqa: S101
        return state.means

    def asks(self, state: Centroids, client: int, round: Round, server: ServerTools) -> Asked:
        """Probabilities of the round's rows."""
        classes = self.federation.num_classes
        return Predictions.asked(round.public_rows, classes, scale="probabilities")

    def aggregate(
        self, state: Centroids, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Centroids:
        """Group the clients; let the server's model distil the mean of all."""
        kept = checked(self.settings, uploads, values_of)
        sent = [as_tensor(own.values) for _, own in payloads_of(kept, Predictions)]
        if not sent:
            return state
        soft = torch.stack(sent)
        means = centroids(soft, self.settings, round.random())
        told = {str(group): _soft(round.public_rows, own) for group, own in enumerate(means)}
        model = state.model
        if self.learns(SERVER):
            mean = _soft(round.public_rows, soft.double().mean(dim=0))
            model = self.settings.taught(model, mean, round, server)
        return Centroids(Bundle(parts=told), model)

    def smallest_steps(self) -> Iterator[Step]:
        """Public rows have steps of their own."""
        yield from super().smallest_steps()
        yield from steps_on_public_rows(self, self.settings)

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The server's model, if there is one."""
        return self.settings.server_models

    def judged_models(self, state: Centroids) -> Mapping[str, ServerModel]:
        """The server's model, if there is one."""
        return {} if state.model is None else {SERVER: state.model}


def _soft(rows: np.ndarray, values: Tensor) -> Predictions:
    return Predictions(
        rows=rows, values=values.float().numpy(), scale="probabilities", averaged=True
    )
