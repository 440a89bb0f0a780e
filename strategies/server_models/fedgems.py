"""FedGEMS: a large server model learns from itself where it can, and asks clients where it cannot.

Source: Cheng, Wu, Xiao, Liu, Liu, 2021, FedGEMS: Federated Learning of Larger Server Models via
Selective Knowledge Fusion. https://arxiv.org/abs/2110.11027
Of labelled public rows the server keeps its own logits where it gets the label (the pool). A row
that it gets wrong is taught by the pool, or, where that has none, by the clients that get it right;
clients are asked for such rows alone.

Differs from the paper: which rows are right, taught by the pool or asked for is settled once a
round, for the clients have to be told. Where 1/H of a client's entropy H would overflow, H counts
as 0.001. Clients see public rows once the server has something to say about them. How they weight
labels and server is that of AIJack's port.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal, Required, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.bounds import Count, Share
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Orders, Predictions
from fedkd.exchange.values import Value
from fedkd.losses.reduction import PerRow
from fedkd.losses.response import hard_label_rows, soft_target_rows
from fedkd.models import ModelSettings
from fedkd.targets import entropy, soften
from fedkd.training import (
    Batch,
    Cohort,
    Losses,
    OptimizerSettings,
    Outputs,
    PublicLesson,
    Table,
    as_tensor,
    supervised,
)
from strategies.contract import (
    CLIENTS,
    Call,
    Card,
    Fault,
    Federation,
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
from strategies.shared.as_published import reversed_kl_rows
from strategies.shared.robust import CheckedSettings, checked, values_of

SERVER = "server"
"""The name of the server's model."""

TAUGHT, KNOWN = "taught", "known"
"""What the server's objective calls the teachers' soft labels, and which rows have any."""

SMALLEST_ENTROPY = 1e-3
"""Nats below which a client counts as no surer."""


class FedGEMSSettings(CheckedSettings):
    """Settings under ``strategy:`` when ``name: fedgems``.

    Attributes:
        model: the server's; the paper's is much larger than those of the clients.
        optimizer: of the server's model, which remembers from round to round; null: that of the
            clients.
        ce_share: share of labels in what is learnt about a public row that has a teacher as well,
            epsilon in the paper; the teacher has the rest.
        server_epochs: the server's passes over a round's public rows.
        public_epochs: a client's passes over them, before its private rows.
    """

    name: Literal["fedgems"] = "fedgems"
    model: ModelSettings = ModelSettings(name="cnn")
    optimizer: OptimizerSettings | None = None
    ce_share: Share = 0.75
    server_epochs: Count = 1
    public_epochs: Count = 1


@dataclass(frozen=True)
class Fusion(Value):
    """What the server remembers.

    Attributes:
        model: its own.
        pool: float32 ``[public, classes]``, its logits of each public row when it last got the
            label.
        pooled: bool ``[public]``, which rows have any.
        rows: int64, the public rows of the coming round.
        logits: float32 ``[rows, classes]``, what it says about them.
        right: bool ``[rows]``, where it gets the label.
        taught: whether it has learnt anything yet.
    """

    model: ServerModel
    pool: np.ndarray
    pooled: np.ndarray
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    right: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    taught: bool = False

    @property
    def asked(self) -> np.ndarray:
        """The rows that neither the server nor its pool gets right."""
        rows: np.ndarray = self.rows[~self.right & ~self.pooled[self.rows]]
        return rows


# -- arithmetic ----------------------------------------------------------------------------------


def reliability(
    logits: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    *,
    where_wrong: float = -math.inf,
) -> Float[Tensor, " rows"]:
    """Return how sure a client is of each row: 1/H, of its entropy in nats; -inf where it errs."""
    values = logits.double()
    sure = 1 / entropy(soften(values, temperature=1.0)).clamp(min=SMALLEST_ENTROPY)
    return torch.where(values.argmax(-1) == labels, sure, where_wrong)


