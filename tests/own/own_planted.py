"""Algorithms that keep to the contract in unusual ways, and some that do not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from own_ballots import Ballot, Ballots, Votes

from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Predictions, Weights
from fedkd.exchange.values import Value
from fedkd.losses.rows import log_softmax
from fedkd.targets import Targets
from fedkd.training import Batch, Losses, Outputs, PerRow, PublicLesson, towards_targets
from strategies.baselines.fedavg import FedAvg, GlobalModels
from strategies.contract import (
    Round,
    ServerTools,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
    upload_logits,
)
from strategies.shared.means import mean_weights
from strategies.shared.taught import TaughtSettings, learn


class Settings(TaughtSettings):
    """Settings of all of them."""


# -- what keeps to it --------------------------------------------------------------------------


@dataclass(frozen=True)
class Coefficients(Value):
    """How much each client learns from each other, and what they said last."""

    matrix: np.ndarray
    said: Mapping[int, np.ndarray] = field(default_factory=dict)
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class Personal(Strategy[Settings, Coefficients]):
    """A teacher for each client, mixed by coefficients that follow how alike clients are."""

    Settings = Settings
    State = Coefficients
    up = (Predictions,)
    down = (Predictions,)
    needs_public = True
    has_ensemble = True

    def client(self, cohort, received, call) -> Sequence[Payload]:
        learn(cohort, received, call, self.settings)
        return upload_logits(cohort, call)

    def begin(self, server: ServerTools) -> Coefficients:
        clients = self.federation.num_clients
        return Coefficients(np.full((clients, clients), 1 / clients))

    def receives(self, state: Coefficients, client: int, round: Round) -> int | None:
        return client if state.said else None

    def payload(self, state: Coefficients, key: int) -> Predictions:
        who = sorted(state.said)
        weights = state.matrix[key, who]
        mixed = np.einsum("k,krc->rc", weights, np.stack([state.said[k] for k in who]))
        values = (mixed / weights.sum()).astype(np.float32)
        return Predictions(rows=state.rows, values=values, averaged=True)

    def asks(self, state, client, round: Round, server):
        return round.asked_logits

    def aggregate(
        self, state: Coefficients, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Coefficients:
        said = {u.client: sent.values for u, sent in payloads_of(uploads, Predictions)}
        matrix = state.matrix.copy()
        for one in said:
            for other in said:
                apart = float(np.abs(said[one] - said[other]).mean())
                matrix[one, other] = 0.9 * matrix[one, other] + 0.1 * np.exp(-apart)
        return Coefficients(matrix, said, round.public_rows) if said else state


@dataclass(frozen=True)
class Moving(GlobalModels):
    """Global models, and which way they went."""

    speed: Mapping[str, Weights] = field(default_factory=dict)


class ServerMomentum(FedAvg):
    """FedAvg whose server goes on a little in the direction in which it went."""

    class Settings(StrategySettings):
        """Settings: none but FedAvg's weighting."""

        weighting: str = "examples"

    State = Moving

    def begin(self, server: ServerTools) -> Moving:
        return Moving(super().begin(server).models)

    def aggregate(self, state: Moving, uploads, round: Round, server: ServerTools) -> Moving:
        architectures = self.federation.architectures
        means = mean_weights(uploads, self.settings.weighting, architectures.__getitem__)
        models, speed = dict(state.models), dict(state.speed)
        for key, mean in means.items():
            before = state.speed[key].arrays if key in state.speed else {}
            went = {
                name: np.asarray(
                    array - state.models[key].arrays[name] + 0.5 * before.get(name, 0), array.dtype
                )
                for name, array in mean.arrays.items()
            }
            speed[key] = Weights(arrays=went)
            models[key] = Weights(
                arrays={n: np.asarray(state.models[key].arrays[n] + went[n]) for n in went}
            )
        return Moving(models, speed)


# -- what does not -----------------------------------------------------------------------------


class InPlace(Ballots):
    """Counts in the table of the state that it was handed."""

    def aggregate(self, state: Votes, uploads, round, server) -> Votes:
        for _, sent in payloads_of(uploads, Ballot):
            state.counted[sent.rows, sent.classes] += sent.sureness
        return state


class OneRoundOff(Ballots):
    """Keeps the cache of which it tells itself, and lets the state follow a round later."""

    latest: np.ndarray | None = None

    def payload(self, state: Votes, key: str) -> Ballot:
        return super().payload(state if self.latest is None else Votes(self.latest), key)

    def aggregate(self, state: Votes, uploads, round, server) -> Votes:
        before = state.counted if self.latest is None else self.latest
        self.latest = super().aggregate(Votes(before), uploads, round, server).counted
        return Votes(before)


class AveragesPadding(Ballots):
    """Measures each row's loss by the mean of a step, in which rows stand that do not count."""

    def client(self, cohort, received, call):
        cohort.fit(relative, private=call.local)
        rows = call.public_rows
        return [self._vote(rows, logits) for logits in cohort.predict_public(rows)]


def relative(outputs: Outputs, batch: Batch) -> Losses:
    rows = -log_softmax(outputs.private)[torch.arange(len(batch.labels)), batch.labels]
    return {"ce": PerRow(rows * rows.mean().detach(), of="private")}


class SoftAsLogits(Ballots):
    """Hands soft labels to a loss as if they were logits."""

    def client(self, cohort, received, call):
        if received:
            won = received.all(Ballot)[0]
            soft = np.full((len(won.rows), 3), 0.1, np.float32)
            soft[np.arange(len(won.rows)), won.classes] = 0.8
            lesson = PublicLesson(rows=won.rows, targets=Targets(soft), passes=call.passes(1))
            cohort.fit(towards_targets, public=lesson)
        return super().client(cohort, None, call)


class ForgetsBytes(Ballots):
    """Says that its votes cost nothing."""

    up = ()

    def client(self, cohort, received, call):
        return [Free(**vars(sent)) for sent in super().client(cohort, received, call)]

    def asks(self, state, client, round, server):
        return replace(super().asks(state, client, round, server), kind=Free)


@dataclass(frozen=True, kw_only=True)
class Free(Ballot):
    """A ballot that costs nothing."""

    kind = "free"

    @property
    def payload_bytes(self) -> int:
        return 0


class WritesIntoWhatItReceives(Ballots):
    """Sorts its lesson where it lies."""

    def client(self, cohort, received, call):
        if received:
            received.all(Ballot)[0].classes[:] = 0
        return super().client(cohort, received, call)


class RemembersAtHome(Ballots):
    """Keeps what a client saw on the algorithm, where the next worker does not find it."""

    def client(self, cohort, received, call):
        self.seen = call.number
        return super().client(cohort, received, call)


class TellsByChance(Ballots):
    """Tells somebody else something else whenever it is asked."""

    asked = 0

    def payload(self, state: Votes, key: str) -> Ballot:
        self.asked += 1
        told = super().payload(state, key)
        return replace(told, classes=(told.classes + self.asked) % 3)


@dataclass
class Loose(Value):
    """A state into which anybody may put something else."""

    counted: np.ndarray


class NotFrozen(Ballots):
    """Has such a state."""

    State = Loose

    def begin(self, server: ServerTools) -> Loose:
        return Loose(super().begin(server).counted)
