"""FedGKD: clients are taught by what the global model was in the last rounds.

Source: Yao, Pan, Dai, Wan, Ding, Jin, Xu, Sun, 2021, Local-Global Knowledge Distillation in
Heterogeneous Federated Learning with Non-IID Data. https://arxiv.org/abs/2107.00051
FedAvg, whose clients also minimise g * T^2 * KL(teacher || client). The teacher is the mean of the
weights of the last M global models, or (FedGKD-VOTE) each of them is one, weighted by the softmax
of its negated loss on validation rows. It stays as it is, in evaluation mode; round 1 has none.
The rule is that of the published code; the paper, which was not read, is said to halve g
(``halved``).
Differs from the published code: its FedGKD-VOTE computes the divergence without gradients, so that
nobody learns from it; here clients do. Each architecture has global models of its own.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from fedkd.bounds import Count, Temperature
from fedkd.exchange.payload import Payload, expect
from fedkd.exchange.payloads import Bundle, Numbers, Weights
from fedkd.exchange.values import Value
from fedkd.exchange.views import RunningMean
from fedkd.inputs import Shape
from fedkd.losses.distances import logit_mse_rows
from fedkd.losses.reduction import PerRow
from fedkd.losses.response import soft_target_rows
from fedkd.losses.rows import t2_factor
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.targets import soften
from fedkd.training import MODEL, Batch, Cohort, Losses, Outputs, supervised
from strategies.baselines.fedavg import Averaging, AveragingSettings, GlobalModels
from strategies.contract import (
    Call,
    Card,
    Fault,
    PrivateUse,
    Received,
    Round,
    ServerTools,
    StrategySettings,
    Upload,
)
from strategies.shared.means import received_part, received_weights

MEAN, VOTES = "mean", "votes"
"""What travels beside the global model: the mean of the last ones, or how much each counts."""

Distance = Literal["kl", "mse"]


class FedGKDSettings(AveragingSettings):
    """Settings under ``strategy:`` when ``name: fedgkd``.

    Attributes:
        kd_weight: weight of the teacher, gamma in the paper; a number or a schedule.
        halved: halve it, as the paper is said to.
        distance: what is minimised between teacher and client: ``kl`` of their softened
            distributions, or ``mse`` of their logits.
        temperature: softens both models in ``kl``.
        scale_by_t2: multiply ``kl`` by the temperature's square.
        teacher: ``mean`` is the mean of the last global models; ``vote`` lets each of them teach,
            weighted by its loss on validation rows.
        last: global models that are remembered, M in the paper.
    """

    name: Literal["fedgkd"] = "fedgkd"
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=0.1)
    halved: bool = False
    distance: Distance = "kl"
    temperature: Temperature = 1.0
    scale_by_t2: bool = True
    teacher: Literal["mean", "vote"] = "mean"
    last: Count = 5


@dataclass(frozen=True)
class PastModels(GlobalModels):
    """What the server remembers.

    Attributes:
        past: the last global models of each architecture, oldest first; none before the first mean.
        losses: of each of them on validation rows, where they vote.
    """

    past: Mapping[str, tuple[Weights, ...]] = field(default_factory=dict)
    losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def mean_model(models: Iterable[Weights]) -> Weights:
    """Return the mean of some models' weights."""
    mean = RunningMean[Weights]()
    for model in models:
        mean.add(model, 1)
    return mean.mean()


def votes_of(losses: Iterable[float]) -> np.ndarray:
    """Return the softmax of negated losses: float32, of sum 1; of a loss that is no number, 0."""
    negated = -np.array(list(losses), np.float64)
    negated[~np.isfinite(negated)] = -np.inf
    if np.isinf(negated).all():
        return np.full(len(negated), 1 / len(negated), np.float32)
    powers = np.exp(negated - negated.max())
    votes: np.ndarray = (powers / powers.sum()).astype(np.float32)
    return votes


def distance_rows(
    logits: Float[Tensor, "rows classes"],
    teacher: Float[Tensor, "rows classes"],
    *,
    distance: Distance,
    temperature: float,
) -> Float[Tensor, " rows"]:
    """Return how far each row's logits are from a teacher's, which is a constant."""
    if distance == "mse":
        return logit_mse_rows(logits, teacher)
    target = soften(teacher.detach(), temperature=temperature)
    return soft_target_rows(logits, target, temperature=temperature)


FAULTS = {
    "no_gradient": Fault(
        does="computes what the voting teachers say within torch.no_grad(), so nobody learns it",
        read_in="CGCL-codes/FedGKD: distillation_with_multiple",
        right="clients learn from their teachers",
        shows_with=("strategy.teacher=vote",),
    ),
}


