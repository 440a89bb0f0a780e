"""What a trained model says of the inputs in files."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedkd.trained.files import LoadedModel
from fedkd.trained.inputs import Piece, files_in, read_pieces, row_named

BATCH_ROWS = 256
"""Inputs that wait to be predicted together."""


class Prediction(NamedTuple):
    """What a model says of one input.

    Attributes:
        file: that it is in.
        row: its number in the file, from 0; None: the file is one input.
        class_name: the most probable class; empty where the input could not be read.
        probability: of that class, in [0, 1].
        probabilities: of all classes, float32 ``[classes]``; None where there are none.
        problem: why the input could not be read; empty where it was.
        named: says which row of the file a number is, such as ``line 7``.
    """

    file: Path
    row: int | None
    class_name: str
    probability: float
    probabilities: np.ndarray | None
    problem: str = ""
    named: Callable[[int], str] = row_named

    @property
    def where(self) -> str:
        """The file, and the row where it has several."""
        return str(self.file) if self.row is None else f"{self.file}, {self.named(self.row)}"


def _nobody(_done: int, _all: int) -> None:
    return None


def predict_files(
    loaded: LoadedModel,
    paths: Sequence[Path],
    *,
    column: str | None = None,
    reached: Callable[[int, int], None] = _nobody,
) -> Iterator[Prediction]:
    """Predict what is in files, one after the other; an input that cannot be read says why.

    Args:
        loaded: the model.
        paths: pictures, tables (Parquet, CSV, NPZ), or folders of them.
        column: of tables, with pictures or texts; None: that of training, or the only one.
        reached: told how many of how many files are done.

    Raises:
        NoInputsError: a folder holds nothing that the model takes.
    """
    files = files_in(paths, loaded.info)
    waiting: list[Piece] = []
    for done, file in enumerate(files):
        reached(done, len(files))
        for piece in read_pieces(file, loaded.info, column):
            waiting.append(piece)
            if sum(_count(each) for each in waiting) >= BATCH_ROWS:
                yield from _predicted(loaded, waiting)
                waiting = []
    yield from _predicted(loaded, waiting)
    reached(len(files), len(files))


def _count(piece: Piece) -> int:
    return 1 if piece.inputs is None else len(piece.inputs)


def _predicted(loaded: LoadedModel, pieces: Sequence[Piece]) -> Iterator[Prediction]:
    """Predict all inputs of some pieces together."""
    inputs = [piece.inputs for piece in pieces if piece.inputs is not None]
    answers = iter(loaded.predict(np.concatenate(inputs)) if inputs else ())
    for piece in pieces:
        if piece.inputs is None:
            row = None if piece.rows is None else piece.rows[0]
            yield Prediction(piece.file, row, "", 0.0, None, piece.problem, piece.named)
            continue
        for row in [None] if piece.rows is None else piece.rows:
            probabilities = next(answers)
            best = int(probabilities.argmax())
            yield Prediction(
                piece.file,
                row,
                loaded.class_names[best],
                float(probabilities[best]),
                probabilities,
                named=piece.named,
            )
