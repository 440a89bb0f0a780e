"""What can be read from a payload: soft labels of public rows, or a model."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Bundle, Predictions, Weights
from fedkd.models import ModelSettings
from fedkd.targets.simplex import nearest_shares
from fedkd.training import Arrays
from sim.attacks.bench import Bench, SoftLabels


class SentModel(NamedTuple):
    """A model that somebody sent.

    Attributes:
        model: its architecture.
        weights: parameters and buffers by name.
    """

    model: ModelSettings
    weights: Arrays


Reading = SoftLabels | SentModel


class UnreadableError(ValueError):
    """A payload in which no attack here finds labels or a model; the text says what it is."""


def reading_of(payload: Payload | None, models: Sequence[ModelSettings], bench: Bench) -> Reading:
    """Return what can be read from a payload; of a bundle, its first part that says anything.

    Args:
        payload: what travelled; None: nothing did.
        models: whose weights it may hold.
        bench: knows their shapes.

    Raises:
        UnreadableError: nothing can.
    """
    match payload:
        case None:
            raise UnreadableError("nothing travelled")
        case Predictions() if len(payload.rows):
            return SoftLabels(payload.rows, _distributions(payload.probabilities()))
        case Predictions():
            raise UnreadableError("predictions of no row")
        case Weights():
            shapes = {name: array.shape for name, array in payload.arrays.items()}
            for model in models:
                if bench.shapes(model) == shapes:
                    return SentModel(model, dict(payload.arrays))
            raise UnreadableError("weights of none of the clients' models")
        case Bundle():
            for part in payload.parts.values():
                try:
                    return reading_of(part, models, bench)
                except UnreadableError:
                    continue
    raise UnreadableError(f"{payload.label}, from which no attack here reads rows")


def _distributions(values: np.ndarray) -> np.ndarray:
    """Return soft labels; what noise made of some is projected onto distributions."""
    if values.min() >= 0 and np.allclose(values.sum(-1), 1, atol=1e-3):
        return values.astype(np.float32)
    return nearest_shares(values).astype(np.float32)
