"""Ranks of arms over several data sets: Friedman's test, Nemenyi's critical difference, pairs.

On each data set the best arm has rank 1, and equal arms share the mean of their ranks. Accuracies
of two data sets cannot be averaged to much purpose; ranks can. One data set is one observation,
however many seeds it was run with: seeds make its mean surer and no data set more.

Source:
    Demsar, 2006, Statistical comparisons of classifiers over multiple data sets, JMLR 7:1-30.
    https://jmlr.org/papers/v7/demsar06a.html
    Pairs by Wilcoxon's test and not by mean ranks: Benavoli, Corani and Mangili, 2016, Should we
    really use post-hoc tests based on mean-ranks?, JMLR 17(5):1-10.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from jaxtyping import Float

from sim.reports.power import CONFIDENCE
from sim.reports.statistics import MOST_FLIPPED, holm, sign_flip_p, smallest_p

Table = Float[np.ndarray, "sets arms"]


@dataclass(frozen=True, slots=True)
class Friedman:
    """Whether arms differ at all.

    Attributes:
        chi_square: Friedman's statistic, corrected for ties; 0 where all arms are equal.
        f: Iman's and Davenport's, which is less conservative; infinite where all data sets rank
            alike.
        freedom: degrees of freedom of ``f``.
        p_value: of ``f``; of all orders that are alike, the share of chance.
    """

    chi_square: float
    f: float
    freedom: tuple[int, int]
    p_value: float


def rank_rows(scores: Table) -> Table:
    """Rank the arms of each data set: the highest score has rank 1, equal ones share the mean."""
    from scipy import stats

    # Means of shares that are equal differ by rounding.
    ranks: Table = stats.rankdata(-np.round(scores, 12), axis=1)
    return ranks


def friedman(ranks: Table) -> Friedman:
    """Test whether arms differ over data sets, by their ranks.

    Args:
        ranks: at least two data sets and two arms.

    Source:
        Friedman, 1937; corrected for ties as ``scipy.stats.friedmanchisquare``. Iman and Davenport,
        1980; Demsar, 2006, section 3.2.2.
    """
    from scipy import special

    sets, arms = ranks.shape
    ties = sum(_tied(row) for row in ranks) / (sets * arms * (arms**2 - 1))
    freedom = (arms - 1, (arms - 1) * (sets - 1))
    if ties == 1:
        return Friedman(0.0, 0.0, freedom, 1.0)
    spread = math.fsum((ranks.mean(0) - (arms + 1) / 2) ** 2)
    chi_square = 12 * sets / (arms * (arms + 1)) * spread / (1 - ties)
    largest = sets * (arms - 1)
    if largest - chi_square < 1e-9 * largest:
        orders = math.factorial(arms) / math.prod(map(math.factorial, _groups(ranks[0])))
        return Friedman(chi_square, math.inf, freedom, orders ** (1 - sets))
    f = (sets - 1) * chi_square / (largest - chi_square)
    return Friedman(chi_square, f, freedom, float(special.fdtrc(*freedom, f)))


def _groups(row: Sequence[float] | Float[np.ndarray, " arms"]) -> list[int]:
    """Return how many share each rank."""
    return [int(count) for count in np.unique(row, return_counts=True)[1]]


def _tied(row: Float[np.ndarray, " arms"]) -> int:
    return sum(count**3 - count for count in _groups(row))


def critical_difference(arms: int, sets: int) -> float:
    """Return by how much mean ranks of two arms must differ, all pairs at 5 % together.

    Args:
        arms: >= 2.
        sets: data sets, >= 2.

    Source:
        Nemenyi, 1963; Demsar, 2006, section 3.2.2: ``q * sqrt(arms (arms + 1) / (6 sets))`` with q
        of the studentized range for infinitely many degrees of freedom, over the root of 2.
    """
    return _range_quantile(arms) / math.sqrt(2) * math.sqrt(arms * (arms + 1) / (6 * sets))


@lru_cache(maxsize=64)
def _range_quantile(arms: int) -> float:
    """Return below what 95 % of the ranges of so many standard normals are."""
    from scipy import integrate, optimize, special

    def below(width: float) -> float:
        def density(lowest: float) -> float:
            others = special.ndtr(lowest + width) - special.ndtr(lowest)
            return math.exp(-(lowest**2) / 2) / math.sqrt(2 * math.pi) * others ** (arms - 1)

        # SciPy's studentized_range does the same integral to fewer digits.
        area, _ = integrate.quad(density, -9, 9, epsabs=1e-14, epsrel=1e-13, limit=200)
        return float(arms * area)

    return float(optimize.brentq(lambda width: below(width) - CONFIDENCE, 0.1, 10, xtol=1e-13))


def cliques(means: Sequence[float], difference: float) -> list[tuple[int, ...]]:
    """Return groups of arms that cannot be told apart: as large as they can be, best first.

    Args:
        means: mean rank of each arm.
        difference: the critical one.

    Returns:
        Positions of arms, each group with two at least and none within another.
    """
    order = sorted(range(len(means)), key=lambda arm: means[arm])
    found: list[tuple[int, ...]] = []
    for place, first in enumerate(order):
        group = tuple(arm for arm in order[place:] if means[arm] - means[first] < difference)
        if len(group) > 1 and not any(set(group) <= set(other) for other in found):
            found.append(group)
    return found


def wilcoxon_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test.

    Exact, with ties, up to `MOST_FLIPPED` differences: all flips of the signs of their ranks are
    counted. Beyond that what SciPy chooses: exact up to 50 where nothing is tied, else normal.

    Args:
        differences: one a data set; those of 0 say nothing and are left out.

    Source:
        Wilcoxon, 1945.
    """
    from scipy import stats

    told = [each for each in differences if abs(each) > 1e-12]
    if not told:
        return 1.0
    if len(told) > MOST_FLIPPED:
        return float(stats.wilcoxon(told).pvalue)
    ranks = stats.rankdata(np.round(np.abs(told), 12))
    return sign_flip_p((ranks * np.sign(told)).tolist())


