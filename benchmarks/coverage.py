"""How often intervals over few seeds hold the truth, and tests claim what is not so: by simulation.

    python benchmarks/coverage.py                  # half a minute; the tables of docs/statistics.md
    python benchmarks/coverage.py --study FOLDER   # and of the differences that a study saw
    python benchmarks/coverage.py --quick          # few draws, to see that it runs

Differences are drawn from laws whose mean is known. What is checked is this house's own code: the
same quantiles, p-values and corrections that a report is made of.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy import special

from sim.reports.power import detectable_effect, t_quantile
from sim.reports.statistics import compare_pairs, holm

SEEDS = (2, 3, 5, 10)
DRAWS = 200_000
RESAMPLES = 999
COMPARISONS = 3

Draws = Float[np.ndarray, "draws seeds"]
Law = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
"""Draws of mean 0 and standard deviation about 1."""


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Gamma of shape 4: skewness 1, as of gains that cannot be much below none."""
    return (rng.gamma(4.0, size=shape) - 4) / 2


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with 3 degrees of freedom: a seed far off now and then, to either side."""
    return rng.standard_t(3, size=shape) / math.sqrt(3)


def failing(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """One seed in ten fails: five standard deviations of the others below them."""
    failed = rng.random(shape) < 0.1
    return (rng.standard_normal(shape) - 5 * failed + 0.5) / math.sqrt(1 + 25 * 0.09)


def bounded(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Two accuracies on 359 test rows near the top, 0.95 and 0.97: steps and an end."""
    rows, first, other = 359, 0.95, 0.97
    gains = (rng.binomial(rows, other, shape) - rng.binomial(rows, first, shape)) / rows
    spread = math.sqrt((first * (1 - first) + other * (1 - other)) / rows)
    return (gains - (other - first)) / spread


LAWS: Mapping[str, Law] = {
    "normal": normal,
    "bounded (359 test rows, 95 and 97 %)": bounded,
    "skewed (gamma of shape 4)": skewed,
    "heavy tails (t with 3 degrees)": heavy,
    "one seed in ten fails": failing,
}


def law_of_study(folder: Path) -> Law:
    """Return draws from what the pairs of a study differed by, each pair about its own mean."""
    from sim.reports.runs import load_study

    residuals = []
    for difference in compare_pairs(load_study(folder), "accuracy", "last").values():
        if difference is not None and difference.sd:
            pairs = np.array(difference.pairs)
            # About the mean of n values the spread is smaller than about the truth.
            scale = math.sqrt(difference.n / (difference.n - 1)) / difference.sd
            residuals.append((pairs - pairs.mean()) * scale)
    if not residuals:
        raise SystemExit(f"no pair of arms in {folder} has two seeds that differ")
    pool = np.concatenate(residuals)
    return lambda rng, shape: rng.choice(pool, shape)


def coverage_of_t(differences: Draws) -> float:
    """Return how often the 95 % t-interval holds the true mean, 0."""
    count = differences.shape[1]
    half = t_quantile(count) * differences.std(1, ddof=1) / math.sqrt(count)
    return float((np.abs(differences.mean(1)) <= half).mean())


