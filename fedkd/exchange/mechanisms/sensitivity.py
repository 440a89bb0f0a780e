"""What one client can change at most: its answer is clipped, and its norm is bounded.

The neighbour of a federation has another client in the place of one, with any rows whatever. A row
of a client's may move all that its model says, so the bound for one row more or less of a client is
the same unless learning itself is protected (`dp_sgd`).

Each kind of payload is a table of rows, one for each public row or class, of which each is bounded;
so a client's answer is a point of ``B x ... x B``, and two answers differ by ``sqrt(rows)`` times
what two points of B do, in the Euclidean norm, and by ``rows`` times that in the sum of absolute
values. For distributions B is the simplex, of diameter ``sqrt(2)`` and 2; for other numbers it is
the ball of radius ``clip``, of diameter ``2 clip`` in either norm.
"""

import math
from dataclasses import replace
from typing import Literal

import numpy as np

from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import ClassTable, Predictions, Prototypes
from fedkd.exchange.payloads.predictions import LARGEST_SCORE
from fedkd.exchange.payloads.prototypes import LARGEST_FEATURE
from fedkd.exchange.release import Form, Occasion
from fedkd.targets import nearest_shares
from fedkd.targets.votes import one_hot

Norm = Literal["l1", "l2"]

ROUNDING = 1e-6
"""By how much float32 rows may leave their bound."""

TABLES = (Predictions, ClassTable, Prototypes)
"""Kinds of payloads whose rows are bounded one by one."""


def refuses_kind(kind: type[Payload]) -> str | None:
    """Return why nothing bounds what one client changes in a kind; None: something does."""
    if kind in TABLES:
        return None
    tables = ", ".join(each.kind for each in TABLES)
    return (
        f"it protects {tables}, got {kind.kind}, of which nothing bounds what one row changes; "
        "use privacy.mechanism: dp_sgd, under which whatever a client sends is protected"
    )


def refuses_table(asked: Asked) -> str | None:
    """Return why a table that is asked for gives away more than its values; None: it does not."""
    if "counts" in asked.limits:
        return (
            f"{asked.kind.kind} come with the number of private rows of each class, which no noise "
            "protects; use strategy.weighting: equal"
        )
    if asked.about.get("ids") == "subset":
        return (
            "which public rows a client sends says something about its private rows; use an "
            "algorithm in which everybody sends the rows of the round"
        )
    if "weights" in asked.limits:
        return "how much a client trusts its rows says something about its private rows"
    return None


def form_of(asked: Asked) -> Form | None:
    """Return what a table that is asked for looks like; None: it is no table."""
    if asked.kind not in TABLES:
        return None
    rows, columns = (
        size if isinstance(size, int) else size.size for size in asked.limits["values"].shape
    )
    return Form(rows, columns, asked.about.get("scale") == "probabilities")


def form_of_payload(payload: Payload) -> Form | None:
    """Return the same of a client's answer, so that the client needs not be told."""
    match payload:
        case Predictions(values=values, scale=scale) | ClassTable(values=values, scale=scale):
            return Form(len(values), values.shape[1], scale == "probabilities")
        case Prototypes(values=values, num_classes=classes):
            return Form(classes, values.shape[1], False)
    return None


def known(occasion: Occasion) -> Form:
    """Return what is released.

    Raises:
        ValueError: nobody knows.
    """
    if occasion.form is None:
        raise ValueError("what is released is no table, so nothing bounds what one client changes")
    return occasion.form


def sensitivity(form: Form, *, clip: int | float, norm: Norm) -> float:
    """Return how far a client's bounded answer can be from that of another in its place.

    Args:
        form: of the answer.
        clip: radius of each row that is no distribution, in ``norm``.
        norm: Euclidean (l2), or sum of absolute values (l1).

    Source:
        Dwork and Roth, 2014, The Algorithmic Foundations of Differential Privacy, definitions 3.1
        and 3.8. https://www.cis.upenn.edu/~aaroth/Papers/privacybook.pdf
    """
    if form.distributions:
        exact = 2.0 * form.rows if norm == "l1" else math.sqrt(2 * form.rows)
        return exact * (1 + ROUNDING)
    return 2 * clip * (form.rows if norm == "l1" else math.sqrt(form.rows))


