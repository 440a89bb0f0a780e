"""`compare --match`: rounds set beforehand so that all arms have equal budgets.

What a round takes is counted, not timed: the first two rounds of each arm are tried in this process
with the study's first seed, and every round after the second is taken to take what the second took.
So the same settings have the same rounds whenever and wherever they are asked for, and a study that
is gone on with finds its runs again. Where rounds are not alike (few participants, training that
stops early) it is an estimate; what was really taken stands beside every accuracy.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NoReturn

from sim.commands.arms import Study
from sim.commands.budgets import Budget, Counts, MatchedArm, Matching
from sim.commands.sweeps import is_swept
from sim.commands.trials import Trial, try_out
from sim.keeping.identity import fingerprint
from sim.settings import Settings, SettingsError

MOST_ROUNDS = 1_000_000
"""The most that a run may have."""


def matched(
    study: Study,
    reference: str,
    *,
    trial_of: Callable[[Settings], Trial] = try_out,
    trying: Callable[[str, int, int], None] | None = None,
) -> tuple[Study, Mapping[str, Trial]]:
    """Return a study whose arms have rounds of equal budgets, where ``study.match`` asks for that.

    Args:
        study: whose arms are settled.
        reference: the arm that the others are made equal to, unless ``study.match_to`` names one.
        trial_of: tries the first two rounds of a run.
        trying: is told the arm that is tried next, how many were tried before, and of how many.

    Returns:
        The study, and what was tried of each arm; the same study and nothing where nothing is to be
        matched.

    Raises:
        SettingsError: names the arm that cannot be matched.
    """
    budget = study.settings.study.match
    if budget == "none":
        return study, {}
    reference = _reference(study, reference)
    trials = _trials(study, trial_of, trying)
    if reference not in trials:
        raise SettingsError(f"study.match: {reference}, which the others are to equal, is refused")
    counts = {arm: _counts(trial, budget) for arm, trial in trials.items()}
    target = counts[reference].total(study.arms[reference].rounds)
    found = []
    for arm, count in counts.items():
        if not count.further:
            _refuse(arm, budget, count)
        rounds = study.arms[arm].rounds
        wanted = rounds if arm == reference else count.nearest_rounds(target)
        if wanted > MOST_ROUNDS:
            raise SettingsError(
                f"study.match: arm {arm} would need {wanted:,} rounds to equal the {budget} of "
                f"{reference}; at most {MOST_ROUNDS:,}"
            )
        after = count.total(wanted)
        found.append(
            MatchedArm(arm, rounds, wanted, count.total(rounds), after, after / target - 1)
        )
    matching = Matching(budget, reference, tuple(found))
    arms = dict(study.arms) | {
        arm.arm: study.arms[arm.arm].model_copy(update={"rounds": arm.rounds}) for arm in found
    }
    notes = [*study.notes, *matching.sentences()]
    return replace(study, arms=arms, notes=notes, matching=matching), trials


def _reference(study: Study, default: str) -> str:
    settings = study.settings.study
    if is_swept("rounds", settings.sweep):
        raise SettingsError(
            f"study.match: {settings.match} sets rounds, which study.sweep sets as well: leave one "
            "of them out"
        )
    wanted = settings.match_to or default
    if wanted not in study.arms:
        raise SettingsError(
            f"study.match_to must be one of the arms ({', '.join(study.arms)}), got {wanted!r}"
        )
    return wanted


def _trials(
    study: Study,
    trial_of: Callable[[Settings], Trial],
    trying: Callable[[str, int, int], None] | None,
) -> dict[str, Trial]:
    """Try every arm, equal ones once; arms that are refused and shown are left out."""
    distinct: dict[str, list[str]] = {}
    for arm, settings in study.arms.items():
        distinct.setdefault(fingerprint(settings), []).append(arm)
    found: dict[str, Trial] = {}
    for done, arms in enumerate(distinct.values()):
        if trying is not None:
            trying(arms[0], done, len(distinct))
        settings = study.arms[arms[0]]
        # Of a run of a single round nobody learns what a second would take.
        settings = settings.model_copy(update={"rounds": max(settings.rounds, 2)})
        try:
            found |= dict.fromkeys(arms, trial_of(settings))
        except SettingsError as error:
            if study.settings.study.refused != "show":
                raise SettingsError(f"arm {arms[0]}: {error}") from None
        except Exception as error:
            error.add_note(f"when arm {arms[0]} was tried")
            raise
    return {arm: found[arm] for arm in study.arms if arm in found}


def _refuse(arm: str, budget: Budget, counts: Counts) -> NoReturn:
    other = "bytes" if budget == "steps" else "steps"
    why = (
        f"its {budget} do not depend on rounds ({counts.first:,} in the first, none in any other)"
        if counts.first
        else f"its rounds take no {budget}"
    )
    raise SettingsError(
        f"study.match: {budget} cannot match arm {arm}: {why}; leave it out (--arms) or match "
        f"{other}"
    )


def _counts(trial: Trial, budget: Budget) -> Counts:
    if budget == "steps":
        return Counts(trial.first_steps, trial.further_steps)
    return Counts(sum(trial.first_bytes), sum(trial.further_bytes))
