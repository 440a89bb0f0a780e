"""The rows of a run: as its settings deal them, changed by an adversary or for an audit."""

from collections.abc import Hashable
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np

from fedkd.data import (
    FederatedData,
    build_federated_data,
    public_source_files,
    source_files,
    view_files,
)
from fedkd.data.canaries import with_canaries
from fedkd.data.changed_rows import Changed, with_changed_rows
from fedkd.exchange.adversaries import Goal, NoAdversary, Poisoning
from sim.settings import Settings
from sim.settings.permission import code_in

MOST_KEPT = 2
"""So many loaded data sets are kept: the arms of a study learn, seed by seed, from the same."""

_STATE = attrgetter("st_ino", "st_mtime_ns", "st_size")
"""Whether a file was written anew shows in these."""

_kept: dict[Hashable, FederatedData] = {}


def data_of(settings: Settings) -> FederatedData:
    """Load the rows of a run, or take what was loaded for another that has the same.

    Raises:
        ValueError: names the setting that cannot work.
    """
    key = _key(settings)
    data = _kept.pop(key, None)
    if data is None:
        data = build_federated_data(
            settings.data, num_clients=settings.clients.count, seed=settings.seed
        )
    if key is not None:
        while len(_kept) >= MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = data
    data = flipped(poisoned(data, settings), settings)
    audit = settings.privacy.audit
    if not audit.canaries:
        return data
    return with_canaries(data, client=audit.client, count=audit.canaries, seed=settings.seed)


def _key(settings: Settings) -> Hashable:
    """Return what decides the rows of a run; None where nobody knows that."""
    own = settings.data
    if any(code_in(own)):
        # What a function of one's own gives may differ from call to call.
        return None
    try:
        files = [*source_files(own), *public_source_files(own), *chain(*view_files(own))]
        states = [(path, *_STATE(path.stat())) for path in files]
    except (OSError, ValueError):
        # Whoever loads it says what is wrong with it.
        return None
    return (own.model_dump_json(), settings.clients.count, settings.seed, tuple(states))


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