def coverage_of_bootstrap(differences: Draws, rng: np.random.Generator) -> float:
    """Return how often the 95 % percentile bootstrap of the mean holds it."""
    count = differences.shape[1]
    weights = rng.multinomial(count, [1 / count] * count, size=RESAMPLES) / count
    held = 0
    for part in np.array_split(differences, max(1, len(differences) // 5000)):
        low, high = np.quantile(part @ weights.T, [0.025, 0.975], axis=1)
        held += int(((low <= 0) & (high >= 0)).sum())
    return held / len(differences)


def p_of_t(differences: Draws) -> Float[np.ndarray, " draws"]:
    """Return the p-value of the paired t-test of each draw."""
    count = differences.shape[1]
    error = differences.std(1, ddof=1) / math.sqrt(count)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(differences.mean(1)) / error
    # Draws without any spread have no test.
    return np.where(error > 0, 2 * special.stdtr(count - 1, -t), 1.0)


def p_of_signs(differences: Draws) -> Float[np.ndarray, " draws"]:
    """Return the p-value of the exact sign-flip test of each draw."""
    signs = np.array([*product([1, -1], repeat=differences.shape[1])])
    found = []
    for part in np.array_split(differences, max(1, len(differences) // 5000)):
        sums = np.abs(part @ signs.T)
        # The first choice of signs is the one that was seen.
        found.append((sums >= sums[:, :1] - 1e-9).mean(1))
    return np.concatenate(found)


def family_error(
    rng: np.random.Generator, law: Law, count: int, draws: int, *, corrected: bool
) -> float:
    """Return how often any of three arms that equal a baseline is said to differ from it."""
    # All are compared with the same baseline, so that the comparisons depend on each other.
    baseline = law(rng, (draws, count))
    p = np.stack([p_of_t(law(rng, (draws, count)) - baseline) for _ in range(COMPARISONS)], 1)
    if not corrected:
        return float((p < 0.05).any(1).mean())
    corrected_p = [holm(dict(enumerate(row))).values() for row in p.tolist()]
    return float(np.mean([min(p for p in row if p is not None) < 0.05 for row in corrected_p]))


def power_at_detectable(rng: np.random.Generator, count: int, draws: int) -> float:
    """Return how often the t-test finds the effect that it should find in 80 % of studies."""
    return float(
        (p_of_t(normal(rng, (draws, count)) + detectable_effect(1.0, count)) < 0.05).mean()
    )


def percents(values: list[float]) -> str:
    return " | ".join(f"{100 * value:.1f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--study", type=Path, metavar="FOLDER", help="a study's own differences too"
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help="studies that are simulated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2000 draws: says nothing")
    options = parser.parse_args()
    draws = 2000 if options.quick else options.draws
    rng = np.random.default_rng(options.seed)
    laws = dict(LAWS)
    if options.study is not None:
        laws[f"differences of {options.study.name}"] = law_of_study(options.study)

    header = f"| {' | '.join(f'{count} seeds' for count in SEEDS)} |"
    line = "|---" * (1 + len(SEEDS)) + "|"
    print(
        f"{draws:,} simulated studies of each kind; standard error at 95 %: "
        f"{100 * math.sqrt(0.95 * 0.05 / draws):.2f} points\n"
    )
    tables: Mapping[str, Callable[[Draws], float]] = {
        "95 % t-interval holds the truth, %": coverage_of_t,
        "95 % percentile bootstrap does, %": lambda drawn: coverage_of_bootstrap(drawn, rng),
        "t-test at 5 % finds what is not so, %": lambda drawn: float((p_of_t(drawn) < 0.05).mean()),
        "sign-flip test at 5 % does, %": lambda drawn: float((p_of_signs(drawn) < 0.05).mean()),
    }
    for title, measure in tables.items():
        print(f"| {title} {header}\n{line}")
        for name, law in laws.items():
            print(f"| {name} | {percents([measure(law(rng, (draws, n))) for n in SEEDS])} |")
        print()
    print(f"| any of {COMPARISONS} arms like the baseline is said to differ, % {header}\n{line}")
    for corrected, name in ((False, "t-tests alone"), (True, "corrected by Holm")):
        found = [family_error(rng, normal, n, draws, corrected=corrected) for n in SEEDS]
        print(f"| {name} | {percents(found)} |")
    print(f"\n| normal differences of standard deviation 1 {header}\n{line}")
    effects = " | ".join(f"{detectable_effect(1.0, count):.2f}" for count in SEEDS)
    print(f"| smallest effect seen in 80 % of studies | {effects} |")
    found = [power_at_detectable(rng, count, draws) for count in SEEDS]
    print(f"| found in simulation, % | {percents(found)} |")


if __name__ == "__main__":
    main()
