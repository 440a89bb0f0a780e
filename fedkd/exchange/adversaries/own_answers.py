"""Lies that need no more than a client's own honest answer: FDLA, scaled and shuffled scores."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from fedkd.bounds import Real
from fedkd.exchange.adversaries.base import Lying, Seen
from fedkd.exchange.adversaries.scores import (
    SCORES,
    Scores,
    rewritten,
    softmax,
)
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Bundle, Prototypes, Weights
from fedkd.exchange.payloads.weights import only_counts


def reversed_ranks(
    values: Float[np.ndarray, "rows classes"],
) -> Float[np.ndarray, "rows classes"]:
    """Give the scores of each row to the classes in the reverse order.

    The least likely class gets the largest score, the second least likely the second largest, and
    so on; of equal scores the first class counts as the more likely.
    """
    order = np.argsort(-values, axis=1, kind="stable")
    lie = np.empty_like(values)
    np.put_along_axis(lie, order, np.take_along_axis(values, order[:, ::-1], axis=1), axis=1)
    return lie


class FDLA(Lying):
    """Each client gives its confidences to the classes in the reverse order, least to most.

    Source:
        Tang, Wu, Gao, Wen, Wang, Sun, 2024, Logits poisoning attack in federated distillation.
        https://arxiv.org/abs/2401.03685 (the idea: confidences are ranked and given to classes in
        another order; that the order is the reverse one is ours.)
    """

    kind: Literal["fdla"] = "fdla"

    def replaces(self, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
        """Turn the order of each row round."""
        return {
            client: rewritten(honest, lambda scores: reversed_ranks(scores.values))
            for client, honest in seen.own.items()
        }


class Shuffled(Lying):
    """Each client shuffles its rows among each other, or the classes of all rows alike.

    Which row or class gets whose scores is drawn for each client and round. Shuffled classes are
    the first stage of LPA with a table that is drawn and not chosen.

    Source:
        Logit poisoning attack in distillation-based federated learning and its countermeasures,
        2024 (LPA). https://arxiv.org/abs/2401.17746
    """

    kind: Literal["shuffled"] = "shuffled"
    what: Literal["rows", "classes"] = Field(
        default="rows", description="rows: among each other; classes: in all rows alike"
    )

    def replaces(self, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
        """Shuffle each table of scores."""

        def lie(scores: Scores) -> np.ndarray:
            axis = 0 if self.what == "rows" else 1
            return rng.permutation(scores.values, axis=axis)

        return {client: rewritten(honest, lie) for client, honest in seen.own.items()}


LARGEST_FACTOR = 1e3


class Scaled(Lying):
    """Each client multiplies what it sends; a negative factor turns its sign round.

    Logits, weights and prototypes are multiplied as they are; counts and variances of BatchNorm are
    not. Soft labels p become softmax(factor x log p): what their logits would become.

    Source:
        Fang, Cao, Jia, Gong, 2020, section 6: a sign flip of what is sent, and one that is scaled
        are the usual baselines. https://arxiv.org/abs/1911.11815
    """

    kind: Literal["scaled"] = "scaled"
    factor: Annotated[Real, Field(ge=-LARGEST_FACTOR, le=LARGEST_FACTOR)] = Field(
        default=10.0, description="what is sent is multiplied with it; -1: the opposite"
    )

    @property
    def lies_about(self) -> tuple[type[Payload], ...]:
        """Numbers of which a multiple says something."""
        return (*SCORES, Weights, Prototypes)

    def replaces(self, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
        """Multiply."""
        return {client: self._multiplied(honest) for client, honest in seen.own.items()}

    def _multiplied(self, payload: Payload) -> Payload:
        match payload:
            case Bundle():
                parts = {name: self._multiplied(part) for name, part in payload.parts.items()}
                return replace(payload, parts=parts)
            case Weights():
                arrays = {
                    name: array if not _may_scale(name, array) else self._times(array)
                    for name, array in payload.arrays.items()
                }
                return replace(payload, arrays=arrays)
            case Prototypes():
                return replace(payload, values=self._times(payload.values))
        return rewritten(payload, self._scores)

    def _scores(self, scores: Scores) -> np.ndarray:
        if scores.scale == "logits":
            return self._times(scores.values)
        return softmax(self.factor * scores.logits)

    def _times(self, array: np.ndarray) -> np.ndarray:
        return (array * self.factor).astype(array.dtype)


def _may_scale(name: str, array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and not only_counts(name) and bool(np.isfinite(array).all())
