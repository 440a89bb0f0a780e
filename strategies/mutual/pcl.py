"""PCL across clients: an ensemble and the other clients' running means teach each client.

Source: Wu and Gong, 2021, Peer Collaborative Learning for Online Knowledge Distillation, section 3.
https://arxiv.org/abs/2006.04147
Every client keeps a running mean of its own model's weights, which follows each of its steps: its
mean teacher. It learns from its labels, from the ensemble of all clients, and from the mean
teachers of the others.

Differs from the paper: its peers are branches of one network on one labelled data set. Here a
client is a peer with a network of its own: what clients and mean teachers predict of public rows
travels in the place of branches, once a round; labels teach on private rows, the others on public
ones. The paper's ensemble is a classifier on the peers' joined features, which labels teach; models
of different architectures have none to join, so the ensemble is the clients' mean logits, and there
is no cross-entropy of it. The weight ramps up over the first 27 % of the run, as in 80 of the
paper's 300 epochs; a public port divides by another number, which leaves it at almost nothing.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedkd.bounds import Count, ShareBelowOne
from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import Bundle, Predictions
from fedkd.exchange.values import Value
from fedkd.inputs import Shape
from fedkd.losses.response import soft_target_rows
from fedkd.mutual.averages import entering
from fedkd.schedules import (
    ConstantSchedule,
    NonNegativeSchedule,
    PositiveSchedule,
    RampUpSchedule,
)
from fedkd.training import (
    Average,
    Batch,
    Cohort,
    Losses,
    Outputs,
    PerRow,
    Table,
    supervised,
    towards_targets,
)
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    Fault,
    Received,
    Round,
    ServerTools,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.mutual.taught_by_peers import lesson
from strategies.shared.as_published import ramp_by_lambda
from strategies.shared.robust import Consensus, RobustSettings

OWN, MEAN_TEACHER = "own", "mean_teacher"
"""The two parts of what a client sends; the second is also what it calls its running mean."""
ENSEMBLE, MEAN_TEACHERS = "ensemble", "mean_teachers"
"""The two parts of what it receives."""


class PCLSettings(RobustSettings):
    """Settings under ``strategy:`` when ``name: pcl``.

    Attributes:
        temperature: softens teachers and student; a number or a schedule over the run.
        ce_weight: weight of cross-entropy on private rows; a number or a schedule.
        kd_weight: weight of both teachers on public rows; a number or a schedule.
        decay: largest share of the past in a mean teacher, in [0, 1).
        public_epochs: passes over the round's public rows, spread over its steps; more of them
            where a step would have fewer than two public rows.
    """

    name: Literal["pcl"] = "pcl"
    temperature: PositiveSchedule = ConstantSchedule(value=3.0)
    ce_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    kd_weight: NonNegativeSchedule = RampUpSchedule(end=1.0, until=0.27)
    decay: ShareBelowOne = Field(0.999)
    public_epochs: Count = Field(1)


@dataclass(frozen=True)
class Collective(Value):
    """What clients learn from next.

    Attributes:
        ensemble: mean logits of all that sent something; None before anybody did.
        mean_teachers: mean soft labels of all their mean teachers.
        others: for each of them the mean soft labels of the others'; None where there was none.
    """

    ensemble: Predictions | None = None
    mean_teachers: Predictions | None = None
    others: Mapping[int, Predictions | None] = field(default_factory=dict)


def taught_twice(
    outputs: Outputs, batch: Batch, *, temperature: float, ce_weight: float, kd_weight: float
) -> Losses:
    """Labels on private rows; on public ones the ensemble, and the others' mean teachers."""
    losses = dict(supervised(outputs, batch, weight=ce_weight))
    if outputs.public is not None:
        soft = batch.tables[MEAN_TEACHERS]
        rows = soft_target_rows(outputs.public, soft, temperature=temperature)
        ensemble = towards_targets(outputs, batch, temperature=temperature)["kd"]
        losses["kd_ensemble"] = kd_weight * ensemble
        losses["kd_mean_teachers"] = kd_weight * temperature**2 * PerRow(rows, of="public")
    return losses


FAULTS = {
    "ramp_by_lambda": Fault(
        does="divides the ramp's epoch by the weight lambda (1) and not by its epochs alpha (80)",
        read_in="a public port of PCL (shaoeric)",
        right="the weight rises over the ramp's epochs",
    ),
}


