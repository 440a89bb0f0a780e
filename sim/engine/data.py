"""The rows of a run: as its settings deal them, changed by an adversary or for an audit."""

from typing import Any

import numpy as np

from fedkd.data import FederatedData, build_federated_data
from fedkd.data.canaries import with_canaries
from fedkd.data.changed_rows import Changed, with_changed_rows
from fedkd.exchange.adversaries import Goal, NoAdversary, Poisoning
from sim.settings import Settings


def data_of(settings: Settings) -> FederatedData:
    """Load the rows of a run.

    Raises:
        ValueError: names the setting that cannot work.
    """
    data = build_federated_data(
        settings.data, num_clients=settings.clients.count, seed=settings.seed
    )
    data = flipped(poisoned(data, settings), settings)
    audit = settings.privacy.audit
    if not audit.canaries:
        return data
    return with_canaries(data, client=audit.client, count=audit.canaries, seed=settings.seed)


def poisoned(data: FederatedData, settings: Settings) -> FederatedData:
    """Return data with the private rows of an adversary's clients as it wants them."""
    adversary = settings.adversary
    if not isinstance(adversary, Poisoning):
        return data
    return adversary.poisoned(data, seed=settings.seed)


def flipped(data: FederatedData, settings: Settings) -> FederatedData:
    """Return data with the labels turned round that are to be: ``counterfactual.flipped``.

    By the rule of the adversary ``label_flip``; what an adversary made of them before is turned.
    """
    clients = settings.counterfactual.flipped
    if not clients:
        return data
    last = data.num_classes - data.other_classes - 1

    def turned(_: int, pool: FederatedData, rows: np.ndarray) -> Changed:
        return Changed(rows, last - pool.train_labels[rows])

    return with_changed_rows(data, clients, turned, named="counterfactual.flipped")


def adversary_of(settings: Settings) -> dict[str, Any]:
    """Return who is controlled and how, as plain values; empty where everybody is honest."""
    adversary = settings.adversary
    if isinstance(adversary, NoAdversary):
        return {}
    seat = "private rows" if isinstance(adversary, Poisoning) else "client"
    return {
        "kind": adversary.kind,
        "seat": "server" if adversary.together else seat,
        "controlled": sorted(settings.stages.controlled),
    }


def goal_of(data: FederatedData, settings: Settings) -> Goal | None:
    """Return what an adversary wants models to say of test rows; None: nothing special.

    Args:
        data: whose test rows.
        settings: of the run.
    """
    adversary = settings.adversary
    return adversary.goal(data) if isinstance(adversary, Poisoning) else None
