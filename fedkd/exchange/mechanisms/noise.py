"""Noise on tables of predictions, class means and prototypes: Gaussian, Laplace."""

from dataclasses import replace
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedkd.bounds import Real
from fedkd.exchange.ledger import Cost
from fedkd.exchange.mechanisms.sensitivity import (
    Norm,
    bounded,
    known,
    on_simplex,
    refuses_kind,
    refuses_table,
    sensitivity,
)
from fedkd.exchange.mechanisms.wanted import WantedNoise, gaussian_noise
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import ClassTable, Predictions, Prototypes
from fedkd.exchange.payloads.predictions import LARGEST_SCORE
from fedkd.exchange.release import Form, Occasion, Where
from fedkd.privacy import COARSE, noise_for_laplace

LARGEST_NOISED = 1e9
"""Released numbers beyond this are refused: no noise that anybody would want makes them."""


class _NoisedTable(WantedNoise):
    """Each row is bounded, noise is added to every number; then it is post-processing.

    At a client ``values + noise * S``; at a server ``mean + noise * S / n`` for the n clients whose
    answers really are in the mean.
    """

    codecs: ClassVar[frozenset[str]] = frozenset({"float32", "float16", "int8"})
    adds_noise: ClassVar[bool] = True
    norm: ClassVar[Norm]

    clip: Real = Field(
        10.0,
        ge=1e-6,
        le=1e6,
        description="largest length of a row of logits or features; soft labels need none",
    )

    def refuses(self, kind: type[Payload], where: Where) -> str | None:
        """Only tables of bounded rows can be protected."""
        return refuses_kind(kind)

    def refuses_asked(self, asked: Asked) -> str | None:
        """Everything in it has to be a bounded number."""
        return refuses_table(asked)

    def bounded(self, payload: Payload) -> Payload:
        """Make each row a distribution, or as short as `clip` says."""
        return bounded(payload, clip=self.clip, norm=self.norm)

    def travelling(self, asked: Asked) -> Asked:
        """Noise leaves neither distributions nor small numbers; all classes have a row."""
        limits = dict(asked.limits)
        limits["values"] = replace(limits["values"], largest=LARGEST_NOISED)
        return replace(asked, limits=limits, about={**asked.about, "released": True})

    def sensitivity(self, occasion: Occasion) -> float:
        """Return how far one client moves what is released, in this rule's norm."""
        return sensitivity(known(occasion), clip=self.clip, norm=self.norm) / occasion.clients

    def release(self, payload: Payload, occasion: Occasion, rng: np.random.Generator) -> Payload:
        """Add noise in proportion to what one client can change."""
        if not isinstance(payload, Predictions | ClassTable | Prototypes):
            raise TypeError(f"{self.kind} protects no {payload.kind}")
        scale = self.multiplier(occasion) * self.sensitivity(occasion)
        values = payload.values + scale * self.draws(rng, payload.values.shape)
        # No number that arrives is ever refused: who is refused must not depend on the draw.
        values = np.clip(values, -LARGEST_NOISED, LARGEST_NOISED)
        return replace(payload, values=values.astype(np.float32))

    def read(self, released: Payload, occasion: Occasion) -> Payload:
        """Return the nearest distributions; logits and features stand as they are."""
        if not isinstance(released, Predictions | ClassTable | Prototypes):
            return released
        if known(occasion).distributions:
            return replace(released, values=on_simplex(released.values))
        if isinstance(released, Prototypes):
            return released
        return replace(released, values=np.clip(released.values, -LARGEST_SCORE, LARGEST_SCORE))

    def tidied(self, made: Payload, form: Form) -> Payload:
        """Read means of all others, which a server makes after the release; others stay."""
        return self.read(made, Occasion(where="server", round=1, form=form))

    def multiplier(self, occasion: Occasion) -> float:
        """Return the noise per unit of sensitivity."""
        raise NotImplementedError

    def draws(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Return noise of one unit."""
        raise NotImplementedError

    def told(self, where: Where) -> str:
        """What is promised to whom."""
        whose = {
            "client": "each client adds noise before anything leaves it, so the guarantee holds "
            "against the server and against everybody else; it does not depend on how many clients "
            "there are",
            "server": "the server is trusted and sees the answers as they are; it adds noise to "
            "their mean, so the guarantee holds against clients and whoever sees what is made of "
            "the mean. Where each client is sent a mean of all others (dml, fd), it holds against "
            "clients, also together, and not against who reads what several of them are sent",
        }
        return f"{self.kind} noise: {whose[where]}"


class GaussianRelease(_NoisedTable):
    """Gaussian noise on soft labels, logits, class means or prototypes.

    Source:
        Dwork et al., 2006, Our Data, Ourselves. https://doi.org/10.1007/11761679_29; noise for a
        wanted epsilon: Balle and Wang, 2018, algorithm 1. https://arxiv.org/abs/1805.06530
    """

    kind: Literal["gaussian"] = "gaussian"
    norm: ClassVar[Norm] = "l2"

    def multiplier(self, occasion: Occasion) -> float:
        """Return the standard deviation over L2 sensitivity."""
        if self.noise is not None:
            return float(self.noise)
        return gaussian_noise(self.epsilon, occasion.delta, occasion.releases)

    def draws(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Return standard normal numbers."""
        return rng.standard_normal(shape)

    def cost(self, occasion: Occasion) -> Cost | None:
        """One Gaussian event, whatever the number of rows: they are in the sensitivity."""
        return Cost("gaussian", {"noise_multiplier": self.multiplier(occasion)})


class LaplaceRelease(_NoisedTable):
    """Laplace noise on soft labels, logits, class means or prototypes; rows are clipped in L1.

    Source:
        Dwork, McSherry, Nissim, Smith, 2006, Calibrating Noise to Sensitivity.
        https://doi.org/10.1007/11681878_14
    """

    kind: Literal["laplace"] = "laplace"
    norm: ClassVar[Norm] = "l1"

    def multiplier(self, occasion: Occasion) -> float:
        """Return the scale over L1 sensitivity."""
        if self.noise is not None:
            return float(self.noise)
        return _laplace_noise(self.epsilon, occasion.delta, occasion.releases)

    def draws(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Return Laplace numbers of scale 1."""
        return rng.laplace(size=shape)

    def cost(self, occasion: Occasion) -> Cost | None:
        """One Laplace event."""
        return Cost("laplace", {"scale": self.multiplier(occasion)})


@lru_cache(maxsize=256)
def _laplace_noise(epsilon: float, delta: float, count: int) -> float:
    return noise_for_laplace(epsilon, delta, count=count, grid=COARSE)
