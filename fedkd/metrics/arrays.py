"""How metrics read their inputs: NumPy arrays or tensors in, 64-bit NumPy arrays inside."""

import numpy as np
from jaxtyping import Float, Integer, Num
from torch import Tensor

Array = np.ndarray | Tensor
"""What every metric accepts; a tensor may sit on any device and carry gradients."""

# Wide enough for targets that travelled as 16-bit floats, far below what logits miss it by.
_SUM_TOLERANCE = 0.01


def as_float64(values: Num[Array, "..."]) -> Float[np.ndarray, "..."]:
    """Return the values in double precision, on the host."""
    if isinstance(values, Tensor):
        # Converted before NumPy sees it: NumPy has no bfloat16.
        doubles: np.ndarray = values.detach().cpu().double().numpy()
        return doubles
    return values.astype(np.float64, copy=False)


def by_class(scores: Num[Array, "rows classes"]) -> Float[np.ndarray, "classes rows"]:
    """Return scores in double precision with a contiguous line for each class.

    NumPy reduces over the first axis ten times as fast as over a short last one.
    """
    return np.ascontiguousarray(as_float64(scores).T)


def as_int64(values: Integer[Array, "..."]) -> Integer[np.ndarray, "..."]:
    """Return the values as 64-bit integers, on the host, so that products cannot wrap around."""
    if isinstance(values, Tensor):
        return values.detach().cpu().long().numpy()
    return values.astype(np.int64, copy=False)


def as_classes(
    name: str, values: Integer[Array, "..."], num_classes: int
) -> Integer[np.ndarray, "..."]:
    """Return class indices after checking that they lie in ``[0, num_classes)``.

    Raises:
        ValueError: naming ``name`` and the range it has.
    """
    classes = as_int64(values)
    if classes.size and not (classes.min() >= 0 and classes.max() < num_classes):
        raise ValueError(
            f"{name} must lie in [0, {num_classes}), got {classes.min()} to {classes.max()}"
        )
    return classes


def as_probabilities(values: Float[Array, "... classes"]) -> Float[np.ndarray, "... classes"]:
    """Return probabilities after checking that each row is >= 0 and sums to 1 within 0.01.

    Raises:
        ValueError: if a row does not, as logits do not.
    """
    probabilities = as_float64(values)
    if probabilities.size:
        lowest, error = probabilities.min(), np.abs(probabilities.sum(-1) - 1).max()
        if not (lowest >= 0 and error <= _SUM_TOLERANCE):
            raise ValueError(
                "probabilities must be >= 0 and sum to 1 in every row, got a lowest value of "
                f"{lowest:.6g} and a sum that is off by {error:.6g}"
            )
    return probabilities


def log_softmax(logits: Float[Array, "... classes"]) -> Float[np.ndarray, "... classes"]:
    """Return log-probabilities; shifted by the largest logit, so nothing overflows."""
    scores = as_float64(logits)
    scores = scores - scores.max(-1, keepdims=True)
    normaliser: np.ndarray = np.log(np.exp(scores).sum(-1, keepdims=True))
    log_probabilities: np.ndarray = scores - normaliser
    return log_probabilities


def entropy(probabilities: Float[np.ndarray, "*rows classes"]) -> Float[np.ndarray, "*rows"]:
    """Return the entropy of each row in nats; a class of probability 0 adds nothing."""
    positive = probabilities > 0
    logs = np.log(probabilities, out=np.zeros_like(probabilities), where=positive)
    entropies: np.ndarray = -np.sum(probabilities * logs, axis=-1)
    return entropies


def mean_or_nan(values: Float[np.ndarray, "..."]) -> float:
    """Return the mean, or NaN where there is nothing to average."""
    return float(values.mean()) if values.size else float("nan")
