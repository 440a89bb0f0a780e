"""Wrong labels among the private rows of clients: each with a rate, by chance or class to class.

Public, validation and test rows keep the labels that the source gives them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fedkd.bounds import PositiveShare, Share
from fedkd.randomness import Purpose, generator_for


def _in_turn(value: object) -> object:
    rates = value if isinstance(value, list | tuple) else (value,)
    odd = next((rate for rate in rates if isinstance(rate, int | float) and 1 < rate <= 100), None)
    if odd is not None:
        raise ValueError(f"must be a share from 0 to 1, as {odd / 100:g} for {odd:g} %, got {odd}")
    return rates


Rates = Annotated[
    tuple[Share, ...], Field(min_length=1, max_length=100_000), BeforeValidator(_in_turn)
]
"""Rates that are dealt out in turn; one number is everybody's."""


class LabelNoise(BaseModel):
    """Which private labels are wrong (``data.label_noise``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: Rates = Field(
        default=(0.0,),
        description="chance that a client's label is wrong; a list is dealt out in turn",
    )
    kind: Literal["symmetric", "pairwise"] = Field(
        default="symmetric",
        description="symmetric: any other class is as likely; pairwise: the next class, and the "
        "first after the last",
    )
    clients: PositiveShare = Field(
        default=1.0,
        description="share of the clients that have wrong labels, drawn by the seed, rounded, and "
        "at least one; the others have none",
    )


@dataclass(frozen=True, eq=False, slots=True)
class WrongLabels:
    """The rows of the private pool whose labels were changed.

    Attributes:
        rows: their places in the pool, sorted.
        true_labels: what the source says of each. No algorithm may look at them.
    """

    rows: Int64[np.ndarray, "wrong"]
    true_labels: Int64[np.ndarray, "wrong"]


def rates_of_clients(
    settings: LabelNoise, num_clients: int, *, seed: int
) -> Float64[np.ndarray, "clients"]:
    """Return each client's rate: in turn to all, or to those that are drawn."""
    noisy = np.arange(num_clients)
    if settings.clients < 1:
        count = max(1, round(settings.clients * num_clients))
        drawn = generator_for(seed, Purpose.LABEL_NOISE)
        noisy = np.sort(drawn.choice(num_clients, size=count, replace=False))
    rates = np.zeros(num_clients)
    rates[noisy] = np.resize(settings.rate, len(noisy))
    return rates


def with_wrong_labels(
    labels: Int64[np.ndarray, "rows"],
    client_rows: Sequence[Int64[np.ndarray, "_"]],
    settings: LabelNoise,
    *,
    num_classes: int,
    seed: int,
) -> tuple[Int64[np.ndarray, "rows"], WrongLabels | None]:
    """Give each row of a client, for itself and with the client's rate, the label of another class.

    Each client has a stream of its own, and a row that is wrong at one rate is so, and in the same
    way, at every higher one: arms that differ in the rate share what they can.

    Args:
        labels: of the private pool.
        client_rows: who holds which rows; rows of nobody keep their labels.
        settings: how often.
        num_classes: of the source.
        seed: of the run, or ``data.seed``.

    Returns:
        The labels as clients see them, and what was changed; ``None`` where no client has a rate.

    Source:
        Han et al., 2018, appendix A: symmetry flipping and pair flipping.
        https://arxiv.org/abs/1804.06872
    """
    rates = rates_of_clients(settings, len(client_rows), seed=seed)
    if not rates.any():
        return labels, None
    noisy = labels.copy()
    for client, (rows, rate) in enumerate(zip(client_rows, rates, strict=True)):
        rng = generator_for(seed, Purpose.LABEL_NOISE, client)
        wrong = rng.random(len(rows)) < rate
        steps = (
            np.ones(len(rows), dtype=np.int64)
            if settings.kind == "pairwise"
            else rng.integers(1, num_classes, size=len(rows))
        )
        noisy[rows] = np.where(wrong, (labels[rows] + steps) % num_classes, labels[rows])
    changed = np.flatnonzero(noisy != labels)
    return noisy, WrongLabels(changed, labels[changed])
