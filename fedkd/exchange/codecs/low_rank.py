"""`low_rank`: how weights changed, as a few singular vectors."""

import math
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedkd.bounds import Few, PositiveShare
from fedkd.exchange.codecs.base import ROUNDING, Coding, float_arrays, float_limits
from fedkd.exchange.codecs.parts import asked_weights, weights_in
from fedkd.exchange.factors import Factors, as_matrix, factors_by_squares, saves
from fedkd.exchange.payload import FLOAT32, Asked, AtMost, Limit, Payload
from fedkd.exchange.payloads.bundle import Bundle
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.payloads.weights import LARGEST_PARAMETER, Weights
from fedkd.exchange.values import Arrays, flatten


class LowRankChanges(Coding):
    """Of each matrix of weights how it changed since it came down, as a few singular vectors.

    A matrix is an array of two or more dimensions, the first one against the others. It travels as
    ``rank (m + n + 1)`` numbers where these are fewer than its own ``m n``, and as it is where not,
    as does everything else. What a client received is what both sides know, so nothing has to be
    remembered; a client that received no weights sends its own as they are.

    The sum of squares of what is left out of a matrix's change is at most ``1 - energy`` of the
    whole, unless ``rank`` cuts it off before.

    Attributes:
        energy: share of the sum of squares of a change that its factors exceed.
        rank: singular values of a matrix at most; None: as many as that takes. Never 0.

    Source:
        Wu et al., 2022, equations 7 to 9. https://arxiv.org/abs/2108.13323
    """

    kind: Literal["low_rank"] = "low_rank"
    energy: PositiveShare = Field(
        0.95, description="share of a change's squares that its factors exceed"
    )
    rank: Few | None = Field(None, description="singular values of a matrix at most")
    follows: ClassVar[bool] = True

    def refuses(self, kind: type[Payload]) -> str | None:
        """Only weights change a little from what was received."""
        if kind in (Weights, Bundle):
            return None
        return (
            f"it codes how weights changed since they were received, got {kind.kind}; use float32 "
            "or float16"
        )

    def asked(self, asked: Asked) -> Asked:
        """A matrix, or its factors beside each other."""
        coded = {}
        for prefix in asked_weights(asked, ""):
            for place, limit in float_limits(asked):
                if place.startswith(f"{prefix}arrays/") and len(limit.shape) > 1:
                    rows, columns = _matrix_shape(limit)
                    shape = (AtMost(rows), AtMost(rows + columns + 1))
                    coded[place] = {"": replace(limit, shape=shape, smallest=-LARGEST_PARAMETER)}
        if not coded:
            parts = " + ".join(part.kind.kind for part in asked.parts.values())
            raise ValueError(
                str(
                    self.refuses(asked.kind)
                    or f"low_rank takes weights, got {parts or 'weights'} without any matrix"
                )
            )
        return Encoded.asked(self.kind, asked, coded)

    def bad(self, encoded: Encoded, asked: Asked) -> str | None:
        """Every matrix is whole, or has as many numbers as factors of some rank."""
        for place, array in encoded.coded.items():
            rows, columns = _matrix_shape(asked.about["inner"].limits[place])
            whole = array.shape == (rows, columns)
            factored = array.shape[1] == rows + columns + 1 and len(array) > 0
            if not whole and not (factored and saves(len(array), rows, columns)):
                return f"{place!r} is neither {rows} x {columns} numbers nor factors of these"
        return None

    def encode(
        self, payload: Payload, memory: Arrays, rng: np.random.Generator
    ) -> tuple[Payload, Arrays]:
        """Take each matrix's change apart."""
        places = {f"{prefix}arrays/" for prefix, _ in weights_in(payload, "")}
        coded = {}
        for place, array in float_arrays(payload):
            if array.ndim > 1 and array.size and place.startswith(tuple(places)):
                before = _followed(memory, place, array.shape)
                coded[place] = {"": self._written(as_matrix(array), before)}
        return Encoded.of(self.kind, payload, coded), memory

    def _written(self, matrix: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        change = None if before is None else matrix - as_matrix(before)
        if change is None or not np.isfinite(change).all():
            return matrix
        factors = factors_by_squares(change, energy=self.energy, most=self.rank)
        if factors is None:
            return matrix
        return np.concatenate(
            [factors.left.T, factors.values[:, None], factors.right], axis=1, dtype=np.float32
        )

    def decode(self, encoded: Payload, memory: Arrays) -> tuple[Payload, Arrays]:
        """Add the changes to what was received."""
        sent = self._encoded(encoded)
        left = flatten(sent.inner).arrays
        arrays = {}
        for place, array in sent.coded.items():
            rest = left[place].shape[1:]
            columns = math.prod(rest)
            rows = len(array) if array.shape[1] == columns else array.shape[1] - columns - 1
            if array.shape[1] == columns:
                arrays[place] = array.reshape(rows, *rest)
                continue
            written = np.split(array, [rows, rows + 1], axis=1)
            change = Factors(written[0].T, written[1][:, 0], written[2]).product()
            before = _followed(memory, place, (rows, *rest))
            # Who says that it changed what it never received means a change of nothing.
            given = 0.0 if before is None else before
            arrays[place] = np.asarray(given + change.reshape(rows, *rest), np.float32)
        return sent.payload(arrays), memory

    def largest_error(self, payload: Payload, memory: Arrays) -> Arrays:
        """Of a matrix's change the root of what share of its squares may be left out."""
        errors = {}
        share = 1.0 if self.rank is not None else math.sqrt(1 - self.energy)
        for prefix, part in weights_in(payload, ""):
            for name, array in part.arrays.items():
                place = f"{prefix}arrays/{name}"
                before = None if array.ndim < 2 else _followed(memory, place, array.shape)
                if before is not None and array.dtype == FLOAT32:
                    change = float(np.linalg.norm(array.astype(np.float64) - before))
                    # Factors are rounded as well.
                    size = float(np.abs(before).max(initial=0.0))
                    rounded = 8 * ROUNDING * (size + change * len(array))
                    errors[place] = np.full(array.shape, share * change + rounded)
        return errors


def _matrix_shape(limit: Limit) -> tuple[int, int]:
    sizes = [size.size if isinstance(size, AtMost) else size for size in limit.shape]
    return sizes[0], math.prod(sizes[1:])


def _followed(memory: Arrays, place: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the array that came down for one place: at that place, or the first of its name.

    Several models come down in a bundle where one goes up; the first is the one to go on from.
    """
    name = place[place.rfind("arrays/") :]
    same = [place, *(other for other in memory if other == name or other.endswith(f"/{name}"))]
    fitting = (memory[other] for other in same if other in memory)
    return next((array for array in fitting if array.shape == shape), None)
