"""The table of names: what may stand in an objective."""

from typing import Any

from fedkd import own_code
from fedkd.bounds import shown
from fedkd.names import nearest
from fedkd.objectives.adversarial import Adversarial
from fedkd.objectives.basic import HardLabels, LogitL1, LogitMSE, SoftCrossEntropy, SoftTargets
from fedkd.objectives.feature import AttentionTransfer, CosineFeatures, Hint
from fedkd.objectives.relation import PKT, RkdAngle, RkdDistance, RowContrast, SimilarityPreserving
from fedkd.objectives.response import (
    DIST,
    AnnealingKD,
    ConfidenceKD,
    DecoupledKD,
    DisagreementKD,
    NormalisedKD,
    NotTrueKD,
    ProbabilityMSE,
    StandardisedKD,
)
from fedkd.objectives.terms import Term, UnreadTerm

TERMS: dict[str, type[Term]] = {
    "ce": HardLabels,
    "kd": SoftTargets,
    "soft_ce": SoftCrossEntropy,
    "mse": LogitMSE,
    "l1": LogitL1,
    "prob_mse": ProbabilityMSE,
    "annealing": AnnealingKD,
    "dkd": DecoupledKD,
    "nkd": NormalisedKD,
    "ntd": NotTrueKD,
    "dist": DIST,
    "logit_std": StandardisedKD,
    "flsw": DisagreementKD,
    "cwsm": ConfidenceKD,
    "hint": Hint,
    "cosine": CosineFeatures,
    "at": AttentionTransfer,
    "rkd_distance": RkdDistance,
    "rkd_angle": RkdAngle,
    "sp": SimilarityPreserving,
    "pkt": PKT,
    "crd": RowContrast,
    "adversarial": Adversarial,
}
"""Kinds of terms by the name that a settings file uses; besides them, somebody's own classes."""


def term_class(kind: object, setting: str) -> type[Term]:
    """Return the term of a kind: a row of the table, or ``package.module:Class``.

    Args:
        kind: its name.
        setting: that names it, for the message.

    Raises:
        ValueError: one line: an unknown kind; or code that may not be loaded, cannot be, or is no
            term.
    """
    if isinstance(kind, str) and kind in TERMS:
        return TERMS[kind]
    if not isinstance(kind, str) or not own_code.is_own_code(kind):
        raise ValueError(
            f"unknown term {shown(kind)} in objective; known: {', '.join(TERMS)}; or kind: "
            f"{own_code.HOW}{nearest(str(kind), TERMS)}"
        )
    if not own_code.may_load(kind, setting):
        return UnreadTerm
    found = own_code.load_class(kind, Term, setting)  # type: ignore[type-abstract]
    own_code.check_holds_name(found, "kind", f"{setting} {kind!r}")
    return found


def describe_terms() -> list[dict[str, Any]]:
    """Return name, meaning, source and defaults of every kind of term.

    Examples:
        >>> from fedkd.objectives import describe_terms
        >>> len(describe_terms()) == len(TERMS)
        True
    """
    return [
        {
            "name": name,
            "summary": (term.__doc__ or "").strip().splitlines()[0],
            "source": term.source,
            "needs": list(term().needs),
            "defaults": term().model_dump(mode="json", exclude={"kind"}),
        }
        for name, term in TERMS.items()
    ]
