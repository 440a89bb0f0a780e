"""FedNTD: clients keep the global model's view of the classes that a row does not have.

Source: Lee, Jeong, Shin, Bae, Yun, 2022, Preservation of the Global Knowledge by Not-True
Distillation in Federated Learning. https://arxiv.org/abs/2106.03097
FedAvg, whose clients also minimise beta * tau^2 * KL(global || client) of the softened
distributions over all classes but the label's. The global model is the one that was received; it
stays as it is, in evaluation mode. The factor tau^2 is that of the published code as it is now; at
its temperature of 1 it changes nothing.
Differs from the paper: as in FedAvg here, each architecture has a global model of its own.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

from fedkd.bounds import Temperature
from fedkd.losses.other_classes import not_true_rows
from fedkd.losses.reduction import PerRow
from fedkd.losses.rows import t2_factor
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.training import MODEL, Batch, Cohort, Losses, Outputs, supervised
from strategies.baselines.fedavg import Averaging, AveragingSettings, GlobalModels
from strategies.contract import Call, Card, Federation, Received, StrategySettings
from strategies.shared.means import received_weights

GLOBAL = "global"
"""What clients call the model that they received."""


class FedNTDSettings(AveragingSettings):
    """Settings under ``strategy:`` when ``name: fedntd``.

    Attributes:
        kd_weight: weight of not-true distillation, beta in the paper; a number or a schedule.
        temperature: softens both models, tau in the paper.
        scale_by_t2: multiply the term by the temperature's square.
    """

    name: Literal["fedntd"] = "fedntd"
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=1.0)
    temperature: Temperature = 1.0
    scale_by_t2: bool = True


class FedNTD(Averaging[FedNTDSettings, GlobalModels]):
    """FedAvg with a frozen copy of the global model at every client's side."""

    card = Card(
        learns="each client from the global model, on classes other than the label",
        up="P",
        down="P",
        equation="CE + beta * tau^2 KL(global || own) over the classes but y",
    )
    Settings: ClassVar[type[StrategySettings]] = FedNTDSettings

    def __init__(self, settings: FedNTDSettings, federation: Federation) -> None:
        super().__init__(settings, federation)
        if federation.num_classes < 3:
            raise ValueError(
                "strategy.name: fedntd needs at least 3 classes, two of which are not a row's "
                f"own, got {federation.num_classes}; use fedavg or fedprox"
            )

    def learn(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Train on private rows, with the received model as the teacher of all other classes."""
        weight = self.settings.kd_weight.at(call.progress)
        if not weight:
            cohort.fit(supervised, private=call.local)
            return
        cohort.freeze(GLOBAL, received_weights(received))
        cohort.fit(partial(self._learn, weight=weight), private=call.local, frozen=[GLOBAL])

    def _learn(self, outputs: Mapping[str, Outputs], batch: Batch, *, weight: float) -> Losses:
        """Cross-entropy, and the divergence from the global model over the other classes."""
        own, known = outputs[MODEL], outputs[GLOBAL]
        assert own.private is not None and known.private is not None  # noqa: S101, PT018
        assert batch.labels is not None  # noqa: S101
        settings = self.settings
        rows = not_true_rows(
            own.private, known.private, batch.labels, temperature=settings.temperature
        )
        ntd = t2_factor(settings.temperature, settings.scale_by_t2) * PerRow(rows, of="private")
        return {**supervised(own, batch), "ntd": weight * ntd}
