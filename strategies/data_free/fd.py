"""FD: clients share the mean soft label of each class, and learn from everybody else's.

Source: Jeong, Oh, Kim, Park, Bennis, Kim, 2018, Algorithm 1. https://arxiv.org/abs/1811.11479
Differs from the paper: the mean is over the other clients that hold a class, where the paper
divides by all others; so a class that nobody else holds teaches nothing. Clients that did not take
part learn from all that did. The paper names no weight of its second term; here it is 1.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import ClassTable
from fedkd.exchange.values import Value
from fedkd.losses.reduction import PerRow
from fedkd.losses.rows import log_softmax
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.targets import Scale, soften
from fedkd.training import (
    Batch,
    Cohort,
    Losses,
    ObjectiveFunction,
    Outputs,
    Table,
    as_tensor,
    supervised,
)
from strategies.contract import (
    Call,
    Card,
    Fault,
    PrivateUse,
    Received,
    Round,
    ServerTools,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.shared.class_means import Collect, class_means, fit_and_collect

TAUGHT = "taught"
"""What an objective calls the soft labels that were received, one row a class."""


class FDSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: fd``.

    Attributes:
        kd_weight: weight of the others' soft labels, gamma in the paper; a number or a schedule.
        collect: which of its own soft labels a client averages. ``round``: those that its model
            puts out in every step of the round's training, as in the paper; ``last_epoch``: in the
            last pass; ``evaluation``: of the trained model, in evaluation mode.
        weighting: ``equal`` counts every client that holds a class once, as in the paper;
            ``count`` weights it by how many soft labels its mean is of, which travel then.
    """

    name: Literal["fd"] = "fd"
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    collect: Collect = "round"
    weighting: Literal["equal", "count"] = "equal"


@dataclass(frozen=True)
class Tables(Value):
    """What the clients of a round sent, class by class.

    Attributes:
        total: float64 ``[classes, classes]``, the weighted sum of their tables.
        weight: float64 ``[classes]``, the sum of the weights of those that hold a class.
        own: each client's table.
        of_all: the mean of all tables, where it was released; else it is made of the sum.
    """

    total: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    weight: np.ndarray = field(default_factory=lambda: np.zeros(0))
    own: Mapping[int, ClassTable] = field(default_factory=dict)
    of_all: ClassTable | None = None


def holding(table: ClassTable) -> np.ndarray:
    """Return how much a client counts for each class: 0 for one that it does not hold."""
    return (table.held if table.counts is None else table.counts).astype(np.float64)


def added_up(tables: Mapping[int, ClassTable]) -> Tables:
    """Add up what clients sent, by client."""
    weights = {client: holding(table) for client, table in tables.items()}
    total = sum(weights[client][:, None] * table.values for client, table in tables.items())
    return Tables(np.asarray(total), np.asarray(sum(weights.values())), tables)


def mean_over_other_holders(
    tables: Tables, client: int | None, *, absent_count: bool = False
) -> ClassTable:
    """Average, for each class, what the other clients that hold it sent; all of them for None.

    With ``absent_count`` all of them count, also those that do not hold the class and sent zeros.
    """
    total, weight = tables.total, tables.weight
    scale: Scale = next((table.scale for table in tables.own.values()), "probabilities")
    if client is not None:
        own = tables.own[client]
        total, weight = total - holding(own)[:, None] * own.values, weight - holding(own)
        if scale == "probabilities":
            # Of a client's own numbers only rounding is left, by which one may become < 0.
            total = np.maximum(total, 0)
    if absent_count:
        weight = np.full(len(weight), float(len(tables.own) - (client is not None)))
    mean = total / np.where(weight > 0, weight, np.inf)[:, None]
    return ClassTable(values=mean.astype(np.float32), scale=scale)


def taught_rows(
    logits: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    taught: Float[Tensor, "classes classes"],
) -> Float[Tensor, " rows"]:
    """Return each row's cross-entropy with the soft label of its class; 0 where that is zero."""
    return -(taught[labels] * log_softmax(logits)).sum(-1)


