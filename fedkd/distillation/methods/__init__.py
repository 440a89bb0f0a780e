"""Ways to distil, one module each: who trains, on what, in which order."""

from typing import Any

from fedkd import own_code
from fedkd.bounds import shown
from fedkd.distillation.fit.method import Method, MethodSettings
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
from fedkd.names import nearest

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
"""The table of names: what ``method.name`` may be, besides the name of somebody's own class."""

__all__ = ["METHODS", "method_class"]


def method_class(name: object) -> type[Method[Any]]:
    """Return the way to distil of a name: a row of the table, or ``package.module:Class``.

    Raises:
        ValueError: one line: an unknown name; or code that may not be loaded, cannot be, or is no
            such way with settings of its own.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    if not isinstance(name, str) or not own_code.is_own_code(name):
        raise ValueError(
            f"unknown method {shown(name)}; known: {', '.join(METHODS)}; or "
            f"{own_code.HOW}{nearest(str(name), METHODS)}"
        )
    found = own_code.load_class(name, Method, "method.name")  # type: ignore[type-abstract]
    own_code.check_settings(found, MethodSettings, f"method.name {name!r}")
    return found
