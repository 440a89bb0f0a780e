"""Bad replies by name: what the fault injection lets clients send, and our own tests.

Each is a function of a good reply that returns one which `sim.server.validation` has to refuse,
whatever the client sends: predictions, parameters or, where it is only judged, predictions of
the test rows. Where a kind of badness does not exist for what the client sends, a NaN takes its
place. A reply that is bad already may be spoilt again and stays bad.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedkd.exchange.payloads import Predictions, Weights
from fedkd.exchange.values import flatten
from sim.wire.messages import ClientReply

Spoiler = Callable[[ClientReply, np.random.Generator], ClientReply]
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _with_values(change: Change) -> Spoiler:
    """Return a spoiler that changes a table of numbers in the reply; of several any one."""

    def spoil(reply: ClientReply, rng: np.random.Generator) -> ClientReply:
        if reply.payload is not None:
            arrays = flatten(reply.payload).arrays
            names = [name for name, array in arrays.items() if _is_table(array)]
            if not names:
                return _nan_metric(reply, rng)
            name = names[rng.integers(len(names))] if len(names) > 1 else names[0]
            changed = _changed(arrays[name], change, rng)
            return replace(reply, payload=reply.payload.with_arrays({name: changed}))
        if reply.test_probabilities is not None:
            values = _changed(reply.test_probabilities, change, rng)
            return replace(reply, test_probabilities=values)
        return _nan_metric(reply, rng)

    return spoil


def _is_table(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and array.ndim > 0 and array.size > 0


def _changed(values: np.ndarray, change: Change, rng: np.random.Generator) -> np.ndarray:
    if not _is_table(values):
        return values  # spoilt already
    changed = change(values, rng)
    if (changed.shape, changed.dtype) == (values.shape, values.dtype) and np.array_equal(
        changed, values, equal_nan=True
    ):
        return _put(values, rng, np.nan)
    return changed


def _put(values: np.ndarray, rng: np.random.Generator, value: float) -> np.ndarray:
    spoilt = values.copy()
    spoilt.flat[rng.integers(values.size)] = value
    return spoilt


def _putting(value: float) -> Spoiler:
    return _with_values(lambda values, rng: _put(values, rng, value))


def _instead(change: Callable[[np.ndarray], np.ndarray]) -> Spoiler:
    return _with_values(lambda values, _: change(values))


def _as(dtype: str) -> Spoiler:
    # Infinity, where it was put before, has no integer.
    return _instead(lambda values: np.nan_to_num(values).clip(-1e4, 1e4).astype(dtype))


_nan = _putting(np.nan)


# -- what only some kinds have -----------------------------------------------------------------


def _lie(name: str) -> Spoiler:
    """Return a spoiler of payloads whose kind knows a lie of that name."""

    def spoil(reply: ClientReply, rng: np.random.Generator) -> ClientReply:
        lie = None if reply.payload is None else reply.payload.lies.get(name)
        if lie is None:
            return _nan(reply, rng)
        return replace(reply, payload=lie(reply.payload))

    return spoil


def _missing_array(reply: ClientReply, rng: np.random.Generator) -> ClientReply:
    payload = reply.payload
    if not isinstance(payload, Weights) or not payload.arrays:
        return _nan(reply, rng)
    arrays = dict(payload.arrays)
    del arrays[list(arrays)[rng.integers(len(arrays))]]
    return replace(reply, payload=Weights(arrays=arrays))


def _extra_array(reply: ClientReply, rng: np.random.Generator) -> ClientReply:
    payload = reply.payload
    if not isinstance(payload, Weights):
        return _nan(reply, rng)
    arrays = {**payload.arrays, "backdoor.weight": np.ones((2, 2), np.float32)}
    return replace(reply, payload=Weights(arrays=arrays))


# -- the reply as a whole ----------------------------------------------------------------------


def _nothing(reply: ClientReply, rng: np.random.Generator) -> ClientReply:
    if reply.payload is not None:
        return replace(reply, payload=None)
    if reply.test_probabilities is not None:
        return replace(reply, test_probabilities=None)
    return _nan(reply, rng)


def _wrong_kind(reply: ClientReply) -> ClientReply:
    """Send what no algorithm asks for where the server expects predictions, and the reverse."""
    if isinstance(reply.payload, Predictions):
        return replace(reply, payload=Weights(arrays={"values": reply.payload.values}))
    scores = np.zeros((1, 1), np.float32)
    return replace(reply, payload=Predictions(rows=np.zeros(1, np.int64), values=scores))


def _with_metrics(change: Callable[[dict[str, float]], dict[str, float]]) -> Spoiler:
    return lambda reply, _: replace(reply, metrics=change(dict(reply.metrics)))


def _to_round(change: Callable[[int], int | None]) -> Spoiler:
    return lambda reply, _: replace(reply, round=change(reply.round or 0))


_nan_metric = _with_metrics(lambda metrics: {**metrics, "loss": float("nan")})


BAD_REPLIES: dict[str, Spoiler] = {
    # Numbers.
    "nan": _nan,
    "infinity": _putting(np.inf),
    "huge": _with_values(lambda values, rng: _put(values, rng, float(np.finfo(values.dtype).max))),
    "probabilities": _lie("probabilities"),
    # Types.
    "half_precision": _as("float16"),
    "double_precision": _as("float64"),
    "integers": _as("int32"),
    "text": _instead(lambda values: np.full(values.shape, "a")),
    # Shapes; some of them broadcast without a complaint.
    "fewer_classes": _instead(lambda values: values[..., :-1]),
    "one_class": _instead(lambda values: values[..., :1]),
    "fewer_rows": _instead(lambda values: values[:-1]),
    "one_row": _instead(lambda values: values[:1]),
    "no_rows": _instead(lambda values: values[:0]),
    "more_rows": _instead(lambda values: np.concatenate([values, values])),
    "oversized": _instead(lambda values: np.concatenate([values] * 10)),
    "flattened": _instead(lambda values: values.ravel()),
    # What predictions say about themselves.
    "reversed_rows": _lie("reversed_rows"),
    "other_rows": _lie("other_rows"),
    "softened": _lie("softened"),
    "averaged": _lie("averaged"),
    # Whole uploads.
    "nothing": _nothing,
    "wrong_kind": lambda reply, _: _wrong_kind(reply),
    "missing_array": _missing_array,
    "extra_array": _extra_array,
    # Rounds.
    "stale_round": _to_round(lambda round: round - 1),
    "future_round": _to_round(lambda round: round + 1000),
    "no_round": _to_round(lambda _: None),
    # Metrics.
    "nan_metric": _nan_metric,
    "infinite_metric": _with_metrics(lambda metrics: {**metrics, "loss": float("inf")}),
    "negative_loss": _with_metrics(
        lambda metrics: {
            name: -1.0 - abs(value) for name, value in {"loss": 0.0, **metrics}.items()
        }
    ),
    "reserved_metric": _with_metrics(lambda metrics: {**metrics, "client": 0.0}),
    "many_metrics": _with_metrics(
        lambda metrics: {**metrics, **{f"loss_{number}": 0.0 for number in range(1000)}}
    ),
}
