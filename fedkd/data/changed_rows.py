"""Private rows of some clients that are not what the source says, on purpose."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int64

from fedkd.data.federated import FederatedData
from fedkd.data.label_noise import WrongLabels


@dataclass(frozen=True, eq=False, slots=True)
class Changed:
    """What becomes of some rows.

    Attributes:
        rows: positions in the pool.
        labels: that they get.
        inputs: that they get; None: they keep theirs.
    """

    rows: Int64[np.ndarray, "changed"]
    labels: Int64[np.ndarray, "changed"]
    inputs: Float32[np.ndarray, "changed *shape"] | None = None


Change = Callable[[int, FederatedData, Int64[np.ndarray, "_"]], Changed]
"""``(client, the data that its rows are of, its rows)``: what becomes of some of these."""


def with_changed_rows(
    data: FederatedData, clients: Iterable[int], change: Change, *, named: str
) -> FederatedData:
    """Return data in which some clients' private rows are others.

    Labels that are wrong thereby are noted as such, as those of ``data.label_noise`` are; rows of
    nobody, of other clients, and public, validation and test rows stay bit for bit.

    Args:
        data: of a run.
        clients: whose rows change.
        change: says how.
        named: who does it, for the note.
    """
    chosen = sorted(clients)
    parts = 1 + len(data.views)
    pools: list[FederatedData] = []
    touched = 0
    for number, pool in enumerate((data, *data.views)):
        own = [client for client in chosen if client % parts == number]
        changes = [change(client, pool, data.client_rows[client]) for client in own]
        touched += sum(len(each.rows) for each in changes)
        pools.append(_applied(pool, changes))
    whom = ", ".join(map(str, chosen[:10])) + (", ..." if len(chosen) > 10 else "")
    held = sum(len(data.client_rows[client]) for client in chosen)
    note = f"{named}: {touched} of {held} private rows of clients {whom or 'none'} are changed"
    first, *views = pools
    return replace(first, views=tuple(views), notes=(*data.notes, note))


def _applied(pool: FederatedData, changes: list[Changed]) -> FederatedData:
    if not changes:
        return pool
    labels, inputs = pool.train_labels.copy(), pool.train_inputs
    true = pool.train_labels.copy()
    if pool.wrong_labels is not None:
        true[pool.wrong_labels.rows] = pool.wrong_labels.true_labels
    for each in changes:
        labels[each.rows] = each.labels
        if each.inputs is not None:
            inputs = inputs.copy() if inputs is pool.train_inputs else inputs
            inputs[each.rows] = each.inputs
    wrong = np.flatnonzero(labels != true)
    return replace(
        pool,
        train_inputs=inputs,
        train_labels=labels,
        wrong_labels=WrongLabels(wrong, true[wrong]) if len(wrong) else None,
    )
