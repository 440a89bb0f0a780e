"""Adversaries of one's own: one whose lies are no answers, and one that copies."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np

from fedkd.exchange.adversaries import Lying, Seen
from fedkd.exchange.payload import Payload


class Careless(Lying):
    """Knows all answers and sends NaN."""

    together: ClassVar[bool] = True

    def replaces(self, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
        return {
            client: replace(honest, values=np.full_like(honest.values, np.nan))
            for client, honest in seen.own.items()
        }


class Copycat(Lying):
    """Sends what the first honest client has sent."""

    together: ClassVar[bool] = True

    def replaces(self, seen: Seen, rng: np.random.Generator) -> Mapping[int, Payload]:
        return dict.fromkeys(seen.own, seen.others[min(seen.others)])
