"""Votes: the class that a row is given, as a distribution."""

import numpy as np


def one_hot(scores: np.ndarray) -> np.ndarray:
    """Return float32 rows with 1 at the largest score, the lowest index where several are.

    Args:
        scores: ``[rows, classes]``; what is no number is the lowest of all.
    """
    classes = np.nan_to_num(scores, nan=-np.inf).argmax(-1)
    made: np.ndarray = np.eye(scores.shape[-1], dtype=np.float32)[classes]
    return made
