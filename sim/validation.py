"""Checks on what clients upload: a bad reply is named and left out, never averaged in."""

from collections.abc import Mapping

import numpy as np

from strategies.knowledge import Knowledge, Predictions
from strategies.plan import RoundPlan

LARGEST_SCORE = 1e4
"""Logits beyond this are refused: honest training does not produce them, attacks do."""

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and type of each parameter of a model."""


def rejection(knowledge: Knowledge, plan: RoundPlan, layout: Layout | None) -> str | None:
    """Return why an upload cannot be used, or None for a good one.

    Args:
        knowledge: what the client sent.
        plan: the round it was asked in.
        layout: what the client's parameters look like; None where it has to send predictions.
    """
    if isinstance(knowledge, Predictions):
        return (
            "expected parameters, got predictions" if layout else _bad_predictions(knowledge, plan)
        )
    if layout is None:
        return "expected predictions, got parameters"
    return _bad_parameters(knowledge.arrays, layout)


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


def _bad_parameters(arrays: Mapping[str, np.ndarray], layout: Layout) -> str | None:
    if arrays.keys() != layout.keys():
        return f"unexpected or missing parameters: {sorted(arrays.keys() ^ layout.keys())[:3]}"
    for name, array in arrays.items():
        shape, dtype = layout[name]
        if array.shape != shape:
            return f"parameter {name!r} has shape {array.shape}, expected {shape}"
        if array.dtype != dtype:
            return f"parameter {name!r} has dtype {array.dtype}, expected {dtype}"
        if not np.isfinite(array).all():
            return f"NaN or infinity in parameter {name!r}"
    return None
