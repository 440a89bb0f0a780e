"""What an algorithm is written against: strategy, round, server tools, payloads."""

from fedkd.exchange.views import Upload
from strategies.contract.card import Card
from strategies.contract.faults import Fault
from strategies.contract.private_use import PrivateUse
from strategies.contract.round import Call, Federation, Received, Round
from strategies.contract.server import (
    Brought,
    FinishedModel,
    GivenRows,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    Trained,
)
from strategies.contract.strategy import (
    CLIENTS,
    Nothing,
    Step,
    Strategy,
    StrategySettings,
    payloads_of,
    upload_logits,
)

__all__ = [
    "CLIENTS",
    "Brought",
    "Call",
    "Card",
    "Fault",
    "Federation",
    "FinishedModel",
    "GivenRows",
    "Nothing",
    "PrivateUse",
    "Received",
    "Round",
    "ServerModel",
    "ServerModelSettings",
    "ServerTools",
    "Step",
    "Strategy",
    "StrategySettings",
    "Trained",
    "Upload",
    "payloads_of",
    "upload_logits",
]
