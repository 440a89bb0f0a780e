"""The table of names: what may stand in an objective."""

from typing import Any

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
from fedkd.objectives.terms import Term

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
"""Kinds of terms by the name that a settings file uses."""


def describe_terms() -> list[dict[str, Any]]:
    """Return name, meaning, source and defaults of every kind of term."""
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