class ReliableMean:
    """The mean of reliable clients' logits, weighted in each row by the softmax of `reliability`.

    Memory of one client, whatever their number: sums are kept relative to the largest so far.
    """

    def __init__(
        self, labels: Int[Tensor, " rows"], classes: int, *, where_wrong: float = -math.inf
    ) -> None:
        self._labels, self._where_wrong = labels, where_wrong
        self._largest = torch.full((len(labels),), -torch.inf, dtype=torch.float64)
        self._weight = torch.zeros(len(labels), dtype=torch.float64)
        self._sum = torch.zeros(len(labels), classes, dtype=torch.float64)

    def add(self, logits: np.ndarray) -> None:
        """Fold one client's logits in; rows that it gets wrong count nothing."""
        values = as_tensor(logits)
        scores = reliability(values, self._labels, where_wrong=self._where_wrong)
        largest = torch.maximum(self._largest, scores)
        # Where nobody is right so far the difference would be that of two infinities.
        top = torch.where(largest.isinf(), 0.0, largest)
        faded, weight = (self._largest - top).exp(), (scores - top).exp()
        self._weight = faded * self._weight + weight
        self._sum = faded[:, None] * self._sum + weight[:, None] * values.double()
        self._largest = largest

    def mean(self) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 logits ``[rows, classes]``, and bool ``[rows]``: who has any."""
        known = self._weight > 0
        mean = self._sum / torch.where(known, self._weight, 1.0)[:, None]
        return mean.float().numpy(), known.numpy()


def fused(
    logits: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    taught: Float[Tensor, "rows classes"],
    known: Float[Tensor, " rows"],
    *,
    ce_share: float,
    reversed_kl: bool = False,
    kl_mean: bool = False,
) -> Losses:
    """Learn labels and teachers; a row without a teacher learns its label alone.

    ``ce_share * CE + (1 - ce_share) * KL(taught || own)`` where ``known`` is 1, else ``CE``;
    ``reversed_kl`` and ``kl_mean`` are the faults of these names.
    """
    share = (1 - ce_share) * known
    ce = (1 - share) * hard_label_rows(logits, labels)
    if reversed_kl:
        divergence = reversed_kl_rows(logits, taught)
    else:
        divergence = soft_target_rows(logits, taught, temperature=1.0)
    kd = share * (divergence / logits.shape[-1] if kl_mean else divergence)
    return {"ce_public": PerRow(ce, of="public"), "kd": PerRow(kd, of="public")}


class _Fusing(TypedDict, total=False):
    """How `fused` is taken; its defaults where a part is missing."""

    ce_share: Required[float]
    reversed_kl: bool
    kl_mean: bool


FAULTS = {
    "unreliable_weight": Fault(
        does="gives clients that are wrong a share of the softmax, as if their 1/H were 0",
        read_in="Koukyosyumei/AIJack 14a3883, collaborative/fedgems: _get_knowledge_from_clients",
        right="clients that are wrong about a row have no weight in it",
    ),
    "reversed_kl": Fault(
        does="takes KL(student || teacher): the arguments of kl_div are exchanged",
        read_in="Koukyosyumei/AIJack 14a3883, collaborative/fedgems",
        right="KL(teacher || student)",
    ),
    "kl_mean": Fault(
        does="divides the divergence by the number of classes as well as by the rows",
        read_in="Koukyosyumei/AIJack 14a3883, collaborative/fedgems",
        right="the mean over rows of the sum over classes",
    ),
}


class FedGEMS(Strategy[FedGEMSSettings, Fusion]):
    """Logits of the rows that the server asks for go up; its logits of all rows come down."""

    card = Card(
        learns="the server from clients where it is wrong; clients from the server",
        up="at most n x C logits: of the rows asked for",
        down="n x C, a bit a row for those asked for",
        equation=(
            "eps CE + (1-eps) KL(sum_k a_k z_k || server), a = softmax of 1/H_k over those who are "
            "right; clients eps CE + (1-eps) KL(server || own) on public rows, CE on private ones"
        ),
        needs=("data.public.labelled=true",),
    )
    directions: ClassVar[Mapping[str, str]] = {
        CLIENTS: "from the server",
        SERVER: "from the clients",
    }
    Settings: ClassVar[type[StrategySettings]] = FedGEMSSettings
    takes_views = True
    State: ClassVar[type[Value]] = Fusion
    up = (Predictions,)
    down = (Predictions,)
    needs_public = True
    has_ensemble = True
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    def __init__(self, settings: FedGEMSSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        federation.check_public_labels(
            "strategy.name: fedgems (its server has to know who is right)",
            "feddf or dsfl, which do without",
        )

    @property
    def learns_alone(self) -> bool:
        """Whether clients learn nothing from the server."""
        return not self.learns(CLIENTS)

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Learn public rows from labels and server, then private rows; predict what is asked."""
        if received:
            lesson = call.lesson(received, epochs=self.settings.public_epochs)
            cohort.fit(self._learn, public=lesson)
        cohort.fit(supervised, private=call.local)
        if not self.learns(SERVER):
            return ()
        rows = call.rows_of(0)
        return [Predictions(rows=rows, values=values) for values in cohort.predict_public(rows)]

    def _learn(self, outputs: Outputs, batch: Batch) -> Losses:
        assert outputs.public is not None and batch.targets is not None  # noqa: S101, PT018
        assert batch.public_labels is not None  # noqa: S101
        taught = batch.targets.probabilities(1.0)
        known = torch.ones_like(taught[:, 0])
        return fused(outputs.public, batch.public_labels, taught, known, **self._fusing)

    @property
    def _fusing(self) -> _Fusing:
        """Return how clients and server take `fused`."""
        return {
            "ce_share": self.settings.ce_share,
            "reversed_kl": self.commits("reversed_kl"),
            "kl_mean": self.commits("kl_mean"),
        }

    # -- server half ---------------------------------------------------------------------

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """The server's model."""
        return {SERVER: ServerModelSettings(self.settings.model, self.settings.optimizer)}

    def judged_models(self, state: Fusion) -> Mapping[str, ServerModel]:
        """The server's model."""
        return {SERVER: state.model}

    def begin(self, server: ServerTools) -> Fusion:
        """An untrained model, and the rows of round 1 that it does not get right."""
        rows, classes = self.federation.public_size, self.federation.num_classes
        state = Fusion(
            model=server.new(SERVER),
            pool=np.zeros((rows, classes), np.float32),
            pooled=np.zeros(rows, bool),
        )
        return self._looked_at(state, self.federation.round(1), server)

    def _looked_at(self, state: Fusion, round: Round, server: ServerTools) -> Fusion:
        """Return the state before a round: what the model says about its rows, and a newer pool."""
        rows = round.public_rows
        logits = server.predict_public(state.model, rows)
        right = logits.argmax(-1) == _labels(server)[rows]
        pool, pooled = state.pool.copy(), state.pooled.copy()
        pool[rows[right]], pooled[rows[right]] = logits[right], True
        return replace(state, pool=pool, pooled=pooled, rows=rows, logits=logits, right=right)

    def receives(self, state: Fusion, client: int, round: Round) -> str | None:
        """What the server says about the round's rows, once it has learnt."""
        return "lesson" if state.taught and self.learns(CLIENTS) else None

    def payload(self, state: Fusion, key: str) -> Predictions:
        """The server's logits."""
        return Predictions(rows=state.rows, values=state.logits)

    def orders(self, state: Fusion, client: int, round: Round) -> Orders | None:
        """Which rows to predict."""
        if not self.learns(SERVER):
            return None
        return Orders(rows=state.asked, planned=len(state.rows))

    def asks(self, state: Fusion, client: int, round: Round, server: ServerTools) -> Asked | None:
        """Logits of these rows; of none, an answer says that the client was heard."""
        if not self.learns(SERVER):
            return None
        return Predictions.asked(state.asked, self.federation.num_classes)

    def aggregate(
        self, state: Fusion, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Fusion:
        """Let each row be taught by pool or reliable clients, and look at the next round's rows.

        Where clients are to answer and nobody does, everything stays as it is. A server that does
        not learn from them has labels and pool.
        """
        asked, classes = state.asked, self.federation.num_classes
        labels, heard = as_tensor(_labels(server)[asked]), False
        where_wrong = 0.0 if self.commits("unreliable_weight") else -math.inf
        mean = ReliableMean(labels, classes, where_wrong=where_wrong)
        # Where no row is asked for, answers say nothing that could be checked.
        kept = checked(self.settings, uploads, values_of) if len(asked) else uploads
        for _, sent in payloads_of(kept, Predictions):
            mean.add(sent.values)
            heard = True
        if self.learns(SERVER) and not heard:
            return state
        teachers, known = state.pool[state.rows], state.pooled[state.rows] & ~state.right
        places = np.searchsorted(state.rows, asked)
        teachers[places], known[places] = mean.mean()
        passes = round.passes(self.settings.server_epochs)
        lesson = PublicLesson(rows=state.rows, targets=None, passes=passes)
        tables = {
            TAUGHT: Table(soften(as_tensor(teachers), temperature=1.0).numpy(), of="public"),
            KNOWN: Table(known.astype(np.float32), of="public"),
        }
        objective = partial(_taught_and_labelled, **self._fusing)
        fitted = server.fit(state.model, objective, round=round, public=lesson, tables=tables)
        after = replace(state, model=fitted.model, taught=True)
        return self._looked_at(after, round.next(), server)

    def smallest_steps(self) -> Iterator[Step]:
        """Clients and server learn from public rows alone, too."""
        yield from super().smallest_steps()
        rows = self.federation.rows_per_round
        yield from self.clients_public_steps(rows)
        yield from self.public_steps("strategy.model", self.settings.model, rows)


def _taught_and_labelled(outputs: Outputs, batch: Batch, **fusing: Unpack[_Fusing]) -> Losses:
    assert outputs.public is not None and batch.public_labels is not None  # noqa: S101, PT018
    taught, known = batch.tables[TAUGHT], batch.tables[KNOWN]
    return fused(outputs.public, batch.public_labels, taught, known, **fusing)


def _labels(server: ServerTools) -> np.ndarray:
    labels = server.data.public_labels
    assert labels is not None  # noqa: S101 (refused before)
    return labels
