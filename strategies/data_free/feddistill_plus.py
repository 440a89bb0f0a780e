"""FedDistill+: FedAvg whose clients also share the mean logits of each class.

Source: the baseline of Zhu, Hong, Zhou, 2021, Data-Free Knowledge Distillation for Heterogeneous
Federated Learning. https://arxiv.org/abs/2105.10056
After Seo, Park, Oh, Bennis, Kim, 2020. https://arxiv.org/abs/2011.02367
A client minimises CE + weight * CE with the softmax of everybody's mean logits of the row's class.
(FedDistill without the plus, which shares no parameters, is `fd` here. Another FedDistill, of 2024,
has nothing to do with it.)

Differs from the published code: a class's mean logits are over the rows that have it, where its
counts begin at 1; the mean over clients is over those that hold a class, where a client without it
sends a row of zeros that counts; and what was added up in earlier rounds is forgotten. A client can
be left out of its own lesson (``leave_one_out``).
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import Bundle, ClassTable, Weights
from fedkd.exchange.values import Value
from fedkd.losses.reduction import PerRow
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.targets import soften
from fedkd.training import (
    MODEL,
    Batch,
    Cohort,
    Losses,
    ObjectiveFunction,
    Outputs,
    Table,
    as_tensor,
    supervised,
)
from strategies.baselines.fedavg import AveragingSettings, GlobalModels, GlobalModelsServer
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
    payloads_of,
)
from strategies.data_free.fd import TAUGHT, Tables, added_up, mean_over_other_holders, taught_rows
from strategies.shared.class_means import Collect, class_means, fit_and_collect
from strategies.shared.means import received_part, received_weights

TABLE = "table"
"""What travels beside the model: mean logits of each class."""


class FedDistillPlusSettings(AveragingSettings):
    """Settings under ``strategy:`` when ``name: feddistill_plus``.

    Attributes:
        weighting: of the weights: ``examples`` weights a client by its private rows; ``equal``
            counts every client once. Class means count every client that holds a class once.
        kd_weight: weight of the class's mean logits, beside cross-entropy; a number or a schedule.
        collect: which of its own logits a client averages. ``round``: those that its model puts out
            in every step of the round's training, as in the published code; ``last_epoch``: in the
            last pass; ``evaluation``: of the trained model, in evaluation mode.
        leave_one_out: leave a client's own logits out of what it learns, as in `fd`; the published
            code does not.
    """

    name: Literal["feddistill_plus"] = "feddistill_plus"
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    collect: Collect = "round"
    leave_one_out: bool = False


@dataclass(frozen=True)
class ModelsAndTables(GlobalModels):
    """What the server remembers: the models, and what was said of each class in the last round."""

    tables: Tables = field(default_factory=Tables)


def targets_of(table: ClassTable) -> np.ndarray:
    """Return the softmax of each class's mean logits; zeros for a class that nobody holds."""
    soft = soften(as_tensor(table.values), temperature=1.0).numpy()
    targets: np.ndarray = np.where(table.held[:, None], soft, np.float32(0))
    return targets


FAULTS = {
    "counts_from_one": Fault(
        does="begins to count the rows of each class at 1, so that means of few rows shrink to 0",
        read_in="zhuangdizhu/FedGen, FLAlgorithms/users/userFedDistill.py",
        right="the mean over the rows of a class",
    ),
    "absent_classes_count": Fault(
        does="averages the rows of zeros in that clients send for classes they do not have",
        read_in="zhuangdizhu/FedGen, FLAlgorithms/servers/serverFedDistill.py",
        right="the mean over the holders of a class",
        shows_with=("data.partition.alpha=0.1",),
    ),
}


