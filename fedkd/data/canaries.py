"""Canaries: rows of one client that a run may have learnt from, by lot, to see whether it shows.

Each gets a wrong label, so that nothing but this row teaches it, and stays or goes with
probability 1/2. Who guesses afterwards which of them stayed bounds the privacy of the run from
below (`fedkd.privacy.attacks.audit`).
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from fedkd.data.changed_rows import Changed, with_changed_rows
from fedkd.data.federated import Canaries, FederatedData
from fedkd.randomness import Purpose, generator_for


def with_canaries(data: FederatedData, *, client: int, count: int, seed: int) -> FederatedData:
    """Turn some of a client's rows into canaries, and take about half of these away from it.

    The label of each is drawn evenly from the classes that it is not of, whatever
    ``data.label_noise`` had made of it. Rows, labels and who stays come from a stream of their own.

    Args:
        data: of a run.
        client: whose rows.
        count: of canaries, at most as many as it has rows.
        seed: of the run.

    Returns:
        What the run learns from; ``canaries`` says which rows they are.

    Raises:
        ValueError: if the client has fewer rows, or rows are all of one class.
    """
    own = data.client_rows[client]
    if len(own) < count:
        raise ValueError(
            f"privacy.audit.canaries must be at most {len(own)}, the rows of client {client}, got "
            f"{count}: use fewer, another privacy.audit.client, or more data.private_rows"
        )
    classes = data.num_classes - data.other_classes
    if classes < 2:
        raise ValueError("privacy.audit needs wrong labels, and private rows have one class only")
    rng = generator_for(seed, Purpose.CANARIES, client)
    rows = np.sort(rng.choice(own, size=count, replace=False))
    steps = rng.integers(1, classes, size=count)
    inside = rng.random(count) < 0.5

    def wrong(_client: int, pool: FederatedData, _rows: Int64[np.ndarray, "rows"]) -> Changed:
        true = pool.train_labels.copy()
        if pool.wrong_labels is not None:
            true[pool.wrong_labels.rows] = pool.wrong_labels.true_labels
        return Changed(rows, (true[rows] + steps) % classes)

    changed = with_changed_rows(data, [client], wrong, named="privacy.audit")
    kept = np.setdiff1d(own, rows[~inside])
    held = tuple(
        kept if other == client else rows_of for other, rows_of in enumerate(data.client_rows)
    )
    return replace(changed, client_rows=held, canaries=Canaries(client, rows, inside))