class PCL(Strategy[PCLSettings, Collective]):
    """Learn from labels, the ensemble and the others' mean teachers; predict with both models."""

    card = Card(
        learns="each client from the ensemble of all and from the other clients' mean teachers",
        up="2 x n x C logits: of the client's model and of its mean teacher",
        down="2 x n x C: the ensemble's logits, and the mean of the others' mean teachers",
        equation=(
            "CE on private rows + w(t) T^2 [KL(ensemble || own) + KL(mean of the others' mean "
            "teachers || own)] on public rows; w(t) = exp(-5 (1 - t / 0.27)^2)"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = PCLSettings
    takes_views = True
    State: ClassVar[type[Value]] = Collective
    up = (Bundle,)
    down = (Bundle,)
    needs_public = True
    has_ensemble = True
    directions: ClassVar[Mapping[str, str]] = {CLIENTS: "from each other"}
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    def check(self, input_shape: Shape) -> None:
        """Refuse a fault of the ramp where the weight has none."""
        super().check(input_shape)
        if self.commits("ramp_by_lambda") and not isinstance(
            self.settings.kd_weight, RampUpSchedule
        ):
            raise ValueError(
                "strategy.as_published ramp_by_lambda of pcl needs a strategy.kd_weight of kind "
                f"ramp_up, got {self.settings.kd_weight.kind}"
            )

    def _weight(self, progress: float) -> float:
        """Return the weight of both teachers at a moment of the run."""
        ramp = self.settings.kd_weight
        if self.commits("ramp_by_lambda") and isinstance(ramp, RampUpSchedule):
            return ramp_by_lambda(progress, end=ramp.end, until=ramp.until)
        return ramp.at(progress)

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        return not self.learns(CLIENTS) or self.federation.never(self.settings.kd_weight)

    def rows_of_step(self, private_rows: int) -> int:
        """Private and public rows go through the model together."""
        local, rows = self.federation.local, self.federation.rows_per_round
        public = self.settings.public_epochs * rows // max(local.count(private_rows), 1)
        return min(local.batch_size, private_rows) + public

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Learn, while the mean teacher follows every step; then predict with both."""
        averages = {MEAN_TEACHER: Average(decay=self.settings.decay)}
        weight = self._weight(call.progress)
        if not self.learns(CLIENTS):
            cohort.fit(supervised, private=call.local, averages=averages)
        elif received and weight:
            self._learn(cohort, received.all(Bundle), call, averages)
        else:
            alone = partial(supervised, weight=self.settings.ce_weight.at(call.progress))
            cohort.fit(alone, private=call.local, averages=averages)
        rows = call.public_rows
        both = zip(
            cohort.predict_public(rows),
            cohort.predict_public(rows, model=MEAN_TEACHER),
            strict=True,
        )
        return [
            Bundle(
                parts={
                    OWN: Predictions(rows=rows, values=own),
                    MEAN_TEACHER: Predictions(rows=rows, values=mean),
                }
            )
            for own, mean in both
        ]

    def _learn(
        self,
        cohort: Cohort,
        taught: Sequence[Bundle],
        call: Call,
        averages: Mapping[str, Average],
    ) -> None:
        settings, progress = self.settings, call.progress
        temperature = settings.temperature.at(progress)
        ensembles = Received([bundle[ENSEMBLE] for bundle in taught])
        others = [expect(bundle[MEAN_TEACHERS], Predictions).targets for bundle in taught]
        objective = partial(
            taught_twice,
            temperature=temperature,
            ce_weight=settings.ce_weight.at(progress),
            kd_weight=self._weight(progress),
        )
        soft = [np.asarray(targets.probabilities(temperature)) for targets in others]
        cohort.fit(
            objective,
            private=call.local,
            public=call.lesson(ensembles, epochs=settings.public_epochs),
            tables={MEAN_TEACHERS: Table(soft, of="public")},
            averages=averages,
        )

    # -- server half ---------------------------------------------------------------------

    def asks(self, state: Collective, client: int, round: Round, server: ServerTools) -> Asked:
        """Logits of the round's rows, of a client's model and of its mean teacher."""
        return Bundle.asked(**{OWN: round.asked_logits, MEAN_TEACHER: round.asked_logits})

    def receives(self, state: Collective, client: int, round: Round) -> Hashable | None:
        """The ensemble, and what the others' mean teachers say; nothing for who was alone."""
        if self.learns_alone:
            return None
        if client in state.others:
            return None if state.others[client] is None else client
        return None if state.ensemble is None else ENSEMBLE

    def payload(self, state: Collective, key: Any) -> Payload:
        """The ensemble, beside the mean teachers of the others of one client, or of all."""
        teachers = state.mean_teachers if key == ENSEMBLE else state.others[key]
        assert state.ensemble is not None and teachers is not None  # noqa: S101, PT018
        return Bundle(parts={ENSEMBLE: state.ensemble, MEAN_TEACHERS: teachers})

    def aggregate(
        self, state: Collective, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Collective:
        """Average the clients' logits, and for each of them the others' mean teachers."""
        temperature = self.settings.temperature.at(round.next().progress)
        with (
            Consensus(self.settings, scale="logits") as ensemble,
            Consensus(self.settings, scale="probabilities") as teachers,
        ):
            for upload, sent in payloads_of(uploads, Bundle):
                ensemble.add(upload.client, expect(sent[OWN], Predictions).values)
                mean_teacher = expect(sent[MEAN_TEACHER], Predictions).values
                soft = entering(mean_teacher, temperature=temperature)
                teachers.add(upload.client, soft, among_others=True)
            if not ensemble.clients:
                return Collective()
            rows = round.public_rows
            others: dict[int, Predictions | None] = dict.fromkeys(ensemble.clients)
            if len(others) > 1:
                for client in others:
                    taught = teachers.of_others(client)
                    others[client] = lesson(rows, taught, "probabilities", temperature)
            return Collective(
                lesson(rows, ensemble.of_all(), "logits", temperature),
                lesson(rows, teachers.of_all(), "probabilities", temperature),
                others,
            )
