"""Ways to distil, one module each: who trains, on what, in which order."""

from typing import Any

from fedkd.distillation.fit.method import Method
from fedkd.distillation.methods.be_your_own_teacher import BeYourOwnTeacher
from fedkd.distillation.methods.born_again import BornAgain
from fedkd.distillation.methods.co_training import CoTraining
from fedkd.distillation.methods.codistillation import Codistillation
from fedkd.distillation.methods.dafl import DataFree
from fedkd.distillation.methods.deep_inversion import DeepInversion
from fedkd.distillation.methods.dml import DeepMutualLearning
from fedkd.distillation.methods.kdcl import CollaborativeLearning
from fedkd.distillation.methods.native_ensemble import NativeEnsemble
from fedkd.distillation.methods.offline import Offline
from fedkd.distillation.methods.okddip import DiversePeers
from fedkd.distillation.methods.pcl import PeerCollaborative
from fedkd.distillation.methods.progressive_mutual import ProgressiveMutual
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
