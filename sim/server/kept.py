"""Whether a server's state from a checkpoint can be one of this run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from fedkd.exchange.payload import Extent, Limit, Payload
from fedkd.exchange.payloads import Weights
from fedkd.exchange.pipeline import ExchangeState
from fedkd.exchange.values import Value
from fedkd.models import ModelSettings
from fedkd.training.cohort import named_models
from strategies.contract import ServerModel, ServerTools, Strategy


def check_kept(state: Value, strategy: Strategy[Any, Any], server: ServerTools) -> None:
    """Refuse a state whose parts are none of this run.

    A digest says that a checkpoint is as it was written, not by whom. What clients or the server
    send has finite numbers; only a model that the server trains may have diverged.

    Raises:
        ValueError: with the reason.
    """
    federation = strategy.federation
    layouts = [_limits(server, model) for model in _models(strategy)]
    extent = Extent(federation.num_clients, federation.public_size, federation.num_classes)
    for part in _parts(state):
        if isinstance(part, ServerModel):
            server.check_kept(part)
        elif isinstance(part, Weights):
            _check_weights(part, layouts)
        elif isinstance(part, Payload):
            if not all(_is_finite(array) for array in _own_arrays(part)):
                raise ValueError(f"{part.kind} with NaN or infinity")
            reason = part.not_kept(extent)
            if reason is not None:
                raise ValueError(reason)
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


def check_clients(state: Value, num_clients: int) -> None:
    """Refuse a state that knows of clients that there are not.

    Whole numbers as keys of a mapping are partition ids, wherever in the state it is.

    Raises:
        ValueError: naming the key.
    """
    for mapping in _mappings(state):
        for key in mapping:
            if isinstance(key, int) and not 0 <= key < num_clients:
                raise ValueError(
                    f"a mapping has the key {key}, which is no client: whole numbers as keys are "
                    f"clients, here 0 to {num_clients - 1}; for anything else use words or tuples"
                )


def check_exchange(state: ExchangeState, num_clients: int) -> None:
    """The same of what the exchange remembers.

    Raises:
        ValueError: naming the client.
    """
    check_clients(state, num_clients)
    if state.spent < 0:
        raise ValueError(f"{state.spent} bytes that were exchanged so far")
    for charge in state.ledger.charges:
        clients = charge.clients
        if clients.ndim != 1 or clients.dtype.kind != "i" or charge.attempts.shape != clients.shape:
            raise ValueError("a charge whose clients and attempts are no two lists of one length")
        if clients.size and not 0 <= clients.min() <= clients.max() < num_clients:
            raise ValueError(f"a charge to a client that is not 0 to {num_clients - 1}")


def _mappings(held: Any) -> Iterator[Mapping[Any, Any]]:
    if isinstance(held, Value):
        held = tuple(getattr(held, field.name) for field in fields(held))  # type: ignore[arg-type]
    if isinstance(held, Mapping):
        yield held
        held = tuple(held.values())
    if isinstance(held, tuple):
        for inner in held:
            yield from _mappings(inner)


def _own_arrays(held: Any) -> Iterator[np.ndarray]:
    """Yield the arrays of a payload that are not those of another payload within it."""
    if isinstance(held, np.ndarray):
        yield held
    elif isinstance(held, Mapping | tuple):
        for inner in held.values() if isinstance(held, Mapping) else held:
            if not isinstance(inner, Payload):
                yield from _own_arrays(inner)
    elif isinstance(held, Value):
        yield from _own_arrays(tuple(getattr(held, f.name) for f in fields(held)))  # type: ignore[arg-type]


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _limits(server: ServerTools, model: ModelSettings) -> dict[str, Limit]:
    limits = server.asked_weights(model).limits
    return {name.removeprefix("arrays/"): limit for name, limit in limits.items()}


def _check_weights(kept: Weights, models: Sequence[Mapping[str, Limit]]) -> None:
    found = {name: (array.shape, array.dtype) for name, array in kept.arrays.items()}
    for limits in models:
        if found == {name: (limit.shape, limit.dtype) for name, limit in limits.items()}:
            odd = [
                name
                for name, limit in limits.items()
                # A mask of -inf is a constant of the model.
                if limit.constant is None and not _is_finite(kept.arrays[name])
            ]
            if odd:
                raise ValueError(f"weights with NaN or infinity in {odd[0]!r}")
            return
    raise ValueError("weights that are those of no model of this run")
