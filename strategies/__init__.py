"""Federated algorithms, one file each: the server half and the client half side by side."""

from typing import Any

from fedkd import own_code
from fedkd.bounds import shown
from fedkd.exchange.values import Value
from fedkd.names import nearest
from strategies.baselines.fedavg import FedAvg
from strategies.baselines.local import Local
from strategies.baselines.pooled import Pooled
from strategies.contract import Strategy, StrategySettings
from strategies.data_free.fd import FD
from strategies.data_free.feddistill_plus import FedDistillPlus
from strategies.data_free.fedgen import FedGen
from strategies.data_free.fedproto import FedProto
from strategies.data_free.fedtgp import FedTGP
from strategies.mutual.codistillation import Codistillation
from strategies.mutual.dml import DML
from strategies.mutual.kdcl import KDCL
from strategies.mutual.okddip import OKDDip
from strategies.mutual.one import ONE
from strategies.mutual.pcl import PCL
from strategies.public_predictions.cfd import CFD
from strategies.public_predictions.comet import COMET
from strategies.public_predictions.cronus import Cronus
from strategies.public_predictions.dsfl import DSFL
from strategies.public_predictions.fccl import FCCL
from strategies.public_predictions.fedmd import FedMD
from strategies.public_predictions.ktpfl import KTpFL
from strategies.public_predictions.rhfl import RHFL
from strategies.public_predictions.scarlet import SCARLET
from strategies.public_predictions.selective_fd import SelectiveFD
from strategies.regularised.fedgkd import FedGKD
from strategies.regularised.fedntd import FedNTD
from strategies.regularised.fedprox import FedProx
from strategies.server_models.feddf import FedDF
from strategies.server_models.fedet import FedET
from strategies.server_models.fedgems import FedGEMS
from strategies.server_models.fedgkt import FedGKT
from strategies.server_models.one_way import OneWay
from strategies.two_models.fedkd import FedKD
from strategies.two_models.fml import FML
from strategies.two_models.proxyfl import ProxyFL

STRATEGIES: dict[str, type[Strategy[Any, Any]]] = {
    "cfd": CFD,
    "codistillation": Codistillation,
    "comet": COMET,
    "cronus": Cronus,
    "dml": DML,
    "dsfl": DSFL,
    "fccl": FCCL,
    "fd": FD,
    "fedavg": FedAvg,
    "feddf": FedDF,
    "feddistill_plus": FedDistillPlus,
    "fedet": FedET,
    "fedgems": FedGEMS,
    "fedgen": FedGen,
    "fedgkd": FedGKD,
    "fedgkt": FedGKT,
    "fedkd": FedKD,
    "fedmd": FedMD,
    "fedntd": FedNTD,
    "fedproto": FedProto,
    "fedprox": FedProx,
    "fedtgp": FedTGP,
    "fml": FML,
    "kdcl": KDCL,
    "ktpfl": KTpFL,
    "local": Local,
    "okddip": OKDDip,
    "one": ONE,
    "one_way": OneWay,
    "pcl": PCL,
    "pooled": Pooled,
    "proxyfl": ProxyFL,
    "rhfl": RHFL,
    "scarlet": SCARLET,
    "selective_fd": SelectiveFD,
}
"""The table of names: what ``strategy.name`` may be, besides the name of somebody's own class."""

__all__ = ["STRATEGIES", "strategy_class"]


def strategy_class(name: object) -> type[Strategy[Any, Any]]:
    """Return the algorithm of a name: a row of the table, or ``package.module:Class``.

    Raises:
        ValueError: one line: an unknown name; or code that may not be loaded, cannot be, or is no
            algorithm with settings of its own.

    Examples:
        >>> from strategies import strategy_class
        >>> strategy_class("dml").__name__
        'DML'
    """
    if isinstance(name, str) and name in STRATEGIES:
        return STRATEGIES[name]
    if not isinstance(name, str) or not own_code.is_own_code(name):
        raise ValueError(
            f"unknown strategy {shown(name)}; known: {', '.join(STRATEGIES)}; or "
            f"{own_code.HOW}{nearest(str(name), STRATEGIES)}"
        )
    found = own_code.load_class(name, Strategy, "strategy.name")  # type: ignore[type-abstract]
    own_code.check_settings(found, StrategySettings, f"strategy.name {name!r}")
    if not (isinstance(found.State, type) and issubclass(found.State, Value)):
        state = getattr(found.State, "__name__", found.State)
        raise ValueError(
            f"strategy.name {name!r}: its State must be a frozen dataclass that is a "
            f"fedkd.exchange.values.Value, got {state}"
        )
    return found