class FedGKD(Averaging[FedGKDSettings, PastModels]):
    """FedAvg with the last global models as teachers at every client's side."""

    card = Card(
        learns="each client from the mean of the last global models",
        up="P",
        down="P, and 1 number in round 2; 2 P from round 3 on; with votes up to M x P, M numbers",
        equation="CE + g T^2 KL(mean of the last M global models || own), none in round 1",
    )
    Settings: ClassVar[type[StrategySettings]] = FedGKDSettings
    State: ClassVar[type[Value]] = PastModels
    down = (Weights, Bundle)
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    def check(self, input_shape: Shape) -> None:
        """Refuse a fault of votes where nobody votes."""
        super().check(input_shape)
        if self.commits("no_gradient") and self.settings.teacher != "vote":
            raise ValueError(
                "strategy.as_published no_gradient of fedgkd is a fault of strategy.teacher: vote, "
                f"got {self.settings.teacher}"
            )

    # -- client half ---------------------------------------------------------------------

    def before_evaluation(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Judge the global model."""
        cohort.load_weights(received_weights(received_part(received, MODEL)))

    @property
    def private_use(self) -> PrivateUse:
        """Past models may vote by their loss on validation rows."""
        votes = "how much each past model counts" if self.settings.teacher == "vote" else ""
        return super().private_use._replace(validation=votes)

    def learn(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Train on private rows, with the last global models as teachers after round 1."""
        weight = self._weight(call)
        teachers = _teachers(received[0])
        # First weights, which nobody has trained, teach nobody.
        if not weight or not teachers:
            cohort.fit(supervised, private=call.local)
            return
        votes = {}
        for part, vote in teachers.items():
            cohort.freeze(f"teacher {part}", received_weights(received_part(received, part)))
            votes[f"teacher {part}"] = vote
        learn = partial(self._learn, weight=weight, votes=votes)
        cohort.fit(learn, private=call.local, frozen=list(votes))

    def _learn(
        self,
        outputs: Mapping[str, Outputs],
        batch: Batch,
        *,
        weight: float,
        votes: Mapping[str, float],
    ) -> Losses:
        """Cross-entropy, and the distance from each teacher by its vote."""
        settings, own = self.settings, outputs[MODEL]
        logits = own.private
        assert logits is not None  # noqa: S101
        rows = logits.new_zeros(len(logits))
        for name, vote in votes.items():
            teacher = outputs[name].private
            assert teacher is not None  # noqa: S101
            rows = rows + vote * distance_rows(
                logits, teacher, distance=settings.distance, temperature=settings.temperature
            )
        if self.commits("no_gradient"):
            rows = rows.detach()
        scaled = settings.scale_by_t2 and settings.distance == "kl"
        factor = weight * t2_factor(settings.temperature, scaled)
        return {**supervised(own, batch), "gkd": factor * PerRow(rows, of="private")}

    def _weight(self, round: Round) -> float:
        """Return what the teachers' term counts in a round; nothing in the first one."""
        weight = self.settings.kd_weight.at(round.progress) if round.number > 1 else 0.0
        return weight / 2 if self.settings.halved else weight

    # -- server half ---------------------------------------------------------------------

    def receives(self, state: PastModels, client: int, round: Round) -> Hashable:
        """The global model of the client's architecture, and others where these teach too."""
        architecture = self.federation.architectures[client]
        taught = self._weight(round) > 0 and bool(state.past.get(architecture))
        return (architecture, "taught") if taught else architecture

    def payload(self, state: PastModels, key: Any) -> Payload:
        """The global model alone, or with what teaches beside it."""
        if isinstance(key, str):
            return state.models[key]
        architecture, _ = key
        past, parts = state.past[architecture], dict[str, Payload]()
        parts[MODEL] = state.models[architecture]
        if len(past) == 1:
            # It is the global model itself, which then votes alone.
            parts[VOTES] = Numbers.of(1.0)
        elif self.settings.teacher == "mean":
            parts[MEAN] = mean_model(past)
        else:
            parts |= {f"past {age}": model for age, model in enumerate(past[:-1])}
            parts[VOTES] = Numbers(values=votes_of(state.losses[architecture]))
        return Bundle(parts=parts)

    def aggregate(
        self, state: PastModels, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> PastModels:
        """Average each architecture's uploads, and remember the last of its means."""
        after = super().aggregate(state, uploads, round, server)
        past, losses, last = dict(state.past), dict(state.losses), self.settings.last
        for key, model in after.models.items():
            if model is state.models[key]:
                continue
            past[key] = tuple(deque((*past.get(key, ()), model), last))
            if self.settings.teacher == "vote":
                settings = self.federation.models[self.federation.first_clients[key]]
                loss = server.loss_with(settings, model.arrays)
                losses[key] = tuple(deque((*losses.get(key, ()), loss), last))
        return replace(after, past=past, losses=losses)


def _teachers(piece: Payload | None) -> dict[str, float]:
    """Return which parts of what was received teach, and how much each counts."""
    if not isinstance(piece, Bundle):
        return {}
    if VOTES not in piece.parts:
        return {MEAN: 1.0}
    # The global model is the newest of those that vote.
    names = [*(name for name in piece.parts if name not in (MODEL, VOTES)), MODEL]
    return dict(zip(names, expect(piece[VOTES], Numbers).values.tolist(), strict=True))
