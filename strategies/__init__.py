"""Federated algorithms, one file each: the server half and the client half side by side."""

from typing import Any

from strategies.baselines.fedavg import FedAvg
from strategies.baselines.local import Local
from strategies.baselines.pooled import Pooled
from strategies.contract import Strategy
from strategies.mutual.dml import DML
from strategies.public_predictions.fedmd import FedMD
from strategies.server_models.one_way import OneWay
from strategies.two_models.fml import FML

STRATEGIES: dict[str, type[Strategy[Any, Any]]] = {
    "dml": DML,
    "fedavg": FedAvg,
    "fedmd": FedMD,
    "fml": FML,
    "local": Local,
    "one_way": OneWay,
    "pooled": Pooled,
}
"""The table of names: what ``strategy.name`` may be."""

__all__ = ["STRATEGIES"]
