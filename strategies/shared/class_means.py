"""What clients say about the rows of each class: collected while they train, averaged, combined."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from fedkd.training import Cohort, ObjectiveFunction, RowOutputs, Table
from strategies.contract import Call

Collect = Literal["round", "last_epoch", "evaluation"]
"""When a client looks at its own rows. ``round``: in every step of the round's training, before the
step changes the model; ``last_epoch``: in its last whole pass, or in all of a round that is none;
``evaluation``: once, after it, in evaluation mode. The first two cost no forward pass."""


def fit_and_collect(
    cohort: Cohort,
    objective: ObjectiveFunction,
    call: Call,
    collect: Collect,
    *,
    layers: Sequence[str] = (),
    tables: Mapping[str, Table] | None = None,
) -> list[RowOutputs]:
    """Train on private rows; return what each member's model put out for them, see `Collect`."""
    training = collect != "evaluation"
    kept = cohort.fit(
        objective, private=call.local, layers=layers, tables=tables, keep_outputs=training
    )
    if collect == "last_epoch":
        sizes = (call.federation.num_examples[client] for client in cohort.clients)
        return [last_pass(own, rows) for own, rows in zip(kept, sizes, strict=True)]
    return kept if training else cohort.outputs(on="private", layers=layers)


def last_pass(outputs: RowOutputs, rows: int) -> RowOutputs:
    """Return what was put out in the last whole pass over so many rows; all, where there is none.

    A number of steps (``clients.local.steps``) may end in the middle of a pass, which then shows
    some rows as they are in it and others not at all.
    """
    end = len(outputs.rows) // rows * rows
    part = slice(end - rows, end) if end else slice(None)
    return replace(
        outputs,
        rows=outputs.rows[part],
        labels=None if outputs.labels is None else outputs.labels[part],
        logits=outputs.logits[part],
        features={name: each[part] for name, each in outputs.features.items()},
    )


def class_means(
    values: np.ndarray, labels: np.ndarray | None, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Average the rows of each class.

    Args:
        values: ``[rows, width]``.
        labels: class of each row.
        classes: how many there are.

    Returns:
        Means, float32 ``[classes, width]``, zero for a class without rows; and how many rows each
        is of, float32 ``[classes]``.
    """
    if labels is None:
        raise ValueError("means of classes need the labels of the rows")
    sums = np.zeros((classes, values.shape[1]))
    np.add.at(sums, labels, values)
    counts = np.bincount(labels, minlength=classes)
    means = sums / np.maximum(counts, 1)[:, None]
    return means.astype(np.float32), counts.astype(np.float32)