class FedDistillPlus(GlobalModelsServer[FedDistillPlusSettings, ModelsAndTables]):
    """Weights and class means of logits up, means of both down."""

    card = Card(
        learns="clients from the mean model, and from all clients' mean logits of a row's class",
        up="P + C x C logits",
        down="P + C x C logits, P in the first round",
        equation="CE + kd_weight * CE(softmax(mean_k mean logits of class y at k), own)",
    )
    Settings: ClassVar[type[StrategySettings]] = FedDistillPlusSettings
    State: ClassVar[type[Value]] = ModelsAndTables
    up = (Bundle,)
    down = (Bundle, Weights)
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    @property
    def private_use(self) -> PrivateUse:
        """Class means are made of private rows."""
        return super().private_use._replace(
            sent="mean logits of the private rows of each class",
        )

    # -- client half ---------------------------------------------------------------------

    def before_evaluation(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Judge the global model."""
        cohort.load_weights(received_weights(received_part(received, MODEL)))

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Train the global model on labels and class means; send weights and own class means."""
        self.before_evaluation(cohort, received, call)
        cohort.reset_optimizers()
        weight = self.settings.kd_weight.at(call.progress)
        objective: ObjectiveFunction = supervised
        tables = {}
        if weight and isinstance(received[0], Bundle):
            lessons = received_part(received, TABLE).all(ClassTable)
            objective = partial(self._learn, weight=weight)
            tables[TAUGHT] = Table([targets_of(lesson) for lesson in lessons])
        seen = fit_and_collect(cohort, objective, call, self.settings.collect, tables=tables)
        classes = self.federation.num_classes
        means = []
        for own in seen:
            mean, counts = class_means(own.logits, own.labels, classes)
            if self.commits("counts_from_one"):
                mean = mean * (counts / (counts + 1))[:, None]
            means.append(mean)
        return [
            Bundle(
                parts={
                    MODEL: Weights(arrays=arrays),
                    TABLE: ClassTable(values=values, scale="logits"),
                }
            )
            for arrays, values in zip(cohort.weights(), means, strict=True)
        ]

    def _learn(self, outputs: Outputs, batch: Batch, *, weight: float) -> Losses:
        """Cross-entropy with the label, and with what is said of the label's class."""
        assert outputs.private is not None and batch.labels is not None  # noqa: S101, PT018
        rows = taught_rows(outputs.private, batch.labels, batch.tables[TAUGHT])
        return {**supervised(outputs, batch), "kd": weight * PerRow(rows, of="private")}

    # -- server half ---------------------------------------------------------------------

    def receives(self, state: ModelsAndTables, client: int, round: Round) -> Hashable:
        """The model of the client's architecture, and class means where there are any."""
        architecture = self.federation.architectures[client]
        if not self.settings.kd_weight.at(round.progress) or not state.tables.own:
            return architecture
        own = self.settings.leave_one_out and client in state.tables.own
        return architecture, client if own else None

    def payload(self, state: ModelsAndTables, key: Any) -> Payload:
        """The model of an architecture; beside it class means, perhaps without a client's own."""
        if isinstance(key, str):
            return state.models[key]
        architecture, client = key
        absent_count = self.commits("absent_classes_count")
        table = mean_over_other_holders(state.tables, client, absent_count=absent_count)
        return Bundle(parts={MODEL: state.models[architecture], TABLE: table})

    def asks(self, state: ModelsAndTables, client: int, round: Round, server: ServerTools) -> Asked:
        """Weights of the client's model, and its mean logits of each class."""
        table = ClassTable.asked(self.federation.num_classes, scale="logits")
        weights = server.asked_weights(self.federation.models[client])
        return Bundle.asked(**{MODEL: weights, TABLE: table})

    def aggregate(
        self, state: ModelsAndTables, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> ModelsAndTables:
        """Average weights by architecture; add up this round's class means, and no others."""
        tables: dict[int, ClassTable] = {}

        def weights() -> Iterable[Upload]:
            for upload, sent in payloads_of(uploads, Bundle):
                tables[upload.client] = expect(sent[TABLE], ClassTable)
                yield replace(upload, payload=sent[MODEL])

        after = super().aggregate(state, weights(), round, server)
        return replace(after, tables=added_up(tables)) if tables else state