def bounded(payload: Payload, *, clip: int | float, norm: Norm) -> Payload:
    """Return an answer each of whose rows is a distribution, or no longer than ``clip``.

    A class that the client does not hold has a row as well: who holds which class is private.
    """
    match payload:
        case Predictions(values=values, scale=scale):
            return replace(payload, values=bounded_rows(values, scale, clip, norm))
        case ClassTable(values=values, scale=scale):
            return replace(payload, values=bounded_rows(values, scale, clip, norm))
        case Prototypes(num_classes=classes):
            values, _ = payload.by_class()
            return Prototypes(
                classes=np.arange(classes),
                values=bounded_rows(values, "features", clip, norm),
                num_classes=classes,
            )
    raise TypeError(f"nothing bounds what one client changes in {payload.kind}")


def acceptable(payload: Payload) -> Payload:
    """Return an answer whose numbers no server refuses; the same object where they are.

    What is no number counts as 0, what is beyond the limit as the limit; a distribution without any
    mass becomes the uniform one.
    """
    if not isinstance(payload, Predictions | ClassTable | Prototypes):
        return payload
    largest = LARGEST_FEATURE if isinstance(payload, Prototypes) else LARGEST_SCORE
    with np.errstate(invalid="ignore"):
        odd = ~(np.abs(payload.values) <= largest).all(-1)
    if not odd.any():
        return payload
    values = payload.values.copy()
    if not isinstance(payload, Prototypes) and payload.scale == "probabilities":
        values[odd] = bounded_rows(values[odd], "probabilities", 1, "l2")
    else:
        finite = np.nan_to_num(values[odd], posinf=largest, neginf=-largest)
        values[odd] = np.clip(finite, -largest, largest)
    return replace(payload, values=values)


def bounded_rows(values: np.ndarray, scale: str, clip: int | float, norm: Norm) -> np.ndarray:
    """Return float32 rows that are distributions, or no longer than ``clip``.

    What is no number counts as 0; a distribution without any mass becomes the uniform one.
    """
    # In float64, and a little to the inside.
    table = np.nan_to_num(values.astype(np.float64), posinf=1e30, neginf=-1e30)
    if scale == "probabilities":
        table = np.clip(table, 0, 1)
        mass = table.sum(-1, keepdims=True)
        table = np.where(mass > 0, table / np.where(mass > 0, mass, 1), 1 / table.shape[-1])
    else:
        order = 1 if norm == "l1" else 2
        lengths = np.linalg.norm(table, ord=order, axis=-1, keepdims=True)
        table = table * np.minimum(1.0, clip * (1 - ROUNDING) / np.maximum(lengths, 1e-300))
    return table.astype(np.float32)


def on_simplex(values: np.ndarray) -> np.ndarray:
    """Return the nearest distribution to each row, by Euclidean distance, in float32."""
    # Of large numbers rounding leaves a sum that is not quite 1.
    shares = nearest_shares(values)
    return np.asarray(shares / shares.sum(-1, keepdims=True), np.float32)


def voted(payload: Payload) -> Predictions:
    """Return a client's votes: for each row its class, as a distribution.

    Raises:
        TypeError: it is no table of predictions, so it has none.
    """
    if not isinstance(payload, Predictions):
        raise TypeError(f"{payload.kind} gives no row of the public set a class")
    values = one_hot(payload.values)
    return replace(payload, values=values, scale="probabilities", temperature=1.0)


LEAST = 1e-4
"""Smallest probability that is told as a logit."""


def as_logits(probabilities: np.ndarray) -> np.ndarray:
    """Return float32 logits of distributions, for algorithms whose clients send logits."""
    return np.asarray(np.log(np.maximum(probabilities, LEAST)), np.float32)
