"""Where in a payload, alone or in a bundle, the parts are that a codec takes."""

from collections.abc import Iterator

import numpy as np

from fedkd.exchange.payload import FLOAT32, Asked, Payload
from fedkd.exchange.payloads.bundle import Bundle
from fedkd.exchange.payloads.class_table import ClassTable
from fedkd.exchange.payloads.predictions import Predictions, Scale
from fedkd.exchange.payloads.weights import Weights
from fedkd.targets.scale import are_distributions


def predictions_in(payload: Payload, prefix: str) -> Iterator[tuple[str, Predictions]]:
    """Find predictions, alone or in a bundle, each with the beginning of its arrays' places."""
    if isinstance(payload, Predictions):
        yield prefix, payload
    elif isinstance(payload, Bundle):
        for name, part in payload.parts.items():
            yield from predictions_in(part, f"{prefix}parts/{name}/")


def asked_predictions(asked: Asked, prefix: str) -> Iterator[tuple[str, Scale]]:
    """Find predictions that are asked for, each with its scale."""
    if asked.kind is Predictions:
        yield prefix, asked.about["scale"]
    for name, part in asked.parts.items():
        yield from asked_predictions(part, f"{prefix}parts/{name}/")


def holds_soft_labels(sent: Predictions | ClassTable) -> bool:
    """Tell whether what says that it is soft labels has distributions in its rows."""
    values = sent.values
    return (
        sent.scale == "probabilities"
        and values.dtype == FLOAT32
        and values.ndim == 2
        and values.shape[1] > 0
        and bool(np.isfinite(values).all())
        and are_distributions(values[sent.held] if isinstance(sent, ClassTable) else values)
    )


def soft_labels_in(payload: Payload, prefix: str) -> Iterator[tuple[str, Predictions | ClassTable]]:
    """Find tables of soft labels, alone or in a bundle, each with the place of its values."""
    if isinstance(payload, Predictions | ClassTable):
        if payload.scale == "probabilities":
            yield f"{prefix}values", payload
    elif isinstance(payload, Bundle):
        for name, part in payload.parts.items():
            yield from soft_labels_in(part, f"{prefix}parts/{name}/")


def weights_in(payload: Payload, prefix: str) -> Iterator[tuple[str, Weights]]:
    """Find weights, alone or in a bundle, each with the beginning of its arrays' places."""
    if isinstance(payload, Weights):
        yield prefix, payload
    elif isinstance(payload, Bundle):
        for name, part in payload.parts.items():
            yield from weights_in(part, f"{prefix}parts/{name}/")


def asked_weights(asked: Asked, prefix: str) -> Iterator[str]:
    """Find weights that are asked for."""
    if asked.kind is Weights:
        yield prefix
    for name, part in asked.parts.items():
        yield from asked_weights(part, f"{prefix}parts/{name}/")
