"""Checks on what clients upload: a bad reply is named and left out, never averaged in."""

from collections.abc import Mapping

import numpy as np

from strategies.base import RoundPlan
from strategies.knowledge import Knowledge, Predictions

LARGEST_SCORE = 1e4
"""Logits beyond this are refused: honest training does not produce them, attacks do."""

Shapes = Mapping[str, tuple[int, ...]]


def rejection(knowledge: Knowledge, plan: RoundPlan, shapes: Shapes | None) -> str | None:
    """Return why an upload cannot be used, or None for a good one.

    Args:
        knowledge: what the client sent.
        plan: the round it was asked in.
        shapes: name and shape of each of the client's parameters, where it sends parameters.
    """
    if isinstance(knowledge, Predictions):
        return _bad_predictions(knowledge, plan)
    if shapes is None:
        return "parameters were not asked for"
    return _bad_parameters(knowledge.arrays, shapes)


def _bad_predictions(predictions: Predictions, plan: RoundPlan) -> str | None:
    rows, values = plan.public_rows, predictions.values
    if predictions.kind != "logits":
        return f"kind {predictions.kind!r}, expected 'logits'"
    if not np.array_equal(predictions.rows, rows):
        return f"rows are not the {len(rows)} public rows of round {plan.round}"
    expected = len(rows), plan.federation.num_classes
    if values.shape != expected:
        return f"shape {values.shape}, expected {expected}"
    if values.dtype != np.float32:
        return f"dtype {values.dtype}, expected float32"
    if not np.isfinite(values).all():
        return "NaN or infinity among the scores"
    largest = float(np.abs(values).max())
    if largest > LARGEST_SCORE:
        return f"a score of size {largest:g}, expected at most {LARGEST_SCORE:g}"
    return None


def _bad_parameters(arrays: Mapping[str, np.ndarray], shapes: Shapes) -> str | None:
    if arrays.keys() != shapes.keys():
        return f"unexpected or missing parameters: {sorted(arrays.keys() ^ shapes.keys())[:3]}"
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            return f"parameter {name!r} has shape {array.shape}, expected {shapes[name]}"
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            return f"NaN, infinity or no number in parameter {name!r}"
    return None
