"""FedProx: FedAvg whose clients are held near the global model.

Source: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, 2020, Federated Optimization in Heterogeneous
Networks, Algorithm 2. https://arxiv.org/abs/1812.06127
A client minimises CE + mu / 2 * ||w - w_global||^2, where w_global is what it received.
Differs from the paper: clients are drawn alike and their weights averaged by rows, as in FedAvg
here, where the paper draws them by rows and averages them alike; all of them train equally long;
and each architecture has a global model of its own.
"""

from typing import ClassVar, Literal

from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.training import Cohort, supervised
from fedkd.training.gradients import Proximal
from strategies.baselines.fedavg import Averaging, AveragingSettings, GlobalModels
from strategies.contract import Call, Card, Received, StrategySettings


class FedProxSettings(AveragingSettings):
    """Settings under ``strategy:`` when ``name: fedprox``.

    Attributes:
        mu: how strongly a client is held near the global model; a number or a schedule. The paper
            tries 0.001, 0.01, 0.1 and 1; which is best depends on the data.
    """

    name: Literal["fedprox"] = "fedprox"
    mu: NonNegativeSchedule = ConstantSchedule(value=0.01)


class FedProx(Averaging[FedProxSettings, GlobalModels]):
    """FedAvg with a proximal term."""

    card = Card(
        learns="each client is held near the global model",
        up="P",
        down="P",
        equation="CE + mu / 2 * ||w - w_global||^2",
    )
    Settings: ClassVar[type[StrategySettings]] = FedProxSettings

    def learn(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Train on private rows, never far from what was received: the fit begins there."""
        rule = Proximal(self.settings.mu.at(call.progress))
        cohort.fit(supervised, private=call.local, gradient=rule)
