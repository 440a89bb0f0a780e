"""Whether a server's state from a checkpoint can be one of this run."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from fedkd.exchange.payloads import Predictions, Weights
from fedkd.exchange.values import Value
from fedkd.models import ModelSettings
from fedkd.training.cohort import named_models
from strategies.contract import ServerModel, ServerTools, Strategy


def check_kept(state: Value, strategy: Strategy[Any, Any], server: ServerTools) -> None:
    """Refuse a state whose parts are none of this run; their numbers may be any.

    Its digests say that a checkpoint is as it was written, not by whom.

    Raises:
        ValueError: with the reason.
    """
    layouts = [_layout(server, model) for model in _models(strategy)]
    federation = strategy.federation
    for part in _parts(state):
        if isinstance(part, ServerModel):
            server.check_kept(part)
        elif isinstance(part, Weights):
            found = {name: (a.shape, a.dtype) for name, a in part.arrays.items()}
            if found not in layouts:
                raise ValueError("weights that are those of no model of this run")
        elif isinstance(part, Predictions):
            _check_predictions(part, federation.public_size, federation.num_classes)
    round = federation.round(1)
    for client in federation.first_clients.values():
        key = strategy.receives(state, client, round)
        if key is not None:
            strategy.payload(state, key)


def _parts(held: Any) -> Iterator[Value]:
    """Yield every value within a value, itself included."""
    if isinstance(held, Value):
        yield held
        for field in fields(held):  # type: ignore[arg-type]
            yield from _parts(getattr(held, field.name))
    elif isinstance(held, Mapping):
        for inner in held.values():
            yield from _parts(inner)
    elif isinstance(held, tuple):
        for inner in held:
            yield from _parts(inner)


def _models(strategy: Strategy[Any, Any]) -> Iterator[ModelSettings]:
    for client in strategy.federation.first_clients.values():
        yield from named_models(strategy.architecture(client)).values()
    for settings in strategy.server_models().values():
        if settings.input_shape is None:
            yield settings.model


def _layout(server: ServerTools, model: ModelSettings) -> dict[str, Any]:
    limits = server.asked_weights(model).limits
    return {
        name.removeprefix("arrays/"): (limit.shape, limit.dtype) for name, limit in limits.items()
    }


def _check_predictions(kept: Predictions, public_size: int, classes: int) -> None:
    rows, values = kept.rows, kept.values
    inside = rows.size == 0 or bool(rows.min() >= 0 and rows.max() < public_size)
    if rows.ndim != 1 or rows.dtype != np.int64 or not inside or bool((np.diff(rows) <= 0).any()):
        raise ValueError("predictions of rows that are not of the public set, in order")
    if values.shape != (len(rows), classes) or values.dtype != np.float32:
        raise ValueError(f"predictions are {values.dtype} {values.shape}")
    if not 0 < kept.temperature < np.inf:
        raise ValueError(f"predictions have temperature {kept.temperature!r}")
