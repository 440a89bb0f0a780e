"""Ways to distil, one module each: who trains, on what, in which order."""

from typing import Any

from fedkd.distillation.method import Method
from fedkd.distillation.methods.be_your_own_teacher import BeYourOwnTeacher
from fedkd.distillation.methods.born_again import BornAgain
from fedkd.distillation.methods.co_training import CoTraining
from fedkd.distillation.methods.dafl import DataFree
from fedkd.distillation.methods.deep_inversion import DeepInversion
from fedkd.distillation.methods.mutual import DeepMutualLearning, ProgressiveMutual
from fedkd.distillation.methods.offline import Offline
from fedkd.distillation.methods.online import (
    Codistillation,
    CollaborativeLearning,
    DiversePeers,
    NativeEnsemble,
    PeerCollaborative,
)
from fedkd.distillation.methods.sskd import SelfSupervised

METHODS: dict[str, type[Method[Any]]] = {
    "offline": Offline,
    "dml": DeepMutualLearning,
    "mutual": ProgressiveMutual,
    "one": NativeEnsemble,
    "kdcl": CollaborativeLearning,
    "okddip": DiversePeers,
    "pcl": PeerCollaborative,
    "codistillation": Codistillation,
    "co_training": CoTraining,
    "born_again": BornAgain,
    "be_your_own_teacher": BeYourOwnTeacher,
    "sskd": SelfSupervised,
    "dafl": DataFree,
    "deep_inversion": DeepInversion,
}
"""The table of names: what ``method`` may be."""

__all__ = ["METHODS"]
