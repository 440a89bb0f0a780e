"""Membership: was a row among a client's private rows? Asked at three places, with two controls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from zlib import crc32

import numpy as np

from fedkd.models import ModelSettings
from fedkd.privacy.attacks.figures import Interval, Roc, auc, rate_at, roc
from fedkd.privacy.attacks.membership import (
    confidence_logit,
    lira_scores,
    loss_scores,
    rmia_scores,
)
from fedkd.randomness import Purpose, generator_for
from fedkd.targets import soften
from fedkd.tensors import as_tensor
from fedkd.training import Arrays, OptimizerSettings
from sim.attacks.bench import Bench
from sim.attacks.candidates import Pool
from sim.settings import Settings
from sim.settings.schema import PrivacySettings

RATES = (0.01, 0.001)
"""False-positive rates at which the share of members that is found is told."""

SCORES = ("threshold", "lira_offline", "lira_online", "rmia")
"""The attacks: Yeom et al. 2018 (loss threshold), Carlini et al. 2022 (LiRA), Zarifzadeh et al.
2024 (RMIA); see `fedkd.privacy.attacks.membership`."""

CONTROL_ROWS = 400
"""Candidates of the positive control, half of which each of its models learns from."""

CONTROL_TARGETS = 16
"""Models of the positive control that are attacked, each with all others as shadows."""

CONTROL_STEPS = 1500
"""Optimizer steps of each of them: enough to know its rows by heart."""


CONTROL_OPTIMIZER = OptimizerSettings(name="adam", lr=0.003)


class Seen(NamedTuple):
    """What an attacker can judge a client's candidates by.

    Attributes:
        target: logits ``[rows, classes]`` of the model that is attacked, on candidates.
        shadows: the same of its shadows, ``[shadows, rows, classes]``.
        labels: int64 ``[rows]``.
        members: bool ``[rows]``, the truth.
        inside: bool ``[shadows, rows]``, what each shadow learnt from.
        population: logits of the target on rows that nobody learnt from.
        population_shadows: the same of the shadows.
        population_labels: int64.
    """

    target: np.ndarray
    shadows: np.ndarray
    labels: np.ndarray
    members: np.ndarray
    inside: np.ndarray
    population: np.ndarray
    population_shadows: np.ndarray
    population_labels: np.ndarray


@dataclass(frozen=True)
class Figures:
    """How well members are told from others.

    Attributes:
        attack: one of `SCORES`.
        auc: area under the ROC curve, with DeLong's 95 % interval.
        rates: share of members found at each of `RATES`, with a Clopper-Pearson interval; None
            where there are too few non-members.
        members, others: how many rows.
        curve: the ROC curve.
    """

    attack: str
    auc: Interval
    rates: Mapping[float, Interval | None]
    members: int
    others: int
    curve: Roc

    @classmethod
    def of(cls, attack: str, scores: np.ndarray, members: np.ndarray) -> "Figures":
        """Judge scores, of which larger ones speak for members."""
        return cls(
            attack,
            auc(scores, members),
            {rate: rate_at(scores, members, rate) for rate in RATES},
            int(members.sum()),
            int((~members).sum()),
            roc(scores, members),
        )


@dataclass(frozen=True)
class Membership:
    """What was found at one place.

    Attributes:
        figures: of each attack.
        missing: reasons, by attack, why there is no figure.
    """

    figures: tuple[Figures, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)


def scores_of(seen: Seen) -> dict[str, np.ndarray | str]:
    """Return the scores of each attack on one client's candidates, or why there are none."""
    found: dict[str, np.ndarray | str] = {"threshold": loss_scores(seen.target, seen.labels)}
    own = confidence_logit(seen.target, seen.labels)
    of_shadows = confidence_logit(seen.shadows, seen.labels)
    tries: dict[str, Callable[[], np.ndarray]] = {
        "lira_offline": lambda: lira_scores(own, of_shadows, seen.inside, online=False),
        "lira_online": lambda: lira_scores(own, of_shadows, seen.inside, online=True),
        "rmia": lambda: rmia_scores(
            _right(seen.target, seen.labels),
            _right(seen.shadows, seen.labels),
            seen.inside,
            _right(seen.population, seen.population_labels),
            _right(seen.population_shadows, seen.population_labels),
        ),
    }
    for name, score in tries.items():
        try:
            found[name] = score()
        except ValueError as error:
            found[name] = f"attacks.shadows: {error}"
    return found


