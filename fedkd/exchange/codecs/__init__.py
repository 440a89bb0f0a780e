"""Codecs: how payloads travel. Pure functions of a payload and of what a codec remembers.

A codec keeps nothing: its memory (what was sent before, what was lost by rounding) is a table of
arrays that it gets and returns, one on either side; `fedkd.exchange.pipeline` keeps both in step.
"""

from typing import Annotated, TypeAlias

from pydantic import PlainValidator, SerializeAsAny

from fedkd.exchange.codecs.base import Codec
from fedkd.exchange.codecs.floats import Float16, Float32
from fedkd.exchange.codecs.int8 import Int8
from fedkd.exchange.codecs.low_rank import LowRankChanges
from fedkd.exchange.codecs.soft_labels import HardLabels, OneBit, SoftLabelBits, SoftLabelDeltas
from fedkd.exchange.codecs.top_k import TopK
from fedkd.exchange.kinds import Kinds

CODECS: Kinds[Codec] = Kinds(
    "codec",
    Codec,
    {
        "float32": Float32,
        "float16": Float16,
        "int8": Int8,
        "top_k": TopK,
        "one_bit": OneBit,
        "hard_label": HardLabels,
        "cfd": SoftLabelBits,
        "cfd_delta": SoftLabelDeltas,
        "low_rank": LowRankChanges,
    },
)
"""Codecs by the name that a settings file uses."""

CodecField: TypeAlias = Annotated[SerializeAsAny[Codec], PlainValidator(CODECS.read)]
"""A codec in settings: its kind, or a table with its kind and settings."""

__all__ = [
    "CODECS",
    "Codec",
    "CodecField",
    "Float16",
    "Float32",
    "HardLabels",
    "Int8",
    "LowRankChanges",
    "OneBit",
    "SoftLabelBits",
    "SoftLabelDeltas",
    "TopK",
]