@dataclass(frozen=True, slots=True)
class PairOfArms:
    """Two arms over data sets.

    Attributes:
        first, other: their names.
        rank_difference: mean rank of the first minus that of the other: positive where the other
            is better.
        told_apart: whether that is beyond Nemenyi's critical difference.
        wins, ties: data sets in which the other is better, and in which neither is.
        p_value: of Wilcoxon's test.
        p_holm: corrected for all pairs.
    """

    first: str
    other: str
    rank_difference: float
    told_apart: bool
    wins: int
    ties: int
    p_value: float
    p_holm: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """Arms over data sets.

    Attributes:
        arms: in the order of their columns.
        sets: names of the data sets, in the order of their rows.
        scores: accuracy of each arm on each data set, a share.
        seeds: of each data set, those that all its arms have.
        left_out: arms that some data set lacks.
    """

    arms: tuple[str, ...]
    sets: tuple[str, ...]
    scores: Table
    seeds: tuple[int, ...]
    left_out: tuple[str, ...] = ()

    @property
    def ranks(self) -> Table:
        """Of each arm on each data set."""
        return rank_rows(self.scores)

    @property
    def mean_ranks(self) -> dict[str, float]:
        """Of each arm, best first."""
        means = self.ranks.mean(0).tolist()
        return dict(sorted(zip(self.arms, means, strict=True), key=lambda each: each[1]))

    @property
    def critical_difference(self) -> float:
        """Nemenyi's, at 5 %."""
        return critical_difference(len(self.arms), len(self.sets))

    @property
    def friedman(self) -> Friedman:
        """Whether arms differ at all."""
        return friedman(self.ranks)

    @property
    def cliques(self) -> list[tuple[str, ...]]:
        """Groups of arms whose mean ranks cannot be told apart."""
        arms, means = [*self.mean_ranks], [*self.mean_ranks.values()]
        return [
            tuple(arms[place] for place in group)
            for group in cliques(means, self.critical_difference)
        ]

    @property
    def p_smallest(self) -> float:
        """The smallest p-value that a pair can have over so many data sets."""
        return smallest_p(len(self.sets))

    @property
    def pairs(self) -> list[PairOfArms]:
        """Every pair, by Wilcoxon's test over data sets, corrected by Holm."""
        columns: Mapping[str, Float[np.ndarray, " sets"]] = dict(
            zip(self.arms, self.scores.T, strict=True)
        )
        gains = {
            (first, other): np.round(columns[other] - columns[first], 12)
            for first, other in combinations(self.arms, 2)
        }
        p_values = {pair: wilcoxon_p(gain.tolist()) for pair, gain in gains.items()}
        p_holm = holm(p_values)
        means = self.mean_ranks
        return [
            PairOfArms(
                first,
                other,
                means[first] - means[other],
                abs(means[first] - means[other]) >= self.critical_difference,
                int((gain > 0).sum()),
                int((gain == 0).sum()),
                p_values[first, other],
                p_holm[first, other] or 0.0,
            )
            for (first, other), gain in gains.items()
        ]
