"""How well a public set can carry what clients know: figures of its rows and of answers on them.

Nothing here sees a public label. What the rows do not determine is NaN.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from fedkd.metrics.arrays import Array, as_classes, as_float64, as_probabilities
from fedkd.metrics.diversity import ensemble_entropy, jensen_shannon, pairwise_disagreement

CONFIDENT = 0.5
"""From this probability on a client believes in its class more than in all others together."""

MOST_ROWS = 1000
"""Rows of a side that a test of two samples looks at: more of them only take longer."""

FEWEST_ROWS = 10
"""With fewer rows on a side, folds of five have one row or none of it."""

COMPONENTS = 16
"""Principal components of the inputs that tell two samples apart."""

FOLDS = 5

NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainShift:
    """How different two samples of inputs are.

    Attributes:
        auc: how often a classifier that is trained to tell them apart gives a public row the higher
            score than a private one: 0.5 where it cannot, 1 where it always can.
        overlap: how much the two densities have in common, estimated from their ratio, in [0, 1]; 1
            where they are alike. The regression is penalised, so that densities that never meet
            come out above 0: of these ``auc`` says more.
    """

    auc: float
    overlap: float


def domain_shift(
    private: Float[Array, "private *features"],
    public: Float[Array, "public *features"],
    rng: np.random.Generator,
) -> DomainShift:
    """Tell two samples apart by a logistic regression, on rows that it has not learnt from.

    It sees the first principal components of both together, and their squares: with these it is the
    ratio of two Gaussian densities. Each row is scored by a model of the other four folds.

    Args:
        private: inputs of one kind, one a row.
        public: the others, with the same features.
        rng: chooses rows where there are many, and deals them into folds.

    Returns:
        NaN twice with fewer than ten rows on either side.

    Source:
        Lopez-Paz, Oquab, 2017 (two-sample tests by classifiers), section 3.
        https://arxiv.org/abs/1610.06545 -- the area under the ROC curve in the place of accuracy.
        Bickel, Bruckner, Scheffer, 2007 (the ratio of densities by logistic regression).
    """
    sides = [_some(as_float64(each).reshape(len(each), -1), rng) for each in (private, public)]
    if min(map(len, sides)) < FEWEST_ROWS:
        return DomainShift(auc=NAN, overlap=NAN)
    is_public = np.repeat([False, True], [len(each) for each in sides])
    log_ratio = _scores_of_others(_squared_components(np.concatenate(sides)), is_public, rng)
    return DomainShift(
        auc=area_under_curve(log_ratio[~is_public], log_ratio[is_public]),
        overlap=density_overlap(log_ratio[is_public]),
    )


def _some(rows: Float[np.ndarray, "rows features"], rng: np.random.Generator) -> np.ndarray:
    return rows[np.sort(rng.permutation(len(rows))[:MOST_ROWS])]


def _squared_components(rows: Float[np.ndarray, "rows features"]) -> np.ndarray:
    """Return the first principal components and their squares, each with variance 1."""
    from sklearn.decomposition import PCA  # imported late, as below: sklearn takes a second

    spread = rows.std(axis=0)
    centred = (rows - rows.mean(axis=0))[:, spread > 0] / spread[spread > 0]
    count = min(COMPONENTS, *centred.shape)
    if not count:
        return np.zeros((len(rows), 1))
    found = PCA(n_components=count, svd_solver="full", whiten=True).fit_transform(centred)
    squares = np.square(found)
    # One far row shall not decide: beyond five standard deviations squares grow no more.
    columns = np.hstack([found, np.minimum(squares, 25)])
    deviation = columns.std(axis=0)
    standardised: np.ndarray = (columns - columns.mean(axis=0)) / np.where(
        deviation > 0, deviation, 1
    )
    return standardised


def _scores_of_others(
    columns: np.ndarray, is_public: np.ndarray, rng: np.random.Generator
) -> Float[np.ndarray, " rows"]:
    """Return log(public density / private density) of each row, by a model of other rows."""
    from sklearn.linear_model import LogisticRegression

    fold = np.empty(len(is_public), np.int64)
    for side in (False, True):
        places = np.flatnonzero(is_public == side)
        fold[rng.permutation(places)] = np.arange(len(places)) % FOLDS
    scores = np.empty(len(is_public))
    for number in range(FOLDS):
        inside = fold == number
        # Balanced, so that the odds are the ratio of densities and not of numbers of rows.
        model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=300)
        model.fit(columns[~inside], is_public[~inside])
        scores[inside] = model.decision_function(columns[inside])
    return scores


def area_under_curve(
    lower: Float[np.ndarray, " first"], higher: Float[np.ndarray, " second"]
) -> float:
    """Return how often a value of the second sample is the larger one; ties count half.

    Source:
        Mann, Whitney, 1947, divided by the number of pairs.
    """
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, side="left")
    not_above = np.searchsorted(ordered, higher, side="right")
    return float((below + not_above).mean() / 2 / len(lower)) if len(lower) and len(higher) else NAN


def density_overlap(log_ratio: Float[np.ndarray, " rows"]) -> float:
    """Return the integral of ``2 p q / (p + q)`` from log(q / p) at rows that were drawn from q.

    In [0, 1]: the mean of ``2 / (1 + q / p)``, cut off at 1, which only chance exceeds. Bounded
    ratios make it steadier than a mean of ``p / q``. NaN without rows.

    Source:
        1 minus half of the triangular discrimination of Topsoe, 2000.
    """
    if not len(log_ratio):
        return NAN
    return min(float((2 / (1 + np.exp(np.clip(log_ratio, -30, 30)))).mean()), 1.0)


def confident_rows(
    probabilities: Float[Array, "clients rows classes"], *, confidence: float = CONFIDENT
) -> Integer[np.ndarray, " classes"]:
    """Count the rows that the clients' mean gives to each class, and that a client is sure of.

    A row counts for the top class of the mean probability, if some client gives that class at least
    ``confidence``.

    Raises:
        ValueError: if a row is no probability distribution.
    """
    answers = as_probabilities(probabilities)
    num_classes = answers.shape[2]
    top = answers.mean(axis=0).argmax(axis=1)
    sure = answers[:, np.arange(len(top)), top].max(axis=0) >= confidence
    return np.bincount(top[sure], minlength=num_classes)


def covered_classes(rows: Integer[np.ndarray, " classes"]) -> Integer[np.ndarray, " covered"]:
    """Return the classes that `confident_rows` gives a fair number of rows.

    That is a tenth of what each had if all rows were dealt out evenly, and one at least.
    """
    return np.flatnonzero(rows >= max(1.0, 0.1 * rows.sum() / len(rows)))


def mix_distance(
    first: Float[Array, "rows classes"], second: Float[Array, "others classes"]
) -> float:
    """Return how far two tables' mean probabilities lie apart: their total variation, in [0, 1].

    Of one model's answers on two sets of rows it says whether they seem to hold other classes.

    Source:
        After Lipton, Wang, Smola, 2018 (black-box shift). https://arxiv.org/abs/1802.03916
    """
    tables = [as_probabilities(each) for each in (first, second)]
    if not all(map(len, tables)):
        return NAN
    means = [each.mean(axis=0) for each in tables]
    return float(np.abs(means[0] - means[1]).sum() / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSetFigures:
    """What is known of a public set before anything is exchanged.

    Attributes:
        rows_per_class: public rows divided by classes.
        domain_auc, overlap: see `DomainShift`.
        answer_entropy: mean entropy of single clients' answers, as a share of ln(classes).
        diversity: Jensen-Shannon divergence of their answers, as a share of ln(classes).
        disagreement: share of pairs of answers with different top classes.
        coverage: share of the classes that are covered, see `covered_classes`.
        mix_distance: of the ensemble's answers on public and on validation rows.
        client_accuracy: mean over clients, on the validation rows.
        ensemble_accuracy: of their mean probability, on the validation rows.
    """

    rows_per_class: float
    domain_auc: float
    overlap: float
    answer_entropy: float
    diversity: float
    disagreement: float
    coverage: float
    mix_distance: float
    client_accuracy: float
    ensemble_accuracy: float

    @property
    def ensemble_gain(self) -> float:
        """What averaging answers is worth on validation rows, in [-1, 1]."""
        return self.ensemble_accuracy - self.client_accuracy


def figures_of(
    answers: Float[Array, "clients public classes"],
    validation: Float[Array, "clients validation classes"],
    labels: Integer[Array, " validation"],
    shift: DomainShift,
) -> PublicSetFigures:
    """Return the figures of a public set.

    Args:
        answers: probabilities of locally trained clients on the public rows.
        validation: the same on validation rows.
        labels: true classes of the validation rows.
        shift: of private and public inputs.

    Raises:
        ValueError: if a row is no probability distribution, or a label is none of its classes.
    """
    public, held = as_probabilities(answers), as_probabilities(validation)
    _, num_rows, num_classes = public.shape
    true_classes = as_classes("labels", labels, num_classes)
    most = np.log(num_classes)
    return PublicSetFigures(
        rows_per_class=num_rows / num_classes,
        domain_auc=shift.auc,
        overlap=shift.overlap,
        answer_entropy=float(ensemble_entropy(public).peers.mean() / most),
        diversity=jensen_shannon(public) / float(most),
        disagreement=pairwise_disagreement(public.argmax(axis=2)),
        coverage=len(covered_classes(confident_rows(public))) / num_classes,
        mix_distance=mix_distance(public.mean(axis=0), held.mean(axis=0)),
        client_accuracy=float((held.argmax(axis=2) == true_classes).mean()),
        ensemble_accuracy=float((held.mean(axis=0).argmax(axis=1) == true_classes).mean()),
    )