FAULTS = {
    "raw_logit_target": Fault(
        does="takes mean logits for the target of a cross-entropy, without any softmax",
        read_in="TsingZ0/HtFLlib and PFLlib, clients/clientfd.py since ca3e29a (2025-11-29)",
        right="targets are distributions: means of soft labels",
    ),
    "own_answer_kept": Fault(
        does="leaves a client's own answer in what it learns",
        read_in="TsingZ0/HtFLlib, servers/serverfd.py",
        right="the mean of the others, Algorithm 1 line 15 of the paper",
    ),
    "absent_classes_count": Fault(
        does="divides by all other clients, also by those that do not have the class",
        read_in="Jeong et al. 2018 (the paper), Algorithm 1 line 15: M - 1",
        right="the mean over the other holders of a class",
        shows_with=("data.partition.alpha=0.1",),
    ),
}


class FD(Strategy[FDSettings, Tables]):
    """Class means up, everybody else's down: as many numbers as classes squared."""

    card = Card(
        learns="each client from the other clients' mean soft label of a row's class",
        up="C x C, a zero row for an absent class",
        down="C x C, each client its own",
        equation=(
            "CE(y, p) + kd_weight * CE(F_y, p); F_y = mean over the other holders of y of "
            "their mean softmax"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = FDSettings
    takes_views = True
    State: ClassVar[type[Value]] = Tables
    up = (ClassTable,)
    down = (ClassTable,)
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    @property
    def leaves_one_out(self) -> bool:
        """A client learns the mean of the others; where all hold each class it is one."""
        return not self.settings.as_published and self.settings.weighting == "equal"

    @property
    def private_use(self) -> PrivateUse:
        """Class means are made of private rows."""
        return super().private_use._replace(
            sent="means of what a model says of the private rows of each class",
        )

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        return self.federation.never(self.settings.kd_weight)

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Learn from labels and from the others' soft labels; send one's own, by class."""
        weight = self.settings.kd_weight.at(call.progress)
        objective: ObjectiveFunction = supervised
        tables = {}
        if received and weight:
            objective = partial(self._learn, weight=weight)
            tables[TAUGHT] = Table([table.values for table in received.all(ClassTable)])
        seen = fit_and_collect(cohort, objective, call, self.settings.collect, tables=tables)
        return [self._table(own.logits, own.labels) for own in seen]

    def _learn(self, outputs: Outputs, batch: Batch, *, weight: float) -> Losses:
        """Cross-entropy with the label, and with what the others say of the label's class."""
        assert outputs.private is not None and batch.labels is not None  # noqa: S101, PT018
        rows = taught_rows(outputs.private, batch.labels, batch.tables[TAUGHT])
        if self.commits("raw_logit_target"):
            # Below 0 it is no cross-entropy, and a run takes it for a mistake; gradients stay.
            rows = rows + (-rows.detach()).clamp_min(0)
        return {**supervised(outputs, batch), "kd": weight * PerRow(rows, of="private")}

    def _table(self, logits: np.ndarray, labels: np.ndarray | None) -> ClassTable:
        raw = self._scale == "logits"
        soft = logits if raw else soften(as_tensor(logits), temperature=1.0).numpy()
        means, counts = class_means(soft, labels, self.federation.num_classes)
        return ClassTable(
            values=means,
            counts=counts if self.settings.weighting == "count" else None,
            scale=self._scale,
        )

    @property
    def _scale(self) -> Scale:
        return "logits" if self.commits("raw_logit_target") else "probabilities"

    def receives(self, state: Tables, client: int, round: Round) -> int | str | None:
        """The mean of the others; of all for a client that sent nothing; nothing without any."""
        if client not in state.own or self.commits("own_answer_kept"):
            return "all" if state.own else None
        others = state.weight - holding(state.own[client])
        return client if (others > 0).any() else None

    def payload(self, state: Tables, key: int | str) -> ClassTable:
        """The mean over the other holders of each class."""
        if isinstance(key, str) and state.of_all is not None:
            return state.of_all
        return mean_over_other_holders(
            state,
            None if isinstance(key, str) else key,
            absent_count=self.commits("absent_classes_count"),
        )

    def asks(self, state: Tables, client: int, round: Round, server: ServerTools) -> Asked:
        """A class table, with counts where they weight."""
        return ClassTable.asked(
            self.federation.num_classes,
            counts=self.settings.weighting == "count",
            scale=self._scale,
        )

    def aggregate(
        self, state: Tables, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Tables:
        """Add up this round's tables; without any there is nothing to learn from."""
        sent: dict[int, ClassTable] = {}
        of_all: ClassTable | None = None
        for upload, table in payloads_of(uploads, ClassTable):
            sent[upload.client] = table
            of_all = None if upload.of_all is None else expect(upload.of_all, ClassTable)
        return replace(added_up(sent), of_all=of_all) if sent else Tables()
