"""Federated algorithms, one file each: the server half and the client half side by side."""

from typing import Any

from strategies.base import DistillationStrategy
from strategies.dml import DML
from strategies.fedavg import FedAvg
from strategies.fedmd import FedMD
from strategies.fml import FML
from strategies.local import Local
from strategies.one_way import OneWay
from strategies.pooled import Pooled

STRATEGIES: dict[str, type[DistillationStrategy[Any]]] = {
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
