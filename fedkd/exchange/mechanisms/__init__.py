"""Mechanisms of differential privacy: release rules by the name that a settings file uses."""

from typing import Annotated, TypeAlias

from pydantic import PlainValidator, SerializeAsAny

from fedkd.exchange.kinds import Kinds
from fedkd.exchange.mechanisms.dp_sgd import DPSGD
from fedkd.exchange.mechanisms.noise import GaussianRelease, LaplaceRelease
from fedkd.exchange.mechanisms.randomized import RandomizedAnswers
from fedkd.exchange.mechanisms.votes import Votes
from fedkd.exchange.mechanisms.wanted import WantedNoise
from fedkd.exchange.release import NoRelease, ReleaseRule

MECHANISMS: Kinds[ReleaseRule] = Kinds(
    "mechanism",
    ReleaseRule,
    {
        "none": NoRelease,
        "dp_sgd": DPSGD,
        "gaussian": GaussianRelease,
        "laplace": LaplaceRelease,
        "votes": Votes,
        "randomized_response": RandomizedAnswers,
    },
)
"""Mechanisms by the name that a settings file uses."""

MechanismField: TypeAlias = Annotated[SerializeAsAny[ReleaseRule], PlainValidator(MECHANISMS.read)]
"""A mechanism in settings: its kind, or a table with its kind and settings."""

__all__ = [
    "DPSGD",
    "MECHANISMS",
    "GaussianRelease",
    "LaplaceRelease",
    "MechanismField",
    "RandomizedAnswers",
    "Votes",
    "WantedNoise",
]
