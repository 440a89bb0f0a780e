"""FedProto: clients share the mean feature of each class and draw their features to all means.

Source: Tan, Long, Liu, Zhou, Lu, Jiang, Zhang, 2022, Algorithm 1. https://arxiv.org/abs/2105.00243
A feature is what a model's last linear layer reads. As in the published code the server's mean is
over the clients that hold a class, the distance is the mean square over a feature's numbers, and
features are collected as they are put out in the last local epoch. (The paper's equation 6, read
literally, would also divide by the number of holders and so shrink every prototype.)
Differs from the paper: models may differ in the number of their features, which are then pooled to
the number of the narrowest. A class that no client of a round holds keeps its prototype.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

import numpy as np

from fedkd.exchange.payloads import Prototypes
from fedkd.exchange.values import Value
from strategies.contract import (
    Card,
    Fault,
    Round,
    ServerTools,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.shared.prototypes import PrototypeSettings, SharedPrototypes


class FedProtoSettings(PrototypeSettings):
    """Settings under ``strategy:`` when ``name: fedproto``.

    Attributes:
        weighting: ``equal`` counts every client that holds a class once; ``count`` weights it by
            how many features its mean is of, which travel then.
    """

    name: Literal["fedproto"] = "fedproto"
    weighting: Literal["equal", "count"] = "equal"


def mean_over_holders(
    sent: Iterable[Prototypes], before: Prototypes, *, by_holders: bool = False
) -> Prototypes:
    """Average, for each class, what the clients that hold it sent; by counts where there are any.

    Args:
        sent: each client's prototypes.
        before: whose prototypes remain where nobody sent any.
        by_holders: divide the mean by the number of holders once more.
    """
    means, held = before.by_class()
    total, weight = np.zeros(means.shape), np.zeros(len(means))
    holders = np.zeros(len(means))
    for own in sent:
        counts = np.ones(len(own.classes)) if own.counts is None else own.counts.astype(np.float64)
        total[own.classes] += counts[:, None] * own.values
        weight[own.classes] += counts
        holders[own.classes] += 1
    new = weight > 0
    if by_holders:
        weight *= np.maximum(holders, 1)
    means[new] = total[new] / weight[new, None]
    classes = np.flatnonzero(held | new)
    return Prototypes(classes=classes, values=means[classes], num_classes=len(means))


FAULTS = {
    "literal_equation_6": Fault(
        does="divides a class's weighted mean by the number of its holders as well",
        read_in="Tan et al. 2022 (the paper), equation 6, read literally",
        right="a mean, as the authors' code has it",
    ),
}


class FedProto(SharedPrototypes[FedProtoSettings, Prototypes]):
    """Class means of features up, their means over the holders down."""

    card = Card(
        learns="each client from all clients' mean feature of a row's class",
        up="at most C x d, a bit a class where some are missing",
        down="at most C x d, a bit a class where some are missing",
        equation="CE + prototype_weight * mean square of (feature - mean feature of the class)",
    )
    Settings: ClassVar[type[StrategySettings]] = FedProtoSettings
    State: ClassVar[type[Value]] = Prototypes
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    @property
    def counted(self) -> bool:
        """Whether counts weight."""
        return self.settings.weighting == "count" or self.commits("literal_equation_6")

    def prototypes(self, state: Prototypes) -> Prototypes:
        """The state itself."""
        return state

    def begin(self, server: ServerTools) -> Prototypes:
        """No prototype yet."""
        return self.no_prototypes(server)

    def aggregate(
        self, state: Prototypes, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Prototypes:
        """Average over the holders of each class."""
        sent = (own for _, own in payloads_of(uploads, Prototypes))
        return mean_over_holders(sent, state, by_holders=self.commits("literal_equation_6"))
