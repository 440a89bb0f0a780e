"""Adversaries: clients that send something else than an honest client would, or learn from it."""

from typing import Annotated, TypeAlias

from pydantic import PlainValidator, SerializeAsAny

from fedkd.exchange.adversaries.base import Adversary, Controlling, Lying, NoAdversary, Seen
from fedkd.exchange.adversaries.free_rider import FreeRider
from fedkd.exchange.adversaries.own_answers import FDLA, Scaled, Shuffled
from fedkd.exchange.adversaries.private_rows import Backdoor, Goal, LabelFlip, Poisoning
from fedkd.exchange.adversaries.sign_flip import SignFlip
from fedkd.exchange.adversaries.together import CPA, HIPS, LMA
from fedkd.exchange.kinds import Kinds

ADVERSARIES: Kinds[Adversary] = Kinds(
    "adversary",
    Adversary,
    {
        "none": NoAdversary,
        "sign_flip": SignFlip,
        "lma": LMA,
        "cpa": CPA,
        "hips": HIPS,
        "fdla": FDLA,
        "scaled": Scaled,
        "shuffled": Shuffled,
        "free_rider": FreeRider,
        "label_flip": LabelFlip,
        "backdoor": Backdoor,
    },
)
"""Adversaries by the name that a settings file uses."""

AdversaryField: TypeAlias = Annotated[SerializeAsAny[Adversary], PlainValidator(ADVERSARIES.read)]
"""An adversary in settings: its kind, or a table with its kind and settings."""

__all__ = [
    "ADVERSARIES",
    "CPA",
    "FDLA",
    "HIPS",
    "LMA",
    "Adversary",
    "AdversaryField",
    "Backdoor",
    "Controlling",
    "FreeRider",
    "Goal",
    "LabelFlip",
    "Lying",
    "NoAdversary",
    "Poisoning",
    "Scaled",
    "Seen",
    "Shuffled",
    "SignFlip",
]