def _right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the probability of the right class."""
    probabilities = soften(as_tensor(logits), temperature=1.0).numpy().astype(np.float64)
    right: np.ndarray = probabilities[..., np.arange(len(labels)), labels]
    return right


def judged(seen: Sequence[Seen]) -> Membership:
    """Put the clients' rows together and judge each attack."""
    if not seen:
        return Membership()
    members = np.concatenate([own.members for own in seen])
    by_client = [scores_of(own) for own in seen]
    figures, missing = [], {}
    for attack in SCORES:
        scores = [own[attack] for own in by_client]
        reason = next((score for score in scores if isinstance(score, str)), None)
        if reason is None:
            figures.append(Figures.of(attack, np.concatenate(scores), members))
        else:
            missing[attack] = reason
    return Membership(tuple(figures), missing)


def negative_control(seen: Sequence[Seen], seed: int) -> Membership:
    """Judge the same scores against membership that was drawn at random: nothing can be found."""
    # Runs of one seed have the same candidates: each has a draw of its own, or a study's controls
    # would stand and fall together.
    own = crc32(seen[0].target.tobytes()) if seen else 0
    rng = generator_for(seed, Purpose.ATTACK, 3, own)
    return judged([own._replace(members=rng.permutation(own.members)) for own in seen])


def look_control(seen: Sequence[Seen]) -> Membership:
    """Put two shadows in the place of each client's model, and judge by the true membership.

    One of them learnt from a row and the other did not, so that together they know nothing of who
    is a member. What tells private rows from test rows by their look, such as another writer's
    hand, shows here; the figures of the run then hold some of that. Every row counts twice, so
    that no rates are told.
    """
    found = judged(
        [
            own._replace(
                target=own.shadows[shadow],
                shadows=own.shadows[2:],
                inside=own.inside[2:],
                population=own.population_shadows[shadow],
                population_shadows=own.population_shadows[2:],
            )
            for own in seen
            for shadow in (0, 1)
            if len(own.shadows) > 2
        ]
    )
    none = dict.fromkeys(RATES)
    return replace(found, figures=tuple(replace(each, rates=none) for each in found.figures))


def positive_control(
    settings: Settings,
    pool: Pool,
    model: ModelSettings,
    bench: Bench,
    learn: Callable[[Pool, Sequence[ModelSettings], Sequence[np.ndarray]], list[Arrays]],
    *,
    models: int,
    wrong: float,
    population: np.ndarray,
    population_labels: np.ndarray,
) -> Membership:
    """Attack models that know their rows by heart, some of which have wrong labels.

    Args:
        settings: of the run.
        pool: where rows are drawn.
        model: the architecture.
        bench: predicts.
        learn: trains models on rows of a pool.
        models: how many; even.
        wrong: share of labels that are wrong.
        population: rows that nobody learnt from.
        population_labels: their classes.
    """
    rng = generator_for(settings.seed, Purpose.ATTACK, 4)
    rows = rng.permutation(len(pool.labels))[:CONTROL_ROWS]
    classes = int(pool.labels.max()) + 1
    labels = pool.labels[rows].copy()
    odd = rng.random(len(rows)) < wrong
    labels[odd] = (labels[odd] + rng.integers(1, max(classes, 2), odd.sum())) % classes
    own = Pool(pool.inputs[rows], labels)
    inside = np.zeros((models, len(rows)), dtype=bool)
    for pair in range(0, models, 2):
        inside[pair, rng.permutation(len(rows))[: len(rows) // 2]] = True
        inside[pair + 1] = ~inside[pair]
    weights = learn(own, [model] * models, [np.flatnonzero(half) for half in inside])
    logits = bench.predict(model, weights, np.concatenate([own.inputs, population]))
    known, unknown = logits[:, : len(rows)], logits[:, len(rows) :]
    seen = []
    for target in range(min(CONTROL_TARGETS, models - 4)):
        # Its own complement as well as all others are shadows.
        others = np.arange(models) != target
        seen.append(
            Seen(
                known[target],
                known[others],
                labels,
                inside[target],
                inside[others],
                unknown[target],
                unknown[others],
                population_labels,
            )
        )
    return judged(seen)


def learnt_by_heart(settings: Settings) -> Settings:
    """Return the settings of models that learn their rows by heart, without privacy.

    By an optimizer of their own: whether they do must not hang on that of the run.
    """
    local = settings.clients.local.model_copy(update={"epochs": 1, "steps": CONTROL_STEPS})
    clients = settings.clients.model_copy(
        update={
            "local": local,
            "participation": 1.0,
            "participants": None,
            "optimizer": CONTROL_OPTIMIZER,
            "batch_size": 32,
        }
    )
    return settings.model_copy(
        update={"rounds": 1, "clients": clients, "privacy": PrivacySettings()}
    )
