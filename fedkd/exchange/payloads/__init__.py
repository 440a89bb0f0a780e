"""The kinds of payloads, one a file."""

from fedkd.exchange.payloads.bundle import Bundle
from fedkd.exchange.payloads.class_table import ClassTable
from fedkd.exchange.payloads.encoded import Encoded
from fedkd.exchange.payloads.low_rank import LowRank
from fedkd.exchange.payloads.numbers import Numbers
from fedkd.exchange.payloads.orders import Orders
from fedkd.exchange.payloads.predictions import Predictions
from fedkd.exchange.payloads.prototypes import Prototypes
from fedkd.exchange.payloads.row_features import RowFeatures
from fedkd.exchange.payloads.row_logits import RowLogits
from fedkd.exchange.payloads.weights import Weights

__all__ = [
    "Bundle",
    "ClassTable",
    "Encoded",
    "LowRank",
    "Numbers",
    "Orders",
    "Predictions",
    "Prototypes",
    "RowFeatures",
    "RowLogits",
    "Weights",
]
