"""Lies made of what honest clients have sent: LMA, CPA and HIPS.

Source: Roux, Zimmer, Pokutta, 2025, On the Byzantine-resilience of distillation-based federated
learning, ICLR. https://arxiv.org/abs/2402.12265, and its authors' code,
https://github.com/ZIB-IOL/FedDistill, byzantine/attacks.py.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64
from pydantic import Field

from fedkd.exchange.adversaries.base import Lying, Seen
from fedkd.exchange.adversaries.scores import (
    SHARED_SCORES,
    Crowd,
    Scores,
    one_hot,
    rewritten,
    scores_in,
)
from fedkd.exchange.payload import Payload


class Together(Lying):
    """A liar that knows the answers of all honest clients of the round.

    Of a row that no honest client sent it knows nothing, and says what it honestly would.
    """

    @property
    def together(self) -> bool:
        """They do."""
        return True

    @property
    def lies_about(self) -> tuple[type[Payload], ...]:
        """Scores that can be compared between clients."""
        return SHARED_SCORES

    def replaces(self, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
        """Lie about every row of which an honest client said something."""
        tables: dict[str, list[Scores]] = {}
        for _, payload in sorted(seen.others.items()):
            for scores in scores_in(payload):
                tables.setdefault(scores.place, []).append(scores)
        crowds = {place: Crowd.of(of_place) for place, of_place in tables.items()}
        share = len(seen.own) / (len(seen.own) + len(seen.others))

        def lie(scores: Scores) -> np.ndarray:
            crowd = crowds.get(scores.place)
            if crowd is None:
                return scores.values
            places = np.minimum(np.searchsorted(crowd.ids, scores.ids), len(crowd.ids) - 1)
            known = crowd.ids[places] == scores.ids
            values = scores.values.copy()
            told = self.told(crowd, share, places[known], scores.values[known], scores)
            values[known] = told
            return values

        return {c: rewritten(honest, lie, SHARED_SCORES) for c, honest in sorted(seen.own.items())}

    @abstractmethod
    def told(
        self,
        crowd: Crowd,
        share: int | float,
        places: Int64[np.ndarray, "rows"],
        own: Float[np.ndarray, "rows classes"],
        scores: Scores,
    ) -> np.ndarray:
        """Return what is said of some rows.

        Args:
            crowd: what honest clients say.
            share: of all that answered, those that lie; in [0, 1).
            places: of the rows in the crowd's.
            own: what the client itself would say of these rows.
            scores: the whole table, for its scale.
        """


class Chosen(Together):
    """Says that a row is surely of one class, which it chooses by the honest mean."""

    @abstractmethod
    def chosen(self, mean: Float[np.ndarray, "rows classes"]) -> Int64[np.ndarray, "rows"]:
        """Return the class of each row.

        Args:
            mean: of what honest clients say, as distributions; of all rows of the round.
        """

    def told(
        self,
        crowd: Crowd,
        share: int | float,
        places: Int64[np.ndarray, "rows"],
        own: Float[np.ndarray, "rows classes"],
        scores: Scores,
    ) -> np.ndarray:
        """A one-hot answer of the client's own size."""
        return one_hot(own, self.chosen(crowd.mean)[places], scores.scale)


class LMA(Chosen):
    """Loss maximisation: each row is surely of the least likely class of the honest mean.

    Source:
        Roux, Zimmer, Pokutta, 2025, section 4. https://arxiv.org/abs/2402.12265
    """

    kind: Literal["lma"] = "lma"

    def chosen(self, mean: Float[np.ndarray, "rows classes"]) -> Int64[np.ndarray, "rows"]:
        """The least likely class; the first of equal ones."""
        return np.asarray(mean.argmin(axis=1), np.int64)


def class_covariance(
    mean: Float[np.ndarray, "rows classes"],
) -> Float[np.ndarray, "classes classes"]:
    """Return how the classes of distributions vary together over the rows; zero for one row."""
    centred = mean - mean.mean(axis=0)
    covariance: np.ndarray = centred.T @ centred / len(mean)
    return covariance


def least_similar(mean: Float[np.ndarray, "rows classes"]) -> Int64[np.ndarray, "classes"]:
    """Return for each class another one, that varies least with it over the rows."""
    covariance = class_covariance(mean)
    if len(covariance) > 1:
        # A class is not its own opposite, not even where nothing varies.
        np.fill_diagonal(covariance, np.inf)
    return np.asarray(covariance.argmin(axis=1), np.int64)


class CPA(Chosen):
    """Class prior: each row is surely of the class that is least similar to its likeliest one.

    ``argmin_j S[argmax of the honest mean, j]``. The authors read S from a file for each public set
    and do not say how it was computed; here it is the covariance of the classes in the honest mean
    over the public rows of the round.

    Source:
        Roux, Zimmer, Pokutta, 2025, section 4. https://arxiv.org/abs/2402.12265
    """

    kind: Literal["cpa"] = "cpa"

    def chosen(self, mean: Float[np.ndarray, "rows classes"]) -> Int64[np.ndarray, "rows"]:
        """The class that is least similar to the likeliest."""
        return np.asarray(least_similar(mean)[mean.argmax(axis=1)], np.int64)


class HIPS(Together):
    """Hides among honest answers: of each row it sends what the worst of the honest clients said.

    With the share a of liars, the honest mean h and the answer y_k of honest client k, the worst is
    for ``mode: lma`` the one with the largest cross-entropy of what the mean would become,
    ``argmax_k -sum_j h_j log((1 - a) h_j + a y_kj)``, and for ``mode: cpa`` the one that is least
    similar to the likeliest class, ``argmin_k S[argmax h] . y_k``, with S as for CPA.

    Source:
        Roux, Zimmer, Pokutta, 2025. https://arxiv.org/abs/2402.12265. The rules are those of the
        authors' code, which exchanges the weights a and 1 - a in the logarithm; a mean over all
        clients has them as above.
    """

    kind: Literal["hips"] = "hips"
    mode: Literal["lma", "cpa"] = Field(
        default="lma", description="by which rule the worst honest answer is found"
    )

    def told(
        self,
        crowd: Crowd,
        share: int | float,
        places: Int64[np.ndarray, "rows"],
        own: Float[np.ndarray, "rows classes"],
        scores: Scores,
    ) -> np.ndarray:
        """The worst honest client's own answer to each row."""
        worst = self.worst(crowd, share)
        told: np.ndarray = crowd.values[worst[places], places]
        return told

    def worst(self, crowd: Crowd, share: int | float) -> Int64[np.ndarray, "rows"]:
        """Return whose answer hurts most, for each row, as a position in the crowd."""
        mean = crowd.mean
        if self.mode == "lma":
            # What no honest client believes has weight 0, and 0 log 0 is 0.
            tiny = np.finfo(np.float64).tiny
            become = (1 - share) * mean + share * crowd.probabilities
            harm = -(mean * np.log(np.maximum(become, tiny))).sum(axis=-1)
        else:
            similarity = class_covariance(mean)[mean.argmax(axis=1)]
            harm = -(similarity * crowd.probabilities).sum(axis=-1)
        return np.asarray(np.where(crowd.sent, harm, -np.inf).argmax(axis=0), np.int64)
