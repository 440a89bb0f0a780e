"""Bad replies by name: what the fault injection lets clients send, and our own tests.

Each is a function of a good reply that returns one which `sim.server.validation` has to refuse,
whatever the client sends: predictions, parameters or, where it is only judged, predictions of
the test rows. Where a kind of badness does not exist for what the client sends, a NaN takes its
place. A reply that is bad already may be spoilt again and stays bad.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sim.wire.messages import ClientReply
from strategies.knowledge import Parameters, Predictions

Spoiler = Callable[[ClientReply, np.random.Generator], ClientReply]
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _with_values(change: Change) -> Spoiler:
    """Return a spoiler that changes a table of numbers in the reply; of parameters any one."""

    def spoil(reply: ClientReply, rng: np.random.Generator) -> ClientReply:
        knowledge = reply.knowledge
        if isinstance(knowledge, Predictions):
            values = _changed(knowledge.values, change, rng)
            return replace(reply, knowledge=replace(knowledge, values=values))
        if isinstance(knowledge, Parameters):
            names = [name for name, array in knowledge.arrays.items() if _is_table(array)]
            if not names:
                return _nan_metric(reply, rng)
            name = names[rng.integers(len(names))]
            array = _changed(knowledge.arrays[name], change, rng)
            return replace(reply, knowledge=Parameters({**knowledge.arrays, name: array}))
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


# -- what only predictions have ----------------------------------------------------------------


def _of_predictions(spoil: Callable[[Predictions], Predictions]) -> Spoiler:
    def spoiler(reply: ClientReply, rng: np.random.Generator) -> ClientReply:
        if isinstance(reply.knowledge, Predictions):
            return replace(reply, knowledge=spoil(reply.knowledge))
        return _nan(reply, rng)

    return spoiler


def _softmax(predictions: Predictions) -> Predictions:
    values = predictions.values
    if not _is_table(values):
        return predictions
    with np.errstate(invalid="ignore"):
        powers = np.exp(values - values.max(axis=-1, keepdims=True))
        return replace(predictions, values=powers / powers.sum(axis=-1, keepdims=True))


# -- what only parameters have -----------------------------------------------------------------


def _missing_array(reply: ClientReply, rng: np.random.Generator) -> ClientReply:
    if not isinstance(reply.knowledge, Parameters) or not reply.knowledge.arrays:
        return _nan(reply, rng)
    arrays = dict(reply.knowledge.arrays)
    del arrays[list(arrays)[rng.integers(len(arrays))]]
    return replace(reply, knowledge=Parameters(arrays))


def _extra_array(reply: ClientReply, rng: np.random.Generator) -> ClientReply:
    if not isinstance(reply.knowledge, Parameters):
        return _nan(reply, rng)
    arrays = {**reply.knowledge.arrays, "backdoor.weight": np.ones((2, 2), np.float32)}
    return replace(reply, knowledge=Parameters(arrays))


# -- the reply as a whole ----------------------------------------------------------------------


def _nothing(reply: ClientReply, rng: np.random.Generator) -> ClientReply:
    if reply.knowledge is not None:
        return replace(reply, knowledge=None)
    if reply.test_probabilities is not None:
        return replace(reply, test_probabilities=None)
    return _nan(reply, rng)


def _wrong_kind(reply: ClientReply) -> ClientReply:
    if isinstance(reply.knowledge, Predictions):
        return replace(reply, knowledge=Parameters({"values": reply.knowledge.values}))
    scores = np.zeros((1, 1), np.float32)
    unasked = Predictions(kind="logits", rows=np.zeros(1, np.int64), values=scores)
    return replace(reply, knowledge=unasked)


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
    "probabilities": _of_predictions(_softmax),
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
    "reversed_rows": _of_predictions(lambda sent: replace(sent, rows=sent.rows[::-1].copy())),
    "other_rows": _of_predictions(lambda sent: replace(sent, rows=sent.rows + 1)),
    "softened": _of_predictions(lambda sent: replace(sent, temperature=4.0)),
    "averaged": _of_predictions(lambda sent: replace(sent, kind="mean_logit")),
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
