"""Stages of the exchange of one's own: a codec that remembers, and a rule that draws and costs."""

from dataclasses import replace
from typing import ClassVar

import numpy as np

from fedkd.bounds import PositiveWeight
from fedkd.exchange.codecs import Codec
from fedkd.exchange.ledger import Cost
from fedkd.exchange.payload import Asked
from fedkd.exchange.payloads import Encoded
from fedkd.exchange.release import ReleaseRule


class Changes(Codec):
    """Sends of predictions what changed since the last time."""

    remembers: ClassVar[bool] = True

    def asked(self, asked: Asked) -> Asked:
        return Encoded.asked(self.kind, asked, {"values": {"": asked.limits["values"]}})

    def encode(self, payload, memory, rng):
        before = memory.get("values", np.zeros_like(payload.values))
        change = payload.values - before
        return (
            Encoded.of(self.kind, payload, {"values": {"": change}}),
            {"values": before + change},
        )

    def decode(self, encoded, memory):
        values = memory.get("values", np.float32(0)) + encoded.array("values")
        return encoded.payload({"values": values}), {"values": values}


class Noise(ReleaseRule):
    """Mixes soft labels with a few that are drawn."""

    share: PositiveWeight = 0.01

    def cost(self, occasion):
        return Cost("mixture", {"share": self.share, "clients": float(occasion.clients)})

    def release(self, payload, occasion, rng):
        drawn = rng.dirichlet(np.ones(payload.values.shape[1]), len(payload.values))
        mixed = (1 - self.share) * payload.values + self.share * drawn
        return replace(payload, values=mixed.astype(np.float32))
